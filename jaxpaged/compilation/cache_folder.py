"""Where the project keeps files of its own on a user's machine."""

from __future__ import annotations

import os
from pathlib import Path


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
