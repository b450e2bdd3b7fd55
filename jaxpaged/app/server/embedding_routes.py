"""Embeddings of texts, and ranks of documents for a query."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter
from jaxpaged_model.checkpoint.pooling import pooled
from starlette.requests import Request
from starlette.responses import Response

from jaxpaged.app.server.answering import json_response
from jaxpaged.app.server.connection import while_connected
from jaxpaged.app.server.embedding_schema import EmbeddingRequest, RerankRequest
from jaxpaged.app.server.errors import ApiError, as_api_error
from jaxpaged.app.server.interfaces import Runner
from jaxpaged.app.server.prompts import check_prompt, encode, encode_mixed
from jaxpaged.app.server.routing import StrictRoute
from jaxpaged.app.server.state import ServedModel, ServerState, state_of
from jaxpaged.engine.request import ContextError

router = APIRouter(route_class=StrictRoute)

_MOST_VECTORS = 16384
"""Vectors of a response without pooling."""


@router.post("/v1/embeddings")
async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
    """Vectors of texts, in OpenAI's form."""
    state = state_of(request)
    model, _ = await state.enter(body.model)
    if model.pooling == "none":
        raise ApiError(
            400, "--pooling none makes a vector for each token, which OpenAI's form has no place for"
        )
    return await while_connected(request.receive, _openai(request, body))


async def _openai(request: Request, body: EmbeddingRequest) -> Response:
    vectors, count = await _vectors(request, body)
    data = [
        {"object": "embedding", "index": i, "embedding": _encoded(vector, body.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    model, _ = state_of(request).ready()
    usage = {"prompt_tokens": count, "total_tokens": count}
    return json_response({"object": "list", "data": data, "model": model.names[0], "usage": usage})


@router.post("/embedding")
@router.post("/embeddings", include_in_schema=False)
async def native_embeddings(request: Request, body: EmbeddingRequest) -> Response:
    """Vectors of texts, in llama-server's form: a list of vectors for each text."""
    await state_of(request).enter(body.model)
    return await while_connected(request.receive, _native(request, body))


async def _native(request: Request, body: EmbeddingRequest) -> Response:
    vectors, _ = await _vectors(request, body)
    return json_response(
        [{"index": i, "embedding": np.atleast_2d(vector).tolist()} for i, vector in enumerate(vectors)]
    )


async def _vectors(request: Request, body: EmbeddingRequest) -> tuple[list[np.ndarray], int]:
    """Vectors of the texts, f32[D] or without pooling f32[T, D], and the number of their tokens."""
    state = state_of(request)
    model, runner = state.ready()
    texts = [await encode_mixed(model, text) for text in body.texts]
    for ids in texts:
        _check(model, runner, ids)
    if model.pooling == "none" and sum(map(len, texts)) > _MOST_VECTORS:
        raise ApiError(400, f"without pooling a request has at most {_MOST_VECTORS} tokens", param="input")
    if body.dimensions is not None and body.dimensions > model.embedding_size:
        raise ApiError(
            400, f"dimensions: the model's embeddings have {model.embedding_size}", param="dimensions"
        )
    vectors = []
    for ids in texts:
        hidden = await _hidden_states(state, runner, ids)
        vector = hidden if model.pooling == "none" else pooled(hidden, model.pooling)
        vector = vector[..., : body.dimensions]
        if not np.isfinite(vector).all():
            raise ApiError(
                500, "the model's hidden states are not finite: its weights, or their dtype, cannot do it"
            )
        norm = state.options.embd_normalize if body.embd_normalize is None else body.embd_normalize
        vectors.append(vector if model.pooling == "none" else _normalized(vector, norm))
    return vectors, sum(map(len, texts))


async def _hidden_states(state: ServerState, runner: Runner, ids: Sequence[int]) -> np.ndarray:
    """Hidden states of a text, f32[T, hidden_size]; counted in the metrics."""
    hidden = await runner.embed(ids)
    state.metrics.embedded_texts += 1
    state.metrics.embedded_tokens += len(ids)
    return hidden


def _check(model: ServedModel, runner: Runner, ids: Sequence[int]) -> None:
    """Checks the tokens of a text.

    Raises:
      ApiError: there are none, too many, or one outside the vocabulary.
    """
    check_prompt(model, ids)
    if len(ids) > runner.n_ctx:
        raise as_api_error(ContextError(len(ids), runner.n_ctx))


def _normalized(vector: np.ndarray, norm: int) -> np.ndarray:
    """The vector divided by a norm; by none if that is -1, or 0."""
    if norm < 0:
        return vector
    wide = np.abs(vector.astype(np.float64))
    largest = wide.max()
    if not largest:
        return vector
    # Divided by the largest first: powers of large or small numbers leave the range of numbers.
    size = largest / 32767 if norm == 0 else largest * float(((wide / largest) ** norm).sum() ** (1 / norm))
    return (vector / size).astype(np.float32)


def _encoded(vector: np.ndarray, form: str) -> Any:
    if form == "float":
        return vector.tolist()
    return base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode()


@router.post("/v1/rerank")
@router.post("/rerank", include_in_schema=False)
@router.post("/reranking", include_in_schema=False)
@router.post("/v1/reranking", include_in_schema=False)
async def rerank(request: Request, body: RerankRequest) -> Response:
    """Documents in the order of their relevance for a query."""
    model, _ = await state_of(request).enter(body.model)
    if model.reranker is None:
        raise ApiError(
            501, "this model has no head that ranks documents (one layer, cls.output, in a GGUF file)"
        )
    return await while_connected(request.receive, _ranked(request, body))


async def _ranked(request: Request, body: RerankRequest) -> Response:
    state = state_of(request)
    model, runner = state.ready()
    assert model.reranker is not None
    documents = body.texts if body.documents is None else body.documents
    assert documents is not None
    prompts = [await _pair(model, body.query, document) for document in documents]
    for ids in prompts:
        _check(model, runner, ids)
    scores = [model.reranker.score((await _hidden_states(state, runner, ids))[-1]) for ids in prompts]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[: body.top_n]
    if body.texts is not None:
        return json_response(
            [
                {"index": i, "score": scores[i]} | ({"text": documents[i]} if body.return_text else {})
                for i in order
            ]
        )
    results = [
        {"index": i, "relevance_score": scores[i]}
        | ({"document": {"text": documents[i]}} if body.return_documents else {})
        for i in order
    ]
    count = sum(map(len, prompts))
    usage = {"prompt_tokens": count, "total_tokens": count}
    return json_response({"object": "list", "model": model.names[0], "results": results, "usage": usage})


async def _pair(model: ServedModel, query: str, document: str) -> list[int]:
    """Tokens of a query and a document: in the model's template, or one behind the other, each with its end."""
    assert model.reranker is not None
    tokenizer, template = model.tokenizer, model.reranker.template
    if template is not None:
        # At once: a query may hold the name of the other place.
        texts = {"{query}": query, "{document}": document}
        text = re.sub(r"\{query\}|\{document\}", lambda match: texts[match[0]], template)
        return await encode(model, text, add_special=False)
    begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    end = [tokenizer.eos_id] if tokenizer.add_eos and tokenizer.eos_id is not None else []
    pair = [await encode(model, text, add_special=False, parse_special=False) for text in (query, document)]
    return [*begin, *pair[0], *end, *pair[1], *end]
