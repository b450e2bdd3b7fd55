"""Reading prompts into a cache without sampling: what beam search and lookup decoding begin with.

The last token of each prompt stays out of the cache: it is the first one that their loops compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpaged.generation import Cache, Model


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompts:
    """Prompts as arrays, so that others never recompile; a row a sequence, S = max_seqs of the cache."""

    tokens: Array
    """i32[S, longest prompt, padded]"""
    lens: Array
    """i32[S]: 0 = no prompt."""

    @property
    def last_tokens(self) -> Array:
        """i32[S]: the last token of each prompt; arbitrary where there is none."""
        return self.tokens[jnp.arange(self.lens.shape[0]), jnp.maximum(self.lens - 1, 0)]


@dataclass(frozen=True)
class PrefillShape:
    """The static sizes of a prefill."""

    chunk: int
    """Tokens of one step; 0 = all of it is shorter than a step."""
    tail: int
    """Tokens of the last, shorter step; 0 = there is none."""


def bucket(count: int) -> int:
    """The next power of two, or one and a half of one: few compiled shapes, a third of padding at most."""
    size = 8
    while size < count:
        if size * 3 // 2 >= count:
            return size * 3 // 2
        size *= 2
    return size


def pack_prompts(
    prompts: Sequence[Sequence[int]], *, max_seqs: int, stride: int = 1, batch_size: int
) -> tuple[Prompts, PrefillShape]:
    """Prompts as arrays, checked on the host.

    Args:
      prompts: token ids, none empty.
      max_seqs: S.
      stride: prompt i is for sequence ``i * stride``.
      batch_size: tokens of a prefill step.

    Raises:
      ValueError: no prompt or too many, an empty prompt, a negative id, a ``batch_size`` below 1.
    """
    most = max_seqs // stride
    if not 1 <= len(prompts) <= most:
        each = "" if stride == 1 else f" / {stride} sequences each"
        raise ValueError(f"prompts must be 1 to {most} (max_seqs = {max_seqs}{each}), got {len(prompts)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty: it needs at least one token")
        if min(prompt) < 0:
            raise ValueError(f"prompt {i} holds a negative token id, {min(prompt)}")
    lens = np.zeros(max_seqs, np.int32)
    tokens = np.zeros((max_seqs, bucket(max(map(len, prompts)))), np.int32)
    for i, prompt in enumerate(prompts):
        lens[i * stride] = len(prompt)
        tokens[i * stride, : len(prompt)] = prompt
    total = int(lens.sum()) - len(prompts)
    rest = total % batch_size
    shape = PrefillShape(
        chunk=batch_size if total >= batch_size else 0,
        tail=min(bucket(rest), batch_size) if rest else 0,
    )
    return Prompts(jnp.asarray(tokens), jnp.asarray(lens)), shape


def pack_limits(max_new_tokens: int | Sequence[int], num_prompts: int, max_seqs: int) -> np.ndarray:
    """i32[S]: tokens that may be generated after each prompt; 0 where there is none.

    Raises:
      ValueError: a limit below 1.
    """
    limits = np.zeros(max_seqs, np.int32)
    limits[:num_prompts] = max_new_tokens
    if limits[:num_prompts].min() < 1:
        raise ValueError(f"max_new_tokens must be positive, got {limits[:num_prompts].min()}")
    return limits


def pack_stop_ids(stop_ids: Sequence[int]) -> Array:
    """i32[n]: the stop tokens, each once, and -1 behind them: their number makes no program of its own."""
    unique = list(dict.fromkeys(stop_ids))
    stops = np.full(max(8, len(unique)), -1, np.int32)
    stops[: len(unique)] = unique
    return jnp.asarray(stops)


def prefill(
    model: Model, shape: PrefillShape, params: Any, cache: Cache, prompts: Prompts
) -> tuple[Cache, Array, Array]:
    """Computes all but the last token of each prompt, sequence after sequence, in steps of ``shape.chunk`` tokens.

    Returns:
      ``(cache, served bool[S], pages_peak i32[])``. A sequence that finds no free page is not served: it is emptied
      and its pages serve the others.
    """

    def step(carry: tuple[Cache, Array, Array, Array], num_tokens: int) -> tuple[Cache, Array, Array, Array]:
        cache, read, served, pages_peak = carry
        remaining = jnp.where(served, prompts.lens - 1 - read, 0)
        before = jnp.cumsum(remaining) - remaining
        take = jnp.clip(num_tokens - before, 0, remaining)
        refused = served & ~cache.fits(take)
        cache = jax.lax.cond(jnp.any(refused), lambda c: c.seq_remove(refused)[0], lambda c: c, cache)
        take = jnp.where(refused, 0, take)
        cache, batch, _ = cache.reserve(take, num_tokens=num_tokens, max_new=num_tokens)
        row = jnp.minimum(batch.sequence, take.shape[0] - 1)
        column = read[row] + jnp.arange(num_tokens, dtype=jnp.int32) - batch.cu_q_lens[row]
        tokens = prompts.tokens[row, jnp.clip(column, 0, prompts.tokens.shape[1] - 1)]
        # One row, because a model gives logits; nobody reads them, and XLA leaves them out.
        _, cache = model(params, tokens, cache, batch, jnp.zeros(1, jnp.int32))
        return cache, read + take, served & ~refused, jnp.maximum(pages_peak, cache.pages_used)

    carry = (cache, jnp.zeros_like(prompts.lens), prompts.lens > 0, cache.pages_used)
    if shape.chunk:
        chunks = jnp.sum(jnp.maximum(prompts.lens - 1, 0)) // shape.chunk
        carry = jax.lax.fori_loop(0, chunks, lambda _, c: step(c, shape.chunk), carry)
    if shape.tail:
        carry = step(carry, shape.tail)
    cache, _, served, pages_peak = carry
    return cache, served, pages_peak
