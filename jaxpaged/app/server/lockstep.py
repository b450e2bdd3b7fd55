"""LockstepEngine: one engine in several processes, which all make the same decisions.

Process 0 serves HTTP. Before each step it broadcasts the calls since the last one, and all
processes step; because no decision of an engine depends on time (``EngineConfig.lockstep``), all
plan the same step and run the same programs. While idle, process 0 sends a heartbeat every few
seconds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

from jaxpaged.engine import (
    Engine,
    EngineRequest,
    EngineStats,
    MeshEngine,
    PoolState,
    RefusedError,
    SampleOutput,
    SlotState,
    SlotTransfer,
)
from jaxpaged.sharding.multihost import broadcast_object

IDLE_SECONDS = 2.0
"""Interval of heartbeats while idle."""
_Call = tuple[str, tuple[Any, ...]]


class LockstepEngine:
    """See the module. Process 0 calls the methods of ``Engine``, the others ``follow``."""

    def __init__(self, engine: MeshEngine) -> None:
        self._engine = engine
        self._calls: list[_Call] = []

    def follow(self) -> None:
        """Repeats the calls of process 0 until it closes."""
        while True:
            calls: list[_Call] = broadcast_object([])
            for name, arguments in calls:
                if name == "close":
                    return
                with contextlib.suppress(RefusedError):  # process 0 raised it too
                    getattr(self._engine, name)(*arguments)

    def _broadcast(self, *calls: _Call) -> None:
        pending, self._calls = [*self._calls, *calls], []
        broadcast_object(pending)

    def idle(self) -> None:
        """Sends a heartbeat."""
        self._broadcast()

    def close(self) -> None:
        """Ends ``follow`` in the other processes."""
        self._broadcast(("close", ()))

    @property
    def n_ctx(self) -> int:
        return self._engine.n_ctx

    @property
    def max_seqs(self) -> int:
        return self._engine.max_seqs

    @property
    def page_size(self) -> int:
        return self._engine.page_size

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def compile(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        """See ``Engine.compile``; every process calls it."""
        self._engine.compile(progress)

    def check(self, request: EngineRequest) -> None:
        """See ``Engine.check``."""
        self._engine.check(request)

    def add_request(self, request: EngineRequest) -> None:
        """See ``Engine.add_request``."""
        self._engine.add_request(request)  # uses no device; a refused request is not broadcast
        self._calls.append(("add_request", (request,)))

    def abort(self, request_id: str, index: int | None = None) -> None:
        """See ``Engine.abort``."""
        self._engine.abort(request_id, index)
        self._calls.append(("abort", (request_id, index)))

    def step(self) -> list[SampleOutput]:
        """See ``Engine.step``."""
        self._broadcast(("step", ()))
        return self._engine.step()

    def stats(self) -> EngineStats:
        """See ``Engine.stats``."""
        return self._engine.stats()

    def pool_state(self) -> PoolState:
        """See ``Engine.pool_state``."""
        return self._engine.pool_state()

    def slot_states(self) -> list[SlotState]:
        """See ``Engine.slot_states``."""
        return self._engine.slot_states()

    def check_state(self) -> None:
        """See ``Engine.check_state``."""
        self._broadcast(("check_state", ()))
        self._engine.check_state()

    def drop_prefix_cache(self) -> int:
        """See ``Engine.drop_prefix_cache``."""
        self._broadcast(("drop_prefix_cache", ()))
        return self._engine.drop_prefix_cache()

    def save_slot(self, slot: int, path: str | os.PathLike[str]) -> SlotTransfer:
        """Refused: slot files need a single process."""
        raise RefusedError("slots cannot be saved or restored by a server of several processes")

    def restore_slot(self, slot: int, path: str | os.PathLike[str]) -> SlotTransfer:
        """See ``save_slot``."""
        raise RefusedError("slots cannot be saved or restored by a server of several processes")

    def erase_slot(self, slot: int) -> int:
        """See ``Engine.erase_slot``."""
        self._broadcast(("erase_slot", (slot,)))
        return self._engine.erase_slot(slot)


AnyEngine = Engine | MeshEngine | LockstepEngine
