"""Settings of all tests; needs hypothesis alone."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# A machine that other work keeps busy makes any deadline a coin toss; CI draws the same examples every time.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# The tests compile far more than they compute. Set before jax is imported; XLA_FLAGS= runs them as users compile.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

# XLA's threads, as many as cores if it is left out. Pallas' GPU interpreter waits on one of them, and on one more for
# each warpgroup that waits at a barrier: with two threads the second warpgroup is never run.
os.environ.setdefault("NPROC", str(max(4, os.cpu_count() or 1)))


@pytest.fixture(autouse=True)
def room_for_programs() -> Iterator[None]:
    """Forgets compiled programs before there are too many.

    Each takes a thousand memory mappings or so, Linux allows a process 65,530, and XLA crashes on the next one.
    """
    yield
    try:
        with open("/proc/self/maps", "rb") as maps:
            count = sum(1 for _ in maps)
    except OSError:
        return  # not Linux, no such limit
    if count > 20_000:
        import jax

        jax.clear_caches()
