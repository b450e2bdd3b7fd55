"""Routes that accept only JSON bodies, parsed strictly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from jaxpaged.app.server.encoding import JsonError, parse_json
from jaxpaged.app.server.errors import ApiError

_SMALL = 64 * 1024
"""Larger bodies, in bytes, are parsed in a thread, so that other requests continue."""


class _StrictRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        try:
            return parse_json(body) if len(body) <= _SMALL else await asyncio.to_thread(parse_json, body)
        except JsonError as error:
            raise ApiError(400, str(error)) from None


class StrictRoute(APIRoute):
    """A route that accepts only ``application/json``.

    Without a CORS preflight, a page of another site may send forms, plain text and bodies without a
    type, but not JSON.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(received: Request) -> Response:
            request = _StrictRequest(received.scope, received.receive)
            if request.method == "POST" and await request.body():
                message = Message()
                message["content-type"] = request.headers.get("content-type", "")
                kind = message.get_content_type()
                charset = str(message.get_param("charset", "utf-8")).lower()
                if "content-type" not in request.headers or kind != "application/json":
                    raise ApiError(415, "the body must be JSON: Content-Type: application/json")
                if charset not in ("utf-8", "utf8", "us-ascii"):
                    raise ApiError(415, "the body must be UTF-8")
            return await handle(request)

        return strict
