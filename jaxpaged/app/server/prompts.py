"""Token ids from texts, mixed lists and conversations."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from jaxpaged_model.text.chat import ChatTemplateError, render_chat

from jaxpaged.app.server.chat_schema import TemplateFields
from jaxpaged.app.server.errors import ApiError
from jaxpaged.app.server.state import ServedModel


async def encode(
    model: ServedModel, text: str, *, add_special: bool = True, parse_special: bool = True
) -> list[int]:
    """Token ids of a prompt, computed in a thread: a long text takes seconds."""
    tokenizer = model.tokenizer
    ids = await asyncio.to_thread(
        tokenizer.encode, text, add_special=add_special, parse_special=parse_special
    )
    # Without the end-of-text token: the model is to continue.
    return ids[:-1] if add_special and tokenizer.add_eos and ids else ids


async def encode_mixed(
    model: ServedModel, parts: Sequence[str | int], *, add_special: bool = True
) -> list[int]:
    """Token ids of llama-server's mixed lists; BOS is added only to a text at the beginning."""
    ids: list[int] = []
    for i, part in enumerate(parts):
        if isinstance(part, int):
            ids.append(part)
        else:
            ids += await encode(model, part, add_special=add_special and i == 0)
    return ids


def check_prompt(model: ServedModel, ids: Sequence[int]) -> None:
    """Checks a prompt.

    Raises:
      ApiError: the prompt is empty, or has a token outside the vocabulary.
    """
    if not ids:
        raise ApiError(400, "the prompt is empty, and this model has no BOS token", param="prompt")
    size = model.tokenizer.vocab_size
    if max(ids) >= size or min(ids) < 0:
        wrong = next(token for token in ids if not 0 <= token < size)
        raise ApiError(
            400, f"prompt: token {wrong} is outside the vocabulary of {size} tokens", param="prompt"
        )


async def chat_text(model: ServedModel, body: TemplateFields) -> str:
    """The prompt of a conversation. An assistant's message at the end is continued.

    Raises:
      ApiError: the chat template refuses the messages.
    """
    arguments: dict[str, Any] = dict(body.chat_template_kwargs or {})
    add_generation_prompt = arguments.pop("add_generation_prompt", body.add_generation_prompt is not False)
    messages, begun = [message.plain() for message in body.messages], ""
    continues = body.continue_final_message
    if continues is None:
        continues = add_generation_prompt and messages[-1]["role"] == "assistant"
    if continues:
        add_generation_prompt = True
        begun = messages.pop()["content"]
        if not messages or messages[-1]["role"] == "assistant":
            raise ApiError(
                400, "messages: nothing to answer before the assistant's last one", param="messages"
            )
    try:
        text = await asyncio.to_thread(
            render_chat,
            model.chat_template,
            messages,
            bos_token=_name(model, model.tokenizer.bos_id),
            eos_token=_name(model, model.tokenizer.eos_id),
            add_generation_prompt=add_generation_prompt,
            **arguments,
        )
    except ChatTemplateError as error:
        raise ApiError(400, str(error)[:500], param="messages") from None
    return text + begun


async def encode_chat(model: ServedModel, text: str) -> list[int]:
    """Token ids of ``chat_text``; BOS is not added if the template has written it."""
    bos = _name(model, model.tokenizer.bos_id)
    return await encode(model, text, add_special=not (bos and text.startswith(bos)))


def _name(model: ServedModel, token: int | None) -> str:
    return "" if token is None else model.tokenizer.token_bytes(token).decode(errors="replace")
