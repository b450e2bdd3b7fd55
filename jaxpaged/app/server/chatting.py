"""A chat request on its way into the engine."""

from __future__ import annotations

from dataclasses import dataclass

from jaxpaged.app.server.blocks import ChatText
from jaxpaged.app.server.constraining import chat_constraint, marker_tokens
from jaxpaged.app.server.conversation import encode_conversation, render
from jaxpaged.app.server.generation import Generation
from jaxpaged.app.server.openai_schema import ChatRequest
from jaxpaged.app.server.state import ServedModel, ServerState


@dataclass(frozen=True)
class Chat:
    """A generation whose text is parsed."""

    model: ServedModel
    generation: Generation
    texts: list[ChatText]
    """One a choice."""


async def begin_chat(state: ServerState, body: ChatRequest) -> Chat:
    """Renders a conversation, and makes its generation, which is not started yet.

    Raises:
      ApiError: messages, tools or a schema that cannot be served.
    """
    model, _ = await state.enter(body.model)
    conversation = await render(state, model, body)
    ids = await encode_conversation(model, conversation)
    constraint = await chat_constraint(state, model, body, conversation)
    visible = frozenset(
        tokens[0]
        for marker in conversation.format.special_markers
        if len(tokens := marker_tokens(model.tokenizer, marker)) == 1
    )
    generation = Generation(state, [ids], body, constraint=constraint, visible=visible)
    texts = [ChatText(conversation.parser(body, state.options.reasoning_format)) for _ in generation.choices]
    return Chat(model, generation, texts)


async def count_tokens(state: ServerState, body: ChatRequest) -> int:
    """Tokens of a conversation's prompt."""
    model, _ = await state.enter(body.model)
    return len(await encode_conversation(model, await render(state, model, body)))
