"""Requests for embeddings and for ranks of documents."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from jaxpaged.app.server.foreign import joined_text
from jaxpaged.app.server.sampling_schema import StrictModel, TokenId

MAX_TEXTS = 2048
"""Texts of a request, at most."""
MAX_NORM = 64
"""Largest p of a p-norm."""

_Mixed = Annotated[list[str | TokenId], Field(min_length=1)]
_Text = str | _Mixed | dict[str, Any]
_Texts = Annotated[list[_Text], Field(min_length=1, max_length=MAX_TEXTS)]


class EmbeddingRequest(StrictModel):
    """``POST /v1/embeddings``, and llama-server's own forms of it."""

    input: str | _Mixed | _Texts | dict[str, Any] | None = None
    content: str | _Mixed | _Texts | dict[str, Any] | None = None
    """llama-server's name of the same."""
    model: Annotated[str | None, Field(max_length=1024)] = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int | None, Field(ge=1)] = None
    """Dimensions that are kept, the first ones."""
    embd_normalize: Annotated[int | None, Field(ge=-1, le=MAX_NORM)] = None
    user: Annotated[str | None, Field(max_length=1024)] = None

    @model_validator(mode="after")
    def _one_input(self) -> EmbeddingRequest:
        if (self.input is None) == (self.content is None):
            raise ValueError("input: give a text, tokens, or a list of them")
        _ = self.texts
        return self

    @property
    def texts(self) -> list[list[str | int]]:
        """The texts, as lists of words and tokens."""
        given = self.content if self.input is None else self.input
        many = isinstance(given, list) and not any(isinstance(part, int) for part in given)
        return [_mixed(one) for one in (given if many and isinstance(given, list) else [given])]


def _mixed(text: Any) -> list[str | int]:
    if isinstance(text, dict):
        if isinstance(text.get("prompt_string"), str):
            return [text["prompt_string"]]
        parts = text.get("content")
        if not isinstance(parts, list) or not parts:
            raise ValueError("input: an object has prompt_string, or content with parts of text")
        return ["".join(joined_text([part], "input") for part in parts)]
    return list(text) if isinstance(text, list) else [text]


class RerankRequest(StrictModel):
    """``POST /v1/rerank``; with ``texts`` in the form of Hugging Face's text-embeddings-inference."""

    query: str
    documents: Annotated[list[str] | None, Field(min_length=1, max_length=MAX_TEXTS)] = None
    texts: Annotated[list[str] | None, Field(min_length=1, max_length=MAX_TEXTS)] = None
    model: Annotated[str | None, Field(max_length=1024)] = None
    top_n: Annotated[int | None, Field(ge=1)] = None
    return_text: bool = False
    return_documents: bool = False

    @model_validator(mode="after")
    def _one_list(self) -> RerankRequest:
        if (self.documents is None) == (self.texts is None):
            raise ValueError("documents: give a list of at least one text")
        return self


class InfillChunk(StrictModel):
    """A part of another file, for context."""

    text: str
    filename: str = "tmp"
