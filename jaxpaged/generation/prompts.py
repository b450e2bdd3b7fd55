"""What every way of generating is asked, checked on the host and laid out in arrays: prompts, limits, stop tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


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


def bucket(count: int, smallest: int = 8) -> int:
    """The next power of two, or one and a half of one: few compiled shapes, a third of padding at most."""
    size = smallest
    while size < count:
        if size * 3 // 2 >= count:
            return size * 3 // 2
        size *= 2
    return size


def check_prompts(prompts: Sequence[Sequence[int]], batch_size: int) -> None:
    """Checks token ids, and how many of them a step that reads prompts takes.

    Raises:
      ValueError: an empty prompt, a negative id, a ``batch_size`` below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty: it needs at least one token")
        if min(prompt) < 0:
            raise ValueError(f"prompt {i} holds a negative token id, {min(prompt)}")


def pack_prompts(
    prompts: Sequence[Sequence[int]], *, max_seqs: int, stride: int = 1, batch_size: int, shards: int = 1
) -> tuple[Prompts, int]:
    """Prompts as host arrays, and the static number of tokens of a prefill step; 0 = no step.

    Args:
      prompts: token ids, none empty.
      max_seqs: S, of each data shard.
      stride: prompt i is for sequence ``i * stride``.
      batch_size: tokens of a prefill step at most.
      shards: D. Prompts are dealt to so many: prompt i is for sequence ``i // D * stride`` of shard ``i % D``.

    Returns:
      ``(prompts, chunk)``; the arrays of the prompts have one more axis in front, ``[D, ...]``.

    Raises:
      ValueError: no prompt or too many, an empty prompt, a negative id, a ``batch_size`` below 1.
    """
    most = max_seqs // stride * shards
    if not 1 <= len(prompts) <= most:
        each = "" if stride == 1 else f" / {stride} sequences each"
        where = "" if shards == 1 else f", on each of {shards} data shards"
        raise ValueError(
            f"prompts must be 1 to {most} (max_seqs = {max_seqs}{each}{where}), got {len(prompts)}"
        )
    check_prompts(prompts, batch_size)
    lens = np.zeros((shards, max_seqs), np.int32)
    tokens = np.zeros((shards, max_seqs, bucket(max(map(len, prompts)))), np.int32)
    for i, prompt in enumerate(prompts):
        place = i % shards, i // shards * stride
        lens[place] = len(prompt)
        tokens[(*place, slice(len(prompt)))] = prompt
    total = int(np.maximum(lens - 1, 0).sum(axis=1).max())
    # Steps of one size, as few as there must be: another size would compile the model once more.
    chunk = min(bucket(-(-total // -(-total // batch_size))), batch_size) if total else 0
    arrays: Any = (tokens, lens)
    return Prompts(*arrays), chunk


def pack_limits(
    max_new_tokens: int | Sequence[int], num_prompts: int, max_prompts: int, shards: int = 1
) -> Any:
    """i32[D, max_prompts]: tokens that may be generated after each prompt; 0 where there is none. Dealt to D shards as
    ``pack_prompts`` deals prompts.

    Raises:
      ValueError: a limit below 1.
    """
    limits = np.zeros(max_prompts * shards, np.int32)
    limits[:num_prompts] = max_new_tokens
    if limits[:num_prompts].min() < 1:
        raise ValueError(f"max_new_tokens must be positive, got {limits[:num_prompts].min()}")
    return limits.reshape(max_prompts, shards).T


def pack_stop_ids(stop_ids: Sequence[int]) -> Array:
    """i32[n]: the stop tokens, each once, and -1 behind them: their number makes no program of its own."""
    unique = list(dict.fromkeys(stop_ids))
    stops = np.full(max(8, len(unique)), -1, np.int32)
    stops[: len(unique)] = unique
    return jnp.asarray(stops)
