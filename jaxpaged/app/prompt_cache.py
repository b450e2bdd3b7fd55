"""``--prompt-cache``: keys and values of a prompt in a file, for later runs with the same prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpaged.app.errors import InputError
from jaxpaged.app.session import Session
from jaxpaged.cache.interface import seq_position_max
from jaxpaged.storage.snapshot_file import Snapshot, SnapshotError, read_snapshot
from jaxpaged.storage.snapshots import restore, snapshot


@dataclass
class PromptCache:
    """The prompt cache of one run; it holds sequence 0 of the cache."""

    session: Session
    path: Path
    saved: Snapshot | None
    """Content of the file; None if it was missing or empty."""

    @classmethod
    def open(cls, session: Session) -> PromptCache | None:
        """Reads and verifies the file; None without ``--prompt-cache``.

        Raises:
          InputError: it is damaged, no snapshot, or another model's; or its folder does not exist.
        """
        path = session.options.prompt_cache
        if path is None:
            return None
        if not path.parent.is_dir():
            raise InputError(f"--prompt-cache {path}: there is no folder {path.parent}")
        if not path.exists() or (path.is_file() and path.stat().st_size == 0):  # as `mktemp` makes one
            return cls(session, path, None)
        try:
            saved = read_snapshot(path, fingerprint=session.ready.loaded.fingerprint)
            saved.common_prefix([])
        except OSError as error:
            raise InputError(f"--prompt-cache {path}: {error.strerror or error}") from error
        except SnapshotError as error:
            raise InputError(f"--prompt-cache {error}") from error
        except ValueError as error:
            raise InputError(f"--prompt-cache {path}: not of a single sequence") from error
        return cls(session, path, saved)

    def reuse(self, cache: Any, ids: Sequence[int]) -> tuple[Any, int]:
        """Restores the longest prefix of a prompt that the file has into sequence 0, which is empty.

        Returns:
          ``(cache, tokens)``; at least one token of the prompt is left to compute, for its logits.

        Raises:
          InputError: the file's pages have other formats.
        """
        if self.saved is None:
            made = "" if self.session.options.prompt_cache_ro else "; it will be made"
            self.session.note(f"prompt cache: {self.path} does not exist yet{made}")
            return cache, 0
        shared = min(self.saved.common_prefix(ids), len(ids) - 1)
        size = self.saved.page_size
        if self.saved.has_residual and -(-shared // size) * size <= self.saved.lengths[0]:
            shared -= shared % size  # a finalized page is not written again
        try:
            cache = restore(cache, self.saved, seq=0, p1=shared)
        except SnapshotError as error:
            raise InputError(f"--prompt-cache {self.path}: {error}") from error
        self.session.note(f"prompt cache: {shared} of {len(ids)} prompt tokens reused from {self.path}")
        return cache, shared

    def save_prompt(self, cache: Any, ids: Sequence[int]) -> None:
        """Saves a prompt after its prefill, unless the file has it or more is saved at the end."""
        known = self.saved is not None and self.saved.common_prefix(ids) == len(ids)
        if not known and not self.session.options.prompt_cache_all:
            self._save(cache, ids)

    def save_all(self, cache: Any, ids: Sequence[int]) -> None:
        """Saves the prompt and the generated tokens ``ids`` at the end of a run, with --prompt-cache-all."""
        if self.session.options.prompt_cache_all:
            # The newest token is not in the cache, unless a stop token followed it.
            newest = len(ids) - int(cache.lengths[0])
            self._save(cache, ids[:-1] if newest == 1 else ids)

    def _save(self, cache: Any, ids: Sequence[int]) -> None:
        if self.session.options.prompt_cache_ro:
            return
        if not ids or {int(cache.lengths[0]), int(seq_position_max(cache)[0]) + 1} != {len(ids)}:
            self.session.note(
                "prompt cache: not saved, the sequence has lost tokens (out of pages, or shifted)"
            )
            return
        try:
            snapshot(
                cache, self.path, seq=0, token_ids=ids, fingerprint=self.session.ready.loaded.fingerprint
            )
        except OSError as error:
            raise InputError(f"--prompt-cache {self.path}: {error.strerror or error}") from error
