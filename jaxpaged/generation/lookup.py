"""Drafts for prompt-lookup decoding: tokens that followed the last ones somewhere before."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


def find_drafts(text: Array, length: Array, *, ngram: int, num_draft: int) -> tuple[Array, Array]:
    """Predicts the continuation of each text from an earlier occurrence of its last tokens.

    Takes the occurrence that matches most of the last tokens, up to ``ngram``, and the latest of
    these. If it is less than ``num_draft`` tokens back, the copy continues with the tokens just
    copied.

    Args:
      text: i32[S, X].
      length: i32[S], tokens of each text; those behind them are ignored.
      ngram: maximum number of tokens to match.
      num_draft: K.

    Returns:
      ``(draft i32[S, K], found bool[S])``.

    Reference: Saxena, "Prompt Lookup Decoding" (2023), which takes the earliest occurrence; Lempel
    and Ziv (1977) for the copy that overlaps itself.
    """
    width = text.shape[1]
    place = lax.iota(jnp.int32, width)
    last = length[:, None] - 1
    same, agreeing = place < last, jnp.zeros(text.shape, jnp.int32)
    for back in range(ngram):
        wanted = jnp.take_along_axis(text, jnp.maximum(last - back, 0), axis=1)
        same &= (jnp.roll(text, back, axis=1) == wanted) & (place >= back)
        agreeing += same
    value = jnp.where(agreeing > 0, agreeing * width + place, -1)
    found = jnp.any(agreeing > 0, axis=1)
    best = jnp.argmax(value, axis=1).astype(jnp.int32)[:, None]
    period = jnp.where(found[:, None], last - best, 1)
    source = best + 1 + lax.iota(jnp.int32, num_draft) % period
    return jnp.take_along_axis(text, jnp.minimum(source, width - 1), axis=1), found
