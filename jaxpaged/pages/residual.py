"""OpenPages: which pages are still kept in 16 bits, for formats that quantize a page once it is full.

A page is open from its first token to its last. Its numbers then lie in one of S open pages, apart from the pool;
whichever sequences share the page find them there, so that a fork moves nothing. A page that is full is sealed in
the very step that fills it, and is never written again: what removals leave of a sealed page stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OpenPages:
    """The place of each open page. S places: no more pages are open than there are sequences, as each is some
    sequence's last one, and two sequences that write have two."""

    place: Array
    """i32[N]: where the numbers of each page are, if it is open; S = in the pool. Free pages have any number."""
    page: Array
    """i32[S]: whose numbers lie in each place; N = nobody's. Holds if ``place`` says so too."""

    @property
    def num_places(self) -> int:
        """S, static."""
        return self.page.shape[0]

    def is_open(self, page: Array) -> Array:
        """bool, as ``page``: whether that page, which some sequence holds, is open."""
        return self.place.at[page].get(mode="fill", fill_value=self.num_places) < self.num_places

    def in_use(self, ref_counts: Array) -> Array:
        """bool[S]: which places hold an open page; ``ref_counts i32[N]`` are the allocator's."""
        held = ref_counts.at[self.page].get(mode="fill", fill_value=0) > 0
        return held & (
            self.place.at[self.page].get(mode="fill", fill_value=self.num_places)
            == jnp.arange(self.num_places)
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Seals:
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


def create(num_pages: int, num_places: int) -> OpenPages:
    """No page is open."""
    return OpenPages(jnp.full(num_pages, num_places, jnp.int32), jnp.full(num_places, num_pages, jnp.int32))
