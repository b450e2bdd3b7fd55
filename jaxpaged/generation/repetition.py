"""Penalties of tokens that repeat recent ones, as in llama.cpp: repetition, presence, frequency, DRY.

``recent i32[S, R]``: the latest tokens of each sequence, right-aligned, the latest last, padded with ids
outside [0, V).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxpaged.generation.sampling_params import SamplingParams

_FLOAT_MAX = float(np.finfo(np.float32).max)


def penalize(logits: Array, params: SamplingParams, recent: Array) -> Array:
    """Repetition, presence and frequency penalties, on the recent tokens only: O(S * R log R) beside
    the copy of the logits."""
    vocab_size, size = logits.shape[1], recent.shape[1]
    age = size - jnp.arange(size, dtype=jnp.int32)
    last_n = jnp.where(params.repeat_last_n < 0, size, params.repeat_last_n)
    last_n = jnp.where(params.mirostat > 0, 0, last_n)[:, None]
    seen = (age <= last_n) & (recent >= 0) & (recent < vocab_size)
    # Sorted, the occurrences of a token are a run, whose length is the count; all write the same
    # value.
    token = jnp.sort(jnp.where(seen, recent, vocab_size), axis=1)
    index = jnp.arange(size, dtype=jnp.int32)
    changes = token[:, 1:] != token[:, :-1]
    first = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    last = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
    start = lax.cummax(jnp.where(first, index, 0), axis=1)
    end = lax.cummin(jnp.where(last, index, size), axis=1, reverse=True)
    count = (end - start + 1).astype(jnp.float32)

    row = jnp.arange(logits.shape[0])[:, None]
    z = logits.at[row, token].get(mode="fill", fill_value=0.0)
    repeat = params.repeat_penalty[:, None]
    z = jnp.where(z > 0, z / repeat, z * repeat)
    z = z - (count * params.frequency_penalty[:, None] + params.presence_penalty[:, None])
    return logits.at[row, token].set(z, mode="drop")


def penalize_repeats(logits: Array, params: SamplingParams, recent: Array) -> Array:
    """DRY: a token that would continue a repetition of n tokens, with n >= ``dry_allowed_length``, loses
    ``dry_multiplier * dry_base ** (n - dry_allowed_length)``.

    n is the length of the longest suffix of the recent tokens that occurred before and was followed by
    the token; suffixes begin after the latest token of ``dry_breakers``, which are not penalized. As many
    steps as the longest repetition has tokens, O(S * R) each.

    Reference: pi6am, koboldcpp pull request 982.
    """
    (num_seqs, vocab_size), size = logits.shape, recent.shape[1]
    row, age = jnp.arange(num_seqs)[:, None], jnp.arange(size, dtype=jnp.int32)
    reverse = recent[:, ::-1]  # the latest first
    valid = (reverse >= 0) & (reverse < vocab_size)
    window = jnp.where(params.dry_penalty_last_n < 0, size, params.dry_penalty_last_n)
    length = jnp.minimum(_first(~valid), window)
    allowed = params.dry_allowed_length
    # A word of zeros, so that there is one to take where B is 0.
    words = jnp.pad(params.dry_breakers, ((0, 0), (0, 1)))
    word = words.at[row, reverse >> 5].get(mode="fill", fill_value=0)
    breaks = valid & (((word >> (reverse & 31)) & 1) == 1)
    limit = jnp.minimum(_first(breaks), length)
    active = params.has_dry & (length > allowed) & (limit >= allowed)
    # A longer repetition costs as much: more overflows float32.
    most = np.log(_FLOAT_MAX) / jnp.log(jnp.maximum(params.dry_base, 1.0))
    longest = jnp.minimum(limit, allowed + jnp.minimum(most, size).astype(jnp.int32))

    # Number of tokens that agree before `reverse[k]` and before the end, for each k.
    inside = active[:, None] & (age >= 1) & (age < length[:, None])

    def goes_on(carry: tuple[Array, Array, Array]) -> Array:
        return jnp.any(carry[1])

    def extend(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        n, agrees, count = carry
        shifted = jnp.roll(reverse, -n, axis=1)
        wanted = lax.dynamic_index_in_dim(reverse, jnp.minimum(n, size - 1), axis=1)
        agrees &= (age + n < length[:, None]) & (n < longest[:, None]) & (shifted == wanted)
        return n + 1, agrees, count + agrees

    count = lax.while_loop(goes_on, extend, (jnp.int32(0), inside, jnp.zeros_like(recent)))[2]

    # The token that followed each of them.
    repeats = inside & (count >= allowed[:, None])
    follows = repeats & ~jnp.roll(breaks, 1, axis=1)
    token = jnp.where(follows, jnp.roll(reverse, 1, axis=1), vocab_size)
    by_token = jnp.zeros(logits.shape, jnp.int32).at[row, token].max(count, mode="drop")
    most_repeated = by_token.at[row, token].get(mode="fill", fill_value=0)
    exponent = (most_repeated - allowed[:, None]).astype(jnp.float32)
    penalty = params.dry_multiplier[:, None] * jnp.power(params.dry_base[:, None], exponent)
    penalty = jnp.clip(penalty, -_FLOAT_MAX, _FLOAT_MAX)
    z = logits.at[row, token].get(mode="fill", fill_value=0.0) - penalty
    return logits.at[row, token].set(z, mode="drop")


def _first(marked: Array) -> Array:
    """i32[S]: index of the first True of each row of ``bool[S, R]``; R if there is none."""
    size = marked.shape[1]
    return jnp.min(jnp.where(marked, jnp.arange(size, dtype=jnp.int32), size), axis=1, initial=size)
