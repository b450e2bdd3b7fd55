"""Where the project keeps files of its own on a user's machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where compiled programs are kept: JAXPAGED_CACHE, or the user's cache folder."""
    if chosen := os.environ.get("JAXPAGED_CACHE"):
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_cache_dir("jaxpaged", appauthor=False))
