"""Count of XLA compilations, to prove that nothing is compiled after start-up."""

from __future__ import annotations

import functools
import threading

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


_counts = threading.local()


def _count(event: str, duration_secs: float, **_: str | int) -> None:
    if event == _EVENT:  # called on the thread that waits for the program
        _counts.value = getattr(_counts, "value", 0) + 1


@functools.cache
def _listen() -> None:
    jax.monitoring.register_event_duration_secs_listener(_count)


def num_compilations() -> int:
    """Programs that this thread compiled, or read from a cache, since its first call."""
    _listen()
    return getattr(_counts, "value", 0)
