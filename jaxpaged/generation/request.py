"""What is asked of a generation, checked on the host and laid out in arrays, and what its program depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jaxpaged.generation.prompts import bucket, check_prompts, pack_stop_ids
from jaxpaged.generation.sampling import SamplingParams
from jaxpaged.sharding.mesh import BatchSharding, put_rows


@dataclass(frozen=True)
class ContextShift:
    """Generation beyond the context, as llama.cpp's ``--context-shift`` does it.

    When a sequence would hold more than ``n_ctx`` tokens, its first ``n_keep`` stay, the ``n_discard`` behind them are
    forgotten, and the others move up. No key or value moves.
    """

    n_ctx: int
    """Tokens that a sequence may hold."""
    n_keep: int = 0
    """Tokens at the beginning that stay; negative: the whole prompt. At most the prompt, and ``n_ctx - 4``."""
    n_discard: int = 0
    """Tokens to forget at a time; 0 = half of those that are not kept."""

    def __post_init__(self) -> None:
        if self.n_ctx < 8:
            raise ValueError(f"n_ctx must be at least 8 tokens, got {self.n_ctx}")
        if self.n_discard < 0:
            raise ValueError(f"n_discard must not be negative, got {self.n_discard}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Request:
    """What is asked for: arrays, so that other prompts and parameters never recompile. G prompts, R = G * n rows."""

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
    """A row each of R."""
    recent: Array
    """i32[G, W]: the last tokens of each prompt."""
    n_ctx: Array
    """i32[]: tokens a sequence may hold, where contexts are shifted."""
    n_keep: Array
    """i32[G]"""
    n_discard: Array
    """i32[]: 0 = half."""


@dataclass(frozen=True)
class Shape:
    """The static part of a request: all that a compiled program depends on."""

    chunk: int
    """Rows of a step that reads prompts."""
    capacity: int
    """M: columns of the tokens generated."""
    num_samples: int
    """n: rows a prompt."""
    queue: bool
    """Whether a sequence serves several prompts in turn; otherwise row i is sequence i's."""
    keep: bool
    """Whether finished sequences stay in the cache."""
    shift: bool
    """Whether contexts are shifted."""
    window: int | None
    """Tokens that the widest layer sees."""
    limit: int | None
    """Tokens that a sequence ever holds, if that is bounded by a window or a shift."""


def make_request(
    max_seqs: int,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    sampling: SamplingParams | None,
    stop_ids: Sequence[int],
    batch_size: int,
    keep: bool,
    num_samples: int,
    context_shift: ContextShift | None,
    window: int | None,
    history: Sequence[Sequence[int]] = (),
    mesh: Mesh | None = None,
) -> tuple[Request, Shape]:
    """Arguments as ``generation.generate`` has them; ``max_seqs`` is S, the sequences of the cache.

    On a mesh all arrays have one axis more in front: what each data shard is asked for.

    Raises:
      ValueError: as ``generate``.
    """
    deal = BatchSharding.of(mesh, len(prompts), num_samples)
    s, n = max_seqs // deal.shards, deal.samples_each  # of one data shard
    if not prompts:
        raise ValueError("prompts must be at least 1, got 0")
    check_prompts(prompts, batch_size)
    if not 1 <= n <= s:
        raise ValueError(f"n must be 1 to {s} (the cache's max_seqs), got {n}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}")
    if history and len(history) != len(prompts):
        raise ValueError(f"history must be of each of {len(prompts)} prompts, got {len(history)}")
    counts = deal.count_each(len(prompts))
    most = int(counts.max())
    queue = most * n > s
    if keep and queue:
        raise ValueError(f"keep needs a sequence for each of {most * n} rows, the cache has {s}")
    count = len(prompts) * num_samples
    num_prompts = bucket(most) if queue else -(-s // n)
    num_prompts *= 1 if deal.splits else deal.shards
    rows = num_prompts * num_samples
    limits = np.zeros(rows, np.int32)
    limits[:count] = np.repeat(np.broadcast_to(max_new_tokens, len(prompts)), num_samples)
    if limits.min() < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {limits.min()}")
    lens = np.zeros(num_prompts, np.int32)
    lens[: len(prompts)] = [len(p) for p in prompts]
    padded = np.zeros((num_prompts, bucket(int(lens.max()))), np.int32)
    for i, prompt in enumerate(prompts):
        padded[i, : len(prompt)] = prompt
    sampling = _sampling_rows(sampling, count, max_seqs, rows)
    texts = (
        [[*before, *prompt] for before, prompt in zip(history, prompts, strict=True)] if history else prompts
    )
    whole = np.zeros(num_prompts, np.int32)
    whole[: len(prompts)] = [len(text) for text in texts]
    penalty_window = _penalty_window(sampling, int(whole.max() + limits.max()))
    recent = np.full((num_prompts, penalty_window), -1, np.int32)
    for i, text in enumerate(texts):
        last = list(text)[-penalty_window:] if penalty_window else []
        recent[i, penalty_window - len(last) :] = last
    keeps = np.zeros(num_prompts, np.int32)
    if context_shift is not None:
        _check_context(context_shift, lens)
        wanted = np.where(context_shift.n_keep < 0, whole, np.minimum(context_shift.n_keep, whole))
        keeps = np.minimum(wanted, context_shift.n_ctx - 4).astype(np.int32)
    # Chunks of one size, none of them mostly padding, with room for the sequences that already decode.
    dealt_lens = deal.prompts(lens)
    total = int(dealt_lens.sum(axis=1).max())
    chunk = min(bucket(-(-total // -(-total // batch_size))), max(batch_size, 8))
    chunk = chunk if s == 1 else max(chunk, s + 1)
    bounds = [context_shift.n_ctx] if context_shift is not None else []
    bounds += [window + chunk] if window is not None else []
    request = Request(
        prompts=deal.prompts(padded),
        prompt_lens=dealt_lens,
        num_prompts=counts,
        max_new_tokens=deal.rows(limits),
        stop_ids=deal.same(pack_stop_ids(stop_ids)),
        sampling=jax.tree.map(deal.rows, sampling),
        recent=deal.prompts(recent),
        n_ctx=deal.same(np.int32(0 if context_shift is None else context_shift.n_ctx)),
        n_keep=deal.prompts(keeps),
        n_discard=deal.same(np.int32(0 if context_shift is None else context_shift.n_discard)),
    )
    shape = Shape(
        chunk=chunk,
        capacity=bucket(max(1, int(limits.max()))),
        num_samples=n,
        queue=queue,
        keep=keep,
        shift=context_shift is not None,
        window=window,
        limit=min(bounds, default=None),
    )
    return put_rows(mesh, request), shape


def _sampling_rows(sampling: SamplingParams | None, count: int, max_seqs: int, rows: int) -> SamplingParams:
    """``sampling``, given for ``count`` rows or, where there are more, all sequences, with ``rows`` rows."""
    if sampling is None:
        return SamplingParams.greedy(rows)
    if sampling.num_seqs not in (count, max(count, max_seqs)):
        raise ValueError(f"sampling must have one row for each of {count} samples, got {sampling.num_seqs}")
    index = np.minimum(np.arange(rows), sampling.num_seqs - 1)
    return jax.tree.map(lambda field: field[index], sampling)


def _check_context(shift: ContextShift, lens: np.ndarray) -> None:
    if lens.max() >= shift.n_ctx:
        i = int(lens.argmax())
        raise ValueError(f"prompt {i} has {lens[i]} tokens, n_ctx = {shift.n_ctx} has room for fewer")


def _penalty_window(sampling: SamplingParams, longest: int) -> int:
    """W: how many tokens the penalties look at; 0 when no row has a penalty."""
    on = (
        (np.asarray(sampling.repeat_penalty) != 1.0)
        | (np.asarray(sampling.presence_penalty) != 0.0)
        | (np.asarray(sampling.frequency_penalty) != 0.0)
    )
    if not on.any():
        return 0
    last_n = np.asarray(sampling.repeat_last_n)[on]
    return bucket(longest if (last_n < 0).any() else int(last_n.max()))
