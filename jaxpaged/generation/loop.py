"""Generation in one XLA program: admit prompts, prefill, decode, sample, stop, free pages.

The path of a token, top to bottom: ``_admit`` assigns a prompt of the queue to an idle sequence of
the cache; ``_step`` reserves slots for the next tokens of all sequences (part of a prompt, or the
newest token), runs the model and samples; ``_accept`` appends the sampled tokens and ends
sequences, which then serve the next prompts. ``generate`` does all of it without returning to
Python; ``generate_stream`` returns every few tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array, lax

from jaxpaged.cache.interface import Cache, KVCache
from jaxpaged.generation.prompts import PromptsLike
from jaxpaged.generation.request import ContextShift, Request, Shape, make_request
from jaxpaged.generation.sampling import SamplingParams, push_recent, sample
from jaxpaged.pages.batch import Batch
from jaxpaged.sharding.mesh import BatchSharding
from jaxpaged.sharding.specs import BATCH, CACHE, GATHERED, PARAMS, REPLICATED, STATIC, mesh_of, over_mesh

RUNNING, FINISH_STOP, FINISH_LENGTH, FINISH_OUT_OF_PAGES, FINISH_NAN = 0, 1, 2, 3, 4
"""Values of ``finish_reason``: still running; a stop token; the token limit; the pool ran out of
pages; the logits held NaN."""

Model = Callable[[Any, Array, Any, Batch, Array], tuple[Array, Any]]
"""``(params, tokens i32[T], cache, batch, rows i32[R]) -> (logits f32[R, V], cache)``"""


@dataclass(frozen=True)
class LimitVocab:
    """A model that returns the first ``vocab_size`` logits only, where a vocabulary is padded.

    Takes the place of ``model`` in ``generate`` and its variants, and in the engine: ids from
    ``vocab_size`` on have no probability then and are never sampled.
    """

    model: Model
    vocab_size: int

    def __call__(
        self, params: Any, tokens: Array, cache: Any, batch: Batch, rows: Array
    ) -> tuple[Array, Any]:
        logits, cache = self.model(params, tokens, cache, batch, rows)
        if not 1 <= self.vocab_size <= logits.shape[1]:
            raise ValueError(
                f"vocab_size must be 1 to {logits.shape[1]} (the logits'), got {self.vocab_size}"
            )
        return logits[:, : self.vocab_size], cache

    @property
    def program_key(self) -> str | None:
        """Key of the executable cache, see ``cached_compile``; None if the model has none."""
        key = getattr(self.model, "program_key", None)
        return None if key is None else f"{key} vocab_size={self.vocab_size}"


class ResultBase:
    """A dataclass of arrays whose ``repr`` shows their dtypes and shapes, and does not fetch
    them."""

    def __repr__(self) -> str:
        arrays = ", ".join(f"{name}={x.dtype}{list(x.shape)}" for name, x in vars(self).items())
        return f"{type(self).__name__}({arrays})"


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class GenerateResult(ResultBase):
    """Result of ``generate``. Sample j of prompt i is row ``i * n + j`` of R; rows behind the last
    are padding."""

    tokens: Array
    """i32[R, M]: generated tokens, without the stop token, padded with -1."""
    num_tokens: Array
    """i32[R]: number of generated tokens."""
    finish_reason: Array
    """i32[R]: FINISH_STOP, FINISH_LENGTH, FINISH_OUT_OF_PAGES or FINISH_NAN; RUNNING in padding."""
    pages_peak: Array
    """i32[]: largest number of pages in use after any step."""
    num_steps: Array
    """i32[]: runs of the model."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class State(ResultBase):
    """Carry of the loop, beside the cache: S sequences of the cache, R rows of the result."""

    tokens: Array
    num_tokens: Array
    finish_reason: Array
    """See GenerateResult."""
    next_prompt: Array
    """i32[]: first prompt that has not been admitted."""
    row: Array
    """i32[S]: row of the result that each sequence works on; R = idle."""
    progress: Array
    """i32[S]: tokens of the prompt that are in the cache."""
    leader: Array
    """i32[S]: sequence that prefills the prompt; the other samples fork it afterwards."""
    newest: Array
    """i32[S]: token sampled last, not yet in the cache."""
    recent: Array
    """i32[S, W]: tokens that penalties apply to, newest last."""
    pages_peak: Array
    num_steps: Array

    def result(self) -> GenerateResult:
        return GenerateResult(
            self.tokens, self.num_tokens, self.finish_reason, self.pages_peak, self.num_steps
        )


@dataclass(frozen=True)
class Slots:
    """Activity of each of the S sequences of the cache."""

    row: Array
    """i32[S]: row of the result; arbitrary if idle."""
    prompt: Array
    """i32[S]"""
    prompt_len: Array
    """i32[S]"""
    busy: Array
    """bool[S]"""
    decoding: Array
    """bool[S]: the prompt is in the cache."""
    prefilling: Array
    """bool[S]: the prompt is not all in the cache."""
    waiting: Array
    """bool[S]: another sequence prefills the prompt."""

    @classmethod
    def of(cls, state: State, request: Request, shape: Shape) -> Slots:
        rows = state.num_tokens.shape[0]
        busy, row = state.row < rows, jnp.minimum(state.row, rows - 1)
        prompt = row // shape.num_samples
        prompt_len = request.prompt_lens[prompt]
        unread = busy & (state.progress < prompt_len)
        leads = state.leader == lax.iota(jnp.int32, state.row.shape[0])
        return cls(row, prompt, prompt_len, busy, busy & ~unread, unread & leads, unread & ~leads)

    def tokens_left(self, state: State, request: Request) -> Array:
        """i32[S]: tokens that each sequence will write unless it stops early; its last token is not
        written."""
        sampled = jnp.maximum(state.num_tokens[self.row], 1)
        left = self.prompt_len - state.progress + request.max_new_tokens[self.row] - sampled
        return jnp.where(self.busy, jnp.maximum(left, 0), 0)


def _end(
    cache: Cache, state: State, ended: Array, reason: Array | int, released: Array
) -> tuple[Cache, State]:
    """Ends the sequences ``ended bool[S]``, which are idle then, and frees the pages of ``released
    bool[S]``."""
    cache, _ = cache.seq_remove(released)
    idle = state.num_tokens.shape[0]
    row = jnp.where(ended, state.row, idle)
    return cache, replace(
        state,
        row=jnp.where(ended, idle, state.row),
        finish_reason=state.finish_reason.at[row].set(reason, mode="drop"),
    )


def _admit(cache: KVCache, state: State, request: Request, shape: Shape) -> State:
    """Assigns prompts of the queue, in order, to idle sequences while there are pages for all they
    may write.

    An admitted prompt never runs out of pages, unless it has the pool to itself. One that does not
    fit even then ends with FINISH_OUT_OF_PAGES.
    """
    n, s, rows = shape.num_samples, cache.max_seqs, state.num_tokens.shape[0]

    def pending(carry: tuple[State, Array]) -> Array:
        return carry[1]

    def admit_next(carry: tuple[State, Array]) -> tuple[State, Array]:
        state = carry[0]
        first = state.next_prompt * n
        idle = state.row == rows
        rank = jnp.cumsum(idle, dtype=jnp.int32) - 1 if shape.queue else lax.iota(jnp.int32, s) - first
        member = idle & (rank >= 0) & (rank < n)
        row = jnp.where(member, first + rank, rows)
        leader = jnp.argmax(member & (rank == 0)).astype(jnp.int32)
        admitted = replace(
            state,
            row=jnp.where(member, row, state.row),
            progress=jnp.where(member, 0, state.progress),
            leader=jnp.where(member, leader, state.leader),
            recent=jnp.where(member[:, None], request.recent[state.next_prompt], state.recent),
        )
        slots = Slots.of(admitted, request, shape)
        needed = cache.pages_needed(slots.tokens_left(admitted, request), limit=shape.limit)
        needed -= jnp.where(slots.waiting, cache.whole_pages(slots.prompt_len), 0)
        alone = jnp.all(idle)
        for_prompt = cache.pages_needed(
            jnp.where(member & (rank == 0), slots.prompt_len, 0), limit=shape.limit
        )
        possible = jnp.sum(for_prompt) <= cache.pages_free
        enough = (jnp.sum(needed) <= cache.pages_free) | (alone & possible)
        if shape.keep:  # pages are never freed, so waiting for them would be in vain
            enough = possible = jnp.bool_(True)
        enters = (jnp.sum(member) == n) & enough
        refused = alone & ~possible
        refused_rows = jnp.where(refused, first, rows) + lax.iota(jnp.int32, n)
        state = jax.tree.map(lambda new, old: jnp.where(enters, new, old), admitted, state)
        moved_on = enters | refused
        state = replace(
            state,
            next_prompt=state.next_prompt + moved_on,
            finish_reason=state.finish_reason.at[refused_rows].set(FINISH_OUT_OF_PAGES, mode="drop"),
        )
        return state, moved_on & (state.next_prompt < request.num_prompts)

    waiting = (state.next_prompt < request.num_prompts) & jnp.any(state.row == rows)
    return lax.while_loop(pending, admit_next, (state, waiting))[0]


def _discard(cache: Cache, slots: Slots, request: Request, shape: Shape, num_new: Array) -> Cache:
    """Removes tokens that no layer will see again, and those that a context shift discards."""
    if shape.window is not None:
        cache = cache.seq_drop_unseen(shape.window)
    if not shape.shift:
        return cache
    length = cache.lengths
    full = slots.busy & (num_new > 0) & (length + num_new > request.n_ctx)
    keep = jnp.minimum(request.n_keep[slots.prompt], length)
    usual = jnp.where(request.n_discard > 0, request.n_discard, (length - keep) // 2)
    discard = jnp.clip(jnp.maximum(usual, length + num_new - request.n_ctx), 0, length - keep)

    # Ranges are positions; a sequence without gaps begins at its smallest.
    begin = cache.seq_position_min() + keep
    cache, removed = cache.seq_remove(full, begin, begin + discard)
    return cache.seq_shift(full & removed, begin + discard, -1, -discard)[0]


def _step(
    model: Model,
    shape: Shape,
    params: Any,
    cache: Cache,
    state: State,
    request: Request,
    *,
    prefill: bool,
) -> tuple[Cache, State]:
    """One run of the model: a token of every decoding sequence and, with ``prefill``, parts of
    prompts."""
    s = cache.max_seqs
    num_tokens = shape.chunk if prefill else s
    slots = Slots.of(state, request, shape)
    num_new = slots.decoding.astype(jnp.int32)
    if prefill:
        left = jnp.where(slots.prefilling, slots.prompt_len - state.progress, 0)
        before = jnp.cumsum(left, dtype=jnp.int32) - left
        num_new += jnp.clip(num_tokens - jnp.sum(num_new, dtype=jnp.int32) - before, 0, left)

    cache = _discard(cache, slots, request, shape, num_new)
    # Sequences without pages end here, with their other samples, and their pages serve the others.
    fits = cache.can_reserve_each(num_new)
    ended = slots.busy & ~(fits & fits[state.leader])
    cache, state = _end(cache, state, ended, FINISH_OUT_OF_PAGES, released=ended)
    num_new = jnp.where(ended, 0, num_new)
    cache, batch, _ = cache.reserve(num_new, num_tokens=num_tokens, max_new=num_tokens if prefill else 1)

    sequence = jnp.minimum(batch.sequence, s - 1)
    tokens = state.newest[sequence]
    if prefill:
        column = state.progress[sequence] + lax.iota(jnp.int32, num_tokens) - batch.cu_q_lens[sequence]
        column = jnp.clip(column, 0, request.prompts.shape[1] - 1)
        tokens = jnp.where(
            slots.prefilling[sequence], request.prompts[slots.prompt[sequence], column], tokens
        )
    last = batch.last_rows[state.leader]
    logits, cache = model(params, tokens, cache, batch, last)

    progress = state.progress + jnp.where(slots.prefilling, num_new, 0)
    sampled = (num_new > 0) & (progress == slots.prompt_len)
    if prefill and shape.num_samples > 1:
        forked = slots.waiting & ~ended & sampled[state.leader]
        source = jnp.where(forked, state.leader, lax.iota(jnp.int32, s))
        cache = lax.cond(jnp.any(forked), lambda c: c.seq_reorder(source), lambda c: c, cache)
        progress = jnp.where(forked, slots.prompt_len, progress)
        sampled |= forked
        state = replace(state, leader=jnp.where(forked, lax.iota(jnp.int32, s), state.leader))
    # Random numbers follow the distance from the beginning, which a context shift does not change.
    token = sample(
        logits,
        jax.tree.map(lambda field: field[slots.row], request.sampling),
        batch.rope_positions[last] + 1,
        state.recent,
    )
    state = replace(
        state,
        progress=progress,
        pages_peak=jnp.maximum(state.pages_peak, cache.pages_used),
        num_steps=state.num_steps + 1,
    )
    return _accept(cache, state, request, slots, token, sampled, shape.keep)


def _accept(
    cache: Cache,
    state: State,
    request: Request,
    slots: Slots,
    token: Array,
    sampled: Array,
    keep: bool,
) -> tuple[Cache, State]:
    """Appends the token of each sequence in ``sampled bool[S]``, and ends those that are
    finished."""
    failed = sampled & (token < 0)
    stopped = sampled & ~failed & jnp.any(token[:, None] == request.stop_ids, axis=1)
    limit = request.max_new_tokens[slots.row]
    below_limit = state.num_tokens[slots.row] < limit
    appended = sampled & ~stopped & ~failed & below_limit
    row = jnp.where(appended, slots.row, state.num_tokens.shape[0])
    num_tokens = state.num_tokens.at[row].add(1, mode="drop")
    column = state.num_tokens[slots.row]
    state = replace(
        state,
        tokens=state.tokens.at[row, column].set(token, mode="drop"),
        num_tokens=num_tokens,
        newest=jnp.where(appended, token, state.newest),
        recent=push_recent(state.recent, token, appended),
    )
    full = sampled & (num_tokens[slots.row] >= limit)
    reason = jnp.where(stopped & below_limit, FINISH_STOP, jnp.where(failed, FINISH_NAN, FINISH_LENGTH))
    ended = stopped | full | failed
    return _end(cache, state, ended, reason, released=failed if keep else ended)


def begin(cache: KVCache, request: Request, shape: Shape) -> State:
    """State before any prompt is admitted."""
    s, rows = cache.max_seqs, request.max_new_tokens.shape[0]
    none = jnp.zeros(s, jnp.int32)
    return State(
        tokens=jnp.full((rows, shape.capacity), -1, jnp.int32),
        num_tokens=jnp.zeros(rows, jnp.int32),
        finish_reason=jnp.full(rows, RUNNING, jnp.int32),
        next_prompt=jnp.int32(0),
        row=none + rows,
        progress=none,
        leader=lax.iota(jnp.int32, s),
        newest=none,
        recent=jnp.full((s, request.recent.shape[1]), -1, jnp.int32),
        pages_peak=cache.pages_used,
        num_steps=jnp.int32(0),
    )


def _advance(
    model: Model,
    shape: Shape,
    params: Any,
    cache: Cache,
    state: State,
    request: Request,
    steps: Array,
) -> tuple[Cache, State]:
    """Runs at most ``steps`` decode steps, and as many prefill steps as the admitted prompts
    need."""
    rows = state.num_tokens.shape[0]
    last = state.num_steps + steps

    def prefilling(state: State) -> Array:
        return jnp.any(Slots.of(state, request, shape).prefilling)

    def admissible(state: State) -> Array:
        return (state.next_prompt < request.num_prompts) & jnp.any(state.row == rows)

    def unfinished(carry: tuple[Cache, State]) -> Array:
        state = carry[1]
        left = (state.next_prompt < request.num_prompts) | jnp.any(state.row < rows)
        return left & ((state.num_steps < last) | prefilling(state))

    # Two loops in succession, not a condition inside of one: a branch that writes to the pool might
    # copy it. Both end as soon as a sequence is idle while prompts wait, but not before a step was
    # made, since a prompt may have to wait for pages.
    def cycle(carry: tuple[Cache, State]) -> tuple[Cache, State]:
        cache, state = carry

        def step(carry: tuple[Array, Cache, State], *, prefill: bool) -> tuple[Array, Cache, State]:
            cache, state = _step(model, shape, params, carry[1], carry[2], request, prefill=prefill)
            return ~admissible(state), cache, state

        def prefills(carry: tuple[Array, Cache, State]) -> Array:
            return carry[0] & prefilling(carry[2])

        def decodes(carry: tuple[Array, Cache, State]) -> Array:
            go, _, state = carry
            return go & jnp.any(state.row < rows) & (state.num_steps < last) & ~prefilling(state)

        going = jnp.bool_(True), cache, _admit(cache, state, request, shape)
        going = lax.while_loop(prefills, functools.partial(step, prefill=True), going)
        _, cache, state = lax.while_loop(decodes, functools.partial(step, prefill=False), going)
        return cache, state

    state = _admit(cache, state, request, shape)
    return lax.while_loop(unfinished, cycle, (cache, state))


def _generate(
    model: Model, shape: Shape, params: Any, cache: Cache, request: Request
) -> tuple[GenerateResult, Cache]:
    state = begin(cache, request, shape)
    most = jnp.int32(np.iinfo(np.int32).max)
    cache, state = _advance(model, shape, params, cache, state, request, most)
    return state.result(), cache


_generate_donating = jax.jit(
    over_mesh(_generate, (STATIC, STATIC, PARAMS, CACHE, BATCH), (GATHERED, CACHE)),
    static_argnums=(0, 1),
    donate_argnums=3,
)
begin_jitted = jax.jit(over_mesh(begin, (CACHE, BATCH, STATIC), BATCH), static_argnums=2)
advance_donating = jax.jit(
    over_mesh(_advance, (STATIC, STATIC, PARAMS, CACHE, BATCH, BATCH, REPLICATED), (CACHE, BATCH)),
    static_argnums=(0, 1),
    donate_argnums=(3, 4),
)


def gather_result(result: GenerateResult, sharding: BatchSharding) -> GenerateResult:
    """Results of the data shards of a mesh in the caller's order, on the host; pages are summed
    up."""
    return sharding.gather_result(result, pages_peak=np.sum, num_steps=np.max)


def generate(
    model: Model,
    params: Any,
    cache: Cache,
    prompts: PromptsLike,
    *,
    max_new_tokens: npt.ArrayLike,
    prompt_lens: npt.ArrayLike | None = None,
    n: int = 1,
    sampling: SamplingParams | None = None,
    stop_ids: Sequence[int] = (),
    batch_size: int = 512,
    keep: bool = False,
    context_shift: ContextShift | None = None,
    window: int | None = None,
    history: Sequence[Sequence[int]] = (),
) -> tuple[GenerateResult, Cache]:
    """Generates a continuation of each prompt, in one XLA program that does not return to Python.

    More prompts than the cache has sequences wait in a queue on the device: when a sequence ends,
    its pages are freed, and the next prompt is prefilled in chunks, in the steps of the sequences
    that decode. A prompt is admitted when there are pages for all that it and the others may yet
    write, so none runs out of pages on the way, unless it is alone.

    Programs are compiled for sizes in buckets: any prompts and ``max_new_tokens`` of up to 4,096
    tokens share a program (fewer where many rows share an array), if their prefill steps have the
    same size: up to 16 tokens, 24, 32, 48, 64 and so on up to ``batch_size``. All else is data.

    Args:
      model: ``(params, tokens i32[T], cache, batch, rows i32[R]) -> (logits f32[R, V], cache)``,
        hashable.
      params: the model's weights, a pytree.
      cache: paged or contiguous; **donated**. With as many sequences as rows, row i continues
        sequence i of the cache; with fewer, all sequences should be empty. A ``ShardedCache`` runs
        the program on its mesh: prompts are distributed over its data shards, or the samples of a
        few prompts are; ``model`` and ``params`` are then of ``load_model(mesh=...)``.
      prompts: token ids, any number of prompts of any lengths, none empty: lists, 1-D arrays, or
        one array ``i32[B, T]``.
      max_new_tokens: maximum number of tokens to generate, one for all or one a prompt.
      prompt_lens: i32[B], tokens of each prompt if ``prompts`` are padded on the right.
      n: samples of each prompt, at most the cache's sequences. They share the prompt's pages, with
        copy-on-write.
      sampling: one row a sample, or one a sequence of the cache if these are more; default greedy.
      stop_ids: tokens that end a sequence; they are not part of the result.
      batch_size: maximum number of tokens of a prefill step, which may hold parts of several
        prompts.
      keep: leave finished sequences in the cache (without their newest token, which was never an
        input); otherwise their pages are freed when they end. Not with a queue.
      context_shift: continue beyond the context; takes two pages and two table entries a sequence
        more than ``n_ctx`` tokens do. Needs a paged cache with a ``rope``.
      window: attention window of the widest layer, if none sees all tokens: pages behind it are
        freed on the way.
      history: tokens before each prompt that the cache holds already: penalties apply to them, and
        ``n_keep`` of a context shift counts them.

    Returns:
      ``(result, cache)``. A sequence that gets no page ends with FINISH_OUT_OF_PAGES and the tokens
      it has; one whose logits hold NaN ends with FINISH_NAN. Their pages are freed, with ``keep``
      too.

    Raises:
      ValueError: no prompt, an empty prompt, ids that are no integers or negative, a negative
        count, sampling of another size, a prompt that fills the shifted context, ``keep`` with more
        rows than sequences.
    """
    mesh = mesh_of(cache)
    request, shape = make_request(
        cache.max_seqs, prompts, max_new_tokens, sampling, stop_ids, batch_size, keep, n, context_shift,
        window, history, mesh, prompt_lens,
    )  # fmt: skip
    result, cache = _generate_donating(model, shape, params, cache, request)
    return (result if mesh is None else gather_result(result, BatchSharding.of(mesh, len(prompts), n))), cache
