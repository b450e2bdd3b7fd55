"""Log-probabilities of given texts, through the pages of a cache."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxpaged.cache.interface import Cache
from jaxpaged.generation.loop import Model
from jaxpaged.generation.sampling import logprobs_of


def score(
    model: Model,
    params: Any,
    cache: Cache,
    tokens: ArrayLike,
    lens: ArrayLike | None = None,
    *,
    batch_size: int = 512,
    keep: bool = False,
) -> tuple[Array, Cache]:
    """Log-probabilities of each token of given texts after those before it.

    Pure, for the caller's ``jit``. With the same weights they are those that ``generate`` returns
    for tokens that it generates, as far as logits do not depend on the number of tokens of a step.

    Args:
      model: ``(params, tokens i32[T], cache, batch, rows i32[R]) -> (logits f32[R, V], cache)``.
      params: the model's weights, a pytree.
      cache: paged or contiguous, of one device; text i continues sequence i.
      tokens: i32[B, T], at most a text a sequence of the cache.
      lens: i32[B], tokens of each text; default T.
      batch_size: tokens of a step, of which the logits exist at one time.
      keep: leave the texts in the cache; otherwise their sequences are empty afterwards.

    Returns:
      ``(logprobs f32[B, T], cache)``. The first token of a text has 0, since nothing predicts it, and so has
      padding. NaN where the cache has too few pages.

    Raises:
      ValueError: shapes that do not fit the cache, at trace time.

    Example:
      >>> from jaxpaged import PagedKVCache, score
      >>> def model(params, tokens, cache, batch, rows):  # all tokens are equally likely
      ...     return jnp.zeros((rows.shape[0], 4)), cache
      >>> cache = PagedKVCache.create(
      ...     num_layers=1, num_kv_heads=1, head_dim=2, num_pages=4, page_size=8, max_seqs=1
      ... )
      >>> score(model, None, cache, jnp.array([[3, 1, 2]]))[0].round(3).tolist()
      [[0.0, -1.38600003..., -1.38600003...]]
    """
    s, tokens = cache.max_seqs, jnp.asarray(tokens)
    if tokens.ndim != 2 or not 1 <= tokens.shape[0] <= s or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens must be integers [B, T] with B from 1 to {s} (the cache's max_seqs), "
            f"got {tokens.dtype}{list(tokens.shape)}"
        )
    count, length = tokens.shape
    lens = jnp.full(count, length, jnp.int32) if lens is None else jnp.asarray(lens, jnp.int32)
    if lens.shape != (count,):
        raise ValueError(f"lens must be [{count}], one for each text, got {list(lens.shape)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    width = min(max(batch_size // count, 1), length)
    steps = -(-length // width)
    rows = count * width
    lens = jnp.pad(lens, (0, s - count))
    # One column more than the texts, whose tokens the last one would predict.
    padded = jnp.pad(tokens.astype(jnp.int32), ((0, 0), (0, steps * width + 1 - length)))

    def step(carry: tuple[Cache, Array], start: Array) -> tuple[tuple[Cache, Array], Array]:
        cache, served = carry
        num_new = jnp.clip(lens - start, 0, width)
        cache, batch, ok = cache.reserve(num_new, num_tokens=rows, max_new=width)
        part = lax.dynamic_slice_in_dim(padded, start, width + 1, axis=1)
        sequence = jnp.minimum(batch.sequence, count - 1)
        column = jnp.clip(lax.iota(jnp.int32, rows) - batch.cu_q_lens[sequence], 0, width - 1)
        logits, cache = model(params, part[sequence, column], cache, batch, lax.iota(jnp.int32, rows))
        logprobs = logprobs_of(logits, part[sequence, column + 1], 0)["logprobs"]
        # Row r predicts the token behind its own.
        row = jnp.where(batch.valid, sequence, count)
        found = jnp.zeros((count, width), jnp.float32).at[row, column].set(logprobs, mode="drop")
        return (cache, served & ok), found

    starts = jnp.arange(steps, dtype=jnp.int32) * width
    (cache, served), found = lax.scan(step, (cache, jnp.bool_(True)), starts)
    found = jnp.moveaxis(found, 0, 1).reshape(count, -1)[:, : length - 1]
    predicted = lax.iota(jnp.int32, length - 1) < lens[:count, None] - 1
    found = jnp.where(served, jnp.where(predicted, found, 0), jnp.nan)
    if not keep:
        cache, _ = cache.seq_remove(lax.iota(jnp.int32, s) < count)
    return jnp.pad(found, ((0, 0), (1, 0))), cache
