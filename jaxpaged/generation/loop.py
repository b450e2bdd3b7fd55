"""The decode loop: admit prompts, prefill, decode, sample, stop, free pages, in one XLA program.

The path of a token, top to bottom: ``_admit`` assigns a prompt of the queue to an idle sequence of
the cache; ``_step`` reserves slots for the next tokens of all sequences (part of a prompt, or the
newest token and its draft), runs the model and samples; ``_accept`` appends the sampled tokens and
ends sequences, which then serve the next prompts. ``run`` does all of it without returning to
Python; ``generate_stream`` returns every few steps. Drafts (``lookup``) and beams (``beams``) are
ways of choosing tokens in this loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxpaged.cache.interface import Cache, KVCache
from jaxpaged.generation import beams
from jaxpaged.generation.lookup import find_drafts
from jaxpaged.generation.request import Request
from jaxpaged.generation.result import (
    FINISH_LENGTH,
    FINISH_NAN,
    FINISH_OUT_OF_PAGES,
    FINISH_STOP,
    RUNNING,
    GenerateResult,
    ResultBase,
)
from jaxpaged.generation.sampling import logprobs_of, push_recent, sample_next
from jaxpaged.generation.sampling_params import SamplingParams, first_mu
from jaxpaged.pages.batch import Batch

Model = Callable[[Any, Array, Any, Batch, Array], tuple[Array, Any]]
"""``(params, tokens i32[T], cache, batch, rows i32[R]) -> (logits f32[R, V], cache)``"""


def check_model(model: Any) -> None:
    """Checks that programs can be kept for a model.

    Raises:
      ValueError: it is not callable, or not hashable.
    """
    try:
        hash(model)
    except TypeError:
        kind = type(model).__name__
        raise ValueError(
            f"model must be hashable, since a program is compiled for it, got {kind}: pass a function of (params, "
            "tokens, cache, batch, rows), and what it computes with as params"
        ) from None
    if not callable(model):
        raise ValueError(f"model must be a function, got {type(model).__name__}")


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class State(ResultBase):
    """Carry of the loop, beside the cache: S sequences of the cache, R rows of the result."""

    result: GenerateResult
    """Result so far."""
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
    mu: Array
    """f32[S]: state of Mirostat."""
    search: beams.Search | None
    """State of a beam search, else None."""


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
    def of(cls, state: State, request: Request) -> Slots:
        rows = state.result.num_tokens.shape[0]
        busy, row = state.row < rows, jnp.minimum(state.row, rows - 1)
        prompt = lax.div(row, jnp.int32(request.shape.num_samples))
        prompt_len = request.prompt_lens[prompt]
        unread = busy & (state.progress < prompt_len)
        leads = state.leader == lax.iota(jnp.int32, state.row.shape[0])
        return cls(row, prompt, prompt_len, busy, busy & ~unread, unread & leads, unread & ~leads)

    def tokens_left(self, state: State, request: Request) -> Array:
        """i32[S]: tokens that each sequence will write unless it stops early; its last token is not
        written."""
        sampled = jnp.maximum(state.result.num_tokens[self.row], 1)
        left = self.prompt_len - state.progress + request.max_new_tokens[self.row] - sampled
        return jnp.where(self.busy, jnp.maximum(left, 0), 0)


def _admit(cache: KVCache, state: State, request: Request) -> State:
    """Assigns prompts of the queue, in order, to idle sequences while there are pages for all they
    may write.

    An admitted prompt never runs out of pages, unless it has the pool to itself. One that does not
    fit even then ends with FINISH_OUT_OF_PAGES.
    """
    shape, s, rows = request.shape, cache.max_seqs, state.result.num_tokens.shape[0]
    n = shape.num_samples

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
            mu=jnp.where(member, first_mu(request.sampling)[jnp.minimum(row, rows - 1)], state.mu),
        )
        slots = Slots.of(admitted, request)

        def pages_needed(num_new: Array) -> Array:
            return cache.pages_needed(num_new, limit=shape.limit, step=shape.chunk)

        def are_free(pages: Array) -> Array:
            return jnp.all(jnp.sum(pages, axis=0) <= cache.pages_free)  # in each layer group

        needed = pages_needed(slots.tokens_left(admitted, request))
        needed -= cache.whole_pages(jnp.where(slots.waiting, slots.prompt_len, 0))
        alone = jnp.all(idle)
        possible = are_free(pages_needed(jnp.where(member & (rank == 0), slots.prompt_len, 0)))
        enough = are_free(needed) | (alone & possible)
        # Where pages are never freed, waiting for them would be in vain; beams share most of theirs.
        if shape.keep or shape.beams:
            enough = possible = jnp.bool_(True)
        enters = (jnp.sum(member) == n) & enough
        refused = alone & ~possible
        refused_rows = jnp.where(refused, first, rows) + lax.iota(jnp.int32, n)
        state = jax.tree.map(lambda new, old: jnp.where(enters, new, old), admitted, state)
        moved_on = enters | refused
        reason = state.result.finish_reason.at[refused_rows].set(FINISH_OUT_OF_PAGES, mode="drop")
        state = replace(
            state,
            next_prompt=state.next_prompt + moved_on,
            result=replace(state.result, finish_reason=reason),
        )
        return state, moved_on & (state.next_prompt < request.num_prompts)

    waiting = (state.next_prompt < request.num_prompts) & jnp.any(state.row == rows)
    return lax.while_loop(pending, admit_next, (state, waiting))[0]


def _discard(cache: Cache, slots: Slots, request: Request, num_new: Array) -> Cache:
    """Removes tokens that no layer will see again, and those that a context shift discards."""
    cache = cache.without_unseen()
    if not request.shape.shift:
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


def _draft(cache: Cache, state: State, slots: Slots, request: Request, decodes: Array) -> tuple[Array, Array]:
    """``(draft i32[S, K], count i32[S])``: tokens to try behind the newest one, and number of them."""
    s, lookup, shape = cache.max_seqs, request.shape.lookup, request.shape
    if lookup is None:
        return jnp.zeros((s, 0), jnp.int32), jnp.zeros(s, jnp.int32)
    # The text of each sequence: its prompt, and what was generated since.
    result, prompt_len = state.result, slots.prompt_len
    longest = request.prompts.shape[1]
    column = lax.iota(jnp.int32, longest + shape.capacity)
    generated = jnp.clip(column - prompt_len[:, None], 0, shape.capacity - 1)
    text = jnp.where(
        column < prompt_len[:, None],
        request.prompts[slots.prompt[:, None], jnp.minimum(column, longest - 1)],
        result.tokens[slots.row[:, None], generated],
    )
    num_tokens = result.num_tokens[slots.row]
    draft, found = find_drafts(text, prompt_len + num_tokens, ngram=lookup.ngram, num_draft=lookup.num_draft)
    # The last token of a limit is never drafted, since a step adds one more token than it accepts.
    left = request.max_new_tokens[slots.row] - num_tokens - 1
    if shape.shift:
        left = jnp.minimum(left, request.n_ctx - cache.lengths - 1)
    count = jnp.where(decodes & slots.decoding & found, jnp.clip(left, 0, lookup.num_draft), 0)
    # A draft must neither take a page that another sequence needs nor end its own sequence.
    fits = jnp.all(cache.can_reserve_each(slots.decoding + count))
    return draft, jnp.where(fits, count, 0)


def _once(wanted: Array, function: Callable[[Any], Any], value: Any) -> Any:
    """``function(value)`` if ``wanted``, else ``value``.

    A loop of at most one turn: a branch of ``lax.cond`` that writes to the pool copies it.
    """
    done = lax.while_loop(lambda c: c[0], lambda c: (jnp.bool_(False), function(c[1])), (wanted, value))
    return done[1]


def _step(
    model: Model, params: Any, cache: Cache, state: State, request: Request, last: Array, logits: Array
) -> tuple[Cache, State, Array]:
    """One run of the model: parts of prompts and a token of every decoding sequence, or where no prompt is
    left and ``num_steps`` is below ``last``, a token of every decoding sequence and its draft.

    Nothing but the model depends on the number of rows, so all else is compiled once for both.

    Args:
      logits: f32[S * width, V], memory for those of the step.
    """
    shape, s = request.shape, cache.max_seqs
    width = shape.width
    num_rows = max(shape.chunk, s * width)
    slots = Slots.of(state, request)
    prefills = jnp.any(slots.prefilling)
    decodes = ~prefills & jnp.any(slots.decoding) & (state.result.num_steps < last)
    runs_model = prefills | decodes
    draft, count = _draft(cache, state, slots, request, decodes)
    going = slots.decoding & runs_model
    if state.search is not None:
        going &= state.search.grows(s)
    num_new = jnp.where(going, 1 + count, 0)
    left = jnp.where(slots.prefilling, slots.prompt_len - state.progress, 0)
    before = jnp.cumsum(left, dtype=jnp.int32) - left
    num_new += jnp.clip(shape.chunk - jnp.sum(num_new, dtype=jnp.int32) - before, 0, left)

    cache = _discard(cache, slots, request, num_new)
    # Sequences without pages end, with their other samples, and their pages serve the others from the next step on.
    fits = cache.can_reserve_each(num_new)
    unserved = slots.busy & ~(fits & fits[state.leader])
    refused = unserved
    if state.search is not None:
        # A search goes on with all its beams or waits for pages; where none can go on, the first ends.
        without = jnp.zeros(request.prompt_lens.shape[0], bool)
        without = without.at[slots.prompt].max(unserved)
        unserved = slots.busy & without[slots.prompt]
        stuck = ~jnp.any((num_new > 0) & ~unserved)
        refused = unserved & stuck & (slots.prompt == jnp.argmax(without))
    num_new = jnp.where(unserved, 0, num_new)
    cache, batch, _ = cache.reserve(num_new, num_tokens=num_rows, max_new=max(shape.chunk, width))

    sequence = jnp.minimum(batch.sequence, s - 1)
    place = lax.iota(jnp.int32, num_rows) - batch.cu_q_lens[sequence]
    column = jnp.clip(state.progress[sequence] + place, 0, request.prompts.shape[1] - 1)
    tried = jnp.concatenate([state.newest[:, None], draft], axis=1)
    tokens = jnp.where(
        slots.prefilling[sequence],
        request.prompts[slots.prompt[sequence], column],
        tried[sequence, jnp.clip(place, 0, width - 1)],
    )
    # Rows whose logits are needed: the newest token's and its draft's, or the last one of a prompt.
    first = jnp.where(slots.decoding, batch.cu_q_lens[:-1], batch.last_rows[state.leader])
    rows = jnp.minimum(first[:, None] + lax.iota(jnp.int32, width), num_rows - 1)

    def runs(
        num_rows: int, width: int, max_q_len: int
    ) -> Callable[[tuple[Cache, Array]], tuple[Cache, Array]]:
        def forward(carry: tuple[Cache, Array]) -> tuple[Cache, Array]:
            cache, logits = carry
            some = batch.first(num_rows, max_q_len)
            asked = jnp.minimum(rows[:, :width].reshape(-1), num_rows - 1)
            found, cache = model(params, tokens[:num_rows], cache, some, asked)
            if width == shape.width:
                return cache, found.astype(logits.dtype)
            by_sequence = logits.reshape(s, shape.width, -1)
            by_sequence = by_sequence.at[:, :width].set(found.astype(logits.dtype).reshape(s, width, -1))
            return cache, by_sequence.reshape(logits.shape)

        return forward

    carry = _once(prefills, runs(shape.chunk, 1, shape.chunk), (cache, logits))
    if width > 1:
        drafted = decodes & jnp.any(count > 0)
        carry = _once(drafted, runs(s * width, width, width), carry)
        decodes &= ~drafted
    cache, logits = _once(decodes, runs(s, 1, 1), carry)

    progress = state.progress + jnp.where(slots.prefilling, num_new, 0)
    sampled = (num_new > 0) & (progress == slots.prompt_len)
    if shape.num_samples > 1:
        forked = slots.waiting & ~unserved & sampled[state.leader]
        source = jnp.where(forked, state.leader, lax.iota(jnp.int32, s))
        cache = lax.cond(jnp.any(forked), lambda c: c.seq_reorder(source), lambda c: c, cache)
        progress = jnp.where(forked, slots.prompt_len, progress)
        sampled |= forked
        state = replace(state, leader=jnp.where(forked, lax.iota(jnp.int32, s), state.leader))
    result = state.result
    result = replace(
        result,
        pages_peak=jnp.maximum(result.pages_peak, cache.pages_used),
        num_steps=result.num_steps + runs_model,
    )
    state = replace(state, progress=progress, result=result)
    if state.search is not None:
        cache, result, row, newest, search = beams.select(
            cache, logits, request, result, state.row, state.newest, state.search, sampled, refused
        )
        return cache, replace(state, result=result, row=row, newest=newest, search=search), logits
    # Random numbers follow the distance from the beginning, which a context shift does not change.
    tokens, mu, found = _choose(logits, request, state, slots, draft, batch.rope_positions[rows] + 1)
    state = replace(state, mu=jnp.where(sampled, mu, state.mu))
    agrees = (draft == tokens[:, :-1]) & (lax.iota(jnp.int32, width - 1) < count[:, None])
    accepted = jnp.sum(jnp.cumprod(agrees, axis=1), axis=1, dtype=jnp.int32)
    cache, state = _accept(cache, state, request, slots, tokens, found, sampled, count, accepted, refused)
    return cache, state, logits


def _choose(
    logits: Array, request: Request, state: State, slots: Slots, draft: Array, position: Array
) -> tuple[Array, Array, Any]:
    """Samples a token behind the newest one and behind each token of the draft.

    Each position has its own random number and sees the draft before it, so a draft that is kept
    as far as it agrees leaves the distribution as it is: the tokens are those of steps without drafts.

    Returns:
      ``(tokens i32[S, width], mu f32[S], log-probabilities or None)``
    """
    shape, (s, width) = request.shape, position.shape
    recent = [state.recent]
    for i in range(width - 1):
        recent.append(push_recent(recent[-1], draft[:, i], jnp.ones(s, bool)))
    params: SamplingParams = jax.tree.map(lambda field: field[slots.row], request.sampling)
    changed = logits
    if shape.logits_processor is not None:
        changed = shape.logits_processor(logits, *_texts_so_far(state.result, slots, draft))
        if changed.shape != logits.shape:
            raise ValueError(
                f"logits_processor must return logits {list(logits.shape)}, got {list(changed.shape)}"
            )
    tokens, mu = sample_next(
        changed,
        jax.tree.map(lambda field: jnp.repeat(field, width, axis=0), params) if width > 1 else params,
        position.reshape(-1),
        jnp.stack(recent, axis=1).reshape(s * width, -1),
        jnp.repeat(state.mu, width),
    )
    found = None
    if shape.logprobs is not None:
        found = jax.tree.map(
            lambda x: x.reshape(s, width, *x.shape[1:]), logprobs_of(logits, tokens, shape.logprobs)
        )
    return tokens.reshape(s, width), mu[::width], found


def _texts_so_far(result: GenerateResult, slots: Slots, draft: Array) -> tuple[Array, Array]:
    """Tokens before each row of logits, ``(i32[S * width, M], i32[S * width])``: those generated, and
    the draft up to the row."""
    tokens, count = result.tokens[slots.row], result.num_tokens[slots.row]
    (s, capacity), width = tokens.shape, draft.shape[1] + 1
    behind = count[:, None] + lax.iota(jnp.int32, width - 1)
    tokens = tokens.at[lax.iota(jnp.int32, s)[:, None], behind].set(draft, mode="drop")
    length = (count[:, None] + lax.iota(jnp.int32, width)).reshape(-1)
    known = lax.iota(jnp.int32, capacity) < length[:, None]
    return jnp.where(known, jnp.repeat(tokens, width, axis=0), -1), length


def _accept(
    cache: Cache,
    state: State,
    request: Request,
    slots: Slots,
    tokens: Array,
    logprobs: Any,
    sampled: Array,
    count: Array,
    accepted: Array,
    refused: Array,
) -> tuple[Cache, State]:
    """Appends tokens of each sequence in ``sampled``, and ends those that are finished.

    Args:
      tokens: i32[S, width]: the first ``accepted i32[S]`` agree with the draft, and one more follows.
      logprobs: of those tokens, as by ``logprobs_of``.
      sampled: bool[S]
      count: i32[S]: tokens of the draft, which are in the cache.
      refused: bool[S]: sequences that end without pages.
    """
    result, keep = state.result, request.shape.keep
    width, idle = tokens.shape[1], result.num_tokens.shape[0]
    step = lax.iota(jnp.int32, width)
    before, limit = result.num_tokens[slots.row], request.max_new_tokens[slots.row]
    room = jnp.maximum(limit - before, 0)
    ends = (tokens < 0) | jnp.any(tokens[..., None] == request.stop_ids, axis=-1)
    ends &= step <= accepted[:, None]
    end = jnp.where(jnp.any(ends, axis=1), jnp.argmax(ends, axis=1), width).astype(jnp.int32)
    at_end = jnp.any(ends & (tokens < 0) & (step == end[:, None]), axis=1)
    failed = sampled & at_end & ((end < room) | (room == 0))
    stopped = sampled & (end < width) & ~at_end
    appended = jnp.where(sampled, jnp.minimum(jnp.minimum(end, accepted + 1), room), 0)
    full = sampled & (before + appended >= limit)
    ended = stopped | full | failed
    reason = jnp.where(stopped & (end < room), FINISH_STOP, jnp.where(failed, FINISH_NAN, FINISH_LENGTH))

    row = jnp.where(appended > 0, slots.row, idle)
    column = jnp.where(step < appended[:, None], before[:, None] + step, result.tokens.shape[1])
    recent = state.recent
    for i in range(width):
        recent = push_recent(recent, tokens[:, i], i < appended)
    newest = jnp.take_along_axis(tokens, jnp.maximum(appended - 1, 0)[:, None], axis=1)[:, 0]

    def put(values: Array, new: Array) -> Array:
        return values.at[slots.row[:, None], column].set(new, mode="drop")

    result = replace(
        result,
        tokens=put(result.tokens, tokens),
        num_tokens=result.num_tokens.at[row].add(appended, mode="drop"),
        finish_reason=result.finish_reason.at[jnp.where(ended | refused, state.row, idle)].set(
            jnp.where(refused, FINISH_OUT_OF_PAGES, reason), mode="drop"
        ),
    )
    if logprobs is not None:
        last = jnp.minimum(end, width - 1)[:, None]
        stop = jnp.take_along_axis(logprobs["logprobs"], last, axis=1)[:, 0]
        at = jnp.where(stopped & (end < room), slots.row, idle)
        result = replace(
            result,
            **jax.tree.map(put, {k: getattr(result, k) for k in logprobs}, logprobs),
            stop_logprob=result.stop_logprob.at[at].set(stop, mode="drop"),
        )
    released = refused | (failed if keep else ended)
    if width == 1:
        cache, _ = cache.seq_remove(released)
    else:
        kept = jnp.minimum(accepted, appended)
        result = replace(
            result,
            drafted=result.drafted.at[row].add(count, mode="drop"),
            accepted=result.accepted.at[row].add(kept, mode="drop"),
        )
        # Roll back: the newest token and the accepted ones stay.
        behind = cache.seq_position_max() + 1 - (count - kept)
        rejected = sampled & (count > kept)
        cache, _ = cache.seq_remove(released | rejected, jnp.where(released, 0, behind))
    return cache, replace(
        state,
        result=result,
        row=jnp.where(ended | refused, idle, state.row),
        newest=jnp.where(appended > 0, newest, state.newest),
        recent=recent,
    )


def begin(cache: KVCache, request: Request) -> State:
    """State before any prompt is admitted."""
    shape, s, rows = request.shape, cache.max_seqs, request.max_new_tokens.shape[0]
    none = jnp.zeros(s, jnp.int32)
    columns = 0 if shape.logprobs is None else shape.capacity
    likeliest = rows, columns, shape.logprobs or 0
    return State(
        result=GenerateResult(
            tokens=jnp.full((rows, shape.capacity), -1, jnp.int32),
            num_tokens=jnp.zeros(rows, jnp.int32),
            finish_reason=jnp.full(rows, RUNNING, jnp.int32),
            logprobs=jnp.zeros((rows, columns), jnp.float32),
            stop_logprob=jnp.zeros(rows if columns else 0, jnp.float32),
            top_tokens=jnp.full(likeliest, -1, jnp.int32),
            top_logprobs=jnp.zeros(likeliest, jnp.float32),
            drafted=jnp.zeros(rows, jnp.int32),
            accepted=jnp.zeros(rows, jnp.int32),
            pages_peak=cache.pages_used,
            num_steps=jnp.int32(0),
        ),
        next_prompt=jnp.int32(0),
        row=none + rows,
        progress=none,
        leader=lax.iota(jnp.int32, s),
        newest=none,
        recent=jnp.full((s, request.recent.shape[1]), -1, jnp.int32),
        mu=jnp.zeros(s, jnp.float32),
        search=beams.begin(cache, request) if shape.beams else None,
    )


def advance(
    model: Model, params: Any, cache: Cache, state: State, request: Request, steps: Array
) -> tuple[Cache, State]:
    """Runs at most ``steps`` decode steps, and as many prefill steps as the admitted prompts
    need."""
    rows = state.result.num_tokens.shape[0]
    last = state.result.num_steps + steps
    model = jax.jit(model)  # traced once for each number of rows
    num_logits = cache.max_seqs * request.shape.width

    def one_step() -> Any:
        rows = jnp.zeros(num_logits, jnp.int32)
        none = jnp.zeros(cache.max_seqs, jnp.int32)
        reserved, batch, _ = cache.reserve(none, num_tokens=num_logits, max_new=request.shape.width)
        return model(params, rows, reserved, batch, rows)

    logits = jnp.zeros(_logits_shape(jax.eval_shape(one_step), cache, num_logits), jnp.float32)

    def unfinished(carry: tuple[Array, Cache, State, Array]) -> Array:
        first, _, state, _ = carry
        left = (state.next_prompt < request.num_prompts) | jnp.any(state.row < rows)
        prefilling = jnp.any(Slots.of(state, request).prefilling)
        # The first turn admits prompts, which may have to be prefilled.
        return left & (first | prefilling | (state.result.num_steps < last))

    def turn(carry: tuple[Array, Cache, State, Array]) -> tuple[Array, Cache, State, Array]:
        _, cache, state, logits = carry
        state = _admit(cache, state, request)
        return jnp.bool_(False), *_step(model, params, cache, state, request, last, logits)

    _, cache, state, _ = lax.while_loop(unfinished, turn, (jnp.bool_(True), cache, state, logits))
    return cache, state


def _logits_shape(returned: Any, cache: Any, rows: int) -> tuple[int, ...]:
    """Shape of a model's logits for ``rows`` rows.

    Raises:
      ValueError: it returned something else than logits and a cache.
    """
    wanted = f"a model must return (logits [R, V], cache), for its rows i32[R] of R = {rows}"
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise ValueError(f"{wanted}, got {type(returned).__name__}")
    logits, after = returned
    if not isinstance(after, type(cache)):
        raise ValueError(f"{wanted}, got ({type(logits).__name__}, {type(after).__name__})")
    if logits.ndim != 2 or logits.shape[0] != rows or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"{wanted}, got logits {logits.dtype}{list(logits.shape)}")
    return tuple(logits.shape)


def run(model: Model, params: Any, cache: Cache, request: Request) -> tuple[Any, Cache]:
    """Generates what a request asks for: the pure function behind ``generate``.

    Works under the caller's ``jit``, ``vmap`` (over seeds, for example) and ``shard_map``; donate
    the cache to keep its pages in place.

    Args:
      model: ``(params, tokens i32[T], cache, batch, rows i32[R]) -> (logits f32[R, V], cache)``.
      params: the model's weights, a pytree.
      cache: paged or contiguous.
      request: of ``Request.create``.

    Returns:
      ``(GenerateResult, cache)``.

    Example:
      >>> from jaxpaged import PagedKVCache, Request, run
      >>> def model(params, tokens, cache, batch, rows):  # counts upwards
      ...     return jax.nn.one_hot(tokens[rows] + 1, 16), cache
      >>> cache = PagedKVCache.create(
      ...     num_layers=1, num_kv_heads=1, head_dim=2, num_pages=4, page_size=8, max_seqs=1
      ... )
      >>> @jax.jit
      ... def count(cache, prompts):
      ...     return run(model, None, cache, Request.create(cache, prompts, max_new_tokens=3))
      >>> count(cache, jnp.array([[3, 4]]))[0].tokens[0, :3].tolist()
      [5, 6, 7]
    """
    state = begin(cache, request)
    most = jnp.int32(np.iinfo(np.int32).max)
    cache, state = advance(model, params, cache, state, request, most)
    return result_of(state, request), cache


def result_of(state: State, request: Request) -> Any:
    """GenerateResult, or BeamResult of a beam search."""
    return state.result if state.search is None else beams.result(state.result, state.search, request)
