"""ModelHost: the models of a server, loaded when a request needs them and unloaded when idle.

Everything here runs on the event loop. Models are opened in a thread, one at a time, in the order of
the requests for them. A request holds its model until its response is sent, and a held model is
never unloaded.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxpaged_model.checkpoint.pooling import Pooling, Reranker
from jaxpaged_model.text.tokenizer import Tokenizer
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxpaged.app.errors import InputError
from jaxpaged.app.memory import trim_memory
from jaxpaged.app.server.connection import while_connected
from jaxpaged.app.server.errors import ApiError, clipped
from jaxpaged.app.server.interfaces import Runner
from jaxpaged.engine.request import EngineStats

LOAD_SECONDS = 600.0
"""Time that a request waits for its model, at most."""


@dataclass(frozen=True)
class ServedModel:
    """Tokenizer, chat template and description of a model; the engine has its weights."""

    tokenizer: Tokenizer
    chat_template: str
    template_is_its_own: bool
    """False: the model has none, so a common one is used; it was probably not trained to chat."""
    names: tuple[str, ...]
    """The model's id, and its aliases."""
    path: str
    trained_context: int
    description: str = ""
    size_bytes: int = 0
    fingerprint: str = ""
    pooling: Pooling | Literal["none"] = "last"
    """Way in which embeddings are made of hidden states."""
    reranker: Reranker | None = None
    embedding_size: int = 0
    """Dimensions of an embedding."""


@dataclass(eq=False)
class Hosted:
    """One model: loaded if it has a runner."""

    name: str
    path: Path | None = None
    """None = the one that the flags name."""
    model: ServedModel | None = None
    """Kept while the model sleeps."""
    runner: Runner | None = None
    users: set[Hold] = field(default_factory=set)
    """Requests that hold it."""
    waiters: set[Hold] = field(default_factory=set)
    """Requests that wait until it is loaded."""
    task: asyncio.Task[None] | None = None
    """Loading, or waiting for its turn."""
    is_loading: bool = False
    is_leaving: bool = False
    """True: it will be unloaded for another model, so new requests wait for their turn."""
    is_sleeping: bool = False
    failure: str | None = None
    """Reason why it could not be loaded the last time."""
    last_used: float = 0.0
    timer: asyncio.TimerHandle | None = None
    last_stats: EngineStats | None = None
    sizes: tuple[int, int] = (0, 0)
    """Context and number of slots of the last runner."""

    @property
    def is_idle(self) -> bool:
        """True if no request holds it or waits for it."""
        return not self.users and not self.waiters

    @property
    def n_ctx(self) -> int:
        """Tokens of a context; while it sleeps, of the last one."""
        return self.runner.n_ctx if self.runner is not None else self.sizes[0]

    @property
    def max_seqs(self) -> int:
        """Number of slots; while it sleeps, of the last engine."""
        return self.runner.max_seqs if self.runner is not None else self.sizes[1]

    def stats(self) -> EngineStats | None:
        """Statistics of its engine; while it sleeps, those of the last one."""
        return self.runner.stats() if self.runner is not None else self.last_stats

    def status(self) -> dict[str, Any]:
        """llama-server's ``status`` of a model."""
        if self.is_loading:
            return {"value": "loading"}
        if self.runner is not None:
            return {"value": "loaded"}
        if self.failure is not None:
            return {"value": "unloaded", "failed": True, "reason": self.failure}
        return {"value": "sleeping" if self.is_sleeping else "unloaded"}


class Hold:
    """The model that a request uses; released when its response is sent."""

    def __init__(self, receive: Receive) -> None:
        self.hosted: Hosted | None = None
        self.receive = receive


_hold: ContextVar[Hold | None] = ContextVar("hold", default=None)


def current_hold() -> Hold | None:
    """The hold of the request that is handled."""
    return _hold.get()


class HoldModels:
    """Middleware: releases the model of a request when its response is sent."""

    def __init__(self, app: ASGIApp, host: Callable[[], ModelHost]) -> None:
        self._app, self._host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hold = Hold(receive)
        token = _hold.set(hold)
        try:
            await self._app(scope, receive, send)
        finally:
            _hold.reset(token)
            self._host().release(hold)


def _nothing_to_open(hosted: Hosted) -> tuple[Any, Any]:
    raise InputError(f"{hosted.name}: there is no file of it")


class ModelHost:
    """See the module.

    Args:
      models: all that can be loaded.
      open_model: loads one, in a thread: ``(runner, model)``; the runner is not started. It raises InputError.
      by_name: requests choose by name; otherwise there is one model, and names are ignored.
      max_loaded: number of loaded models, at most; None = as many as ``has_room`` allows.
      has_room: True if another model fits the memory beside those that are loaded.
      sleep_seconds: idle time until a model is unloaded; negative = never.
      load_seconds: time that a request waits for its model, at most.
    """

    def __init__(
        self,
        models: list[Hosted],
        open_model: Callable[[Hosted], tuple[Any, ServedModel]] = _nothing_to_open,
        *,
        by_name: bool = False,
        max_loaded: int | None = None,
        has_room: Callable[[Hosted], bool] = lambda _: True,
        sleep_seconds: float = -1,
        load_seconds: float = LOAD_SECONDS,
    ) -> None:
        self.models, self.by_name, self.max_loaded = models, by_name, max_loaded
        self._open, self._has_room = open_model, has_room
        self._sleep_seconds, self._load_seconds = sleep_seconds, load_seconds
        self._turn = asyncio.Lock()
        self._released = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop holds tasks only weakly

    @property
    def loaded(self) -> list[Hosted]:
        """The loaded models."""
        return [hosted for hosted in self.models if hosted.runner is not None]

    @property
    def num_waiting(self) -> int:
        """Number of requests that wait for a model."""
        return sum(len(hosted.waiters) for hosted in self.models)

    @property
    def is_loading(self) -> bool:
        """True while a model is opened, which cannot be interrupted."""
        return any(hosted.is_loading for hosted in self.models)

    @property
    def only(self) -> Hosted | None:
        """The model of requests that name none: the only one, or the only one that is loaded."""
        models = self.models if len(self.models) == 1 else self.loaded
        return models[0] if len(models) == 1 else None

    def find(self, name: str | None) -> Hosted:
        """The model of a request.

        Raises:
          ApiError: 404, no such model; 400, no name where there is a choice.
        """
        if not self.by_name:
            return self.models[0]
        there = ", ".join(hosted.name for hosted in self.models)
        there = there if len(there) < 500 else f"{there[:500]}..."
        if name is None:
            if self.only is None:
                raise ApiError(400, f"the request names no model; there are: {there}", param="model")
            return self.only
        for hosted in self.models:
            if hosted.name == name:
                return hosted
        raise ApiError(
            404,
            f"there is no model {clipped(name)!r}; there are: {there}",
            param="model",
            type="invalid_request_error",
            code="model_not_found",
        )

    async def hold(self, hosted: Hosted, hold: Hold) -> None:
        """Gives a request its model, which is loaded first if it has to be.

        Raises:
          ApiError: it cannot be loaded, not in time, or the server shuts down.
        """
        hold.hosted = hosted
        if hosted.runner is not None and not hosted.is_leaving:
            hosted.users.add(hold)
            return
        hosted.waiters.add(hold)
        await while_connected(hold.receive, self.load(hosted))

    def release(self, hold: Hold) -> None:
        """Ends a request's use of its model."""
        hosted, hold.hosted = hold.hosted, None
        if hosted is None or hold not in hosted.users | hosted.waiters:
            return
        hosted.users.discard(hold)
        hosted.waiters.discard(hold)
        if hosted.is_idle and hosted.task is not None and not hosted.is_loading:
            hosted.task.cancel()  # nobody waits for it any more
            hosted.task = None
        self._rest(hosted)

    async def load(self, hosted: Hosted) -> None:
        """Loads a model, unless it is loaded; gives it to the requests that wait for it.

        Raises:
          ApiError: it cannot be loaded, not in time, or the server shuts down.
        """
        if hosted.task is None:
            hosted.task = asyncio.create_task(self._load(hosted))
        task = hosted.task
        await asyncio.wait((task,), timeout=self._load_seconds)
        if not task.done():
            raise ApiError(
                503, f"the model {hosted.name!r} was not loaded within {self._load_seconds:g} seconds"
            )
        if task.cancelled():
            raise ApiError(503, "the server is shutting down")
        task.result()
        if hosted.failure is not None:
            raise ApiError(500, f"the model {hosted.name!r} cannot be loaded: {hosted.failure}")

    async def _load(self, hosted: Hosted) -> None:
        try:
            async with self._turn:
                if hosted.runner is None:
                    await self._make_room(hosted)
                    hosted.is_loading = True
                    runner, model = await asyncio.to_thread(self._open, hosted)
                    runner.start()
                    hosted.model, hosted.runner = model, runner
                    hosted.sizes = runner.n_ctx, runner.max_seqs
                hosted.failure, hosted.is_sleeping = None, False
                # At once, so that the next model in line finds it in use.
                hosted.users |= hosted.waiters
                hosted.waiters.clear()
        except (InputError, MemoryError, OSError, RuntimeError, ValueError) as error:
            reason = error.message if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            if hosted.path is not None:  # the client need not know the server's folders
                reason = reason.replace(str(hosted.path), hosted.path.name)
            hosted.failure = _first_line(reason)
        finally:
            hosted.is_loading = False
            if hosted.task is asyncio.current_task():
                hosted.task = None
            self._rest(hosted)

    async def _make_room(self, hosted: Hosted) -> None:
        """Unloads models until ``hosted`` may be loaded, idle ones first; waits for those in use."""
        try:
            while (loaded := self.loaded) and not self._fits(hosted, loaded):
                idle = [other for other in loaded if other.is_idle or (other.is_leaving and not other.users)]
                oldest = min(idle or loaded, key=lambda other: other.last_used)
                if idle:
                    await self._unload(oldest)
                    continue
                oldest.is_leaving = True
                self._released.clear()
                await self._released.wait()
        finally:
            for other in self.models:
                other.is_leaving = False

    def _fits(self, hosted: Hosted, loaded: list[Hosted]) -> bool:
        if self.max_loaded is not None:
            return len(loaded) < self.max_loaded
        return self._has_room(hosted)

    async def unload(self, hosted: Hosted, *, sleeps: bool = False) -> None:
        """Unloads a model if no request uses it."""
        async with self._turn:
            if hosted.is_idle and hosted.runner is not None:
                await self._unload(hosted, sleeps=sleeps)

    async def _unload(self, hosted: Hosted, *, sleeps: bool = False) -> None:
        runner, hosted.runner = hosted.runner, None
        assert runner is not None
        if hosted.timer is not None:
            hosted.timer.cancel()
        hosted.last_stats = runner.stats()
        hosted.is_sleeping = sleeps
        if not sleeps:
            hosted.model = None
        await runner.close()
        del runner
        await asyncio.to_thread(_collect)

    def _rest(self, hosted: Hosted) -> None:
        """Notes a use of a model, after which it may be unloaded."""
        loop = asyncio.get_running_loop()
        hosted.last_used = loop.time()
        self._released.set()
        if hosted.timer is not None:
            hosted.timer.cancel()
        if self._sleep_seconds >= 0 and hosted.is_idle and hosted.runner is not None:
            hosted.timer = loop.call_later(self._sleep_seconds, self._sleep, hosted)

    def _sleep(self, hosted: Hosted) -> None:
        task = asyncio.create_task(self.unload(hosted, sleeps=True))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def discard_failed(self) -> None:
        """Drops models whose engines have failed; the next request loads them again."""
        for hosted in self.loaded:
            if hosted.runner is not None and not hosted.runner.healthy:
                async with self._turn:
                    await self._unload(hosted)
                hosted.failure = "its engine has failed"

    def refuse_waiting(self) -> None:
        """Ends the waiting of requests for their models."""
        for hosted in self.models:
            if hosted.task is not None:
                hosted.task.cancel()

    async def close(self) -> None:
        """Ends all engines, even if requests are running."""
        self.refuse_waiting()
        while loaded := self.loaded:
            await self._unload(loaded[0])


def _collect() -> None:
    """Frees a model: its engine's thread, methods and programs refer to each other."""
    gc.collect()
    trim_memory()


def _first_line(text: str) -> str:
    """The first line of a reason, shortened for a message."""
    line = text.strip().splitlines()[0] if text.strip() else "unknown reason"
    return line if len(line) <= 500 else f"{line[:500]}..."
