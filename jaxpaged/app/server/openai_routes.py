"""OpenAI's API: completions and chat."""

from __future__ import annotations

import secrets
import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from jaxpaged.app.server.answering import json_response, respond
from jaxpaged.app.server.chatting import begin_chat, count_tokens
from jaxpaged.app.server.constraining import constraint_of
from jaxpaged.app.server.generation import Generation
from jaxpaged.app.server.openai_answers import ChatAnswer, CompletionAnswer
from jaxpaged.app.server.openai_schema import ChatRequest, CompletionRequest
from jaxpaged.app.server.prompts import check_prompt, encode
from jaxpaged.app.server.routing import StrictRoute
from jaxpaged.app.server.state import ServedModel, state_of

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continues one prompt or several."""
    state = state_of(request)
    model, _ = await state.enter(body.model)
    prompts = await _prompts(model, body.prompt)
    echoes: list[str] = []
    if body.echo:
        texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        echoes = [
            text if isinstance(text, str) else model.tokenizer.decode(ids, skip_special=False)
            for text, ids in zip(texts if isinstance(texts[0], str) else prompts, prompts, strict=True)
        ]
    generation = Generation(state, prompts, body, constraint=await constraint_of(model, body))
    answer_id = f"cmpl-{secrets.token_hex(16)}"
    answer = CompletionAnswer(state, model, generation, answer_id, int(time.time()), body, echoes=echoes)
    return await respond(request, generation, answer, stream=bool(body.stream))


@router.post("/v1/chat/completions")
@router.post("/chat/completions", include_in_schema=False)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answers a conversation."""
    state = state_of(request)
    chat = await begin_chat(state, body)
    answer_id = f"chatcmpl-{secrets.token_hex(16)}"
    answer = ChatAnswer(
        state, chat.model, chat.generation, answer_id, int(time.time()), body, texts=chat.texts
    )
    return await respond(request, chat.generation, answer, stream=bool(body.stream))


@router.post("/v1/chat/completions/input_tokens")
@router.post("/chat/completions/input_tokens", include_in_schema=False)
async def input_tokens(request: Request, body: ChatRequest) -> Response:
    """Counts the tokens of a conversation."""
    count = await count_tokens(state_of(request), body)
    return json_response({"object": "response.input_tokens", "input_tokens": count})


async def _prompts(model: ServedModel, given: Any) -> list[list[int]]:
    """Token ids of each prompt, from any of the four formats."""
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    prompts = [await encode(model, one) if isinstance(one, str) else list(one) for one in given]
    for ids in prompts:
        check_prompt(model, ids)
    return prompts
