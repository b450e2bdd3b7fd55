"""Work for a client that may disconnect.

A web framework notices a disconnect only when it writes. A queued request, or an answer that is
sent as a whole, writes nothing for a long time, so a task here always listens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from jaxpaged.app.server.errors import ApiError

T = TypeVar("T")


class ClientGoneError(ApiError):
    """The client has disconnected; nobody reads the response."""

    def __init__(self) -> None:
        super().__init__(499, "the client is gone")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Awaits ``work``, and cancels it as soon as the client disconnects.

    Raises:
      ClientGoneError: it did.
    """
    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return await task
    finally:
        watcher.cancel()
        if task.cancel():  # its cleanup aborts the requests in the engine
            await asyncio.wait((task,))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
