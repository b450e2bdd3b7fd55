"""The APIs that agents speak beside OpenAI's chat: ``/v1/responses`` and Anthropic's ``/v1/messages``."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from jaxpaged.app.server.answering import json_response, respond
from jaxpaged.app.server.chatting import begin_chat, count_tokens
from jaxpaged.app.server.messages_answers import MessagesAnswer
from jaxpaged.app.server.messages_schema import CountRequest, MessagesRequest
from jaxpaged.app.server.responses_answers import ResponsesAnswer
from jaxpaged.app.server.responses_schema import ResponsesRequest
from jaxpaged.app.server.routing import StrictRoute
from jaxpaged.app.server.state import state_of

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/responses")
@router.post("/responses", include_in_schema=False)
async def responses(request: Request, body: ResponsesRequest) -> Response:
    """Answers a conversation, in OpenAI's newer API; nothing is stored."""
    chat = await begin_chat(state_of(request), body.chat())
    answer = ResponsesAnswer(chat.model, chat.generation, int(time.time()), body, chat.texts[0])
    return await respond(request, chat.generation, answer, stream=bool(body.stream))


@router.post("/v1/responses/input_tokens")
@router.post("/responses/input_tokens", include_in_schema=False)
async def responses_input_tokens(request: Request, body: ResponsesRequest) -> Response:
    """Counts the tokens of a conversation."""
    count = await count_tokens(state_of(request), body.chat())
    return json_response({"object": "response.input_tokens", "input_tokens": count})


@router.post("/v1/messages")
async def messages(request: Request, body: MessagesRequest) -> Response:
    """Answers a conversation, in Anthropic's API."""
    chat = await begin_chat(state_of(request), body.chat())
    answer = MessagesAnswer(chat.model, chat.generation, chat.texts[0])
    return await respond(request, chat.generation, answer, stream=bool(body.stream))


@router.post("/v1/messages/count_tokens")
async def messages_count_tokens(request: Request, body: CountRequest) -> Response:
    """Counts the tokens of a conversation."""
    return json_response({"input_tokens": await count_tokens(state_of(request), body.chat())})
