"""Prefill without sampling, for beam search and prompt lookup.

The last token of each prompt stays out of the cache: it is the first input of their loops.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxpaged.cache.interface import Cache
from jaxpaged.generation.loop import Model
from jaxpaged.generation.prompts import Prompts


def prefill(
    model: Model, chunk: int, params: Any, cache: Cache, prompts: Prompts
) -> tuple[Cache, Array, Array]:
    """Prefills all but the last token of each prompt, in order, in steps of ``chunk`` tokens.

    Returns:
      ``(cache, served bool[S], pages_peak i32[])``. A sequence that gets no page is not served: it
      is emptied, and its pages serve the others.
    """

    def step(carry: tuple[Cache, Array, Array, Array]) -> tuple[Cache, Array, Array, Array]:
        cache, done, served, pages_peak = carry
        left = jnp.where(served, prompts.lens - 1 - done, 0)
        before = jnp.cumsum(left, dtype=jnp.int32) - left
        num_new = jnp.clip(chunk - before, 0, left)
        refused = served & ~cache.can_reserve_each(num_new)
        cache, _ = cache.seq_remove(refused)
        num_new = jnp.where(refused, 0, num_new)
        cache, batch, _ = cache.reserve(num_new, num_tokens=chunk, max_new=chunk)
        row = jnp.minimum(batch.sequence, num_new.shape[0] - 1)
        column = done[row] + lax.iota(jnp.int32, chunk) - batch.cu_q_lens[row]
        tokens = prompts.tokens[row, jnp.clip(column, 0, prompts.tokens.shape[1] - 1)]
        # The logits are not used, so XLA removes their computation.
        _, cache = model(params, tokens, cache, batch, jnp.zeros(1, jnp.int32))
        return cache, done + num_new, served & ~refused, jnp.maximum(pages_peak, cache.pages_used)

    carry = (cache, jnp.zeros_like(prompts.lens), prompts.lens > 0, cache.pages_used)
    if chunk:
        carry = lax.while_loop(lambda carry: jnp.any(carry[2] & (carry[1] < prompts.lens - 1)), step, carry)
    cache, _, served, pages_peak = carry
    return cache, served, pages_peak
