"""Whole generations inside one XLA program: prefill in chunks, then reserve, decode, sample, stop, give pages back.

The path of a token, top to bottom: ``_prefill_chunk`` puts a prompt's keys and values into the cache, ``_decode_step``
reserves a slot for the newest token, runs the model and samples the next, ``_accept`` appends it or ends the sequence.
``generate`` runs all of it without returning to Python; ``generate_stream`` comes back every few tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpaged.batch import Batch
from jaxpaged.rope import Rope
from jaxpaged.sampling import SamplingParams, push_recent, sample

RUNNING, FINISH_STOP, FINISH_LENGTH, FINISH_OUT_OF_PAGES = 0, 1, 2, 3
"""Values of ``finish_reason``: still running; a stop token; the token limit; the pool ran out of pages."""


class KVCache(Protocol):
    """What generation and a model need of a cache; PagedKVCache and ContiguousKVCache have it."""

    @property
    def max_seqs(self) -> int: ...
    @property
    def lengths(self) -> Array: ...
    @property
    def pages_used(self) -> Array: ...
    def attend(
        self,
        layer: int,
        q: Array,
        k: Array,
        v: Array,
        batch: Batch,
        *,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks: Array | None = None,
        rope: Rope | None = None,
    ) -> tuple[Array, Self]: ...
    def reserve(
        self, num_new: Array, *, num_tokens: int | None = None, max_new: int | None = None
    ) -> tuple[Self, Batch, Array]: ...
    def fits(self, num_new: Array) -> Array: ...
    def seq_remove(
        self, seq: Array | int, p0: Array | int = 0, p1: Array | int = -1
    ) -> tuple[Self, Array]: ...


Cache = TypeVar("Cache", bound=KVCache)
Model = Callable[[Any, Array, Any, Batch, Array], tuple[Array, Any]]
"""``(params, tokens i32[T], cache, batch, rows i32[R]) -> (logits f32[R, V], cache)``"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GenerateResult:
    """What ``generate`` made; a row a sequence, S = max_seqs of the cache."""

    tokens: Array
    """i32[S, M]: the tokens generated, without the stop token; -1 behind them."""
    num_tokens: Array
    """i32[S]: how many they are."""
    finish_reason: Array
    """i32[S]: FINISH_STOP, FINISH_LENGTH or FINISH_OUT_OF_PAGES; RUNNING in rows without a prompt."""
    pages_peak: Array
    """i32[]: most pages in use after any step."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """What the loop carries, beside the cache."""

    tokens: Array
    num_tokens: Array
    newest: Array
    """i32[S]: the token sampled last, not yet in the cache."""
    recent: Array
    """i32[S, R]: the tokens that penalties look at, newest last."""
    active: Array
    """bool[S]"""
    finish_reason: Array
    pages_peak: Array

    def result(self) -> GenerateResult:
        return GenerateResult(self.tokens, self.num_tokens, self.finish_reason, self.pages_peak)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Request:
    """What is asked for: arrays, so that other prompts and parameters never recompile."""

    prompts: Array
    """i32[S, longest prompt, padded]"""
    prompt_lens: Array
    """i32[S]: 0 = no prompt."""
    max_new_tokens: Array
    """i32[S]"""
    stop_ids: Array
    """i32[number of stop tokens]; -1 in padding."""
    sampling: SamplingParams
    recent: Array
    """i32[S, R]: the last tokens of each prompt."""


@dataclass(frozen=True)
class _Shape:
    """The static part of a request: all that a compiled program depends on."""

    chunk: int
    """Tokens of one prefill step."""
    tail: int
    """Tokens of the last, shorter prefill step; 0 = there is none."""
    capacity: int
    """M: columns of the tokens generated."""
    keep: bool
    """Whether finished sequences stay in the cache."""


def _bucket(count: int) -> int:
    """The next power of two, or one and a half of one: few compiled shapes, a third of padding at most."""
    size = 8
    while size < count:
        if size * 3 // 2 >= count:
            return size * 3 // 2
        size *= 2
    return size


def _request(
    cache: KVCache,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    sampling: SamplingParams | None,
    stop_ids: Sequence[int],
    batch_size: int,
    keep: bool,
) -> tuple[_Request, _Shape]:
    s = cache.max_seqs
    if not 1 <= len(prompts) <= s:
        raise ValueError(f"prompts must be 1 to {s} (the cache's max_seqs), got {len(prompts)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty: it needs at least one token")
        if min(prompt) < 0:
            raise ValueError(f"prompt {i} holds a negative token id, {min(prompt)}")
    limits = np.zeros(s, np.int32)
    limits[: len(prompts)] = max_new_tokens
    if limits.min() < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {limits.min()}")
    sampling = SamplingParams.greedy(s) if sampling is None else sampling
    if sampling.num_seqs != s:
        raise ValueError(f"sampling must have one row for each of {s} sequences, got {sampling.num_seqs}")
    lens = np.zeros(s, np.int32)
    lens[: len(prompts)] = [len(p) for p in prompts]
    padded = np.zeros((s, _bucket(int(lens.max()))), np.int32)
    for i, prompt in enumerate(prompts):
        padded[i, : len(prompt)] = prompt
    total = int(lens.sum())
    rest = total % batch_size
    window = _penalty_window(sampling, int((lens + limits).max()))
    recent = np.full((s, window), -1, np.int32)
    for i, prompt in enumerate(prompts):
        last = list(prompt)[-window:] if window else []
        recent[i, window - len(last) :] = last
    # Padded, so that the number of stop tokens does not make a program of its own.
    stops = np.full(max(8, len(stop_ids)), -1, np.int32)
    stops[: len(stop_ids)] = list(stop_ids)
    request = _Request(
        prompts=jnp.asarray(padded),
        prompt_lens=jnp.asarray(lens),
        max_new_tokens=jnp.asarray(limits),
        stop_ids=jnp.asarray(stops),
        sampling=sampling,
        recent=jnp.asarray(recent),
    )
    shape = _Shape(
        chunk=batch_size if total >= batch_size else 0,
        tail=min(_bucket(rest), batch_size) if rest else 0,
        capacity=_bucket(max(1, int(limits.max()))),
        keep=keep,
    )
    return request, shape


def _penalty_window(sampling: SamplingParams, longest: int) -> int:
    """R: how many tokens the penalties look at; 0 when no row has a penalty."""
    on = (
        (np.asarray(sampling.repeat_penalty) != 1.0)
        | (np.asarray(sampling.presence_penalty) != 0.0)
        | (np.asarray(sampling.frequency_penalty) != 0.0)
    )
    if not on.any():
        return 0
    last_n = np.asarray(sampling.repeat_last_n)[on]
    return _bucket(longest if (last_n < 0).any() else int(last_n.max()))


def _end(cache: Cache, state: _State, ended: Array, reason: int, release: bool) -> tuple[Cache, _State]:
    """Ends the sequences marked; gives their pages back if asked to."""
    if release:
        cache = jax.lax.cond(jnp.any(ended), lambda c: c.seq_remove(ended)[0], lambda c: c, cache)
    return cache, replace(
        state,
        active=state.active & ~ended,
        finish_reason=jnp.where(ended, reason, state.finish_reason),
    )


def _reserve(
    cache: Cache, state: _State, num_new: Array, num_tokens: int, max_new: int
) -> tuple[Cache, _State, Batch]:
    """Room for ``num_new`` tokens; sequences that find none end here, and their pages serve the others."""
    cache, state = _end(cache, state, state.active & ~cache.fits(num_new), FINISH_OUT_OF_PAGES, release=True)
    num_new = jnp.where(state.active, num_new, 0)
    cache, batch, _ = cache.reserve(num_new, num_tokens=num_tokens, max_new=max_new)
    return cache, replace(state, pages_peak=jnp.maximum(state.pages_peak, cache.pages_used)), batch


def _accept(cache: Cache, state: _State, request: _Request, token: Array, keep: bool) -> tuple[Cache, _State]:
    """Appends the token sampled for each active sequence, and ends those that are done."""
    rows = jnp.arange(token.shape[0])
    stopped = state.active & jnp.any(token[:, None] == request.stop_ids, axis=1)
    room = state.num_tokens < request.max_new_tokens
    appended = state.active & ~stopped & room
    column = jnp.where(appended, state.num_tokens, state.tokens.shape[1])
    num_tokens = state.num_tokens + appended
    state = replace(
        state,
        tokens=state.tokens.at[rows, column].set(token, mode="drop"),
        num_tokens=num_tokens,
        newest=jnp.where(appended, token, state.newest),
        recent=push_recent(state.recent, token, appended),
    )
    full = state.active & (num_tokens >= request.max_new_tokens)
    reason = jnp.where(stopped & room, FINISH_STOP, FINISH_LENGTH)
    ended = stopped | full
    cache, finished = _end(cache, state, ended, FINISH_STOP, release=not keep)
    return cache, replace(finished, finish_reason=jnp.where(ended, reason, finished.finish_reason))


def _prefill_chunk(
    model: Model,
    params: Any,
    cache: Cache,
    state: _State,
    request: _Request,
    base: Array,
    num_tokens: int,
    first: Array,
) -> tuple[Cache, _State, Array]:
    """Computes the next ``num_tokens`` prompt tokens, sequence after sequence.

    ``base i32[S]`` is the length of each sequence before its prompt; ``first i32[S]`` collects the first token sampled
    for each sequence, in the chunk where its prompt ends.
    """
    remaining = jnp.where(state.active, request.prompt_lens - (cache.lengths - base), 0)
    before = jnp.cumsum(remaining) - remaining
    take = jnp.clip(num_tokens - before, 0, remaining)
    cache, state, batch = _reserve(cache, state, take, num_tokens, num_tokens)
    row = jnp.minimum(batch.sequence, take.shape[0] - 1)
    in_chunk = jnp.arange(num_tokens, dtype=jnp.int32) - batch.cu_q_lens[row]
    column = (request.prompt_lens - remaining)[row] + in_chunk
    tokens = request.prompts[row, jnp.clip(column, 0, request.prompts.shape[1] - 1)]
    logits, cache = model(params, tokens, cache, batch, batch.last_rows)
    position = batch.position[batch.last_rows] + 1
    token = sample(logits, request.sampling, position, state.recent)
    return cache, state, jnp.where((take > 0) & (take == remaining), token, first)


def _start(model: Model, shape: _Shape, params: Any, cache: Cache, request: _Request) -> tuple[Cache, _State]:
    """Prefills every prompt in chunks, and samples each sequence's first token."""
    s = cache.max_seqs
    base = cache.lengths
    state = _State(
        tokens=jnp.full((s, shape.capacity), -1, jnp.int32),
        num_tokens=jnp.zeros(s, jnp.int32),
        newest=jnp.zeros(s, jnp.int32),
        recent=request.recent,
        active=request.prompt_lens > 0,
        finish_reason=jnp.full(s, RUNNING, jnp.int32),
        pages_peak=cache.pages_used,
    )
    step = functools.partial(_prefill_chunk, model, params)
    carry = (cache, state, jnp.zeros(s, jnp.int32))
    if shape.chunk:
        chunks = jnp.sum(request.prompt_lens) // shape.chunk
        carry = jax.lax.fori_loop(
            0, chunks, lambda _, c: step(c[0], c[1], request, base, shape.chunk, c[2]), carry
        )
    if shape.tail:
        carry = step(carry[0], carry[1], request, base, shape.tail, carry[2])
    cache, state, token = carry
    return _accept(cache, state, request, token, shape.keep)


def _decode_step(
    model: Model, shape: _Shape, params: Any, cache: Cache, state: _State, request: _Request
) -> tuple[Cache, _State]:
    """One more token for every active sequence."""
    s = cache.max_seqs
    cache, state, batch = _reserve(cache, state, state.active.astype(jnp.int32), s, 1)
    tokens = state.newest[jnp.minimum(batch.sequence, s - 1)]
    logits, cache = model(params, tokens, cache, batch, batch.last_rows)
    position = batch.position[batch.last_rows] + 1
    token = sample(logits, request.sampling, position, state.recent)
    return _accept(cache, state, request, token, shape.keep)


def _advance(
    model: Model, shape: _Shape, params: Any, cache: Cache, state: _State, request: _Request, steps: Array
) -> tuple[Cache, _State]:
    """At most ``steps`` decode steps; fewer when every sequence has ended."""

    def unfinished(carry: tuple[Array, Cache, _State]) -> Array:
        return (carry[0] < steps) & jnp.any(carry[2].active)

    def step(carry: tuple[Array, Cache, _State]) -> tuple[Array, Cache, _State]:
        i, cache, state = carry
        return i + 1, *_decode_step(model, shape, params, cache, state, request)

    _, cache, state = jax.lax.while_loop(unfinished, step, (jnp.int32(0), cache, state))
    return cache, state


def _generate(
    model: Model, shape: _Shape, params: Any, cache: Cache, request: _Request
) -> tuple[GenerateResult, Cache]:
    cache, state = _start(model, shape, params, cache, request)
    cache, state = _advance(model, shape, params, cache, state, request, jnp.int32(shape.capacity))
    return state.result(), cache


_generate_donating = jax.jit(_generate, static_argnums=(0, 1), donate_argnums=3)
_start_donating = jax.jit(_start, static_argnums=(0, 1), donate_argnums=3)
_advance_donating = jax.jit(_advance, static_argnums=(0, 1), donate_argnums=(3, 4))


def generate(
    model: Model,
    params: Any,
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    sampling: SamplingParams | None = None,
    stop_ids: Sequence[int] = (),
    batch_size: int = 512,
    keep: bool = False,
) -> tuple[GenerateResult, Cache]:
    """Generates after each prompt, in one XLA program that does not return to Python.

    Args:
      model: ``(params, tokens i32[T], cache, batch, rows i32[R]) -> (logits f32[R, V], cache)``, hashable.
      params: the model's weights, a pytree.
      cache: paged or contiguous; **donated**. Prompt i continues what sequence i of the cache holds.
      prompts: token ids, 1 to ``max_seqs`` prompts of any lengths, none empty.
      max_new_tokens: tokens to generate at most, for all or one number a prompt.
      sampling: one row a sequence of the cache; default greedy.
      stop_ids: tokens that end a sequence; they are not part of the result.
      batch_size: tokens of a prefill step; prompts are packed one behind the other into steps of that many.
      keep: leave finished sequences in the cache (all but their newest token, which was never fed back); otherwise
        their pages are given back the moment they end.

    Returns:
      ``(result, cache)``. A sequence that finds no free page ends with FINISH_OUT_OF_PAGES and what it has, and its
      pages go to the others.

    Raises:
      ValueError: no prompt or too many, an empty prompt, a negative id or count, sampling of another size.
    """
    request, shape = _request(cache, prompts, max_new_tokens, sampling, stop_ids, batch_size, keep)
    return _generate_donating(model, shape, params, cache, request)


@dataclass(frozen=True)
class StreamChunk:
    """What came out since the chunk before."""

    tokens: list[list[int]]
    """New tokens of each prompt, in order."""
    finish_reason: list[int]
    """RUNNING, or why the sequence ended."""


@dataclass
class GenerateStream:
    """An iterator of StreamChunks; see ``generate_stream``.

    ``compile()`` may be called first, to keep compilation out of what is timed. ``cache`` is the cache after the last
    chunk taken; the one passed in is donated by the first.
    """

    model: Model
    params: Any
    cache: Any
    num_prompts: int
    request: _Request
    shape: _Shape
    every: int
    result: GenerateResult | None = None
    """After each chunk, all that was generated so far."""
    _start: Any = field(default=None, repr=False)
    _advance: Any = field(default=None, repr=False)

    def compile(self) -> None:
        """Compiles both programs, without running them."""
        if self._start is not None:
            return
        lowered = _start_donating.lower(self.model, self.shape, self.params, self.cache, self.request)
        cache, state = lowered.out_info
        advance = _advance_donating.lower(
            self.model, self.shape, self.params, cache, state, self.request, jnp.int32(0)
        )
        # Side by side: XLA compiles much of a program on one thread.
        with ThreadPoolExecutor(2) as pool:
            self._start, self._advance = pool.map(lambda program: program.compile(), (lowered, advance))

    def __iter__(self) -> Iterator[StreamChunk]:
        self.compile()
        self.cache, state = self._start(self.params, self.cache, self.request)
        seen = [0] * self.num_prompts
        while True:
            # Copied: the arrays of `state` are donated to the next call.
            self.result = jax.tree.map(np.array, state.result())
            counts = self.result.num_tokens
            new = [self.result.tokens[i, seen[i] : counts[i]].tolist() for i in range(self.num_prompts)]
            seen = [int(counts[i]) for i in range(self.num_prompts)]
            running = bool(np.asarray(state.active).any())
            yield StreamChunk(new, self.result.finish_reason[: self.num_prompts].tolist())
            if not running:
                return
            self.cache, state = self._advance(
                self.params, self.cache, state, self.request, jnp.int32(self.every)
            )


def generate_stream(
    model: Model,
    params: Any,
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    sampling: SamplingParams | None = None,
    stop_ids: Sequence[int] = (),
    batch_size: int = 512,
    keep: bool = False,
    every: int = 8,
) -> GenerateStream:
    """``generate`` that hands out tokens while it runs: the first one after prefill, then up to ``every`` at a time.

    Same arguments, same tokens; the steps of one chunk still run inside one XLA program.

    Raises:
      ValueError: as ``generate``, or ``every`` is not positive.
    """
    if every < 1:
        raise ValueError(f"every must be positive, got {every}")
    request, shape = _request(cache, prompts, max_new_tokens, sampling, stop_ids, batch_size, keep)
    return GenerateStream(model, params, cache, len(prompts), request, shape, every)
