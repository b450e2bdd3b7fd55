"""EngineRunner: an engine on a thread of its own, behind coroutines.

The thread alone touches the engine. What handlers ask for goes through a queue that is emptied between two steps, and
what a step puts out is handed to the event loop in one go.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from jaxpaged.app import processes
from jaxpaged.app.server.lockstep import IDLE_SECONDS, AnyEngine, LockstepEngine
from jaxpaged.engine import EngineRequest, EngineStats, PoolState, SampleOutput, SlotState

T = TypeVar("T")
_VIEW_SECONDS = 0.2
"""How old a picture of the pool may be, and numbers a quarter of that, while steps follow each other: counting the
tokens of all pages takes a fraction of a millisecond, and some steps take little more."""


class EngineFailedError(RuntimeError):
    """The engine's thread came upon an error that it cannot go on from."""


class RequestStream:
    """What becomes of one request: an asynchronous iterator of ``SampleOutput``, until all its samples are done."""

    def __init__(self, runner: EngineRunner, request: EngineRequest) -> None:
        self.request = request
        self._runner = runner
        self._outputs: asyncio.Queue[SampleOutput | EngineFailedError] = asyncio.Queue()
        self._open = set(range(request.n))
        self._coming = set(range(request.n))

    @property
    def delivered(self) -> bool:
        """Whether the last output of every sample is here, taken or not."""
        return not self._coming

    def __aiter__(self) -> AsyncIterator[SampleOutput]:
        return self

    async def __anext__(self) -> SampleOutput:
        while self._open:
            output = await self._outputs.get()
            if isinstance(output, EngineFailedError):
                self._open.clear()
                raise output
            if output.index not in self._open:
                continue  # it was aborted while this was on its way
            if output.finish_reason is not None:
                self._open.discard(output.index)
            return output
        raise StopAsyncIteration

    async def abort(self, index: int | None = None) -> None:
        """Ends the request, or one of its samples, in the engine; again is no error. Nothing of it comes any more."""
        ended = self._open & ({index} if index is not None else self._open)
        self._open -= ended
        if ended:
            self._coming -= ended
            self._runner.post(lambda engine: engine.abort(self.request.request_id, index))
            if self.delivered:
                self._runner.forget(self)

    def put(self, output: SampleOutput | EngineFailedError) -> None:
        """From the event loop."""
        if isinstance(output, SampleOutput) and output.finish_reason is not None:
            self._coming.discard(output.index)
        self._outputs.put_nowait(output)


class EngineRunner:
    """See the module.

    Args:
      engine: compiled; nobody else may call it while the thread runs.
    """

    def __init__(self, engine: AnyEngine) -> None:
        self._engine = engine
        self.n_ctx, self.max_seqs, self.page_size = engine.n_ctx, engine.max_seqs, engine.page_size
        self._asked: queue.SimpleQueue[Callable[[AnyEngine], None]] = queue.SimpleQueue()
        self._streams: dict[str, RequestStream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._closing = False
        self._failure: EngineFailedError | None = None
        self._stats = engine.stats()
        self._pool_state = engine.pool_state()
        self._slot_states = engine.slot_states()
        self._viewed = self._counted = 0.0
        self.draining = False
        """New requests are turned away; those that run come to their end."""

    # From the event loop

    def start(self) -> None:
        """Begins; from inside the event loop that will be told of outputs."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """Ends the thread, whatever still runs."""
        self._closing = True
        self.post(lambda _: None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    @property
    def healthy(self) -> bool:
        """Whether requests can be served."""
        return self._failure is None and self._thread.is_alive()

    @property
    def failure(self) -> BaseException | None:
        """What the engine could not go on from."""
        return None if self._failure is None else self._failure.__cause__

    @property
    def num_residual(self) -> int:
        """Requests that are not done."""
        return len(self._streams)

    async def submit(self, request: EngineRequest) -> RequestStream:
        """Hands a request to the engine.

        Raises:
          RefusedError: the engine's refusal, of whatever kind.
          EngineFailedError: the engine is gone.
        """
        stream = RequestStream(self, request)
        if request.request_id not in self._streams:  # else the engine refuses it
            self._streams[request.request_id] = stream
        try:
            await self.call(lambda engine: engine.add_request(request))
        except BaseException as error:  # refused, or nobody waits for it any more
            self.forget(stream)
            if isinstance(error, asyncio.CancelledError):
                self.post(lambda engine: engine.abort(request.request_id))
            raise
        return stream

    async def call(self, function: Callable[[AnyEngine], T]) -> T:
        """What ``function`` returns, or raises, between two steps, on the engine's thread."""
        if self._failure is not None:
            raise self._failure
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: Exception | None) -> None:
            if answer.cancelled():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(result)  # type: ignore[arg-type]

        def run(engine: AnyEngine) -> None:
            result: T | None = None
            failure: Exception | None = None
            try:
                result = function(engine)
            except (ValueError, OSError, RuntimeError, AssertionError) as error:  # for who asked
                failure = error
            loop.call_soon_threadsafe(settle, result, failure)

        self.post(run)
        return await answer

    def post(self, function: Callable[[AnyEngine], None]) -> None:
        """Has ``function`` called between two steps, on the engine's thread; from any thread."""
        self._asked.put(function)

    def forget(self, stream: RequestStream) -> None:
        """Nothing is handed to the stream any more."""
        if self._streams.get(stream.request.request_id) is stream:
            del self._streams[stream.request.request_id]

    # From any thread

    def stats(self) -> EngineStats:
        """As they were a moment ago, or, where nothing runs, as they are."""
        return self._stats

    def pool_state(self) -> PoolState:
        """As it was a moment ago."""
        return self._pool_state

    def slot_states(self) -> list[SlotState]:
        """As they were a moment ago."""
        return self._slot_states

    # The engine's thread

    def _work(self) -> None:
        try:
            while not self._closing:
                self._answer(wait=not self._engine.has_work)
                outputs = self._engine.step() if self._engine.has_work else []
                self._publish()
                if outputs:
                    self._hand_out(outputs)
            if isinstance(self._engine, LockstepEngine):
                self._engine.close()
        # The thread has no caller: whatever it is, every request must hear of it, and /health.
        except BaseException as error:
            self._failure = EngineFailedError(f"the engine failed: {type(error).__name__}: {error}")
            self._failure.__cause__ = error
            self._tell_failure()
            if not processes.is_loss(error):
                raise

    def _answer(self, *, wait: bool) -> None:
        """Does what was asked for since the last step."""
        with contextlib.suppress(queue.Empty):
            if wait:
                self._refresh_view()
                self._await()(self._engine)
            while True:
                self._asked.get_nowait()(self._engine)

    def _await(self) -> Callable[[AnyEngine], None]:
        """What is asked for next, whenever that is."""
        if not isinstance(self._engine, LockstepEngine):
            return self._asked.get()
        while True:
            with contextlib.suppress(queue.Empty):
                return self._asked.get(timeout=IDLE_SECONDS)
            self._engine.idle()

    def _publish(self) -> None:
        now = time.monotonic()
        if now - self._viewed > _VIEW_SECONDS:
            self._refresh_view()
        elif now - self._counted > _VIEW_SECONDS / 4:
            self._stats, self._counted = self._engine.stats(), now

    def _refresh_view(self) -> None:
        self._stats = self._engine.stats()
        self._pool_state = self._engine.pool_state()
        self._slot_states = self._engine.slot_states()
        self._viewed = self._counted = time.monotonic()

    def _hand_out(self, outputs: list[SampleOutput]) -> None:
        def deliver() -> None:
            for output in outputs:
                stream = self._streams.get(output.request_id)
                if stream is not None:
                    stream.put(output)
                    if stream.delivered:
                        self.forget(stream)

        self._on_loop(deliver)

    def _tell_failure(self) -> None:
        failure = self._failure
        assert failure is not None

        def tell() -> None:
            for stream in self._streams.values():
                stream.put(failure)
            self._streams.clear()

        self._on_loop(tell)
        # Who asks from now on, or has just asked, is told as well.
        while not self._asked.empty():
            self._asked.get_nowait()(self._engine)

    def _on_loop(self, function: Callable[[], Any]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(function)
