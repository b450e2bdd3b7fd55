"""Requests of other APIs, converted into chat requests."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from jaxpaged.app.server.errors import ApiError, of_validation
from jaxpaged.app.server.openai_schema import ChatRequest

_TEXTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "summary_text": "text",
    "reasoning_text": "text",
}
"""Types of parts with text, and the field that has it."""


class Lenient(BaseModel):
    """Strict types, but unknown names are ignored: agents send what only the official server knows."""

    model_config = ConfigDict(strict=True, extra="ignore")


def as_chat_request(fields: dict[str, Any]) -> ChatRequest:
    """A chat request of these fields.

    Raises:
      ApiError: they are none.
    """
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise of_validation(error.errors()) from None


def joined_text(parts: Any, place: str) -> str:
    """The text of content parts, on separate lines.

    Raises:
      ApiError: a part that is no text.
    """
    if not isinstance(parts, list):
        raise ApiError(400, f"{place}: it is neither a text nor a list of parts", param=place.split("[")[0])
    texts = []
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in _TEXTS and isinstance(part.get(_TEXTS[kind]), str):
            texts.append(part[_TEXTS[kind]])
        else:
            image = ", image input is not supported" if "image" in str(kind) else ""
            raise ApiError(
                400,
                f"{place}[{i}]: only text is supported, not {str(kind)[:100]!r}{image}",
                param=place.split("[")[0],
            )
    return "\n".join(texts)
