"""Settings made before JAX starts: threads, logging, the compilation cache."""

from __future__ import annotations

import os
import warnings

from jaxpaged.app.errors import InputError, say
from jaxpaged.compilation.cache_folder import cache_folder, private_folder


def prepare(threads: int | None = None) -> None:
    """Sets up the process; call it before anything imports jax.

    Args:
      threads: CPU threads that XLA may use, None for all.

    Raises:
      InputError: JAXPAGED_ATTENTION names no implementation.
    """
    # For programs from its cache, XLA logs as an error that other CPU instructions were preferred when they were
    # compiled. Real errors reach Python as exceptions.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if threads is not None:
        os.environ["PJRT_NPROC"] = str(threads)
    _use_compilation_cache()
    from jaxpaged.attention import candidates

    try:
        candidates("cpu")
    except ValueError as error:  # JAXPAGED_ATTENTION names none
        raise InputError(str(error)) from None


def _use_compilation_cache() -> None:
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    from jaxpaged.compilation import executable_cache

    try:
        folder = private_folder(cache_folder() / "xla")
        executable_cache.set_directory(cache_folder() / "programs")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        say(f"warning: no compilation cache, every start compiles: {where}{error.strerror or error}")
        warnings.filterwarnings("ignore", "no kernel cache", RuntimeWarning)  # the same reason
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Small models are made of many small programs; JAX's own thresholds would keep none of them.
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
