"""A conversation as the model reads it, with the format and the constraint of its answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

from jaxpaged_model.text.answer_parser import AnswerParser
from jaxpaged_model.text.chat import ChatTemplateError, render_chat
from jaxpaged_model.text.chat_format import ChatFormat
from jaxpaged_model.text.tools_as_text import TEMPLATE, write_tools

from jaxpaged.app.server.chat_schema import TemplateFields, merged_system, without_system
from jaxpaged.app.server.errors import ApiError
from jaxpaged.app.server.openai_schema import ChatRequest
from jaxpaged.app.server.prompts import check_prompt, encode_chat, special_name
from jaxpaged.app.server.state import ServedModel, ServerState


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation."""

    text: str
    """The prompt, special tokens written out."""
    format: ChatFormat
    tools: list[dict[str, Any]]

    def parser(self, body: ChatRequest, default_format: str) -> AnswerParser:
        """A parser of one answer."""
        return self.format.parser(
            tools=self.tools if body.tool_choice != "none" else [],
            prompt=self.text,
            reasoning=(body.reasoning_format or default_format) != "none",
        )


def thinks(state: ServerState, body: TemplateFields) -> bool | None:
    """True or False if the request, or the server, asks for thoughts or for none; None = the template decides."""
    asked = (body.chat_template_kwargs or {}).get("enable_thinking")
    if isinstance(asked, bool):
        return asked
    budget = getattr(body, "reasoning_budget", None)
    budget = state.options.reasoning_budget if budget is None else budget
    if body.reasoning_effort == "none" or budget == 0:
        return False
    return {"on": True, "off": False}.get(state.options.reasoning)


async def render(state: ServerState, model: ServedModel, body: TemplateFields) -> Conversation:
    """Renders a conversation. An assistant's message at the end is continued.

    Raises:
      ApiError: the chat template refuses the messages.
    """
    return await asyncio.to_thread(_render, state, model, body)


def _render(state: ServerState, model: ServedModel, body: TemplateFields) -> Conversation:
    arguments: dict[str, Any] = dict(body.chat_template_kwargs or {})
    add_generation_prompt = arguments.pop("add_generation_prompt", body.add_generation_prompt is not False)
    messages, begun = merged_system([message.plain() for message in body.messages]), ""
    continues = body.continue_final_message
    if continues is None:
        continues = (
            add_generation_prompt
            and messages[-1]["role"] == "assistant"
            and not messages[-1].get("tool_calls")
        )
    if continues:
        add_generation_prompt = True
        begun = messages.pop()["content"]
        if not messages or messages[-1]["role"] == "assistant":
            raise ApiError(
                400, "messages: nothing to answer before the assistant's last one", param="messages"
            )
    thinking = thinks(state, body)
    if thinking is not None:  # DeepSeek's templates call it thinking
        arguments |= {"enable_thinking": thinking, "thinking": thinking}
    if body.reasoning_effort not in (None, "none"):
        arguments.setdefault("reasoning_effort", body.reasoning_effort)
    names: dict[str, Any] = {
        "bos_token": special_name(model, model.tokenizer.bos_id),
        "eos_token": special_name(model, model.tokenizer.eos_id),
    }
    chat_format = ChatFormat.derive(model.chat_template, **names)
    tools = given = body.plain_tools
    called = any(message.get("tool_calls") or message["role"] == "tool" for message in messages)
    if (tools or called) and chat_format.calls is None and not chat_format.is_harmony:
        messages, given = write_tools(messages, tools), []
        chat_format = replace(chat_format, calls=ChatFormat.derive(TEMPLATE).calls)
    if given:
        arguments["tools"] = given

    def rendered(messages: list[dict[str, Any]]) -> str:
        return render_chat(
            model.chat_template,
            chat_format.messages(messages),
            add_generation_prompt=add_generation_prompt,
            **names,
            **arguments,
        )

    try:
        try:
            text = rendered(messages)
        except ChatTemplateError:
            if all(message["role"] != "system" for message in messages):
                raise
            # Some templates know no instructions, or one at the beginning.
            text = rendered(without_system(messages))
    except ChatTemplateError as error:
        raise ApiError(400, str(error)[:500], param="messages") from None
    return Conversation(text + begun, chat_format, tools)


async def encode_conversation(model: ServedModel, conversation: Conversation) -> list[int]:
    """Token ids of a conversation.

    Raises:
      ApiError: it has none.
    """
    ids = await encode_chat(model, conversation.text)
    check_prompt(model, ids)
    return ids
