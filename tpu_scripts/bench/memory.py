"""Memory of the device: how much is free, and how fast it is."""

from __future__ import annotations

import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tpu_scripts.common import mebibytes, on_cpu


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int:
    """Bytes that can be allocated on the device; on CPUs half of what the system has available."""
    if not on_cpu():
        stats = jax.devices()[0].memory_stats() or {}
        if "bytes_limit" in stats:
            return int(0.95 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
    return _system_memory() // 2


def _system_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = Path("/sys/fs/cgroup")  # a container's own limit
    try:
        most, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if most == "max" else min(free, int(most) - int(used))


def last_level_cache() -> int:
    """Bytes of the last-level cache, which may serve repeated reads; a guess of 128 MiB on other devices."""
    if on_cpu():
        sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        return max((_kibibytes(path.read_text()) for path in sizes), default=32 << 20)
    return 128 << 20


def _kibibytes(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20}
    return int(text.strip()[:-1]) * units[text.strip()[-1]]


class Bandwidth:
    """Memory bandwidth of the device in bytes per second, measured at each call.

    ``copy`` is a jitted ``x + 1`` in place: every byte is read once and written once, and both count. ``read`` is for
    CPUs: every core sums its part of an array. Attention writes next to nothing, so on CPUs ``read`` is the limit it
    is compared with; elsewhere it is ``copy``, as no program is known to read faster than the best copy.
    """

    def __init__(self, most: int) -> None:
        """Allocates arrays of ``most`` bytes at most."""
        self.cpu = on_cpu()
        wanted = max(256 << 20, 8 * last_level_cache()) if self.cpu else 2 << 30
        count = min(wanted, most // (2 if self.cpu else 1)) // 4
        self.bytes = 4 * count
        self._copied = jnp.ones(count, jnp.float32)
        self._add = jax.jit(
            lambda x, times: jax.lax.fori_loop(0, times, lambda _, x: x + 1, x), donate_argnums=0
        )
        if self.cpu:
            self._pool = ThreadPoolExecutor(num_cores())
            self._parts = np.array_split(np.ones(count // 2, np.uint64), num_cores())
        self._times = 1
        self.copy()  # compiles
        # Launching and waiting cost some 100 us a call; the copies of one call have to take far longer.
        self._times = max(1, int(0.02 * self.copy() / (2 * self.bytes)))

    @property
    def kind(self) -> str:
        """Name of the measurement that is the limit."""
        return "read" if self.cpu else "copy"

    def limit(self) -> float:
        """Measures the limit."""
        return self.read() if self.cpu else self.copy()

    def copy(self) -> float:
        start = time.perf_counter()
        self._copied = jax.block_until_ready(self._add(self._copied, self._times))
        return 2 * self.bytes * self._times / (time.perf_counter() - start)

    def read(self) -> float:
        start = time.perf_counter()
        list(self._pool.map(np.add.reduce, self._parts))
        return self.bytes / (time.perf_counter() - start)

    def describe(self, repeat: int = 7) -> tuple[str, dict[str, float]]:
        """Returns a line of text and the medians of ``repeat`` measurements."""
        kinds = ("copy", "read") if self.cpu else ("copy",)
        rates = {kind: statistics.median(getattr(self, kind)() for _ in range(repeat)) for kind in kinds}
        shown = ", ".join(f"{kind} {rate / 1e9:,.1f} GB/s" for kind, rate in rates.items())
        return f"memory, arrays of {mebibytes(self.bytes)} MiB: {shown}; the limit is {self.kind}", rates
