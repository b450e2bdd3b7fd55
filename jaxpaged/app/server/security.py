"""Middlewares: limits of headers and body, API key.

Plain ASGI, because a framework's wrappers would buffer streams and hide disconnects.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Collection, Iterable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxpaged.app.server.errors import ApiError
from jaxpaged.app.server.metrics import Metrics

MAX_HEADER_BYTES = 32 * 1024
MAX_HEADERS = 100
BODY_SECONDS = 30.0
"""Time limit for receiving a body: slow ones occupy memory and a connection."""
_DISCARDED = 8
"""Bodies of up to this many times the limit are read, so that the client sees the error."""

PUBLIC_PATHS = frozenset({"/health", "/v1/health"})


class HeadAsGet:
    """Answers HEAD like GET on every path; the HTTP server leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, "method": "GET"} if scope.get("method") == "HEAD" else scope, receive, send)


class CountErrors:
    """Counts responses with an error status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                self._metrics.errors.labels(str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)


class LimitHeaders:
    """Refuses headers that are too large or too many."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            size = sum(len(name) + len(value) for name, value in scope["headers"])
            size += len(scope.get("raw_path") or b"") + len(scope["query_string"])
            if size > MAX_HEADER_BYTES or len(scope["headers"]) > MAX_HEADERS:
                message = f"the headers exceed {MAX_HEADER_BYTES} bytes, or are more than {MAX_HEADERS}"
                error = ApiError(431, message, headers={"Connection": "close"})
                await error.response(scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


class RequireKey:
    """Requires ``Authorization: Bearer KEY`` or ``X-Api-Key: KEY`` on paths that are not public."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], public: Collection[str]) -> None:
        self._app, self._public = app, public
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        closed = scope["type"] == "http" and self._keys and scope["path"] not in self._public
        if closed and not self._known(_key_of(scope["headers"])):
            error = ApiError(401, "Invalid API Key", headers={"WWW-Authenticate": "Bearer"})
            await error.response(scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _known(self, given: bytes) -> bool:
        # All keys are compared, each in constant time, so that the time reveals nothing.
        return sum([hmac.compare_digest(given, key) for key in self._keys]) > 0


def _key_of(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip()
        if name == b"x-api-key":
            return value.strip()
    return b""


class LimitBody:
    """Reads the whole body first, chunked or not, within limits of size and time."""

    def __init__(self, app: ASGIApp, limit: int, seconds: float = BODY_SECONDS) -> None:
        self._app, self._limit, self._seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._seconds):
                body = await self._read(receive)
        except TimeoutError:
            error = ApiError(408, f"the body took more than {self._seconds:g} seconds")
        else:
            if body is None:  # the client is gone
                return
            if len(body) <= self._limit:
                await self._app(scope, _replay(body, receive), send)
                return
            error = ApiError(413, f"the body has more than {self._limit} bytes")
        error.headers = {"Connection": "close"}
        await error.response(scope["path"])(scope, receive, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; a part beyond the limit of a too large one; None if the client disconnected."""
        parts: list[bytes] = []
        size = 0
        while size <= _DISCARDED * self._limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            if size <= self._limit:
                parts.append(part)
            size += len(part)
            if not message.get("more_body", False):
                break
        return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Receives the body once, and then the client's messages."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
