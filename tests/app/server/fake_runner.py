"""An engine's thread without an engine: it says a prompt's tokens back, one or several an output."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxpaged.app.server.runner import EngineFailedError
from jaxpaged.engine.request import (
    ContextError,
    EngineRequest,
    EngineStats,
    GroupStats,
    PoolError,
    QueueFullError,
    RequestTimes,
    SampleOutput,
    TokenLogprobs,
)
from jaxpaged.engine.slot_files import SlotTransfer
from jaxpaged.engine.stats import PoolState, SlotState

T = TypeVar("T")


class FakeStream:
    """The outputs of one request, its samples taking turns."""

    def __init__(self, runner: FakeRunner, request: EngineRequest) -> None:
        self.runner, self.request = runner, request
        self.open = set(range(request.n))

    async def __aiter__(self) -> AsyncIterator[SampleOutput]:
        request, runner = self.request, self.runner
        said = list(request.prompt) if runner.says is None else runner.says
        said = [token for token in said if token not in request.stop_ids]
        limit = len(said) + 1 if request.max_new_tokens is None else request.max_new_tokens
        arrived = time.monotonic()
        for i in range(0, limit + runner.burst, runner.burst):
            for index in sorted(self.open):
                await asyncio.sleep(runner.delay)
                if runner.failed:
                    raise EngineFailedError("out of order")
                if i and runner.nan:
                    yield self._output(index, (), "nan", arrived)
                    continue
                if index not in self.open:
                    continue
                if i >= len(said) or limit == 0:
                    yield self._output(index, (), "length" if limit == 0 else "stop", arrived)
                else:
                    tokens = tuple(said[i : min(i + runner.burst, limit)])
                    reason = "length" if i + len(tokens) == limit else None
                    yield self._output(index, tokens, reason, arrived)
        self.runner.streams.pop(request.request_id, None)

    def _output(self, index: int, tokens: tuple[int, ...], reason: Any, arrived: float) -> SampleOutput:
        if reason is not None:
            self.open.discard(index)
        count = self.request.num_logprobs
        logprobs = None
        if count is not None:
            top = tuple((token, -0.5 - token) for token in range(count))
            logprobs = tuple(TokenLogprobs(token, -0.25, top) for token in tokens)
        times = RequestTimes(arrived, arrived + 0.001, arrived + 0.002, time.monotonic())
        cached = min(self.runner.cached, len(self.request.prompt) - 1)
        stop = 0 if reason == "stop" else None
        return SampleOutput(
            self.request.request_id,
            index,
            tokens,
            logprobs,
            reason,
            stop,
            self.request.slot or 0,
            cached,
            False,
            times,
        )

    async def abort(self, index: int | None = None) -> None:
        self.runner.aborted.append((self.request.request_id, index))
        self.open -= {index} if index is not None else self.open
        if not self.open:
            self.runner.streams.pop(self.request.request_id, None)


class FakeEngine:
    """The slots of a fake engine, which are files with a number in them."""

    def save_slot(self, slot: int, path: Path) -> SlotTransfer:
        path.write_text(str(slot))
        return SlotTransfer(7, 70, 0.0)

    def restore_slot(self, slot: int, path: Path) -> SlotTransfer:
        if path.read_text() != "0":
            raise ValueError(f"{path}: a file of another model")
        return SlotTransfer(7, 70, 0.0)

    def erase_slot(self, slot: int) -> int:
        return 7


class FakeRunner:
    """See the module; set its attributes to have it refuse, fail or wait."""

    def __init__(self, n_ctx: int = 512) -> None:
        self.n_ctx, self.max_seqs = n_ctx, 2
        self.draining = self.failed = self.nan = False
        self.full: int | None = None
        self.delay = 0.0
        self.burst = 1
        """Tokens of an output."""
        self.cached = 0
        self.says: list[int] | None = None
        """Tokens of its answers, instead of the prompt's."""
        self.streams: dict[str, FakeStream] = {}
        self.requests: list[EngineRequest] = []
        self.aborted: list[tuple[str, int | None]] = []
        self.busy = False

    @property
    def healthy(self) -> bool:
        return not self.failed

    async def submit(self, request: EngineRequest) -> FakeStream:
        await asyncio.sleep(0)
        if len(request.prompt) >= self.n_ctx:
            raise ContextError(len(request.prompt), self.n_ctx)
        if request.n > 100:
            raise PoolError(request.n, 100)
        if self.full is not None and len(self.streams) >= self.full:
            raise QueueFullError(self.full)
        self.requests.append(request)
        self.streams[request.request_id] = FakeStream(self, request)
        return self.streams[request.request_id]

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.streams),
            waiting=0,
            swapped=0,
            pages_total=4,
            pages_used=1,
            pages_cached=1,
            pages_free=2,
            page_size=32,
            tokens_live=16,
            waste=0.5,
            bytes_per_page=64,
            groups=(GroupStats(2, None, 4, 1, 1, 2, 64),),
            steps=3,
            prompt_tokens=30,
            generated_tokens=9,
            prefix_queries=30,
            prefix_hits=15,
            preemptions=1,
            swaps=0,
            evictions=0,
            shifts=0,
            nan_samples=0,
            compiled=5,
            compiled_late=0,
        )

    def pool_state(self) -> PoolState:
        sequence = {"slot": 0, "request_id": "1", "tokens": 16, "state": "decode"}
        return PoolState(4, 32, np.array([1, 3, 0, 0], np.uint8), np.array([0, -1, -1, -1]), [sequence])

    def slot_states(self) -> list[SlotState]:
        request = EngineRequest("1", (1, 2, 3), max_new_tokens=8)
        slots = [SlotState(0, "1", True, 3, 3, 2, self.n_ctx, request)]
        return [*slots, SlotState(1, None, self.busy, 0, 0, 0, self.n_ctx, None)]

    async def call(self, function: Callable[[Any], T]) -> T:
        await asyncio.sleep(0)
        return function(FakeEngine())

    def hidden_states(self, tokens: Sequence[int]) -> np.ndarray:
        """Five numbers that depend on each token."""
        return np.sin(np.outer(np.asarray(tokens) + 1.0, np.arange(1, 6))).astype(np.float32)

    async def embed(self, tokens: Sequence[int]) -> np.ndarray:
        await asyncio.sleep(0)
        return self.hidden_states(tokens)

    async def close(self) -> None:
        pass
