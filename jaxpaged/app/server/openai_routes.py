"""OpenAI's API: completions and chat."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from jaxpaged.app.server.answering import EventStream, event, json_response, while_connected
from jaxpaged.app.server.errors import ApiError
from jaxpaged.app.server.generation import Generation, Job, Update
from jaxpaged.app.server.openai_answers import Answer, ChatAnswer, CompletionAnswer
from jaxpaged.app.server.openai_schema import ChatRequest, CompletionRequest, OpenAIFields
from jaxpaged.app.server.prompts import chat_text, check_prompt, encode, encode_chat
from jaxpaged.app.server.routing import StrictRoute
from jaxpaged.app.server.sampling_schema import bias_of, engine_request, seed_of
from jaxpaged.app.server.state import ServedModel, ServerState, state_of

router = APIRouter(route_class=StrictRoute)
_DONE = b"data: [DONE]\n\n"


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continues one prompt or several."""
    state = state_of(request)
    model, _ = state.accepting()
    prompts = await _prompts(model, body.prompt)
    echoes: list[str] = []
    if body.echo:
        texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        echoes = [
            text if isinstance(text, str) else model.tokenizer.decode(ids, skip_special=False)
            for text, ids in zip(texts if isinstance(texts[0], str) else prompts, prompts, strict=True)
        ]
    return await _answer(
        request,
        body,
        prompts,
        num_logprobs=body.logprobs,
        answer=lambda generation: CompletionAnswer(
            state, model, generation, f"cmpl-{secrets.token_hex(16)}", int(time.time()), body, echoes=echoes
        ),
    )


@router.post("/v1/chat/completions")
@router.post("/chat/completions", include_in_schema=False)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answers a conversation."""
    state = state_of(request)
    model, _ = state.accepting()
    ids = await _chat_prompt(model, body)
    return await _answer(
        request,
        body,
        [ids],
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        answer=lambda generation: ChatAnswer(
            state, model, generation, f"chatcmpl-{secrets.token_hex(16)}", int(time.time()), body
        ),
    )


@router.post("/v1/chat/completions/input_tokens")
@router.post("/chat/completions/input_tokens", include_in_schema=False)
async def input_tokens(request: Request, body: ChatRequest) -> Response:
    """Counts the tokens of a conversation."""
    model, _ = state_of(request).ready()
    return json_response(
        {"object": "response.input_tokens", "input_tokens": len(await _chat_prompt(model, body))}
    )


async def _chat_prompt(model: ServedModel, body: ChatRequest) -> list[int]:
    ids = await encode_chat(model, await chat_text(model, body))
    check_prompt(model, ids)
    return ids


async def _prompts(model: ServedModel, given: Any) -> list[list[int]]:
    """Token ids of each prompt, from any of the four formats."""
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    prompts = [await encode(model, one) if isinstance(one, str) else list(one) for one in given]
    for ids in prompts:
        check_prompt(model, ids)
    return prompts


async def _answer(
    request: Request,
    body: OpenAIFields,
    prompts: Sequence[Sequence[int]],
    *,
    num_logprobs: int | None,
    answer: Callable[[Generation], Answer],
) -> Response:
    state = state_of(request)
    model, runner = state.accepting()
    seed = seed_of(body, state.options)
    n = body.n or 1
    job = Job(
        prompts,
        n,
        lambda request_id, ids: engine_request(
            request_id,
            ids,
            body,
            state.options,
            model.tokenizer,
            max_new_tokens=body.limit,
            n=n,
            seed=seed,
            num_logprobs=num_logprobs,
            logit_bias=bias_of((body.logit_bias or {}).items(), model.tokenizer, text=False),
            stops=body.stops,
        ),
        body.stops,
    )
    generation = Generation(state, model.tokenizer, runner, job)
    shape = answer(generation)
    if not body.stream:
        return await while_connected(request, _whole(generation, shape))
    await generation.start()
    return EventStream(_events(state, generation, shape, body.include_usage), generation.close)


async def _whole(generation: Generation, answer: Answer) -> Response:
    try:
        await generation.start()
        updates: list[Update] = [update async for update in generation.updates()]
        return json_response(answer.whole(updates))
    finally:
        generation.close()


async def _events(
    state: ServerState, generation: Generation, answer: Answer, include_usage: bool
) -> AsyncIterator[bytes]:
    def encoded(chunk: dict[str, Any]) -> bytes:
        return event(chunk | {"usage": None} if include_usage else chunk)

    try:
        for chunk in answer.opening():
            yield encoded(chunk)
        async for update in generation.updates():
            for chunk in answer.chunks(update):
                yield encoded(chunk)
        if include_usage:
            yield event(answer.usage_chunk())
    except ApiError as error:  # the status is sent already
        state.metrics.errors.labels(str(error.status_code)).inc()
        yield event(error.body())
    yield _DONE
