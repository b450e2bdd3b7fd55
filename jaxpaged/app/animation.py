"""``--page-map``: the pool during a run, as a picture of its fullest moment or an animation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxpaged.app.errors import InputError
from jaxpaged.app.options import GenerateOptions
from jaxpaged.pictures.animation import draw_page_map_animation
from jaxpaged.pictures.page_map import PageMap, draw_page_map

_MOST_FRAMES = 400


class PageMapRecorder:
    """Snapshots of a pool during a run; the longer it gets, the fewer of them are kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.every = 1
        """Decode steps between two snapshots."""
        self._frames: list[tuple[str, PageMap]] = []
        self._passed = 0

    @classmethod
    def open(cls, options: GenerateOptions) -> PageMapRecorder | None:
        """The recorder that the options ask for, if any.

        Raises:
          InputError: the cache is not paged, or the folder does not exist.
        """
        if options.page_map is None:
            return None
        if not options.paged:
            raise InputError("--page-map shows a pool of pages, and --no-kv-cache-paged asks for none")
        if not options.page_map.parent.is_dir():
            raise InputError(f"--page-map {options.page_map}: there is no folder {options.page_map.parent}")
        return cls(options.page_map)

    def add(self, label: str, cache: Any, steps: int | None = None) -> None:
        """Records the pool, unless fewer than ``every`` steps have passed; ``steps`` None always does."""
        self._passed += self.every if steps is None else steps
        if self._passed < self.every:
            return
        self._passed = 0
        self._frames.append((label, PageMap.of(cache)))
        if len(self._frames) > 2 * _MOST_FRAMES:
            self._frames = self._frames[::2]
            self.every *= 2

    def write(self) -> None:
        """Writes the file.

        Raises:
          InputError: it cannot be written.
        """
        if not self._frames:
            return
        if self.path.suffix.lower() == ".svg":
            fullest = max((state for _, state in self._frames), key=lambda s: (s.pages_used, s.num_tokens))
            text = draw_page_map(fullest)
        else:
            text = draw_page_map_animation(self._frames)
        try:
            self.path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"--page-map {self.path}: {error.strerror or error}") from error
