"""Responses that take a while, and are cancelled when the client disconnects.

A web framework notices a disconnect only when it writes. A queued request, or an answer that is
sent as a whole, writes nothing for a long time, so a task here always listens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxpaged.app.server.encoding import dump_json

_CLIENT_GONE = 499


def json_response(value: Any) -> Response:
    """A JSON response."""
    return Response(dump_json(value), media_type="application/json")


async def while_connected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Awaits ``work``, and cancels it as soon as the client disconnects."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else Response(status_code=_CLIENT_GONE)
    finally:
        watcher.cancel()
        if task.cancel():  # its cleanup aborts the requests in the engine
            await asyncio.wait((task,))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + dump_json(value) + b"\n\n"


class EventStream(Response):
    """Server-sent events; calls ``close`` at their end, or as soon as the client disconnects."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        self._events, self._close = events, close
        self.status_code, self.background = 200, None
        # A proxy that buffers would send the stream as one block.
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.ensure_future(self._send(send))
        watcher = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((sender, watcher), return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                await sender
        finally:
            watcher.cancel()
            if sender.cancel():
                await asyncio.wait((sender,))
            self._close()  # even if the stream never began

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in self._events:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
