"""Memory: how much the device has left for a pool of pages, and what is given back."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import jax

_CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that the default device could still give; of a CPU what the system, or a container, has left."""
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return min(_host_memory())


def _host_memory() -> Iterator[int]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield total
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        yield int(available.split()[1]) * 1024
    with suppress(OSError, ValueError):  # a container's limit; "max" is none
        limit = int((_CGROUP / "memory.max").read_text())
        yield limit - int((_CGROUP / "memory.current").read_text())


def trim_memory() -> None:
    """Hands memory that was freed back to the system, where the C library (glibc) keeps it otherwise.

    Compiling and loading programs allocates hundreds of megabytes for a moment, which stay with the process.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
