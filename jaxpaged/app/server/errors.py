"""Errors of the server, with one body for all.

The body is OpenAI's, ``{"error": {"message", "type", "param", "code"}}``, with llama-server's types
and, like there, the HTTP status as code, so that clients of both understand it; under /v1/messages it
is Anthropic's.
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
_ANTHROPIC = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_MESSAGES = {404: "there is no such path", 405: "this path does not know that method"}
_LONGEST_ECHO = 100
"""Characters of client input that an error message repeats, at most."""
_RETRY_SECONDS = "1"


class ApiError(HTTPException):
    """An error response.

    Derived from FastAPI's exception, because FastAPI replaces all others that are raised while it
    reads a body.
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
        if status in (429, 503):  # OpenAI's clients wait that long before a retry
            self.headers = {"Retry-After": _RETRY_SECONDS, **(self.headers or {})}

    def body(self) -> dict[str, Any]:
        """The JSON body; in a stream, the error event."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.status_code}
        return {"error": error | self.details}

    def response(self, path: str = "") -> Response:
        """The HTTP response, in the dialect of the path that was called."""
        body = anthropic_body(self) if path.startswith(_ANTHROPIC) else self.body()
        return Response(
            dump_json(body), self.status_code, headers=self.headers, media_type="application/json"
        )


def anthropic_body(error: ApiError) -> dict[str, Any]:
    """The JSON body of an error in Anthropic's API."""
    kind = _ANTHROPIC_TYPES.get(
        error.status_code, "invalid_request_error" if error.status_code < 500 else "api_error"
    )
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": None}


def clipped(text: str) -> str:
    """Client input, shortened for a message."""
    return text if len(text) <= _LONGEST_ECHO else text[:_LONGEST_ECHO] + "..."


def as_api_error(error: RefusedError | EngineFailedError) -> ApiError:
    """Converts an error of the engine."""
    if isinstance(error, ContextError):
        return ApiError(
            400,
            f"the prompt of {error.num_prompt} tokens exceeds the available context size ({error.n_ctx} tokens); "
            f"it fits {error.n_ctx - 1} and one to generate",
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
    """Converts the first validation error of a schema, with the parameter's name."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    name = clipped(".".join(place)) or None
    match first["type"]:
        case "extra_forbidden":
            message = f"unknown parameter: {name!r}"
        case "missing":
            message = f"missing parameter: {name!r}" if name else "the request has no body"
        case "value_error":  # raised by our validators; pydantic would add a prefix
            message = str(first["ctx"]["error"])
        case _:
            message = f"{name or 'the body'}: {clipped(first['msg'])}"
    return ApiError(400, message, param=name)


async def handle_refused(request: Request, error: Exception) -> Response:
    """Handles ``RefusedError`` and ``EngineFailedError``."""
    assert isinstance(error, RefusedError | EngineFailedError)
    return as_api_error(error).response(request.url.path)


async def handle_validation(request: Request, error: Exception) -> Response:
    """Handles FastAPI's validation error, as 400 instead of 422: OpenAI's clients expect that."""
    assert isinstance(error, RequestValidationError)
    return of_validation(error.errors()).response(request.url.path)


async def handle_http(request: Request, error: Exception) -> Response:
    """Handles ``ApiError``, and Starlette's errors for unknown paths and methods."""
    assert isinstance(error, StarletteHTTPException)
    if not isinstance(error, ApiError):
        message = _MESSAGES.get(error.status_code, str(error.detail))
        error = ApiError(error.status_code, message, headers=error.headers)
    return error.response(request.url.path)


async def handle_bug(request: Request, error: Exception) -> Response:
    """Handles all other exceptions: the traceback goes to the log, not to the client."""
    return ApiError(500, "internal error").response(request.url.path)
