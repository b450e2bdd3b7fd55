"""State shared by all request handlers: model, engine thread, options, metrics."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from starlette.requests import Request

from jaxpaged import __version__
from jaxpaged.app.server.errors import ApiError
from jaxpaged.app.server.hosting import Hosted, ModelHost, ServedModel, current_hold
from jaxpaged.app.server.interfaces import Runner
from jaxpaged.app.server.metrics import Metrics
from jaxpaged.app.server.options import ServeOptions
from jaxpaged.engine.request import EngineStats

__all__ = ["Rates", "ServedModel", "ServerState", "state_of"]
_RATE_SECONDS = 5.0
"""Time window of token rates."""


class Unfinished(Protocol):
    """An unfinished ``generation.Generation``."""

    def fail(self, error: ApiError) -> None: ...


class Rates:
    """Recent token rates, computed on request from monotonic counters."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int, int]] = deque()

    def update(self, now: float, generated: int, prompt: int) -> tuple[float, float]:
        """``(generated, prompt)`` tokens a second."""
        if self._seen and generated < self._seen[-1][1]:  # another engine
            self._seen.clear()
        self._seen.append((now, generated, prompt))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _RATE_SECONDS:
            self._seen.popleft()
        then, generated_then, prompt_then = self._seen[0]
        seconds = now - then
        if seconds < 0.05:  # too short for a rate, when two clients ask at once
            return 0.0, 0.0
        return (generated - generated_then) / seconds, (prompt - prompt_then) / seconds


@dataclass
class ServerState:
    """State of a server."""

    options: ServeOptions
    metrics: Metrics = field(default_factory=Metrics)
    host: ModelHost = field(default_factory=lambda: ModelHost([Hosted("")]))
    draining: bool = False
    started: float = field(default_factory=time.time)
    generations: set[Unfinished] = field(default_factory=set)
    """Unfinished generations."""
    rates: Rates = field(default_factory=Rates)
    numbers: count[int] = field(default_factory=lambda: count(1))
    """Ids of the engine's requests."""

    @property
    def build(self) -> str:
        """``build_info`` and ``system_fingerprint``; llama-server's clients check the leading b."""
        hosted = self._current
        model = hosted.model if hosted else None
        return f"b{__version__}-jaxpaged{f'-{model.fingerprint[:12]}' if model and model.fingerprint else ''}"

    @property
    def _current(self) -> Hosted | None:
        """The model of the request that is handled, else the one for requests that name none."""
        hold = current_hold()
        return hold.hosted if hold is not None and hold.hosted is not None else self.host.only

    def stats(self) -> EngineStats | None:
        """The engine's statistics; the last ones while its model sleeps."""
        hosted = self._current
        return None if hosted is None else hosted.stats()

    async def enter(self, name: str | None, *, loads: bool = False) -> tuple[ServedModel, Runner]:
        """The model and the engine that a request names, for the rest of it; loads them if needed.

        Args:
          loads: the request is to load the model, so ``--no-models-autoload`` does not matter.

        Raises:
          ApiError: 400, ``--no-models-autoload``; 404, no such model; 500, it cannot be loaded; 503, not in
            time, and see ``accepting``.
        """
        if self.draining:
            raise ApiError(503, "the server is shutting down")
        hosted, hold = self.host.find(name), current_hold()
        assert hold is not None, "the middleware HoldModels"
        if self.host.by_name and hosted.runner is None and not (self.options.models_autoload or loads):
            raise ApiError(400, f"the model {hosted.name!r} is not loaded", param="model")
        if self.host.by_name or hosted.model is not None:
            await self.host.hold(hosted, hold)
        return self.ready()

    def look_at(self, name: str | None) -> Hosted:
        """The model that a request names, for the rest of it; not loaded, and not kept loaded.

        Raises:
          ApiError: 404, no such model; 400, no name where there is a choice; 503, the first one is loading.
        """
        hosted, hold = self.host.find(name), current_hold()
        if not self.host.by_name and hosted.model is None:
            raise ApiError(503, "Loading model")
        if hold is not None:
            hold.hosted = hosted
        return hosted

    def ready(self) -> tuple[ServedModel, Runner]:
        """The model and the engine of the request that is handled.

        Raises:
          ApiError: 503 while they load or sleep, and once the engine has failed.
        """
        hosted = self._current or self.host.find(None)
        if hosted.is_sleeping or (self.host.by_name and hosted.runner is None):
            raise ApiError(503, "the model is not loaded; a request for text loads it")
        if hosted.model is None or hosted.runner is None:
            raise ApiError(503, "Loading model")
        if not hosted.runner.healthy:
            raise ApiError(503, "the engine has failed and takes no more requests")
        return hosted.model, hosted.runner

    def accepting(self) -> tuple[ServedModel, Runner]:
        """The model and the engine, for new requests.

        Raises:
          ApiError: 503, also while the server shuts down, except to a request that has waited for its model.
        """
        hold = current_hold()
        if self.draining and (hold is None or hold.hosted is None):
            raise ApiError(503, "the server is shutting down")
        return self.ready()


def state_of(request: Request) -> ServerState:
    """State of the server that received a request."""
    state: ServerState = request.app.state.server
    return state
