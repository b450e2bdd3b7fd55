"""Draws page_map.svg beside this file: python docs/pictures/page_map.py"""

from pathlib import Path

import jax.numpy as jnp

from jaxpaged import PagedKVCache, draw_page_map, reserve, seq_copy, seq_remove


def picture() -> str:
    """A prompt with three forks that are continued, one with a hole, and another sequence."""
    cache = PagedKVCache.create(
        num_layers=1, num_kv_heads=1, head_dim=8, num_pages=48, max_seqs=5, page_size=16
    )
    cache, _, _ = reserve(cache, jnp.array([118, 0, 0, 0, 0]))
    for fork in (1, 2, 3):
        cache, _ = seq_copy(cache, 0, fork)
    # The last page of the prompt is partly filled: each fork that writes to it gets a copy, the
    # last one keeps it.
    cache, _, _ = reserve(cache, jnp.array([37, 20, 5, 52, 41]))
    cache, _ = seq_remove(cache, 3, 22, 86)
    cache, _ = seq_remove(cache, 4, 12, 36)
    return draw_page_map(cache)


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture(), encoding="utf-8")
