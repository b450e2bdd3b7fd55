"""Responses that take a while, and are cancelled when the client disconnects."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, ClassVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxpaged.app.server.connection import ClientGoneError, while_connected
from jaxpaged.app.server.encoding import dump_json
from jaxpaged.app.server.errors import ApiError
from jaxpaged.app.server.generation import Generation, Update
from jaxpaged.app.server.state import state_of


class Answer:
    """Format of an API's response to a generation."""

    end: ClassVar[bytes] = b""
    """Last event of a stream."""
    named_events: ClassVar[bool] = False
    """True if events have the name of their type."""

    def whole(self, updates: Sequence[Update]) -> Any:
        """The response of a request without a stream."""
        raise NotImplementedError

    def opening(self) -> list[dict[str, Any]]:
        """Events before the first token."""
        return []

    def chunks(self, update: Update) -> Iterator[dict[str, Any]]:
        """Events of one update."""
        raise NotImplementedError

    def closing(self) -> list[dict[str, Any]]:
        """Events after the last token."""
        return []

    def failure(self, error: ApiError) -> dict[str, Any]:
        """The event of an error in a stream."""
        return error.body()


async def respond(request: Request, generation: Generation, answer: Answer, *, stream: bool) -> Response:
    """Starts a generation, and responds with all of its text, or with a stream."""
    if not stream:
        return await while_connected(request.receive, _whole(generation, answer))
    await generation.start()
    return EventStream(_events(request, generation, answer), generation.close)


async def _whole(generation: Generation, answer: Answer) -> Response:
    try:
        await generation.start()
        return json_response(answer.whole([update async for update in generation.updates()]))
    finally:
        generation.close()


async def _events(request: Request, generation: Generation, answer: Answer) -> AsyncIterator[bytes]:
    try:
        for chunk in answer.opening():
            yield event(chunk, named=answer.named_events)
        async for update in generation.updates():
            for chunk in answer.chunks(update):
                yield event(chunk, named=answer.named_events)
        for chunk in answer.closing():
            yield event(chunk, named=answer.named_events)
    except ApiError as error:  # the status is sent already
        state_of(request).metrics.errors.labels(str(error.status_code)).inc()
        yield event(answer.failure(error), named=answer.named_events)
    if answer.end:
        yield answer.end


def json_response(value: Any) -> Response:
    """A JSON response."""
    return Response(dump_json(value), media_type="application/json")


def event(value: Any, *, named: bool = False) -> bytes:
    """One server-sent event, perhaps with its type as its name."""
    name = f"event: {value['type']}\n".encode() if named else b""
    return name + b"data: " + dump_json(value) + b"\n\n"


class EventStream(Response):
    """Server-sent events; calls ``close`` at their end, or as soon as the client disconnects."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        self._events, self._close = events, close
        self.status_code, self.background = 200, None
        # A proxy that buffers would send the stream as one block.
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientGoneError):
                await while_connected(receive, self._send(send))
        finally:
            self._close()  # even if the stream never began

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in self._events:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
