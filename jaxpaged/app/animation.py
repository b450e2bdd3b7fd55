"""``--page-map``: the pool while a run goes on, as a picture of its fullest moment or a page to step through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxpaged.app.errors import InputError
from jaxpaged.app.options import GenerateOptions
from jaxpaged.pictures.animation import draw_page_map_animation
from jaxpaged.pictures.page_map import PageMap, draw_page_map

_MOST_FRAMES = 400


class PageMapRecorder:
    """The states of a pool that were looked at; of a long run, fewer and fewer of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.every = 1
        """Decode steps between two looks."""
        self._frames: list[tuple[str, PageMap]] = []
        self._passed = 0

    @classmethod
    def open(cls, options: GenerateOptions) -> PageMapRecorder | None:
        """The film that the options ask for.

        Raises:
          InputError: there is no pool to film, or no folder to write to.
        """
        if options.page_map is None:
            return None
        if not options.paged:
            raise InputError("--page-map shows a pool of pages, and --no-kv-cache-paged asks for none")
        if not options.page_map.parent.is_dir():
            raise InputError(f"--page-map {options.page_map}: there is no folder {options.page_map.parent}")
        return cls(options.page_map)

    def add(self, label: str, cache: Any, steps: int | None = None) -> None:
        """Looks at the pool, if ``steps`` and those before it make up ``every``, or are None."""
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
