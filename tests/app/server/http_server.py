"""A server of the embedded model's tokenizer over a fake engine, asked without a socket."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import httpx
from fake_runner import FakeRunner
from jaxpaged_model import tiny
from jaxpaged_model.checkpoint.gguf_file import GGUFFile
from jaxpaged_model.text.chat import BUILTIN_TEMPLATES
from jaxpaged_model.text.tokenizer import Tokenizer

from jaxpaged.app.server.application import create_application
from jaxpaged.app.server.options import ServeOptions
from jaxpaged.app.server.state import ServedModel, ServerState

TOKENIZER = Tokenizer.from_gguf(GGUFFile(tiny.PATH).metadata)


class Server:
    """An application with its state; every request has an event loop of its own."""

    def __init__(self, **options: Any) -> None:
        self.state = ServerState(ServeOptions(**options))
        names = self.state.options.alias or ("tiny",)
        self.hosted = self.state.host.models[0]
        self.hosted.model = ServedModel(
            TOKENIZER,
            BUILTIN_TEMPLATES["chatml"],
            True,
            names,
            str(tiny.PATH),
            1024,
            fingerprint="f" * 64,
            embedding_size=5,
        )
        self.runner = FakeRunner()
        self.hosted.runner = self.runner
        self.state.metrics.watch(self.runner.stats)
        self.app = create_application(self.state)

    def ask(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                response = await client.request(method, path, **kwargs)
                await asyncio.sleep(0)  # what ends in the background ends
                return response

        return asyncio.run(ask())

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return self.ask("GET", path, **kwargs)

    def post(self, path: str, body: Any = None, **kwargs: Any) -> httpx.Response:
        return self.ask("POST", path, json=body, **kwargs)

    def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a stream, read; ``[DONE]`` stays as it is."""
        response = self.post(path, body | {"stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        return [event if event == "[DONE]" else json.loads(event) for event in events]

    def with_options(self, **options: Any) -> Server:
        return Server(**(dataclasses.asdict(self.state.options) | options))


def check_error(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer, which must have the one shape that all have."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert isinstance(error["message"], str) and error["message"] and len(error["message"]) < 1000
    assert error["code"] == status
    if status in (429, 503):
        assert int(response.headers["retry-after"]) >= 1
    return error
