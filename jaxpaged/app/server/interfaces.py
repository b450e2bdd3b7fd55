"""Protocols of the engine's thread, so that routes can be tested without a model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from jaxpaged.engine.request import EngineRequest, EngineStats, SampleOutput
from jaxpaged.engine.stats import PoolState, SlotState

T = TypeVar("T")


class Stream(Protocol):
    """Outputs of one request, until all its samples are finished or aborted."""

    def __aiter__(self) -> AsyncIterator[SampleOutput]: ...
    async def abort(self, index: int | None = None) -> None: ...


class Runner(Protocol):
    """An engine on its own thread."""

    n_ctx: int
    max_seqs: int

    @property
    def healthy(self) -> bool: ...
    async def submit(self, request: EngineRequest) -> Stream: ...
    def stats(self) -> EngineStats: ...
    def pool_state(self) -> PoolState: ...
    def slot_states(self) -> list[SlotState]: ...
    async def call(self, function: Callable[[Any], T]) -> T: ...
    async def embed(self, tokens: Sequence[int]) -> np.ndarray: ...
    async def close(self) -> None: ...
