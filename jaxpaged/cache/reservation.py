"""Reservation: the plan of a step over allocator and block table, before any page is touched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxpaged.pages import allocator as pages_of
from jaxpaged.pages import block_table as tables
from jaxpaged.pages.allocator import PageAllocator
from jaxpaged.pages.batch import Batch, pack
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.residual import (
    FinalizedPages,
    FreshPages,
    LastPages,
    StagingCopies,
    StagingSlots,
    plan_step,
)


class Metadata(NamedTuple):
    """State of a paged cache without its pages."""

    allocator: PageAllocator
    table: BlockTable
    staging: StagingSlots | None
    page_size: int


@dataclass(frozen=True)
class Plan:
    """Pages that ``num_new`` more tokens need, per sequence (``[S]`` each)."""

    last: tables.Entry
    """Last entry of each sequence; page N if it is empty."""
    own: Array
    """i32: the sequence's entries in its last page, more than one after a removal inside it."""
    into_last: Array
    """i32: tokens that go behind the last entry, into its page."""
    copied: Array
    """bool: True if the last page is shared and must be copied first."""
    fresh: Array
    """i32: fresh pages for the other tokens."""
    representable: Array
    """bool: True if the count is not negative and the table's row is wide enough."""

    @property
    def needed(self) -> Array:
        """i32: pages to allocate."""
        return self.fresh + self.copied


class PageCopies(NamedTuple):
    """Pages to copy before the step writes, the first ``num`` of C."""

    source: Array
    """i32[C]: physical pages; N = none."""
    target: Array
    """i32[at least C]"""
    staging: StagingCopies | None
    """The same as staging slots, for formats with residual pages."""
    num: Array
    """i32[]"""


class Reservation(NamedTuple):
    """Outcome of ``reserve``; metadata as before and a batch of padding when not ok."""

    allocator: PageAllocator
    table: BlockTable
    staging: StagingSlots | None
    batch: Batch
    copies: PageCopies
    ok: Array


def free_slots(state: Metadata) -> Array:
    """i32[S]: free slots behind each sequence's last token in its last page.

    The first token written there allocates a page all the same if the page is shared, for the copy.
    """
    return _free_slots(state, _last_entry(state))


def _last_entry(state: Metadata) -> tables.Entry:
    last = tables.last_entry(state.table)
    num_pages = state.allocator.num_pages
    return replace(last, pages=jnp.where(state.table.num_entries > 0, last.pages, num_pages))


def _free_slots(state: Metadata, last: tables.Entry) -> Array:
    free = state.page_size - last.first_slot - last.num_tokens
    free = jnp.where(last.pages < state.allocator.num_pages, free, 0)
    if state.staging is not None:
        free = jnp.where(state.staging.is_residual(last.pages), free, 0)  # quantized pages are read-only
    return free


def _own_entries(table: BlockTable, last: tables.Entry) -> Array:
    """i32[S]: entries of each sequence in its last page. Entries of one page are neighbours."""
    one_before = jnp.maximum(table.num_entries - 2, 0)[:, None]
    before = jnp.take_along_axis(table.pages, one_before, axis=1)[:, 0]
    several = (table.num_entries > 1) & (before == last.pages)
    # O(P) only after a removal inside a last page; otherwise O(1) a sequence.
    return jax.lax.cond(
        jnp.any(several),
        lambda: jnp.maximum(jnp.sum(table.pages == last.pages[:, None], axis=1, dtype=jnp.int32), 1),
        lambda: jnp.ones(table.max_seqs, jnp.int32),
    )


def plan(state: Metadata, num_new: Array) -> Plan:
    """Plans room for ``num_new i32[S]`` more tokens of each sequence."""
    table = state.table
    num_new = jnp.asarray(num_new, jnp.int32)
    last = _last_entry(state)
    own = _own_entries(table, last)
    into_last = jnp.clip(num_new, 0, _free_slots(state, last))
    count = state.allocator.ref_counts.at[last.pages].get(mode="fill", fill_value=0)
    shared = (into_last > 0) & (count > own)
    # Of sequences that share a page and write to it in this very step, each takes a copy until one
    # is left with the original to itself.
    ids = jnp.arange(table.max_seqs, dtype=jnp.int32)
    rivals = shared[None, :] & (last.pages[None, :] == last.pages[:, None]) & (ids[None, :] < ids[:, None])
    copied = shared & (count - jnp.sum(rivals * own, axis=1, dtype=jnp.int32) > own)
    fresh = -(-jnp.maximum(num_new - into_last, 0) // state.page_size)
    representable = (num_new >= 0) & (table.num_entries + fresh <= table.max_pages_per_seq)
    return Plan(last, own, into_last, copied, fresh, representable)


def can_reserve_each(state: Metadata, num_new: Array) -> Array:
    """bool[S]: True for sequences that get their pages when served by id, skipping those that do not fit."""
    needs = plan(state, num_new)
    free = state.allocator.num_free

    def serve(left: Array, ask: tuple[Array, Array]) -> tuple[Array, Array]:
        representable, needed = ask
        served = representable & (needed <= left)
        return left - jnp.where(served, needed, 0), served

    wanted = jnp.where(needs.representable, needs.needed, 0)
    return jax.lax.cond(
        jnp.sum(wanted, dtype=jnp.int32) <= free,
        lambda: needs.representable,
        lambda: jax.lax.scan(serve, free, (needs.representable, wanted))[1],
    )


def reserve(state: Metadata, num_new: Array, t: int, max_new: int | None) -> Reservation:
    """Makes room for ``num_new i32[S]`` tokens in a step of ``t`` rows; see ``interface.reserve``."""
    allocator, table, staging, ps = state
    s, n = table.max_seqs, allocator.num_pages
    num_new = jnp.asarray(num_new, jnp.int32)
    needs = plan(state, num_new)
    # Each fresh page holds at least one token, and each sequence leaves at most one partly filled.
    max_fresh = min(t, t // ps + min(s, t))
    total = jnp.sum(needs.needed, dtype=jnp.int32)
    ok = (
        jnp.all(needs.representable)
        & (jnp.sum(jnp.maximum(num_new, 0), dtype=jnp.int32) <= t)
        & jnp.all(num_new <= (t if max_new is None else max_new))
        & pages_of.can_allocate(allocator, total)
    )
    num_new = jnp.where(ok, num_new, 0)
    into_last, fresh = jnp.where(ok, needs.into_last, 0), jnp.where(ok, needs.fresh, 0)
    copied, last, own = needs.copied & ok, needs.last, needs.own
    num_copied = jnp.sum(copied, dtype=jnp.int32)
    max_copied = min(s, t)
    before = allocator.ref_counts
    allocator, taken, _ = pages_of.allocate(
        allocator, jnp.where(ok, total, 0), max_count=max_copied + max_fresh
    )

    # Among the pages taken, copies come first, then fresh pages by sequence.
    copy_rank = jnp.cumsum(copied, dtype=jnp.int32) - 1
    last_page = jnp.where(copied, taken.at[copy_rank].get(mode="clip"), last.pages)
    sources = jnp.full(max_copied, n, jnp.int32)
    sources = sources.at[jnp.where(copied, copy_rank, s)].set(last.pages, mode="drop")
    # All of the sequence's entries in its last page move with the copy.
    ref_counts = allocator.ref_counts.at[jnp.where(copied, last.pages, n)].add(-own, mode="drop")
    ref_counts = ref_counts.at[jnp.where(copied, last_page, n)].set(own, mode="drop")
    allocator = replace(allocator, ref_counts=ref_counts)
    pages = jax.lax.cond(
        jnp.any(copied & (own > 1)),
        lambda pages: jnp.where(copied[:, None] & (pages == last.pages[:, None]), last_page[:, None], pages),
        lambda pages: pages,
        table.pages,
    )
    taken_fresh = taken.at[num_copied + jnp.arange(max_fresh, dtype=jnp.int32)].get(mode="fill", fill_value=n)

    start = tables.position_max(table) + 1
    entry_seq, entry_rank, fresh_before = pack(fresh, max_fresh)
    owner = jnp.minimum(entry_seq, s - 1)
    entry = table.num_entries[owner] + entry_rank
    rest = (num_new - into_last)[owner] - entry_rank * ps
    grown = jnp.where(into_last > 0, table.num_entries - 1, table.max_pages_per_seq)
    ids = jnp.arange(s, dtype=jnp.int32)

    sequence, offset, cu_q_lens = pack(num_new, t)
    first_slot = last.first_slot + last.num_tokens
    finalized: FinalizedPages | None = None
    staging_copies: StagingCopies | None = None
    if staging is not None:
        staging, finalized, staging_copies = plan_step(
            staging,
            before,
            LastPages(last.pages, last_page, copied, copy_rank, into_last, first_slot, cu_q_lens[:-1]),
            FreshPages(taken_fresh, entry_seq, rest, cu_q_lens[owner] + into_last[owner] + entry_rank * ps),
            ps,
            max_copied,
        )

    def put(values: Array, new: Array | int) -> Array:
        return values.at[entry_seq, entry].set(new, mode="drop")

    table = BlockTable(
        pages=put(pages.at[ids, grown].set(last_page, mode="drop"), taken_fresh),
        first_slot=put(table.first_slot, 0),
        num_tokens=put(table.num_tokens.at[ids, grown].add(into_last, mode="drop"), jnp.clip(rest, 0, ps)),
        position=put(table.position, (start + into_last)[owner] + entry_rank * ps),
        rotation=put(table.rotation, last.rotation[owner]),
        num_entries=table.num_entries + fresh,
    )

    valid, row = sequence < s, jnp.minimum(sequence, s - 1)
    beyond = offset - into_last[row]
    fresh_index = fresh_before[row] + jnp.maximum(beyond, 0) // ps
    page = jnp.where(beyond < 0, last_page[row], taken_fresh.at[fresh_index].get(mode="fill", fill_value=n))
    slot = jnp.where(beyond < 0, first_slot[row] + offset, beyond % ps)
    position = jnp.where(valid, start[row] + offset, 0)
    batch = Batch(
        sequence=sequence,
        position=position,
        rope_positions=position + jnp.where(valid, last.rotation[row], 0),
        page=jnp.where(valid, page, n),
        slot=jnp.where(valid, slot, 0),
        cu_q_lens=cu_q_lens,
        finalized=finalized,
        max_q_len=max_new,
    )
    copies = PageCopies(sources, taken, staging_copies, num_copied)
    return Reservation(allocator, table, staging, batch, copies, ok)
