"""What all handlers share: the model's text side, the engine's thread, the options, the measurements."""

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
"""What "tokens a second" looks back on."""


@dataclass(frozen=True)
class ServedModel:
    """The side of a model that is text; its weights are the engine's."""

    tokenizer: Tokenizer
    chat_template: str
    template_is_its_own: bool
    """False: the model has none, was most likely not trained to chat, and chats are written in a usual form."""
    names: tuple[str, ...]
    """The first one is the model's id, the others are accepted beside it."""
    path: str
    trained_context: int
    description: str = ""
    size_bytes: int = 0
    fingerprint: str = ""


class Unfinished(Protocol):
    """A ``generation.Generation`` that is not at its end, and may be told that it must end."""

    def fail(self, error: ApiError) -> None: ...


class Rates:
    """Tokens a second of the last seconds, from counters that only grow; nothing runs while nobody asks."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int, int]] = deque()

    def update(self, now: float, generated: int, prompt: int) -> tuple[float, float]:
        """``(generated, prompt)`` tokens a second."""
        self._seen.append((now, generated, prompt))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _RATE_SECONDS:
            self._seen.popleft()
        then, generated_then, prompt_then = self._seen[0]
        seconds = now - then
        if seconds < 0.05:  # two askers at one moment; a rate over nothing means nothing
            return 0.0, 0.0
        return (generated - generated_then) / seconds, (prompt - prompt_then) / seconds


@dataclass
class ServerState:
    """One server. ``model`` and ``runner`` come when they are loaded."""

    options: ServeOptions
    metrics: Metrics = field(default_factory=Metrics)
    model: ServedModel | None = None
    runner: Runner | None = None
    draining: bool = False
    started: float = field(default_factory=time.time)
    generations: set[Unfinished] = field(default_factory=set)
    """Those that are not at their end."""
    rates: Rates = field(default_factory=Rates)
    numbers: count[int] = field(default_factory=lambda: count(1))
    """One for each request that is handed to the engine."""

    @property
    def build(self) -> str:
        """What ``build_info`` and ``system_fingerprint`` say; llama-server's begin with a b, and clients check it."""
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
        """The same for what begins new work.

        Raises:
          ApiError: 503, also while the server shuts down.
        """
        if self.draining:
            raise ApiError(503, "the server is shutting down")
        return self.ready()


def state_of(request: Request) -> ServerState:
    """The server that a request came to."""
    state: ServerState = request.app.state.server
    return state
