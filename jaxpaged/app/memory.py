"""Free memory of the device, and freed memory of the process."""

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
    """Free bytes of the default device; of a CPU, those of the system or the container."""
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
    """Returns freed memory to the system, which glibc otherwise keeps.

    Compiling and loading programs temporarily allocates hundreds of megabytes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
