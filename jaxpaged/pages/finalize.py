"""What a step does to open pages: which are begun, copied and sealed. Arithmetic on small integer arrays."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxpaged.pages.residual import OpenPages, Seals


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
    open_pages: OpenPages,
    ref_counts: Array,
    last: LastPages,
    fresh: FreshPages,
    page_size: int,
    max_copies: int,
) -> tuple[OpenPages, Seals, Copies]:
    """Finds places for the pages that stay open, and lists those that the step fills.

    A copy gets a place that nobody uses. So does a fresh page, or it takes the place of the page that its sequence
    fills in the same step: pages are sealed before rows are written.

    Args:
      open_pages: as before the step.
      ref_counts: i32[N], the allocator's before the step.
      last, fresh: what the step writes.
      page_size: slots of a page.
      max_copies: static bound on copies.

    Returns:
      ``(open_pages, seals, copies)``: as behind the step, what is sealed in it, what is copied before it.
    """
    s, n = open_pages.num_places, open_pages.place.shape[0]
    free = ~open_pages.in_use(ref_counts)
    free_places = _compacted(free, jnp.arange(s, dtype=jnp.int32), s, s)
    before = open_pages.place.at[last.source].get(mode="fill", fill_value=s)
    now = jnp.where(last.copied, free_places.at[last.copy_rank].get(mode="clip"), before)
    fills = (last.num_tokens > 0) & (last.first_slot + last.num_tokens == page_size)

    exists = fresh.page < n
    full, begun = exists & (fresh.num_tokens >= page_size), exists & (fresh.num_tokens < page_size)
    owner = jnp.minimum(fresh.owner, s - 1)
    takes_over = fills[owner]
    rank = jnp.cumsum(begun & ~takes_over) - 1 + jnp.sum(last.copied)
    place = jnp.where(takes_over, now[owner], free_places.at[rank].get(mode="clip"))

    copied_page = jnp.where(last.copied, last.page, n)
    behind = OpenPages(
        place=open_pages.place.at[copied_page].set(now, mode="drop")
        .at[jnp.where(fills, last.page, n)].set(s, mode="drop")
        .at[fresh.page].set(jnp.where(begun, place, s), mode="drop"),
        page=open_pages.page.at[jnp.where(last.copied, now, s)].set(last.page, mode="drop")
        .at[jnp.where(begun, place, s)].set(fresh.page, mode="drop"),
    )  # fmt: skip

    sealed, size = jnp.concatenate([fills, full]), s + len(full)

    def listed(of_last: Array, of_fresh: Array | int, nothing: int = 0) -> Array:
        values = jnp.concatenate([of_last, jnp.broadcast_to(of_fresh, full.shape)])
        return _compacted(sealed, values.astype(jnp.int32), size, nothing)

    seals = Seals(
        page=listed(last.page, fresh.page, n),
        place=listed(now, s, s),
        first_slot=listed(last.first_slot, 0),
        first_row=listed(last.first_row, fresh.first_row),
        count=jnp.sum(sealed, dtype=jnp.int32),
    )
    at = jnp.where(last.copied, last.copy_rank, max_copies)
    nowhere = jnp.full(max_copies, s, jnp.int32)
    copies = Copies(nowhere.at[at].set(before, mode="drop"), nowhere.at[at].set(now, mode="drop"))
    return behind, seals, copies


def _compacted(chosen: Array, values: Array, size: int, nothing: int) -> Array:
    """i32[size]: the chosen values, one behind the other."""
    rank = jnp.where(chosen, jnp.cumsum(chosen) - 1, size)
    return jnp.full(size, nothing, jnp.int32).at[rank].set(values, mode="drop")
