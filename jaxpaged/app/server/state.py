"""State shared by all request handlers: model, engine thread, options, metrics."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from jaxpaged_model.text.tokenizer import Tokenizer
from starlette.requests import Request

from jaxpaged import __version__
from jaxpaged.app.server.errors import ApiError
from jaxpaged.app.server.interfaces import Runner
from jaxpaged.app.server.metrics import Metrics
from jaxpaged.app.server.options import ServeOptions

_RATE_SECONDS = 5.0
"""Time window of token rates."""


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


class Unfinished(Protocol):
    """An unfinished ``generation.Generation``."""

    def fail(self, error: ApiError) -> None: ...


class Rates:
    """Recent token rates, computed on request from monotonic counters."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int, int]] = deque()

    def update(self, now: float, generated: int, prompt: int) -> tuple[float, float]:
        """``(generated, prompt)`` tokens a second."""
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
    """State of a server. ``model`` and ``runner`` are None until loaded."""

    options: ServeOptions
    metrics: Metrics = field(default_factory=Metrics)
    model: ServedModel | None = None
    runner: Runner | None = None
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
        model = f"-{self.model.fingerprint[:12]}" if self.model and self.model.fingerprint else ""
        return f"b{__version__}-jaxpaged{model}"

    def ready(self) -> tuple[ServedModel, Runner]:
        """The model and the engine.

        Raises:
          ApiError: 503 while they load, and once the engine has failed.
        """
        if self.model is None or self.runner is None:
            raise ApiError(503, "Loading model")
        if not self.runner.healthy:
            raise ApiError(503, "the engine has failed and takes no more requests")
        return self.model, self.runner

    def accepting(self) -> tuple[ServedModel, Runner]:
        """The model and the engine, for new requests.

        Raises:
          ApiError: 503, also while the server shuts down.
        """
        if self.draining:
            raise ApiError(503, "the server is shutting down")
        return self.ready()


def state_of(request: Request) -> ServerState:
    """State of the server that received a request."""
    state: ServerState = request.app.state.server
    return state
