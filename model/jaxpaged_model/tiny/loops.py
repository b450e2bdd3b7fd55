"""Unlikelihood training against loops: the embedded model's greedy texts must not repeat themselves for ever.

A language model that is trained on likelihood alone falls into loops when the likeliest token is taken every time.
Sequence-level unlikelihood (Welleck et al., "Neural Text Generation with Unlikelihood Training", 2019) lets the model
continue texts greedily, and lowers the probability of the tokens that repeat. Here those of loops alone are lowered:
code repeats names and lines for good reasons, but seldom the same tokens three times in a row.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpaged import PagedKVCache, generate
from jaxpaged_model.config import ModelConfig
from jaxpaged_model.llama import functional

LONGEST_PERIOD = 48
SHORTEST_LOOP = 12


def loop_tokens(tokens: np.ndarray) -> np.ndarray:
    """Marks the tokens of loops: bool of the shape of ``tokens``, i32[..., N], a row each.

    A token is in a loop if, for a period of up to ``LONGEST_PERIOD`` tokens, it and those before it are what was there
    a period earlier, for two periods and at least ``SHORTEST_LOOP`` tokens.
    """
    count = tokens.shape[-1]
    marked = np.zeros(tokens.shape, bool)
    for period in range(1, min(LONGEST_PERIOD, count - 1) + 1):
        same = tokens[..., period:] == tokens[..., :-period]
        position = np.arange(count - period)
        last_change = np.maximum.accumulate(np.where(same, -1, position), axis=-1)
        marked[..., period:] |= position - last_change >= max(2 * period, SHORTEST_LOOP)
    return marked


def continuations(config: ModelConfig, params: Any, prompts: np.ndarray, num_new: int) -> np.ndarray:
    """Greedy continuations of ``prompts``, i32[B, P]: i32[B, P + num_new], the prompts in front."""
    count, length = prompts.shape
    spec = {**config.cache_spec, "page_size": 32}
    pages = count * -(-(length + num_new) // 32)
    cache = PagedKVCache.create(**spec, num_pages=pages, max_seqs=count)
    result, _ = generate(
        functional(config),
        params,
        cache,
        jnp.asarray(prompts),
        prompt_lens=jnp.full(count, length),
        max_new_tokens=num_new,
    )
    return np.concatenate([prompts, np.asarray(result.tokens)[:, :num_new]], axis=1)


def unlikelihood(log_probs: Array, marked: Array) -> Array:
    """Mean of ``-log(1 - p)`` over the marked tokens, f32[]; 0 without any.

    Args:
      log_probs: of the tokens, f32[B, N].
      marked: bool[B, N].
    """
    losses = -jnp.log1p(-jnp.minimum(jnp.exp(log_probs), 1 - 1e-5))
    return jnp.where(marked, losses, 0.0).sum() / jnp.maximum(marked.sum(), 1)
