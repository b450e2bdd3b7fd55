"""Requests: what to generate, in arrays, and the static sizes that a program depends on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array

from jaxpaged.generation.prompts import (
    PromptsLike,
    bucket,
    chunk_size,
    columns,
    pack_stop_ids,
    token_limits,
    token_lists,
)
from jaxpaged.generation.sampling_params import SamplingParams
from jaxpaged.sharding.mesh import BatchSharding, num_shards
from jaxpaged.sharding.specs import mesh_of, put

_TRACED_PENALTY_WINDOW = 64
"""Recent tokens that penalties see if their parameters are traced; the default of ``repeat_last_n``."""


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


@dataclass(frozen=True)
class Lookup:
    """Prompt-lookup decoding: several tokens a step where the text repeats itself.

    A draft is copied from behind an earlier occurrence of the last tokens, and kept as far as it
    is what sampling chooses. So tokens are those of ``generate`` without it, as far as the model's
    logits do not depend on the number of tokens of a step.

    Reference: Saxena, "Prompt Lookup Decoding" (2023); transformers' ``prompt_lookup_num_tokens``.
    """

    num_draft: int = 8
    """K: tokens of a draft."""
    ngram: int = 3
    """Maximum number of last tokens to match."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")


EarlyStopping = Literal[False, True, "never"]
EARLY_STOPPING: tuple[EarlyStopping, ...] = (False, True, "never")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SearchParams:
    """Parameters of a beam search; values do not recompile."""

    length_penalty: Any
    """f32[]"""
    early_stopping: Any
    """i32[]: index in ``EARLY_STOPPING``."""
    num_return: int = field(metadata={"static": True})
    """R: sequences to return."""

    def penalized(self, score: Array, length: Array) -> Array:
        """Score of sequences of ``length``, at least 1, with the length penalty; -inf stays
        -inf."""
        divided = score / length.astype(jnp.float32) ** self.length_penalty
        return jnp.where(score > -jnp.inf, divided, -jnp.inf)


LogitsProcessor = Callable[[Array, Array, Array], Array]
"""``(logits f32[R, V], tokens i32[R, M], num_tokens i32[R]) -> logits f32[R, V]``, pure and hashable:
changes logits before a token is sampled. ``tokens`` are those generated before each row, padded with -1."""


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
    limit: int | None
    """Maximum number of tokens of a sequence, if a shift bounds it."""
    lookup: Lookup | None
    logprobs: int | None
    """Number of likeliest tokens whose log-probabilities are returned, beside the sampled one's; None =
    no log-probabilities."""
    logits_processor: LogitsProcessor | None
    beams: int = 0
    """Width of a beam search, whose beams are the samples of a prompt; 0 = sampling."""

    @property
    def width(self) -> int:
        """Tokens of a sequence in a decode step, at most."""
        return 1 if self.lookup is None else 1 + self.lookup.num_draft


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Request:
    """Prompts and options of a generation, for ``run``. G prompts, R = G * n rows.

    Arrays are data: other values do not recompile.
    """

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
    search: SearchParams | None
    """Parameters of a beam search, else None."""
    shape: Shape = field(metadata={"static": True})

    @staticmethod
    def create(
        cache: Any,
        prompts: PromptsLike,
        *,
        max_new_tokens: npt.ArrayLike,
        prompt_lens: npt.ArrayLike | None = None,
        n: int = 1,
        sampling: SamplingParams | None = None,
        key: Array | None = None,
        stop_ids: Sequence[int] = (),
        batch_size: int = 512,
        keep: bool = False,
        context_shift: ContextShift | None = None,
        history: Sequence[Sequence[int]] = (),
        lookup: Lookup | None = None,
        logprobs: int | None = None,
        logits_processor: LogitsProcessor | None = None,
        fixed_steps: bool = False,
        search: SearchParams | None = None,
    ) -> Request:
        """A request for ``cache``; arguments as for ``generate``.

        Under ``jit``, ``prompts`` are one array ``i32[B, T]``, whose values and those of
        ``prompt_lens``, ``sampling`` and ``key`` may be traced, and are not checked then;
        ``max_new_tokens`` is an integer, and penalties see the last 64 tokens.

        Args:
          fixed_steps: prefill in steps of ``batch_size`` tokens, however short a prompt is, so that all
            prompts share a program; for models whose products skip padding.
          search: parameters of a beam search with ``n`` beams, see ``beam_request``.

        Raises:
          ValueError: as ``generate``; traced prompts of another form.
        """
        mesh, num_samples = mesh_of(cache), n
        if logprobs is not None and logprobs < 0:
            raise ValueError(f"logprobs must not be negative, got {logprobs}")
        traced = is_traced(prompts, prompt_lens)
        if traced:
            ids, lens = _traced_prompts(prompts, prompt_lens, mesh)
        else:
            ids, lens = _padded(token_lists(prompts, prompt_lens))
        count, longest = ids.shape
        if count < 1:
            raise ValueError("prompts must be at least 1, got 0")
        if len(history) not in (0, count):
            raise ValueError(f"history must be of each of {count} prompts, got {len(history)}")
        if traced and len(history):
            raise ValueError("history needs prompts that are not traced")
        texts, whole = ids, lens
        if len(history):
            texts, whole = _padded(
                [np.append(h, row[:length]) for h, row, length in zip(history, ids, lens, strict=True)]
            )

        # The layout: which prompts each data shard has, and rows of the result.
        sharding = BatchSharding.of(mesh, count, num_samples)
        if search is not None:  # beams stay together
            sharding = BatchSharding(num_shards(mesh), num_samples)
        s, n = cache.max_seqs // sharding.shards, sharding.samples_per_shard  # of one data shard
        if not 1 <= n <= s:
            raise ValueError(f"n must be 1 to {s} (the cache's max_seqs), got {n}")
        counts = sharding.prompts_per_shard(count)
        most = int(counts.max())
        queue = most * n > s
        if keep and queue:
            raise ValueError(f"keep needs a sequence for each of {most * n} rows, the cache has {s}")
        num_prompts = bucket(most) if queue else -(-s // n)
        num_prompts *= 1 if sharding.split_samples else sharding.shards
        rows = num_prompts * num_samples

        limits = np.zeros(rows, np.int32)
        given = token_limits(max_new_tokens, count, 0 if search is None else 1)
        limits[: count * num_samples] = np.repeat(given, num_samples)
        xp: Any = jnp if traced else np
        padding = (0, num_prompts - count)
        lens = xp.pad(lens, padding)
        ids = xp.pad(ids, (padding, (0, columns(longest, num_prompts) - longest)))
        sampling = _sampling_rows(sampling, count * num_samples, cache.max_seqs, rows, key)
        if lookup is not None and not is_traced(sampling) and np.asarray(sampling.mirostat).any():
            raise ValueError("lookup cannot be used with mirostat, which adapts to one token after the other")
        whole, texts = xp.pad(whole, padding), xp.pad(texts, (padding, (0, 0)))
        width = _TRACED_PENALTY_WINDOW
        if not is_traced(sampling, lens):
            width = _penalty_window(sampling, int(whole.max() + limits.max()))
        index = whole[:, None] - width + np.arange(width, dtype=np.int32)
        recent = xp.where(index < 0, np.int32(-1), xp.take_along_axis(texts, xp.maximum(index, 0), axis=1))

        keeps = xp.zeros(num_prompts, np.int32)
        if context_shift is not None:
            if not traced:
                _check_context(context_shift, lens)
            wanted = whole if context_shift.n_keep < 0 else xp.minimum(context_shift.n_keep, whole)
            keeps = xp.minimum(wanted, context_shift.n_ctx - 4).astype(np.int32)
        total = longest * count
        if not traced:
            total = int(sharding.shard_prompts(lens).sum(axis=1).max())
        chunk = chunk_size(total, batch_size, fixed=fixed_steps)
        chunk = chunk if s == 1 else max(chunk, s + 1)  # the sequences that already decode take part
        shape = Shape(
            chunk=chunk,
            # Beams copy their tokens in every step.
            capacity=columns(max(1, int(limits.max())), rows)
            if search is None
            else bucket(int(limits.max())),
            num_samples=n,
            queue=queue,
            keep=keep,
            shift=context_shift is not None,
            limit=None if context_shift is None else context_shift.n_ctx,
            lookup=lookup,
            logprobs=logprobs,
            logits_processor=logits_processor,
            beams=0 if search is None else num_samples,
        )

        def of_shards(distribute: Callable[[Any], Any], **values: Any) -> dict[str, Any]:
            return values if mesh is None else jax.tree.map(distribute, values)

        n_ctx, n_discard = (0, 0) if context_shift is None else (context_shift.n_ctx, context_shift.n_discard)
        request = Request(
            **of_shards(sharding.shard_prompts, prompts=ids, prompt_lens=lens, recent=recent, n_keep=keeps),
            **of_shards(sharding.shard_rows, max_new_tokens=limits, sampling=sampling),
            **of_shards(
                sharding.replicate,
                stop_ids=pack_stop_ids(stop_ids),
                n_ctx=np.int32(n_ctx),
                n_discard=np.int32(n_discard),
                search=search,
            ),
            num_prompts=jnp.int32(count) if mesh is None else counts,
            shape=shape,
        )
        return jax.tree.map(jnp.asarray, request) if mesh is None else put(mesh, request)


def is_traced(*values: Any) -> bool:
    """True if any array is a tracer."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def _padded(lists: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """``(ids i32[B, longest], lens i32[B])`` of lists of ids, padded with 0."""
    lens = np.asarray([len(ids) for ids in lists], np.int32)
    padded = np.zeros((len(lists), lens.max(initial=0)), np.int32)
    for row, ids in zip(padded, lists, strict=True):
        row[: len(ids)] = ids
    return padded, lens


def _traced_prompts(prompts: Any, prompt_lens: Any, mesh: Any) -> tuple[Any, Any]:
    """``(ids i32[B, T], lens i32[B])`` of prompts under ``jit``."""
    if mesh is not None:
        raise ValueError("prompts of a ShardedCache must not be traced: they are distributed by the host")
    if not hasattr(prompts, "ndim") or prompts.ndim != 2 or not jnp.issubdtype(prompts.dtype, jnp.integer):
        given = (
            f"{prompts.dtype}{list(prompts.shape)}" if hasattr(prompts, "dtype") else type(prompts).__name__
        )
        raise ValueError(f"traced prompts must be one integer array [B, T] with prompt_lens [B], got {given}")
    count, longest = prompts.shape
    lens = jnp.full(count, longest, jnp.int32) if prompt_lens is None else jnp.asarray(prompt_lens, jnp.int32)
    if lens.shape != (count,):
        raise ValueError(f"prompt_lens must be [{count}], one for each prompt, got {list(lens.shape)}")
    return jnp.asarray(prompts, jnp.int32), lens


def _sampling_rows(
    sampling: SamplingParams | None, count: int, max_seqs: int, rows: int, key: Array | None
) -> SamplingParams:
    """``rows`` rows of ``sampling``, which has ``count`` of them or, where these are more,
    ``max_seqs``; with a key, seeds of its own for each."""
    if sampling is None:
        sampling = SamplingParams.greedy(count) if key is None else SamplingParams.create(count)
    if sampling.num_seqs not in (count, max(count, max_seqs)):
        raise ValueError(f"sampling must have one row for each of {count} samples, got {sampling.num_seqs}")
    if key is not None:
        sampling = replace(sampling, seed=SamplingParams.seeds_of(key, sampling.num_seqs))
    index = np.minimum(np.arange(rows), sampling.num_seqs - 1)
    if is_traced(sampling):
        return jax.tree.map(lambda field: field[index], sampling)
    return jax.tree.map(lambda field: np.asarray(field)[index], sampling)


def _check_context(shift: ContextShift, lens: np.ndarray) -> None:
    if lens.max() >= shift.n_ctx:
        i = int(lens.argmax())
        raise ValueError(f"prompt {i} has {lens[i]} tokens, it must have fewer than n_ctx = {shift.n_ctx}")


def _penalty_window(sampling: SamplingParams, longest: int) -> int:
    """W: number of recent tokens that penalties need; 0 if no row has a penalty."""
    last_n = np.append(
        np.asarray(sampling.repeat_last_n)[np.asarray(sampling.has_penalties)],
        np.asarray(sampling.dry_penalty_last_n)[np.asarray(sampling.has_dry)],
    )
    return bucket(int(np.where(last_n < 0, longest, last_n).max())) if last_n.size else 0
