"""StagingSlots: which pages are still kept in 16 bits, for formats that quantize a page once it is full.

A page is open from its first token to its last. Its numbers then lie in one of S open pages, apart from the pool;
whichever sequences share the page find them there, so that a fork moves nothing. A page that is full is sealed in
the very step that fills it, and is never written again: what removals leave of a sealed page stays as it is.
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
    """The place of each open page. S places: no more pages are open than there are sequences, as each is some
    sequence's last one, and two sequences that write have two."""

    place: Array
    """i32[N]: where the numbers of each page are, if it is open; S = in the pool. Free pages have any number."""
    page: Array
    """i32[S]: whose numbers lie in each place; N = nobody's. Holds if ``place`` says so too."""

    @property
    def num_staging_slots(self) -> int:
        """S, static."""
        return self.page.shape[0]

    def is_open(self, page: Array) -> Array:
        """bool, as ``page``: whether that page, which some sequence holds, is open."""
        return (
            self.place.at[page].get(mode="fill", fill_value=self.num_staging_slots) < self.num_staging_slots
        )

    def in_use(self, ref_counts: Array) -> Array:
        """bool[S]: which places hold an open page; ``ref_counts i32[N]`` are the allocator's."""
        held = ref_counts.at[self.page].get(mode="fill", fill_value=0) > 0
        return held & (
            self.place.at[self.page].get(mode="fill", fill_value=self.num_staging_slots)
            == jnp.arange(self.num_staging_slots)
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FinalizedPages:
    """The pages that a step fills, at most M of them."""

    page: Array
    """i32[M]"""
    place: Array
    """i32[M]: where the tokens that it had before the step are; S = it had none."""
    first_slot: Array
    """i32[M]: the slot of its first token of this step."""
    first_row: Array
    """i32[M]: that token's row in the step."""
    count: Array
    """i32[]: how many there are."""


def create(num_pages: int, num_staging_slots: int) -> StagingSlots:
    """No page is open."""
    return StagingSlots(
        jnp.full(num_pages, num_staging_slots, jnp.int32), jnp.full(num_staging_slots, num_pages, jnp.int32)
    )


class LastPages(NamedTuple):
    """Of each sequence, what a step writes behind its last token; ``[S]`` each."""

    source: Array
    """i32: the page of its last token; N = it has none."""
    page: Array
    """i32: the page that is written: that one, or a copy of it."""
    copied: Array
    """bool"""
    copy_rank: Array
    """i32: which of the step's copies it is."""
    num_tokens: Array
    """i32: those written into the page."""
    first_slot: Array
    """i32: the first of their slots."""
    first_row: Array
    """i32: the first of their rows in the step."""


class FreshPages(NamedTuple):
    """The pages that a step takes for tokens that found no room; ``[F]`` each."""

    page: Array
    """i32: N = no page."""
    owner: Array
    """i32: its sequence; S = no page."""
    num_tokens: Array
    """i32: its tokens, and those of the sequence's later pages."""
    first_row: Array
    """i32: the row of its first token."""


class Copies(NamedTuple):
    """Places of the open pages to copy, in the order of their ranks; i32[max_copies] each."""

    source: Array
    target: Array


def plan_step(
    staging: StagingSlots,
    ref_counts: Array,
    last: LastPages,
    fresh: FreshPages,
    page_size: int,
    max_copies: int,
) -> tuple[StagingSlots, FinalizedPages, Copies]:
    """Finds places for the pages that stay open, and lists those that the step fills.

    A copy gets a place that nobody uses. So does a fresh page, or it takes the place of the page that its sequence
    fills in the same step: pages are sealed before rows are written.

    Args:
      staging: as before the step.
      ref_counts: i32[N], the allocator's before the step.
      last, fresh: what the step writes.
      page_size: slots of a page.
      max_copies: static bound on copies.

    Returns:
      ``(staging, finalized, copies)``: as behind the step, what is sealed in it, what is copied before it.
    """
    s, n = staging.num_staging_slots, staging.place.shape[0]
    free = ~staging.in_use(ref_counts)
    free_places = _compacted(free, jnp.arange(s, dtype=jnp.int32), s, s)
    before = staging.place.at[last.source].get(mode="fill", fill_value=s)
    now = jnp.where(last.copied, free_places.at[last.copy_rank].get(mode="clip"), before)
    fills = (last.num_tokens > 0) & (last.first_slot + last.num_tokens == page_size)

    exists = fresh.page < n
    full, begun = exists & (fresh.num_tokens >= page_size), exists & (fresh.num_tokens < page_size)
    owner = jnp.minimum(fresh.owner, s - 1)
    takes_over = fills[owner]
    rank = jnp.cumsum(begun & ~takes_over) - 1 + jnp.sum(last.copied)
    place = jnp.where(takes_over, now[owner], free_places.at[rank].get(mode="clip"))

    copied_page = jnp.where(last.copied, last.page, n)
    behind = StagingSlots(
        place=staging.place.at[copied_page].set(now, mode="drop")
        .at[jnp.where(fills, last.page, n)].set(s, mode="drop")
        .at[fresh.page].set(jnp.where(begun, place, s), mode="drop"),
        page=staging.page.at[jnp.where(last.copied, now, s)].set(last.page, mode="drop")
        .at[jnp.where(begun, place, s)].set(fresh.page, mode="drop"),
    )  # fmt: skip

    sealed, size = jnp.concatenate([fills, full]), s + len(full)

    def listed(of_last: Array, of_fresh: Array | int, nothing: int = 0) -> Array:
        values = jnp.concatenate([of_last, jnp.broadcast_to(of_fresh, full.shape)])
        return _compacted(sealed, values.astype(jnp.int32), size, nothing)

    finalized = FinalizedPages(
        page=listed(last.page, fresh.page, n),
        place=listed(now, s, s),
        first_slot=listed(last.first_slot, 0),
        first_row=listed(last.first_row, fresh.first_row),
        count=jnp.sum(sealed, dtype=jnp.int32),
    )
    at = jnp.where(last.copied, last.copy_rank, max_copies)
    nowhere = jnp.full(max_copies, s, jnp.int32)
    copies = Copies(nowhere.at[at].set(before, mode="drop"), nowhere.at[at].set(now, mode="drop"))
    return behind, finalized, copies


def _compacted(chosen: Array, values: Array, size: int, nothing: int) -> Array:
    """i32[size]: the chosen values, one behind the other."""
    rank = jnp.where(chosen, jnp.cumsum(chosen) - 1, size)
    return jnp.full(size, nothing, jnp.int32).at[rank].set(values, mode="drop")
