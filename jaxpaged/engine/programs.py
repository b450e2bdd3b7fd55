"""Device programs of an engine: a step of the model with sampling, edits of the block table, copies
of pages.

Pure functions of arrays with a few static sizes, so that an engine can compile all of them at
start-up. Each takes the donated cache and returns it, so the programs run in order: no page is read
before the step that writes it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxpaged.cache import sharing
from jaxpaged.cache.groups import GroupedKVCache, map_parts, parts_of, with_parts
from jaxpaged.cache.interface import Cache
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.cache.reservation import free_slots
from jaxpaged.cache.sharing import PagesOfLayers, seq_allocate, seq_attach
from jaxpaged.engine.request import MAX_LOGPROBS
from jaxpaged.generation.loop import Model
from jaxpaged.generation.sampling import logprobs_of, push_recent, sample_next
from jaxpaged.generation.sampling_params import SamplingParams, unpack_tokens
from jaxpaged.pages import allocator as allocators
from jaxpaged.pages import block_table as block_tables
from jaxpaged.pages.allocator import PageAllocator
from jaxpaged.pages.block_table import BlockTable

Given = Any
"""An array: numpy on the host, a JAX array inside a program."""
NAN_TOKEN = -2
"""In place of a token: the logits held NaN."""
ATTACHED_PER_EDIT = 8
"""Sequences that one edit can attach pages to."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotParams:
    """Parameters of the S sequences that do not change while they run."""

    sampling: SamplingParams
    """S rows."""
    stop_ids: Given
    """i32[S, MAX_STOP_IDS]: stop tokens; -1 in padding."""
    bias_ids: Given
    """i32[S, B]: tokens with a logit bias; V or more in padding."""
    bias: Given
    """f32[S, B]: the biases."""
    wants_logprobs: Given
    """bool[S]: True if log-probabilities are returned."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInput:
    """Input of one step. T = rows of the program; S sequences."""

    num_new: Given
    """i32[S]: tokens to compute of each sequence."""
    tokens: Given
    """i32[T]: those tokens, concatenated in sequence order."""
    samples: Given
    """bool[S]: True if a token is sampled after the last of them."""
    left: Given
    """i32[S]: tokens that may still be sampled."""
    position: Given
    """i32[S]: position of the first sampled token in the whole text, dropped tokens included."""
    recent: Given
    """i32[S, W]: recent tokens for penalties, newest last; -1 in padding."""
    mu: Given
    """f32[S]: state of Mirostat."""
    constrained: Given
    """bool[S]: True if the mask of the sequence applies; the step is then the only one."""
    steps: Given
    """i32[]: decode steps to run, at most the program's K."""
    stop_early: Given
    """bool[]: return as soon as a sequence ends."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepOutput:
    """Output of one step. K = decode steps of the program, at most."""

    tokens: Array
    """i32[K, S]: sampled tokens, also stop tokens; -1 = none; NAN_TOKEN = the logits held NaN."""
    logprobs: Array
    """f32[K, S]: their log-probabilities, where requested."""
    top_tokens: Array
    """i32[K, S, MAX_LOGPROBS]: the likeliest tokens, in order; -1 in padding."""
    top_logprobs: Array
    """f32[K, S, MAX_LOGPROBS]: log-probabilities of those."""
    mu: Array
    """f32[S]: state of Mirostat after the step."""
    num_steps: Array
    """i32[]: steps that ran."""
    ok: Array
    """bool[]: False if the pool had too few pages for one more step, which changed nothing."""
    table: Any
    """``table_state`` after the step."""


@dataclass(frozen=True)
class StepShape:
    """Static sizes of a step."""

    rows: int
    """T"""
    decode: bool
    """True: several steps of one token a sequence. False: one step of any number of tokens."""
    max_steps: int
    """K"""


def step(
    model: Model,
    shape: StepShape,
    params: Any,
    cache: Cache,
    slots: SlotParams,
    masks: Given,
    given: StepInput,
) -> tuple[Cache, StepOutput]:
    """Runs the model and samples; a decode shape repeats that with the sampled tokens.

    A sequence that sampled a stop token, or all tokens left to it, is idle until the others are
    done.

    Args:
      masks: i32[S, ceil(V / 32)]: tokens that constrained sequences may sample, see ``Constraint``.
    """
    s, k = given.num_new.shape[0], shape.max_steps
    sampled = StepOutput(
        tokens=jnp.full((k, s), -1, jnp.int32),
        logprobs=jnp.zeros((k, s), jnp.float32),
        top_tokens=jnp.full((k, s, MAX_LOGPROBS), -1, jnp.int32),
        top_logprobs=jnp.zeros((k, s, MAX_LOGPROBS), jnp.float32),
        mu=given.mu,
        num_steps=jnp.int32(0),
        ok=jnp.bool_(True),
        table=None,
    )

    def once(carry: tuple[Cache, StepOutput, StepInput, Array]) -> tuple[Cache, StepOutput, StepInput, Array]:
        cache, sampled, given, _ = carry
        cache, batch, ok = cache.reserve(
            given.num_new, num_tokens=shape.rows, max_new=1 if shape.decode else shape.rows
        )
        if shape.decode:  # logits of as many rows as the program has, not of all S sequences
            rows, owner = jnp.arange(shape.rows), batch.sequence
        else:
            rows, owner = batch.last_rows, jnp.arange(s)
        logits, cache = model(params, given.tokens, cache, batch, rows)
        tokens, mu, logprobs, top_tokens, top_logprobs = _sample_tokens(logits, slots, masks, given, owner)
        samples = given.samples & (given.num_new > 0) & ok
        failed = tokens < 0
        i = sampled.num_steps
        sampled = replace(
            sampled,
            tokens=sampled.tokens.at[i].set(jnp.where(samples, jnp.where(failed, NAN_TOKEN, tokens), -1)),
            logprobs=sampled.logprobs.at[i].set(logprobs),
            top_tokens=sampled.top_tokens.at[i].set(top_tokens),
            top_logprobs=sampled.top_logprobs.at[i].set(top_logprobs),
            mu=jnp.where(samples, mu, given.mu),
            num_steps=i + ok,
            ok=ok,
        )
        left = given.left - samples
        stopped = jnp.any(tokens[:, None] == slots.stop_ids, axis=1)
        goes_on = samples & ~stopped & ~failed & (left > 0)
        num_new = goes_on.astype(jnp.int32)
        if shape.decode:
            place = jnp.where(goes_on, jnp.cumsum(num_new, dtype=jnp.int32) - 1, shape.rows)
            given = replace(
                given,
                num_new=num_new,
                tokens=jnp.zeros_like(given.tokens).at[place].set(tokens, mode="drop"),
                left=left,
                position=given.position + samples,
                recent=push_recent(given.recent, tokens, samples),
                mu=sampled.mu,
            )
        return cache, sampled, given, jnp.any(samples & ~goes_on)

    def goes_on(carry: tuple[Cache, StepOutput, StepInput, Array]) -> Array:
        _, sampled, given, ended = carry
        more = sampled.ok & (sampled.num_steps < given.steps) & jnp.any(given.num_new > 0)
        return more & ~(ended & given.stop_early)

    carry = (cache, sampled, given, jnp.bool_(False))
    cache, sampled, _, _ = lax.while_loop(goes_on, once, carry) if shape.decode else once(carry)
    return cache, replace(sampled, table=table_state(cache))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TableState:
    """Fields of a layer group that the host tracks; P = 0 for a contiguous cache."""

    num_free: Array
    """i32[]: free pages."""
    free_slots: Array
    """i32[S]: tokens that still fit each sequence's last page."""
    pages: Array
    """i32[S, P]: page of each entry; N = no entry."""
    page_tokens: Array
    """i32[S, P]: tokens of each entry."""
    first_page: Array
    """i32[S]: pages of the text before the first entry, which the window has left."""


def table_state(cache: Any) -> tuple[TableState, ...]:
    """The state of each layer group as it is now."""
    if not isinstance(cache, PagedKVCache | GroupedKVCache):
        s = cache.max_seqs
        none = jnp.zeros((s, 0), jnp.int32)
        return (TableState(jnp.int32(0), jnp.zeros(s, jnp.int32), none, none, jnp.zeros(s, jnp.int32)),)

    def of(part: PagedKVCache) -> TableState:
        table = part.table
        return TableState(
            part.allocator.num_free,
            free_slots(part.metadata),
            table.pages,
            table.num_tokens,
            table.position[:, 0] // part.page_size,
        )

    return tuple(map(of, parts_of(cache)))


def _sample_tokens(
    logits: Array, slots: SlotParams, masks: Array, given: StepInput, owner: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """Samples a token from each row of ``logits f32[R, V]``, for the sequence ``owner i32[R]``; S =
    padding. Log-probabilities are those without masks and biases.

    Returns:
      ``(tokens, mu, logprobs, top_tokens, top_logprobs)``, one row per sequence.
    """
    s = given.num_new.shape[0]
    row = jnp.minimum(owner, s - 1)
    mine = jax.tree.map(lambda field: field[row], slots)
    wants = mine.wants_logprobs & (owner < s)

    def masked(z: Array) -> Array:
        allowed = unpack_tokens(masks[row], z.shape[1])  # none of a vocabulary's padding
        return jnp.where(~given.constrained[row][:, None] | allowed, z, -jnp.inf)

    def biased(z: Array) -> Array:
        return z.at[jnp.arange(z.shape[0])[:, None], mine.bias_ids].add(mine.bias, mode="drop")

    vocab_size = logits.shape[1]
    has_bias = jnp.any(mine.bias_ids < vocab_size)
    constrained = jnp.any(given.constrained & given.samples)
    changed = lax.cond(constrained, masked, lambda z: z, logits)
    changed = lax.cond(has_bias, biased, lambda z: z, changed)
    of_row = given.position[row], given.recent[row], given.mu[row]
    tokens, mu = sample_next(changed, mine.sampling, *of_row)

    def likeliest(z: Array) -> tuple[Array, ...]:
        found = logprobs_of(z, tokens, MAX_LOGPROBS)
        return found["logprobs"], found["top_tokens"], found["top_logprobs"]

    def nothing(z: Array) -> tuple[Array, ...]:
        shape = z.shape[0], MAX_LOGPROBS
        return jnp.zeros(shape[0], jnp.float32), jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32)

    logprobs, ids, values = lax.cond(jnp.any(wants), likeliest, nothing, logits)

    def of_sequences(values: Array, fill: int) -> Array:
        return jnp.full((s, *values.shape[1:]), fill, values.dtype).at[owner].set(values, mode="drop")

    return (
        of_sequences(tokens, -1),
        of_sequences(mu, 0),
        of_sequences(logprobs, 0),
        of_sequences(ids, -1),
        of_sequences(values, 0),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Edit:
    """Changes to the block table of a layer group between two steps, in this order. M = P, A =
    ATTACHED_PER_EDIT."""

    pinned: Given
    """i32[M]: pages that the prefix cache retains, from the front; N in padding."""
    removed: Given
    """bool[S]: sequences that end."""
    attached: Given
    """i32[A]: empty sequences that attach pages, from the front; S in padding."""
    attached_pages: Given
    """i32[A, P]: those pages."""
    attached_first: Given
    """i32[A]: pages of the text before the first one attached."""
    attached_tokens: Given
    """i32[A]: tokens of the text; 0 in padding."""
    unpinned: Given
    """i32[M]: pages that the prefix cache releases, from the front; N in padding."""

    @classmethod
    def none(cls, cache: PagedKVCache) -> Edit:
        """An edit that changes nothing, on the host."""
        s, p, n = cache.max_seqs, cache.max_pages_per_seq, cache.num_pages
        return cls(
            pinned=np.full(p, n, np.int32),
            removed=np.zeros(s, bool),
            attached=np.full(ATTACHED_PER_EDIT, s, np.int32),
            attached_pages=np.full((ATTACHED_PER_EDIT, p), n, np.int32),
            attached_first=np.zeros(ATTACHED_PER_EDIT, np.int32),
            attached_tokens=np.zeros(ATTACHED_PER_EDIT, np.int32),
            unpinned=np.full(p, n, np.int32),
        )


def edit(cache: Cache, given: Sequence[Edit]) -> tuple[Cache, Array, tuple[TableState, ...]]:
    """Applies an edit of each layer group; its cost depends on what it changes, not on S.

    Returns:
      ``(cache, ok bool[], state)``. Not ok: pages could not be attached; everything else is done.
    """
    edited = [_edit_group(part, one) for part, one in zip(parts_of(cache), given, strict=True)]
    cache = with_parts(cache, [part for part, _ in edited])
    return cache, jnp.all(jnp.stack([ok for _, ok in edited])), table_state(cache)


def _edit_group(cache: PagedKVCache, given: Edit) -> tuple[PagedKVCache, Array]:

    def update(operation: Callable[..., PageAllocator], cache: PagedKVCache, pages: Array) -> PagedKVCache:
        some = pages[0] < cache.num_pages
        return replace(
            cache, allocator=lax.cond(some, operation, lambda same, _: same, cache.allocator, pages)
        )

    def attach(allocator: PageAllocator, table: BlockTable) -> tuple[PageAllocator, BlockTable, Array]:
        rows = jax.tree.map(lambda field: field.at[given.attached].get(mode="clip"), table)
        held = replace(cache, allocator=allocator, table=rows)
        held, ok = seq_attach(held, given.attached_pages, given.attached_tokens, given.attached_first)
        table = jax.tree.map(
            lambda field, new: field.at[given.attached].set(new, mode="drop"), table, held.table
        )
        return held.allocator, table, ok

    cache = update(allocators.retain, cache, given.pinned)
    cache, _ = cache.seq_remove(given.removed)
    allocator, table, ok = lax.cond(
        given.attached[0] < cache.max_seqs,
        attach,
        lambda *same: (*same, jnp.bool_(True)),
        cache.allocator,
        cache.table,
    )
    cache = update(allocators.release, replace(cache, allocator=allocator, table=table), given.unpinned)
    return cache, ok


def remove(cache: Cache, removed: Array) -> Cache:
    """Removes the sequences marked ``bool[S]``: the edit of a contiguous cache."""
    return cache.seq_remove(removed)[0]


def shift(
    cache: Cache, seq: Array, keep: Array, discard: Array
) -> tuple[Cache, Array, tuple[TableState, ...]]:
    """Removes ``discard i32[]`` tokens after the first ``keep i32[]`` of sequence ``seq i32[]``; S
    = no sequence.

    Returns:
      ``(cache, ok bool[], state)``. Not ok: its row of the table is too narrow, or a window would reach
      tokens that it has left; nothing was changed.
    """
    # Ranges are positions, and a sequence that was shifted before still begins at 0.
    before, end = cache, keep + discard
    cache, removed = cache.seq_remove(seq, keep, end)
    cache, shifted = cache.seq_shift(seq, end, -1, -discard)
    ok = removed & shifted

    def chosen(new: PagedKVCache, old: PagedKVCache) -> PagedKVCache:
        row = block_tables.choose(
            ok, block_tables.get_row(new.table, seq), block_tables.get_row(old.table, seq)
        )
        allocator = jax.tree.map(lambda new, old: jnp.where(ok, new, old), new.allocator, old.allocator)
        return replace(new, allocator=allocator, table=block_tables.set_row(new.table, seq, row))

    cache = map_parts(chosen, cache, parts_of(before))
    return cache, ok, table_state(cache)


def read_pages(group: int, cache: Cache, pages: Array) -> tuple[Cache, PagesOfLayers]:
    """Keys and values of ``pages i32[M]`` of a layer group; the cache is unchanged."""
    return cache, sharing.read_pages(parts_of(cache)[group], pages)


def allocate(
    group: int, cache: Cache, seq: Array, row: BlockTable, count: Array
) -> tuple[Cache, Array, tuple[TableState, ...]]:
    """Allocates fresh pages of a layer group for a sequence that is swapped in."""
    part, ok = seq_allocate(parts_of(cache)[group], seq, row, count)
    cache = _with_group(cache, group, part)
    return cache, ok, table_state(cache)


def write_pages(group: int, cache: Cache, pages: Array, data: PagesOfLayers) -> Cache:
    """Overwrites ``pages i32[M]`` of a layer group with data from ``read_pages``."""
    return _with_group(cache, group, sharing.write_pages(parts_of(cache)[group], pages, data))


def _with_group(cache: Cache, group: int, part: PagedKVCache) -> Cache:
    parts = list(parts_of(cache))
    parts[group] = part
    return with_parts(cache, parts)
