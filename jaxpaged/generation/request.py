"""Arguments of ``generate`` in arrays, and the static sizes that its program depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
import numpy.typing as npt
from jax import Array
from jax.sharding import Mesh

from jaxpaged.generation.prompts import (
    PromptsLike,
    bucket,
    chunk_size,
    columns,
    pack_stop_ids,
    token_limits,
    token_lists,
)
from jaxpaged.generation.sampling import SamplingParams
from jaxpaged.sharding.mesh import BatchSharding
from jaxpaged.sharding.specs import put_batch


@dataclass(frozen=True)
class ContextShift:
    """Generation beyond the context, as by llama.cpp's ``--context-shift``.

    When a sequence would hold more than ``n_ctx`` tokens, its first ``n_keep`` stay, the next
    ``n_discard`` are removed, and the positions of the others move down. No key or value moves.
    """

    n_ctx: int
    """Maximum number of tokens of a sequence."""
    n_keep: int = 0
    """Number of leading tokens that stay, at most the prompt and ``n_ctx - 4``; negative: the
    prompt."""
    n_discard: int = 0
    """Number of tokens removed at a time; 0 = half of those that are not kept."""

    def __post_init__(self) -> None:
        if self.n_ctx < 8:
            raise ValueError(f"n_ctx must be at least 8 tokens, got {self.n_ctx}")
        if self.n_discard < 0:
            raise ValueError(f"n_discard must not be negative, got {self.n_discard}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Request:
    """Dynamic part of a request: other values do not recompile. G prompts, R = G * n rows."""

    prompts: Array
    """i32[G, longest prompt, padded]"""
    prompt_lens: Array
    """i32[G]: 0 in padding."""
    num_prompts: Array
    """i32[]"""
    max_new_tokens: Array
    """i32[R]"""
    stop_ids: Array
    """i32[number of stop tokens]; -1 in padding."""
    sampling: SamplingParams
    """R rows."""
    recent: Array
    """i32[G, W]: last tokens of each prompt."""
    n_ctx: Array
    """i32[]: maximum number of tokens of a sequence, if contexts are shifted."""
    n_keep: Array
    """i32[G]"""
    n_discard: Array
    """i32[]: 0 = half."""


@dataclass(frozen=True)
class Shape:
    """Static part of a request: all that a compiled program depends on."""

    chunk: int
    """Rows of a prefill step."""
    capacity: int
    """M: columns of the generated tokens."""
    num_samples: int
    """n: rows of each prompt."""
    queue: bool
    """True if a sequence serves several prompts in succession; otherwise row i is sequence i."""
    keep: bool
    """True if finished sequences stay in the cache."""
    shift: bool
    """True if contexts are shifted."""
    window: int | None
    """Attention window of the widest layer, in tokens."""
    limit: int | None
    """Maximum number of tokens of a sequence, if a window or a shift bounds it."""


def make_request(
    max_seqs: int,
    prompts: PromptsLike,
    max_new_tokens: npt.ArrayLike,
    sampling: SamplingParams | None,
    stop_ids: Sequence[int],
    batch_size: int,
    keep: bool,
    num_samples: int,
    context_shift: ContextShift | None,
    window: int | None,
    history: Sequence[Sequence[int]] = (),
    mesh: Mesh | None = None,
    prompt_lens: npt.ArrayLike | None = None,
    fixed_steps: bool = False,
) -> tuple[Request, Shape]:
    """Arguments as for ``generate``; ``max_seqs`` is S of the cache, ``fixed_steps`` as for
    ``chunk_size``.

    On a mesh, arrays have one more leading axis: the part of each data shard.

    Raises:
      ValueError: as ``generate``.
    """
    ids = token_lists(prompts, prompt_lens)
    if not ids:
        raise ValueError("prompts must be at least 1, got 0")
    sharding = BatchSharding.of(mesh, len(ids), num_samples)
    s, n = max_seqs // sharding.shards, sharding.samples_per_shard  # of one data shard
    if not 1 <= n <= s:
        raise ValueError(f"n must be 1 to {s} (the cache's max_seqs), got {n}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}")
    if len(history) not in (0, len(ids)):
        raise ValueError(f"history must be of each of {len(ids)} prompts, got {len(history)}")
    counts = sharding.prompts_per_shard(len(ids))
    most = int(counts.max())
    queue = most * n > s
    if keep and queue:
        raise ValueError(f"keep needs a sequence for each of {most * n} rows, the cache has {s}")
    count = len(ids) * num_samples
    num_prompts = bucket(most) if queue else -(-s // n)
    num_prompts *= 1 if sharding.split_samples else sharding.shards
    rows = num_prompts * num_samples
    limits = np.zeros(rows, np.int32)
    limits[:count] = np.repeat(token_limits(max_new_tokens, len(ids), 0), num_samples)
    lens = np.zeros(num_prompts, np.int32)
    lens[: len(ids)] = [len(prompt) for prompt in ids]
    padded = np.zeros((num_prompts, columns(int(lens.max()), num_prompts)), np.int32)
    for i, prompt in enumerate(ids):
        padded[i, : len(prompt)] = prompt
    sampling = _sampling_rows(sampling, count, max_seqs, rows)
    texts = ids
    if len(history):
        texts = [np.append(np.asarray(before, np.int32), ids[i]) for i, before in enumerate(history)]
    whole = np.zeros(num_prompts, np.int32)
    whole[: len(ids)] = [len(text) for text in texts]
    penalty_window = _penalty_window(sampling, int(whole.max() + limits.max()))
    recent = np.full((num_prompts, penalty_window), -1, np.int32)
    for i, text in enumerate(texts):
        last = text[max(0, len(text) - penalty_window) :]
        recent[i, penalty_window - len(last) :] = last
    keeps = np.zeros(num_prompts, np.int32)
    if context_shift is not None:
        _check_context(context_shift, lens)
        wanted = np.where(context_shift.n_keep < 0, whole, np.minimum(context_shift.n_keep, whole))
        keeps = np.minimum(wanted, context_shift.n_ctx - 4).astype(np.int32)
    sharded_lens = sharding.shard_prompts(lens)
    chunk = chunk_size(int(sharded_lens.sum(axis=1).max()), batch_size, fixed=fixed_steps)
    chunk = chunk if s == 1 else max(chunk, s + 1)  # the sequences that already decode take part
    bounds = [context_shift.n_ctx] if context_shift is not None else []
    bounds += [window + chunk] if window is not None else []
    request = Request(
        prompts=sharding.shard_prompts(padded),
        prompt_lens=sharded_lens,
        num_prompts=counts,
        max_new_tokens=sharding.shard_rows(limits),
        stop_ids=sharding.replicate(pack_stop_ids(stop_ids)),
        sampling=jax.tree.map(sharding.shard_rows, sampling),
        recent=sharding.shard_prompts(recent),
        n_ctx=sharding.replicate(np.int32(0 if context_shift is None else context_shift.n_ctx)),
        n_keep=sharding.shard_prompts(keeps),
        n_discard=sharding.replicate(np.int32(0 if context_shift is None else context_shift.n_discard)),
    )
    shape = Shape(
        chunk=chunk,
        capacity=columns(max(1, int(limits.max())), rows),
        num_samples=n,
        queue=queue,
        keep=keep,
        shift=context_shift is not None,
        window=window,
        limit=min(bounds, default=None),
    )
    return put_batch(mesh, request), shape


def _sampling_rows(sampling: SamplingParams | None, count: int, max_seqs: int, rows: int) -> SamplingParams:
    """``rows`` rows of ``sampling``, which has ``count`` of them or, where these are more,
    ``max_seqs``."""
    if sampling is None:
        return SamplingParams.greedy(rows)
    if sampling.num_seqs not in (count, max(count, max_seqs)):
        raise ValueError(f"sampling must have one row for each of {count} samples, got {sampling.num_seqs}")
    index = np.minimum(np.arange(rows), sampling.num_seqs - 1)
    return jax.tree.map(lambda field: np.asarray(field)[index], sampling)


def _check_context(shift: ContextShift, lens: np.ndarray) -> None:
    if lens.max() >= shift.n_ctx:
        i = int(lens.argmax())
        raise ValueError(f"prompt {i} has {lens[i]} tokens, it must have fewer than n_ctx = {shift.n_ctx}")


def _penalty_window(sampling: SamplingParams, longest: int) -> int:
    """W: number of recent tokens that penalties need; 0 if no row has a penalty."""
    on = (
        (np.asarray(sampling.repeat_penalty) != 1.0)
        | (np.asarray(sampling.presence_penalty) != 0.0)
        | (np.asarray(sampling.frequency_penalty) != 0.0)
    )
    if not on.any():
        return 0
    last_n = np.asarray(sampling.repeat_last_n)[on]
    return bucket(longest if (last_n < 0).any() else int(last_n.max()))
