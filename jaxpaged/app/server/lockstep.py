"""LockstepEngine: one engine in several processes, each of which decides alike.

Process 0 serves HTTP. Before each step it tells the others what came in since the last one, and all of them step; since
nothing in an engine depends on time (``EngineConfig.lockstep``), all plan the same and run the same programs. While
nobody asks for anything, a word every few seconds tells the others that it lives.
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
"""Between two words while nothing is to do."""
_Call = tuple[str, tuple[Any, ...]]


class LockstepEngine:
    """See the module; its methods are ``Engine``'s, for process 0, and ``follow`` is for the others."""

    def __init__(self, engine: MeshEngine) -> None:
        self._engine = engine
        self._calls: list[_Call] = []

    def follow(self) -> None:
        """Does what process 0 does until that ends."""
        while True:
            calls: list[_Call] = broadcast_object([])
            for name, arguments in calls:
                if name == "close":
                    return
                with contextlib.suppress(RefusedError):  # process 0 was refused, too
                    getattr(self._engine, name)(*arguments)

    def _tell(self, *calls: _Call) -> None:
        told, self._calls = [*self._calls, *calls], []
        broadcast_object(told)

    def idle(self) -> None:
        """Nothing to do for a while."""
        self._tell()

    def close(self) -> None:
        """Lets the others end."""
        self._tell(("close", ()))

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
        self._engine.add_request(request)  # which touches no device; one that is refused is not told
        self._calls.append(("add_request", (request,)))

    def abort(self, request_id: str, index: int | None = None) -> None:
        """See ``Engine.abort``."""
        self._engine.abort(request_id, index)
        self._calls.append(("abort", (request_id, index)))

    def step(self) -> list[SampleOutput]:
        """See ``Engine.step``."""
        self._tell(("step", ()))
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
        self._tell(("check_state", ()))
        self._engine.check_state()

    def drop_prefix_cache(self) -> int:
        """See ``Engine.drop_prefix_cache``."""
        self._tell(("drop_prefix_cache", ()))
        return self._engine.drop_prefix_cache()

    def save_slot(self, slot: int, path: str | os.PathLike[str]) -> SlotTransfer:
        """There are no files of slots in a run of several processes."""
        raise RefusedError("slots are saved and restored where one process serves")

    def restore_slot(self, slot: int, path: str | os.PathLike[str]) -> SlotTransfer:
        """See ``save_slot``."""
        raise RefusedError("slots are saved and restored where one process serves")

    def erase_slot(self, slot: int) -> int:
        """See ``Engine.erase_slot``."""
        self._tell(("erase_slot", (slot,)))
        return self._engine.erase_slot(slot)


AnyEngine = Engine | MeshEngine | LockstepEngine
