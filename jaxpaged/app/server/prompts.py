"""Token ids from texts, mixed lists and conversations."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

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
    model: ServedModel, parts: Sequence[str | int], *, add_special: bool = True, parse_special: bool = True
) -> list[int]:
    """Token ids of llama-server's mixed lists; BOS is added only to a text at the beginning."""
    ids: list[int] = []
    for i, part in enumerate(parts):
        if isinstance(part, int):
            ids.append(part)
        else:
            begins = add_special and i == 0
            ids += await encode(model, part, add_special=begins, parse_special=parse_special)
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


async def encode_chat(model: ServedModel, text: str) -> list[int]:
    """Token ids of a rendered conversation; BOS is not added if the template has written it."""
    bos = special_name(model, model.tokenizer.bos_id)
    return await encode(model, text, add_special=not (bos and text.startswith(bos)))


def special_name(model: ServedModel, token: int | None) -> str:
    """Name of a special token; "" for None."""
    return "" if token is None else model.tokenizer.token_bytes(token).decode(errors="replace")
