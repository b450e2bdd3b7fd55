"""What the server refuses, and the one body that every refusal has.

The body is OpenAI's, ``{"error": {"message", "type", "param", "code"}}``, with llama-server's types and its habit of
repeating the HTTP status as the code: clients of both read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import HTTPException, RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import Request
from starlette.responses import Response

from jaxpaged.app.server.encoding import dump_json
from jaxpaged.app.server.runner import EngineFailedError
from jaxpaged.engine.request import ContextError, QueueFullError, RefusedError, SlotBusyError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    501: "not_supported_error",
    503: "unavailable_error",
}
_MESSAGES = {404: "there is no such path", 405: "this path does not know that method"}
_LONGEST_ECHO = 100
"""Characters of a client's own words that an error repeats."""
_RETRY_SECONDS = "1"


class ApiError(HTTPException):
    """A request that is answered with an error.

    It is FastAPI's exception, because FastAPI turns every other one that comes up while a body is read into its own.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
        **details: Any,
    ) -> None:
        super().__init__(status, message, headers=dict(headers or {}))
        self.message, self.param, self.details = message, param, details
        self.type = type or _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        if status in (429, 503):  # what the OpenAI clients wait before they try again
            self.headers = {"Retry-After": _RETRY_SECONDS, **(self.headers or {})}

    def body(self) -> dict[str, Any]:
        """What the client gets, also in the middle of a stream."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.status_code}
        return {"error": error | self.details}

    def response(self) -> Response:
        """The same as an answer of its own."""
        return Response(
            dump_json(self.body()), self.status_code, headers=self.headers, media_type="application/json"
        )


def clipped(text: str) -> str:
    """A client's words, short enough to be repeated to it."""
    return text if len(text) <= _LONGEST_ECHO else text[:_LONGEST_ECHO] + "..."


def as_api_error(error: RefusedError | EngineFailedError) -> ApiError:
    """What the engine says, in HTTP's terms."""
    if isinstance(error, ContextError):
        return ApiError(
            400,
            f"the prompt of {error.num_prompt} tokens exceeds the available context size ({error.n_ctx} tokens); "
            f"there is room for {error.n_ctx - 1} and one to generate",
            type="exceed_context_size_error",
            n_prompt_tokens=error.num_prompt,
            n_ctx=error.n_ctx,
        )
    if isinstance(error, QueueFullError | SlotBusyError):
        return ApiError(429, str(error))
    if isinstance(error, RefusedError):
        return ApiError(400, clipped(str(error)) if len(str(error)) > 500 else str(error))
    return ApiError(503, "the engine has failed and takes no more requests")


def of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of the things that a schema found wrong, with the parameter's name."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    name = clipped(".".join(place)) or None
    match first["type"]:
        case "extra_forbidden":
            message = f"unknown parameter: {name!r}"
        case "missing":
            message = f"missing parameter: {name!r}" if name else "the request has no body"
        case "value_error":  # a validator of ours; pydantic puts its own words before
            message = str(first["ctx"]["error"])
        case _:
            message = f"{name or 'the body'}: {clipped(first['msg'])}"
    return ApiError(400, message, param=name)


async def handle_refused(_: Request, error: Exception) -> Response:
    """Of a ``RefusedError`` or an ``EngineFailedError``."""
    assert isinstance(error, RefusedError | EngineFailedError)
    return as_api_error(error).response()


async def handle_validation(_: Request, error: Exception) -> Response:
    """Of FastAPI's own error, which would be 422: OpenAI's clients expect 400."""
    assert isinstance(error, RequestValidationError)
    return of_validation(error.errors()).response()


async def handle_http(_: Request, error: Exception) -> Response:
    """Of an ``ApiError``, and of what Starlette raises for paths and methods that are not there."""
    assert isinstance(error, StarletteHTTPException)
    if not isinstance(error, ApiError):
        message = _MESSAGES.get(error.status_code, str(error.detail))
        error = ApiError(error.status_code, message, headers=error.headers)
    return error.response()


async def handle_bug(_: Request, error: Exception) -> Response:
    """Of anything else: the traceback goes to the log, not to the client."""
    return ApiError(500, "internal error").response()
