"""EngineRunner: an engine on its own thread, behind coroutines.

Only that thread uses the engine. Calls of request handlers go through a queue that is processed
between two steps, and the outputs of a step are passed to the event loop together.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from jaxpaged_model.embedding import Embedder

from jaxpaged.app import processes
from jaxpaged.app.server.lockstep import IDLE_SECONDS, LockstepEngine
from jaxpaged.engine import Engine, EngineRequest, EngineStats, PoolState, SampleOutput, SlotState
from jaxpaged.engine.request import RefusedError

T = TypeVar("T")
_STATE_SECONDS = 0.2
"""Age of the pool's state while the engine is busy, at most; a quarter of it for statistics. They
take up to 1 ms at 256 sequences and 65,536 pages, and some steps take little more."""


class EngineFailedError(RuntimeError):
    """The engine's thread ended with an error."""


class RequestStream:
    """Outputs of one request: an asynchronous iterator, until all samples are finished."""

    def __init__(self, runner: EngineRunner, request: EngineRequest) -> None:
        self.request = request
        self._runner = runner
        self._outputs: asyncio.Queue[SampleOutput | EngineFailedError] = asyncio.Queue()
        self._open = set(range(request.n))
        self._pending = set(range(request.n))

    @property
    def delivered(self) -> bool:
        """True if the last output of every sample has arrived."""
        return not self._pending

    def __aiter__(self) -> AsyncIterator[SampleOutput]:
        return self

    async def __anext__(self) -> SampleOutput:
        while self._open:
            output = await self._outputs.get()
            if isinstance(output, EngineFailedError):
                self._open.clear()
                raise output
            if output.index not in self._open:
                continue  # aborted meanwhile
            if output.finish_reason is not None:
                self._open.discard(output.index)
            return output
        raise StopAsyncIteration

    async def abort(self, index: int | None = None) -> None:
        """Aborts the request, or one of its samples, without further output; idempotent."""
        ended = self._open & ({index} if index is not None else self._open)
        self._open -= ended
        if ended:
            self._pending -= ended
            self._runner.post(lambda engine: engine.abort(self.request.request_id, index))
            if self.delivered:
                self._runner.forget(self)

    def put(self, output: SampleOutput | EngineFailedError) -> None:
        """Adds an output; to be called on the event loop."""
        if isinstance(output, SampleOutput) and output.finish_reason is not None:
            self._pending.discard(output.index)
        self._outputs.put_nowait(output)


class EngineRunner:
    """Runs an engine; see the module.

    Args:
      engine: a compiled engine, which nothing else may use while the thread runs.
      embedder: makes vectors of texts; None where it cannot.
    """

    def __init__(self, engine: Engine, embedder: Embedder | None = None) -> None:
        self._engine, self._embedder = engine, embedder
        self._embedding = asyncio.Lock()
        self.n_ctx, self.max_seqs, self.page_size = engine.n_ctx, engine.max_seqs, engine.page_size
        self._calls: queue.SimpleQueue[Callable[[Engine], None]] = queue.SimpleQueue()
        self._streams: dict[str, RequestStream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._closing = False
        self._failure: EngineFailedError | None = None
        self._stats = engine.stats()
        self._pool_state = engine.pool_state()
        self._slot_states = engine.slot_states()
        self._refreshed = self._counted = 0.0

    # To be called on the event loop

    def start(self) -> None:
        """Starts the thread; outputs go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """Ends the thread, even if requests are running."""
        self._closing = True
        self.post(lambda _: None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    @property
    def healthy(self) -> bool:
        """True if requests can be served."""
        return self._failure is None and self._thread.is_alive()

    @property
    def failure(self) -> BaseException | None:
        """Exception that ended the engine's thread."""
        return None if self._failure is None else self._failure.__cause__

    @property
    def num_unfinished(self) -> int:
        """Number of unfinished requests."""
        return len(self._streams)

    async def submit(self, request: EngineRequest) -> RequestStream:
        """Submits a request to the engine.

        Raises:
          RefusedError: the engine refused it.
          EngineFailedError: the engine has failed.
        """
        stream = RequestStream(self, request)
        if request.request_id not in self._streams:  # otherwise the engine refuses it
            self._streams[request.request_id] = stream
        try:
            await self.call(lambda engine: engine.add_request(request))
        except BaseException as error:  # refused, or the caller was cancelled
            self.forget(stream)
            if isinstance(error, asyncio.CancelledError):
                self.post(lambda engine: engine.abort(request.request_id))
            raise
        return stream

    async def call(self, function: Callable[[Engine], T]) -> T:
        """Calls ``function`` on the engine's thread, between two steps; returns what it returns."""
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

        def run(engine: Engine) -> None:
            result: T | None = None
            failure: Exception | None = None
            try:
                result = function(engine)
            except (ValueError, OSError, RuntimeError, AssertionError) as error:  # raised in the caller
                failure = error
            loop.call_soon_threadsafe(settle, result, failure)

        self.post(run)
        return await answer

    async def embed(self, tokens: Sequence[int]) -> np.ndarray:
        """Hidden states of a text, f32[number of tokens, hidden_size], computed beside the engine's steps.

        Raises:
          RefusedError: the engine is one of a mesh.
        """
        if self._embedder is None:
            raise RefusedError("embeddings are computed on one device, not on a mesh")
        await self._embedding.acquire()  # a text at a time: each needs memory for its keys and values
        try:
            work = asyncio.ensure_future(asyncio.to_thread(self._embedder.hidden_states, tokens))
        except BaseException:
            self._embedding.release()
            raise
        # The thread goes on if the caller is cancelled.
        work.add_done_callback(lambda _: self._embedding.release())
        return await asyncio.shield(work)

    def post(self, function: Callable[[Engine], None]) -> None:
        """Queues a call on the engine's thread, between two steps; thread-safe."""
        self._calls.put(function)

    def forget(self, stream: RequestStream) -> None:
        """Stops passing outputs to a stream."""
        if self._streams.get(stream.request.request_id) is stream:
            del self._streams[stream.request.request_id]

    # Thread-safe

    def stats(self) -> EngineStats:
        """Recent statistics; current ones while the engine is idle."""
        return self._stats

    def pool_state(self) -> PoolState:
        """Recent state of the pool."""
        return self._pool_state

    def slot_states(self) -> list[SlotState]:
        """Recent states of the slots."""
        return self._slot_states

    # The engine's thread

    def _work(self) -> None:
        try:
            while not self._closing:
                self._process_calls(wait=not self._engine.has_work)
                outputs = self._engine.step() if self._engine.has_work else []
                self._publish()
                if outputs:
                    self._hand_out(outputs)
            if isinstance(self._engine, LockstepEngine):
                self._engine.close()
        # The thread has no caller: every request must get the error, whatever it is, and /health.
        except BaseException as error:
            self._failure = EngineFailedError(f"the engine failed: {type(error).__name__}: {error}")
            self._failure.__cause__ = error
            self._publish_failure()
            if not processes.is_loss(error):
                raise

    def _process_calls(self, *, wait: bool) -> None:
        """Processes the calls queued since the last step."""
        with contextlib.suppress(queue.Empty):
            if wait:
                self._refresh()
                self._await()(self._engine)
            while True:
                self._calls.get_nowait()(self._engine)

    def _await(self) -> Callable[[Engine], None]:
        """Waits for the next call."""
        if not isinstance(self._engine, LockstepEngine):
            return self._calls.get()
        while True:
            with contextlib.suppress(queue.Empty):
                return self._calls.get(timeout=IDLE_SECONDS)
            self._engine.idle()

    def _publish(self) -> None:
        now = time.monotonic()
        if now - self._refreshed > _STATE_SECONDS:
            self._refresh()
        elif now - self._counted > _STATE_SECONDS / 4:
            self._stats, self._counted = self._engine.stats(), now

    def _refresh(self) -> None:
        self._stats = self._engine.stats()
        self._pool_state = self._engine.pool_state()
        self._slot_states = self._engine.slot_states()
        self._refreshed = self._counted = time.monotonic()

    def _hand_out(self, outputs: list[SampleOutput]) -> None:
        def deliver() -> None:
            for output in outputs:
                stream = self._streams.get(output.request_id)
                if stream is not None:
                    stream.put(output)
                    if stream.delivered:
                        self.forget(stream)

        self._on_loop(deliver)

    def _publish_failure(self) -> None:
        failure = self._failure
        assert failure is not None

        def tell() -> None:
            for stream in self._streams.values():
                stream.put(failure)
            self._streams.clear()

        self._on_loop(tell)
        # Calls that are queued already fail as well.
        while not self._calls.empty():
            self._calls.get_nowait()(self._engine)

    def _on_loop(self, function: Callable[[], Any]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function)
