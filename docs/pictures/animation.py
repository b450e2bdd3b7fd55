"""Draws animation.html beside this file, from a real cache: python docs/pictures/animation.py"""

from pathlib import Path

import jax
import jax.numpy as jnp

from jaxpaged import PagedKVCache, can_reserve, reserve, seq_copy, seq_length, seq_remove
from jaxpaged.pictures import PageMap, draw_page_map_animation

SYSTEM, TURN, MOST = 52, 20, 120
"""Tokens of the system prompt that all chats share, of a question, and of a whole chat."""


def picture() -> str:
    """Four chats begin with one system prompt, grow token by token, and end; new ones take their pages."""
    cache = PagedKVCache.create(
        num_layers=1, num_kv_heads=1, head_dim=8, num_pages=24, max_seqs=5, page_size=16, max_seq_len=192
    )
    frames: list[tuple[str, PageMap]] = []
    step = jax.jit(lambda cache, new: reserve(cache, new, num_tokens=64)[0])
    copy = jax.jit(lambda cache, chat: seq_copy(cache, 0, chat)[0])
    remove = jax.jit(lambda cache, chat: seq_remove(cache, chat)[0])

    def add(label: str) -> None:
        frames.append((label, PageMap.of(cache)))

    cache = step(cache, jnp.array([SYSTEM, 0, 0, 0, 0]))
    add("the system prompt is computed")
    waiting = [1, 2, 3, 4, 2, 1]
    for tick in range(150):
        lengths = seq_length(cache)
        for chat in range(1, 5):
            if lengths[chat] >= MOST - 8 * chat:
                cache = remove(cache, chat)
                add(f"chat {chat} ends: pages that nobody shares are free")
        chat = waiting[0] if waiting and tick % 14 == 0 else None
        if chat is not None and not seq_length(cache)[chat]:
            waiting.pop(0)
            cache = copy(cache, chat)
            add(f"chat {chat} begins: it shares the system prompt")
            cache = step(cache, jnp.zeros(5, int).at[chat].set(TURN))
            add(f"chat {chat} asks: the partly filled page is copied, the rest is new")
        lengths = seq_length(cache)
        new = (lengths > 0).astype(int).at[0].set(0)
        if not new.sum() or not can_reserve(cache, new):
            continue
        cache = step(cache, new)
        if tick % 3 == 0:
            add(f"decoding, step {tick}")
    return draw_page_map_animation(frames)


if __name__ == "__main__":
    Path(__file__).with_suffix(".html").write_text(picture(), encoding="utf-8")
