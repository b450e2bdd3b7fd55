"""Settings of all tests: cheap compilation, shared caches, and budgets of time and memory. Needs hypothesis alone."""

import ctypes
import gc
import os
import resource
import shutil
import sys
from collections.abc import Generator, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import settings

MAX_TEST_SECONDS = 30
"""Processor time of a test without the mark ``slow``, its subprocesses included. 10 s is meant; other work on the same
cores may double it, and the first test that calls a numba kernel compiles it."""
CLEAR_PROGRAMS_AT = 1 << 30
"""Bytes of a worker. A program takes some MB, and of the 65,530 memory mappings of a process about 1,000."""
MAX_CACHE_BYTES = 2 << 30

# A machine that other work keeps busy makes any deadline a coin toss; CI draws the same examples every time.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# All that follows is set before jax is imported. The tests compile far more than they compute: without optimization,
# and without MLIR where XLA still has the other emitters. XLA_FLAGS= compiles as users do.
CHEAP_COMPILATION = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"
)
if version("jaxlib").startswith("0.10."):
    CHEAP_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", CHEAP_COMPILATION)

# Workers, stages and the processes that tests start share what they compile.
CACHE = Path(__file__).parents[1] / ".pytest_cache" / "compiled"
os.environ.setdefault("JAXPAGED_CACHE", str(CACHE))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# XLA's threads, as many as cores if it is left out. Pallas' GPU interpreter waits on one of them, and on one more for
# each warpgroup that waits at a barrier: with two threads the second warpgroup is never run.
os.environ.setdefault("NPROC", str(max(4, os.cpu_count() or 1)))

gc.set_threshold(50_000, 20, 50)  # traces make many objects, and no garbage to speak of

_peaks: dict[str, float] = {}
_clear_at = CLEAR_PROGRAMS_AT


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return
    if sum(path.stat().st_size for path in CACHE.rglob("*") if path.is_file()) > MAX_CACHE_BYTES:
        shutil.rmtree(CACHE)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    begun = sum(os.times()[:4])
    yield
    spent = sum(os.times()[:4]) - begun  # unlike seconds of a clock, nearly the same on a busy machine
    if spent > MAX_TEST_SECONDS and item.get_closest_marker("slow") is None:
        pytest.fail(
            f"{spent:.1f} s of processor time, more than {MAX_TEST_SECONDS}: make it cheaper, or mark it slow",
            pytrace=False,
        )


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """Drops compiled programs when the process has grown too large; they are read from disk when needed again."""
    yield
    global _clear_at
    if "jax" in sys.modules and _resident_bytes() > _clear_at:
        sys.modules["jax"].clear_caches()
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # glibc keeps what is freed, and the process looks as large as before
        _clear_at = max(CLEAR_PROGRAMS_AT, _resident_bytes() + CLEAR_PROGRAMS_AT // 3)


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0  # not Linux, which alone limits mappings


def pytest_sessionfinish(session: pytest.Session) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peak"] = peak
    else:
        _peaks["main"] = peak


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    _peaks[node.gateway.id] = getattr(node, "workeroutput", {}).get("peak", float("nan"))


def pytest_terminal_summary(terminalreporter) -> None:
    peaks = ", ".join(f"{name} {peak:.1f} GB" for name, peak in sorted(_peaks.items()))
    terminalreporter.write_line(f"peak memory: {peaks}; processor time {sum(os.times()[:4]):.0f} s")
