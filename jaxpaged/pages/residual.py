"""Staging slots for residual pages: pages of a format that quantizes only whole pages.

Such a page stays in full precision, in one of S staging slots, until a step fills its last slot;
it is then quantized into the pool and never written again. The idea of a full-precision residual is
KIVI's, arXiv:2402.02750. Everything here is arithmetic on small integer arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StagingSlots:
    """Assignment of residual pages to staging slots.

    S = max_seqs slots are enough: a residual page is the last page of some sequence, and two
    sequences that write have two.
    """

    slot_of_page: Array
    """i32[N]: staging slot of each residual page; S = quantized. Arbitrary for free pages."""
    page_of_slot: Array
    """i32[S]: page in each slot; N = none. Valid only if ``slot_of_page`` agrees."""

    @property
    def num_slots(self) -> int:
        """S, static."""
        return self.page_of_slot.shape[0]

    def slot(self, page: Array) -> Array:
        """i32, shaped as ``page``: staging slot of each page; S for quantized pages and for N."""
        return self.slot_of_page.at[page].get(mode="fill", fill_value=self.num_slots)

    def is_residual(self, page: Array) -> Array:
        """bool, shaped as ``page``: True if that page, which some sequence holds, is residual."""
        return self.slot(page) < self.num_slots

    def in_use(self, ref_counts: Array) -> Array:
        """bool[S]: True for slots that hold a residual page; ``ref_counts i32[N]`` of the allocator."""
        held = ref_counts.at[self.page_of_slot].get(mode="fill", fill_value=0) > 0
        return held & (self.slot(self.page_of_slot) == jnp.arange(self.num_slots, dtype=jnp.int32))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FinalizedPages:
    """Pages that a step fills and quantizes, at most M."""

    page: Array
    """i32[M]"""
    staging_slot: Array
    """i32[M]: staging slot with the tokens from before the step; S = none."""
    first_slot: Array
    """i32[M]: page slot of its first token of this step."""
    first_row: Array
    """i32[M]: row of that token in the step."""
    count: Array
    """i32[]: number of pages finalized."""


def create(num_pages: int, num_slots: int) -> StagingSlots:
    """Staging slots without a residual page."""
    return StagingSlots(jnp.full(num_pages, num_slots, jnp.int32), jnp.full(num_slots, num_pages, jnp.int32))


class LastPages(NamedTuple):
    """Writes of a step behind the last token of each sequence; [S] each."""

    source: Array
    """i32: page of the last token; N = empty sequence."""
    page: Array
    """i32: page written to: ``source``, or its copy."""
    copied: Array
    """bool: True if ``page`` is a copy."""
    copy_rank: Array
    """i32: index among the step's copies."""
    num_tokens: Array
    """i32: tokens written to the page."""
    first_slot: Array
    """i32: first slot written."""
    first_row: Array
    """i32: row of the first token."""


class FreshPages(NamedTuple):
    """Pages allocated by a step, [F] each."""

    page: Array
    """i32: N = no page."""
    owner: Array
    """i32: its sequence; S = no page."""
    num_tokens: Array
    """i32: tokens of this page and of the sequence's later pages."""
    first_row: Array
    """i32: row of its first token."""


class StagingCopies(NamedTuple):
    """Staging slots to copy, by copy rank; i32[max_copies] each."""

    source: Array
    target: Array


def plan_step(
    staging: StagingSlots,
    ref_counts: Array,
    last: LastPages,
    fresh: FreshPages,
    page_size: int,
    max_copies: int,
) -> tuple[StagingSlots, FinalizedPages, StagingCopies]:
    """Assigns staging slots to the pages that stay residual, and lists those the step finalizes.

    A copy takes an unused slot. A fresh page does so too, or takes over the slot of the page that
    its sequence fills in the same step: pages are finalized before rows are written.

    Args:
      staging: state before the step.
      ref_counts: i32[N], the allocator's before the step.
      last, fresh: the step's writes.
      page_size: slots of a page.
      max_copies: static bound on copies.

    Returns:
      ``(staging, finalized, copies)``: state after the step, pages finalized in it, and copies to
      make before it.
    """
    s, n = staging.num_slots, staging.slot_of_page.shape[0]
    free = ~staging.in_use(ref_counts)
    free_slots = _compacted(free, jnp.arange(s, dtype=jnp.int32), s, s)
    before = staging.slot(last.source)
    now = jnp.where(last.copied, free_slots.at[last.copy_rank].get(mode="clip"), before)
    fills = (last.num_tokens > 0) & (last.first_slot + last.num_tokens == page_size)

    exists = fresh.page < n
    full, begun = exists & (fresh.num_tokens >= page_size), exists & (fresh.num_tokens < page_size)
    owner = jnp.minimum(fresh.owner, s - 1)
    takes_over = fills[owner]
    rank = jnp.cumsum(begun & ~takes_over, dtype=jnp.int32) - 1 + jnp.sum(last.copied, dtype=jnp.int32)
    slot = jnp.where(takes_over, now[owner], free_slots.at[rank].get(mode="clip"))

    copied_page = jnp.where(last.copied, last.page, n)
    after = StagingSlots(
        slot_of_page=staging.slot_of_page.at[copied_page].set(now, mode="drop")
        .at[jnp.where(fills, last.page, n)].set(s, mode="drop")
        .at[fresh.page].set(jnp.where(begun, slot, s), mode="drop"),
        page_of_slot=staging.page_of_slot.at[jnp.where(last.copied, now, s)].set(last.page, mode="drop")
        .at[jnp.where(begun, slot, s)].set(fresh.page, mode="drop"),
    )  # fmt: skip

    finalizes, size = jnp.concatenate([fills, full]), s + len(full)

    def listed(of_last: Array, of_fresh: Array | int, padding: int = 0) -> Array:
        values = jnp.concatenate([of_last, jnp.broadcast_to(of_fresh, full.shape)])
        return _compacted(finalizes, values.astype(jnp.int32), size, padding)

    finalized = FinalizedPages(
        page=listed(last.page, fresh.page, n),
        staging_slot=listed(now, s, s),
        first_slot=listed(last.first_slot, 0),
        first_row=listed(last.first_row, fresh.first_row),
        count=jnp.sum(finalizes, dtype=jnp.int32),
    )
    at = jnp.where(last.copied, last.copy_rank, max_copies)
    none = jnp.full(max_copies, s, jnp.int32)
    copies = StagingCopies(none.at[at].set(before, mode="drop"), none.at[at].set(now, mode="drop"))
    return after, finalized, copies


def _compacted(chosen: Array, values: Array, size: int, padding: int) -> Array:
    """i32[size]: the chosen values, moved to the front."""
    rank = jnp.where(chosen, jnp.cumsum(chosen, dtype=jnp.int32) - 1, size)
    return jnp.full(size, padding, jnp.int32).at[rank].set(values, mode="drop")
