"""llama-server's own API: completion, tokenization, chat templates."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from jaxpaged.app.server.answering import json_response, respond
from jaxpaged.app.server.constraining import constraint_of
from jaxpaged.app.server.conversation import render
from jaxpaged.app.server.generation import Generation
from jaxpaged.app.server.native_answers import NativeAnswer
from jaxpaged.app.server.native_schema import (
    DetokenizeRequest,
    NativeRequest,
    TemplateRequest,
    TokenizeRequest,
)
from jaxpaged.app.server.prompts import check_prompt, encode_mixed
from jaxpaged.app.server.routing import StrictRoute
from jaxpaged.app.server.state import ServedModel, state_of

router = APIRouter(route_class=StrictRoute)


@router.post("/completion")
@router.post("/completions", include_in_schema=False)
async def completion(request: Request, body: NativeRequest) -> Response:
    """Continues a prompt; with several prompts or samples the response is a list."""
    state = state_of(request)
    model, _ = await state.enter(body.model)
    prompts = [await encode_mixed(model, prompt) for prompt in body.prompts]
    for ids in prompts:
        check_prompt(model, ids)
    generation = Generation(state, prompts, body, constraint=await constraint_of(model, body))
    answer = NativeAnswer(state, model, generation, body)
    return await respond(request, generation, answer, stream=body.stream)


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """The tokens of a text."""
    model, _ = await state_of(request).enter(body.model)
    ids: list[int] = []
    parts = [body.content] if isinstance(body.content, str) else body.content
    for i, part in enumerate(parts):
        if isinstance(part, int):
            ids.append(part)
        else:
            ids += await asyncio.to_thread(
                model.tokenizer.encode,
                part,
                add_special=body.add_special and i == 0,
                parse_special=body.parse_special,
            )
    if ids:
        check_prompt(model, ids)
    if not body.with_pieces:
        return json_response({"tokens": ids})
    return json_response({"tokens": [{"id": token, "piece": _piece(model, token)} for token in ids]})


def _piece(model: ServedModel, token: int) -> str | list[int]:
    data = model.tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """The text of tokens, special ones written out."""
    model, _ = await state_of(request).enter(body.model)
    if body.tokens:
        check_prompt(model, body.tokens)
    text = await asyncio.to_thread(model.tokenizer.decode, body.tokens, skip_special=False)
    return json_response({"content": text})


@router.post("/apply-template")
async def apply_template(request: Request, body: TemplateRequest) -> Response:
    """The prompt that a conversation becomes."""
    state = state_of(request)
    model, _ = await state.enter(body.model)
    return json_response({"prompt": (await render(state, model, body)).text})
