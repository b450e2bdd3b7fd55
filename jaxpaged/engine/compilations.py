"""How many programs XLA has compiled in this process: what proves that none is compiled behind the start."""

from __future__ import annotations

import threading

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


class _Counter:
    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, _seconds: float, **_: object) -> None:
        if event == _EVENT:
            with self._lock:
                self.count += 1


_counter: _Counter | None = None


def num_compilations() -> int:
    """Programs compiled, or read from the compilation cache, since the first call."""
    global _counter
    if _counter is None:
        _counter = _Counter()
    return _counter.count
