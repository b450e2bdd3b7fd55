"""A client that is gone: its samples leave the engine at once, streaming or not, waiting or running."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from http_server import Server

PROMPT = "def main(path):\n    return path"


async def _converse(
    server: Server, path: str, body: dict[str, Any], *, leave_after: int
) -> list[dict[str, Any]]:
    """Asks, and is gone after so many messages of the answer (0: while it waits for the first)."""
    sent: list[dict[str, Any]] = []
    gone = asyncio.Event()
    data = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

    async def receive() -> dict[str, Any]:
        if (message := next(data, None)) is not None:
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if len(sent) == leave_after:
            gone.set()
            await asyncio.sleep(0.01)

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    task = asyncio.create_task(server.app(scope, receive, send))
    if leave_after == 0:
        async with asyncio.timeout(10):
            while not server.runner.streams:
                await asyncio.sleep(0.01)
        gone.set()
    await asyncio.wait_for(task, 2)
    await asyncio.sleep(0)
    return sent


@pytest.mark.parametrize("path", ["/v1/completions", "/completion"])
@pytest.mark.parametrize(("stream", "leave_after"), [(False, 0), (True, 0), (True, 1), (True, 3)])
@pytest.mark.parametrize("prompts", [PROMPT, [PROMPT, PROMPT, PROMPT]])
def test_its_samples_leave_the_engine_at_once(path, stream, leave_after, prompts):
    server = Server()
    server.runner.delay = 5.0 if leave_after <= 1 else 0.002
    body = {"prompt": prompts, "stream": stream, "n": 2}
    sent = asyncio.run(_converse(server, path, body, leave_after=leave_after))
    assert not server.runner.streams and not server.state.generations
    assert (
        len(server.runner.aborted) == len(server.runner.requests) == (3 if isinstance(prompts, list) else 1)
    )
    assert len(sent) <= leave_after + 1 or not stream


def test_one_that_is_gone_before_the_engine_has_answered():
    server = Server()
    submit = server.runner.submit

    async def slow(request):
        await asyncio.sleep(0.2)
        return await submit(request)

    server.runner.submit = slow

    async def ask():
        task = asyncio.create_task(_converse(server, "/completion", {"prompt": PROMPT}, leave_after=99))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait((task,))
        await asyncio.sleep(0.3)

    asyncio.run(ask())
    assert not server.runner.streams and not server.state.generations


def test_what_runs_when_the_server_must_end_is_told():
    from jaxpaged.app.server.errors import ApiError

    server = Server()
    server.runner.delay = 5.0

    async def end():
        task = asyncio.create_task(
            _converse(server, "/v1/completions", {"prompt": PROMPT, "stream": True}, leave_after=99)
        )
        await asyncio.sleep(0.05)
        for generation in list(server.state.generations):
            generation.fail(ApiError(503, "the server is shutting down"))
        return await asyncio.wait_for(task, 2)

    text = b"".join(message.get("body", b"") for message in asyncio.run(end())).decode()
    assert '"code":503' in text and text.endswith("data: [DONE]\n\n")
    assert not server.runner.streams
