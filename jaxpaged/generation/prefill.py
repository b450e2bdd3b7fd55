"""Reading prompts into a cache without sampling: what beam search and lookup decoding begin with.

The last token of each prompt stays out of the cache: it is the first one that their loops compute.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxpaged.generation.loop import Cache, Model
from jaxpaged.generation.prompts import Prompts


def prefill(
    model: Model, chunk: int, params: Any, cache: Cache, prompts: Prompts
) -> tuple[Cache, Array, Array]:
    """Computes all but the last token of each prompt, sequence after sequence, in steps of ``chunk`` tokens.

    Returns:
      ``(cache, served bool[S], pages_peak i32[])``. A sequence that finds no free page is not served: it is emptied
      and its pages serve the others.
    """

    def step(carry: tuple[Cache, Array, Array, Array]) -> tuple[Cache, Array, Array, Array]:
        cache, read, served, pages_peak = carry
        remaining = jnp.where(served, prompts.lens - 1 - read, 0)
        before = jnp.cumsum(remaining) - remaining
        take = jnp.clip(chunk - before, 0, remaining)
        refused = served & ~cache.can_reserve_each(take)
        cache = jax.lax.cond(jnp.any(refused), lambda c: c.seq_remove(refused)[0], lambda c: c, cache)
        take = jnp.where(refused, 0, take)
        cache, batch, _ = cache.reserve(take, num_tokens=chunk, max_new=chunk)
        row = jnp.minimum(batch.sequence, take.shape[0] - 1)
        column = read[row] + jnp.arange(chunk, dtype=jnp.int32) - batch.cu_q_lens[row]
        tokens = prompts.tokens[row, jnp.clip(column, 0, prompts.tokens.shape[1] - 1)]
        # One row, because a model gives logits; nobody reads them, and XLA leaves them out.
        _, cache = model(params, tokens, cache, batch, jnp.zeros(1, jnp.int32))
        return cache, read + take, served & ~refused, jnp.maximum(pages_peak, cache.pages_used)

    carry = (cache, jnp.zeros_like(prompts.lens), prompts.lens > 0, cache.pages_used)
    if chunk:
        carry = jax.lax.while_loop(
            lambda carry: jnp.any(carry[2] & (carry[1] < prompts.lens - 1)), step, carry
        )
    cache, _, served, pages_peak = carry
    return cache, served, pages_peak
