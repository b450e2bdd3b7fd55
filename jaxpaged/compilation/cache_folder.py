"""Compiled code in the user's cache folder.

Files there are unpickled and run, so a file that another user could have written, or that is
damaged, is never read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

MAX_ENTRIES = 256
"""Files of a kind in a folder; the least recently used ones beyond it are deleted."""


def cache_folder() -> Path:
    """Folder of compiled programs: JAXPAGED_CACHE, or the user's cache folder.

    Raises:
      FileNotFoundError: the user has no home folder.
    """
    if chosen := os.environ.get("JAXPAGED_CACHE"):
        return Path(chosen)
    import platformdirs

    try:
        return Path(platformdirs.user_cache_dir("jaxpaged", appauthor=False))
    except RuntimeError as error:
        raise FileNotFoundError(2, "no home folder; JAXPAGED_CACHE names a cache folder") from error


def private_folder(path: Path) -> Path:
    """Creates a folder that only its user can write to, or checks that it is one.

    Raises:
      OSError: it cannot be created or written to, or other users own it or may write to it.
    """
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not os.access(path, os.W_OK):
        raise PermissionError(13, "not writable", str(path))
    if not _is_private(path.stat()):
        raise PermissionError(13, "another user owns it or may write to it", str(path))
    return path


def read_entry(path: Path) -> bytes | None:
    """Content that ``write_entry`` wrote; None if the file is missing, damaged, or writable by
    other users."""
    try:
        with path.open("rb") as file:
            content = file.read() if _is_private(os.fstat(file.fileno())) else b""
        os.utime(path)
    except OSError:
        return None
    return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else None


def write_entry(path: Path, content: bytes) -> None:
    """Replaces a file as a whole, or not at all: a full disk is no error."""
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / path.name
        file.touch(mode=0o600)
        file.write_bytes(hashlib.sha256(content).digest() + content)
        os.replace(file, path)
        entries = sorted(path.parent.glob(f"*{path.suffix}"), key=lambda entry: entry.stat().st_mtime)
        for entry in entries[:-MAX_ENTRIES]:
            entry.unlink(missing_ok=True)


def _is_private(status: os.stat_result) -> bool:
    return not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)
