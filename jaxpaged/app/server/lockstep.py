"""LockstepEngine: one engine in several processes, which all make the same decisions.

Process 0 serves HTTP. Before each step it broadcasts the calls since the last one, and all
processes step; because no decision of an engine depends on time (``EngineConfig.lockstep``), all
plan the same step and run the same programs. While idle, process 0 sends a heartbeat every few
seconds.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from jaxpaged.engine import Engine, EngineConfig, EngineRequest, RefusedError, SampleOutput, SlotTransfer
from jaxpaged.generation.loop import Model
from jaxpaged.sharding.multihost import broadcast_object
from jaxpaged.sharding.specs import ShardedCache

IDLE_SECONDS = 2.0
"""Interval of heartbeats while idle."""
_Call = tuple[str, tuple[Any, ...]]


class LockstepEngine(Engine):
    """See the module. Process 0 calls the methods of an engine, the others ``follow``."""

    def __init__(self, model: Model, params: Any, cache: ShardedCache, config: EngineConfig) -> None:
        super().__init__(model, params, cache, config)
        self._calls: list[_Call] = []

    def follow(self) -> None:
        """Repeats the calls of process 0 until it closes."""
        while True:
            calls: list[_Call] = broadcast_object([])
            for name, arguments in calls:
                if name == "close":
                    return
                with contextlib.suppress(RefusedError):  # process 0 raised it too
                    getattr(Engine, name)(self, *arguments)

    def _broadcast(self, *calls: _Call) -> None:
        pending, self._calls = [*self._calls, *calls], []
        broadcast_object(pending)

    def idle(self) -> None:
        """Sends a heartbeat."""
        self._broadcast()

    def close(self) -> None:
        """Ends ``follow`` in the other processes."""
        self._broadcast(("close", ()))

    def add_request(self, request: EngineRequest) -> None:
        if request.constraint is not None:  # its state is that of one process
            raise RefusedError(
                "schemas, grammars and required tools are not for a server of several processes"
            )
        super().add_request(request)  # uses no device; a refused request is not broadcast
        self._calls.append(("add_request", (request,)))

    def abort(self, request_id: str, index: int | None = None) -> None:
        super().abort(request_id, index)
        self._calls.append(("abort", (request_id, index)))

    def step(self) -> list[SampleOutput]:
        self._broadcast(("step", ()))
        return super().step()

    def check_state(self) -> None:
        self._broadcast(("check_state", ()))
        super().check_state()

    def drop_prefix_cache(self) -> int:
        self._broadcast(("drop_prefix_cache", ()))
        return super().drop_prefix_cache()

    def save_slot(self, slot: int, path: str | os.PathLike[str]) -> SlotTransfer:
        raise RefusedError("slots cannot be saved or restored by a server of several processes")

    restore_slot = save_slot

    def erase_slot(self, slot: int) -> int:
        self._broadcast(("erase_slot", (slot,)))
        return super().erase_slot(slot)
