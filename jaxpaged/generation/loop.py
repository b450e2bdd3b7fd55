"""Whole generations inside one XLA program: admit prompts, prefill, decode, sample, stop, give pages back.

The path of a token, top to bottom: ``_admit`` gives a prompt of the queue a sequence of the cache, ``_step`` makes room
for the next tokens of all sequences (a piece of a prompt, or the newest token), runs the model and samples, ``_accept``
appends what was sampled or ends the sequence, whose pages and place then serve the next prompt. ``generate`` runs all
of it without returning to Python; ``generate_stream`` comes back every few tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpaged.cache.interface import Cache, KVCache
from jaxpaged.generation.request import ContextShift, Request, Shape, make_request
from jaxpaged.generation.sampling import SamplingParams, push_recent, sample
from jaxpaged.pages.batch import Batch
from jaxpaged.sharding.mesh import (
    BATCH,
    CACHE,
    GATHERED,
    PARAMS,
    REPLICATED,
    STATIC,
    BatchSharding,
    mesh_of,
    over_mesh,
)

RUNNING, FINISH_STOP, FINISH_LENGTH, FINISH_OUT_OF_PAGES, FINISH_NAN = 0, 1, 2, 3, 4
"""Values of ``finish_reason``: still running; a stop token; the token limit; the pool ran out of pages; the model's
logits held NaN."""


Model = Callable[[Any, Array, Any, Batch, Array], tuple[Array, Any]]
"""``(params, tokens i32[T], cache, batch, rows i32[R]) -> (logits f32[R, V], cache)``"""


@dataclass(frozen=True)
class LimitVocab:
    """A model without the logits behind its first ``vocab_size``, for a vocabulary padded beyond the tokenizer's.

    Takes the place of ``model`` in ``generate`` and its variants, and in the engine: ids from
    ``vocab_size`` on then have no probability and are never sampled.
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GenerateResult:
    """What ``generate`` made. Sample j of prompt i is row ``i * n + j`` of R, which is at least their number."""

    tokens: Array
    """i32[R, M]: the tokens generated, without the stop token; -1 behind them."""
    num_tokens: Array
    """i32[R]: how many they are."""
    finish_reason: Array
    """i32[R]: FINISH_STOP, FINISH_LENGTH, FINISH_OUT_OF_PAGES or FINISH_NAN; RUNNING in rows without a prompt."""
    pages_peak: Array
    """i32[]: most pages in use after any step."""
    num_steps: Array
    """i32[]: how often the model ran."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What the loop carries, beside the cache: S sequences of the cache at work on R rows of the result."""

    tokens: Array
    num_tokens: Array
    finish_reason: Array
    """As in GenerateResult."""
    next_prompt: Array
    """i32[]: the first prompt that was not admitted yet."""
    row: Array
    """i32[S]: the row of the result that each sequence works on; R = the sequence is idle."""
    progress: Array
    """i32[S]: tokens of the prompt that are in the cache."""
    leader: Array
    """i32[S]: the sequence that reads the prompt; its other samples fork it when it is done."""
    newest: Array
    """i32[S]: the token sampled last, not yet in the cache."""
    recent: Array
    """i32[S, W]: the tokens that penalties look at, newest last."""
    pages_peak: Array
    num_steps: Array

    def result(self) -> GenerateResult:
        return GenerateResult(
            self.tokens, self.num_tokens, self.finish_reason, self.pages_peak, self.num_steps
        )


@dataclass(frozen=True)
class Slots:
    """What each of the cache's S sequences is doing."""

    row: Array
    """i32[S]: its row of the result; any row, where it is idle."""
    prompt: Array
    """i32[S]: its prompt."""
    prompt_len: Array
    busy: Array
    """bool[S]"""
    decoding: Array
    """bool[S]: its prompt is read."""
    reading: Array
    """bool[S]: it reads its prompt."""
    waiting: Array
    """bool[S]: another sequence reads its prompt."""

    @classmethod
    def of(cls, state: State, request: Request, shape: Shape) -> Slots:
        rows = state.num_tokens.shape[0]
        busy, row = state.row < rows, jnp.minimum(state.row, rows - 1)
        prompt = row // shape.num_samples
        prompt_len = request.prompt_lens[prompt]
        unread = busy & (state.progress < prompt_len)
        leads = state.leader == jnp.arange(state.row.shape[0])
        return cls(row, prompt, prompt_len, busy, busy & ~unread, unread & leads, unread & ~leads)

    def tokens_to_come(self, state: State, request: Request) -> Array:
        """i32[S]: tokens that each sequence will still write if nothing stops it; the last one never is written."""
        sampled = jnp.maximum(state.num_tokens[self.row], 1)
        left = self.prompt_len - state.progress + request.max_new_tokens[self.row] - sampled
        return jnp.where(self.busy, jnp.maximum(left, 0), 0)


def _end(
    cache: Cache, state: State, ended: Array, reason: Array | int, released: Array
) -> tuple[Cache, State]:
    """Ends the sequences marked ``ended bool[S]``, which then are idle; frees the pages of ``released bool[S]``."""
    cache = jax.lax.cond(jnp.any(released), lambda c: c.seq_remove(released)[0], lambda c: c, cache)
    idle = state.num_tokens.shape[0]
    row = jnp.where(ended, state.row, idle)
    return cache, replace(
        state,
        row=jnp.where(ended, idle, state.row),
        finish_reason=state.finish_reason.at[row].set(reason, mode="drop"),
    )


def _admit(cache: KVCache, state: State, request: Request, shape: Shape) -> State:
    """Gives prompts of the queue idle sequences, in order, as long as there are such and pages for all that may come.

    What is admitted never runs out of pages, unless it has the pool to itself. A prompt too long even then is passed
    over, with FINISH_OUT_OF_PAGES.
    """
    n, s, rows = shape.num_samples, cache.max_seqs, state.num_tokens.shape[0]

    def pending(carry: tuple[State, Array]) -> Array:
        return carry[1]

    def admit_next(carry: tuple[State, Array]) -> tuple[State, Array]:
        state = carry[0]
        first = state.next_prompt * n
        idle = state.row == rows
        rank = jnp.cumsum(idle, dtype=jnp.int32) - 1 if shape.queue else jnp.arange(s) - first
        member = idle & (rank >= 0) & (rank < n)
        row = jnp.where(member, first + rank, rows)
        leader = jnp.argmax(member & (rank == 0))
        admitted = replace(
            state,
            row=jnp.where(member, row, state.row),
            progress=jnp.where(member, 0, state.progress),
            leader=jnp.where(member, leader, state.leader),
            recent=jnp.where(member[:, None], request.recent[state.next_prompt], state.recent),
        )
        slots = Slots.of(admitted, request, shape)
        needed = cache.pages_needed(slots.tokens_to_come(admitted, request), limit=shape.limit)
        needed -= jnp.where(slots.waiting, cache.whole_pages(slots.prompt_len), 0)
        alone = jnp.all(idle)
        for_prompt = cache.pages_needed(
            jnp.where(member & (rank == 0), slots.prompt_len, 0), limit=shape.limit
        )
        possible = jnp.sum(for_prompt) <= cache.pages_free
        room = (jnp.sum(needed) <= cache.pages_free) | (alone & possible)
        if shape.keep:  # pages never come back, so waiting for them would be in vain
            room = possible = jnp.bool_(True)
        enters = (jnp.sum(member) == n) & room
        refused = alone & ~possible
        refused_rows = jnp.where(refused, first, rows) + jnp.arange(n)
        state = jax.tree.map(lambda new, old: jnp.where(enters, new, old), admitted, state)
        moved_on = enters | refused
        state = replace(
            state,
            next_prompt=state.next_prompt + moved_on,
            finish_reason=state.finish_reason.at[refused_rows].set(FINISH_OUT_OF_PAGES, mode="drop"),
        )
        return state, moved_on & (state.next_prompt < request.num_prompts)

    waiting = (state.next_prompt < request.num_prompts) & jnp.any(state.row == rows)
    return jax.lax.while_loop(pending, admit_next, (state, waiting))[0]


def _forget(cache: Cache, slots: Slots, request: Request, shape: Shape, num_new: Array) -> Cache:
    """Makes room in the contexts: what no layer will see again and what a context shift discards is removed."""
    if shape.window is not None:
        cache = cache.seq_drop_unseen(shape.window)
    if not shape.shift:
        return cache
    length = cache.lengths
    full = slots.busy & (num_new > 0) & (length + num_new > request.n_ctx)
    keep = jnp.minimum(request.n_keep[slots.prompt], length)
    usual = jnp.where(request.n_discard > 0, request.n_discard, (length - keep) // 2)
    discard = jnp.clip(jnp.maximum(usual, length + num_new - request.n_ctx), 0, length - keep)

    def shift(cache: Cache) -> Cache:
        # Ranges are positions. Those of a sequence without gaps begin where its first token stands.
        begin = cache.seq_position_min() + keep
        cache, removed = cache.seq_remove(full, begin, begin + discard)
        return cache.seq_shift(full & removed, begin + discard, -1, -discard)[0]

    return jax.lax.cond(jnp.any(full), shift, lambda cache: cache, cache)


def _step(
    model: Model,
    shape: Shape,
    params: Any,
    cache: Cache,
    state: State,
    request: Request,
    *,
    reads: bool,
) -> tuple[Cache, State]:
    """One run of the model: a token for every decoding sequence and, if it ``reads``, pieces of prompts."""
    s = cache.max_seqs
    num_tokens = shape.chunk if reads else s
    slots = Slots.of(state, request, shape)
    num_new = slots.decoding.astype(jnp.int32)
    if reads:
        left = jnp.where(slots.reading, slots.prompt_len - state.progress, 0)
        num_new += jnp.clip(num_tokens - jnp.sum(num_new) - (jnp.cumsum(left) - left), 0, left)

    cache = _forget(cache, slots, request, shape, num_new)
    # Those that find no room end here, their other samples with them, and their pages serve the others.
    fits = cache.can_reserve_each(num_new)
    ended = slots.busy & ~(fits & fits[state.leader])
    cache, state = _end(cache, state, ended, FINISH_OUT_OF_PAGES, released=ended)
    num_new = jnp.where(ended, 0, num_new)
    cache, batch, _ = cache.reserve(num_new, num_tokens=num_tokens, max_new=num_tokens if reads else 1)

    sequence = jnp.minimum(batch.sequence, s - 1)
    tokens = state.newest[sequence]
    if reads:
        column = state.progress[sequence] + jnp.arange(num_tokens) - batch.cu_q_lens[sequence]
        column = jnp.clip(column, 0, request.prompts.shape[1] - 1)
        tokens = jnp.where(slots.reading[sequence], request.prompts[slots.prompt[sequence], column], tokens)
    last = batch.last_rows[state.leader]
    logits, cache = model(params, tokens, cache, batch, last)

    progress = state.progress + jnp.where(slots.reading, num_new, 0)
    sampled = (num_new > 0) & (progress == slots.prompt_len)
    if reads and shape.num_samples > 1:
        forked = slots.waiting & ~ended & sampled[state.leader]
        source = jnp.where(forked, state.leader, jnp.arange(s))
        cache = jax.lax.cond(jnp.any(forked), lambda c: c.seq_reorder(source), lambda c: c, cache)
        progress = jnp.where(forked, slots.prompt_len, progress)
        sampled |= forked
        state = replace(state, leader=jnp.where(forked, jnp.arange(s), state.leader))
    # Not the position in the context, which a shift turns back, but how far the sequence has come.
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
    """Appends the token sampled for each sequence marked, and ends those that are done."""
    failed = sampled & (token < 0)
    stopped = sampled & ~failed & jnp.any(token[:, None] == request.stop_ids, axis=1)
    limit = request.max_new_tokens[slots.row]
    room = state.num_tokens[slots.row] < limit
    appended = sampled & ~stopped & ~failed & room
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
    reason = jnp.where(stopped & room, FINISH_STOP, jnp.where(failed, FINISH_NAN, FINISH_LENGTH))
    ended = stopped | full | failed
    return _end(cache, state, ended, reason, released=failed if keep else ended)


def begin(cache: KVCache, request: Request, shape: Shape) -> State:
    """Nothing admitted yet."""
    s, rows = cache.max_seqs, request.max_new_tokens.shape[0]
    none = jnp.zeros(s, jnp.int32)
    return State(
        tokens=jnp.full((rows, shape.capacity), -1, jnp.int32),
        num_tokens=jnp.zeros(rows, jnp.int32),
        finish_reason=jnp.full(rows, RUNNING, jnp.int32),
        next_prompt=jnp.int32(0),
        row=none + rows,
        progress=none,
        leader=jnp.arange(s, dtype=jnp.int32),
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
    """At most ``steps`` steps that decode, and as many as it takes to read the prompts admitted."""
    rows = state.num_tokens.shape[0]
    last = state.num_steps + steps

    def reading(state: State) -> Array:
        return jnp.any(Slots.of(state, request, shape).reading)

    def admissible(state: State) -> Array:
        return (state.next_prompt < request.num_prompts) & jnp.any(state.row == rows)

    def unfinished(carry: tuple[Cache, State]) -> Array:
        state = carry[1]
        left = (state.next_prompt < request.num_prompts) | jnp.any(state.row < rows)
        return left & ((state.num_steps < last) | reading(state))

    # Two loops side by side, not a choice inside of one: a branch that writes the pool might copy it. Both come back as
    # soon as a sequence is idle that a prompt waits for, but not before a step was made: it may have to wait for pages.
    def turn(carry: tuple[Cache, State]) -> tuple[Cache, State]:
        cache, state = carry

        def step(carry: tuple[Array, Cache, State], *, reads: bool) -> tuple[Array, Cache, State]:
            cache, state = _step(model, shape, params, carry[1], carry[2], request, reads=reads)
            return ~admissible(state), cache, state

        def reads(carry: tuple[Array, Cache, State]) -> Array:
            return carry[0] & reading(carry[2])

        def decodes(carry: tuple[Array, Cache, State]) -> Array:
            go, _, state = carry
            return go & jnp.any(state.row < rows) & (state.num_steps < last) & ~reading(state)

        going = jnp.bool_(True), cache, _admit(cache, state, request, shape)
        going = jax.lax.while_loop(reads, functools.partial(step, reads=True), going)
        _, cache, state = jax.lax.while_loop(decodes, functools.partial(step, reads=False), going)
        return cache, state

    state = _admit(cache, state, request, shape)
    return jax.lax.while_loop(unfinished, turn, (cache, state))


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


def in_order(result: GenerateResult, deal: BatchSharding) -> GenerateResult:
    """What the data shards of a mesh came to as rows of the caller's order, on the host; pages are summed up."""
    return deal.gathered_result(result, pages_peak=np.sum, num_steps=np.max)


def generate(
    model: Model,
    params: Any,
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    n: int = 1,
    sampling: SamplingParams | None = None,
    stop_ids: Sequence[int] = (),
    batch_size: int = 512,
    keep: bool = False,
    context_shift: ContextShift | None = None,
    window: int | None = None,
    history: Sequence[Sequence[int]] = (),
) -> tuple[GenerateResult, Cache]:
    """Generates after each prompt, in one XLA program that does not return to Python.

    Prompts beyond the cache's sequences wait in a queue on the device: when a sequence ends, its pages go back, and the
    next prompt is read, in chunks, beside the sequences that decode. A prompt is admitted when there are pages for all
    that it and the others may yet write, so none runs out of pages on the way, unless it is alone.

    Args:
      model: ``(params, tokens i32[T], cache, batch, rows i32[R]) -> (logits f32[R, V], cache)``, hashable.
      params: the model's weights, a pytree.
      cache: paged or contiguous; **donated**. With as many sequences as rows, row i continues what sequence i of the
        cache holds; with fewer, all of them should be empty. A ``ShardedCache`` runs all of it on its mesh, in one
        program still: prompts are dealt to its data shards, or the samples of a few prompts are; ``model`` and
        ``params`` are then those of a mesh (``jaxpaged_model.checkpoint.loading.load_model(mesh=...)``).
      prompts: token ids, any number of prompts of any lengths, none empty.
      max_new_tokens: tokens to generate at most, for all or one number a prompt.
      n: samples of each prompt, at most the cache's sequences. They share the prompt's pages, and copy on write.
      sampling: one row a sample, or one a sequence of the cache where these are more; default greedy.
      stop_ids: tokens that end a sequence; they are not part of the result.
      batch_size: tokens of a step that reads prompts; they are packed one behind the other into steps of that many.
      keep: leave finished sequences in the cache (all but their newest token, which was never fed back); otherwise
        their pages are given back the moment they end. Not with a queue.
      context_shift: go on beyond the context; it takes two pages and two table entries a sequence more than ``n_ctx``
        tokens do. Needs a paged cache, and a model that hands its ``rope`` to ``attend``.
      window: tokens that the widest layer sees, if no layer sees all: pages behind it are given back on the way.
      history: the tokens before each prompt, where the cache has some: penalties look at them, and a context shift's
        ``n_keep`` counts them.

    Returns:
      ``(result, cache)``. A sequence that finds no free page ends with FINISH_OUT_OF_PAGES and the tokens it has; one
      whose logits hold NaN ends with FINISH_NAN. Their pages are freed, with ``keep`` too.

    Raises:
      ValueError: no prompt, an empty prompt, a negative id or count, sampling of another size, a prompt that fills the
        shifted context, ``keep`` with more rows than sequences.
    """
    mesh = mesh_of(cache)
    request, shape = make_request(
        cache.max_seqs,
        prompts,
        max_new_tokens,
        sampling,
        stop_ids,
        batch_size,
        keep,
        n,
        context_shift,
        window,
        history,
        mesh,
    )
    result, cache = _generate_donating(model, shape, params, cache, request)
    return (result if mesh is None else in_order(result, BatchSharding.of(mesh, len(prompts), n))), cache
