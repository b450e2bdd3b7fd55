"""PageAllocator: the free pages, and the reference counts of the others."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PageAllocator:
    """A stack of free pages and the reference counts of all pages. N = num_pages; "no page" is N.

    Allocating reads from the top of the stack and never searches, so its cost does not depend on N.
    """

    free_pages: Array
    """i32[N]: ``free_pages[:num_free]`` are exactly the pages of count 0; the last one is next."""
    num_free: Array
    """i32[]: number of free pages."""
    ref_counts: Array
    """i32[N]: number of table entries and pins that refer to each page."""

    @property
    def num_pages(self) -> int:
        """N, static."""
        return self.free_pages.shape[0]


def create(num_pages: int) -> PageAllocator:
    """Creates an allocator with all pages free.

    Pages are allocated in the order 0, 1, 2, ...; freed pages are reused first, last in, first out.

    Raises:
      ValueError: ``num_pages`` is not positive.
    """
    if num_pages < 1:
        raise ValueError(f"num_pages must be positive, got {num_pages}")
    return PageAllocator(
        free_pages=jnp.arange(num_pages - 1, -1, -1, dtype=jnp.int32),
        num_free=jnp.int32(num_pages),
        ref_counts=jnp.zeros(num_pages, jnp.int32),
    )


def from_ref_counts(ref_counts: Array) -> PageAllocator:
    """Creates an allocator of pages of which ``ref_counts i32[N]`` entries refer to each.

    Free pages are allocated in order.
    """
    n = ref_counts.shape[0]
    free = ref_counts == 0
    page = jnp.arange(n, dtype=jnp.int32)
    stack = jnp.argsort(jnp.where(free, -page, n)).astype(jnp.int32)
    return PageAllocator(stack, jnp.sum(free, dtype=jnp.int32), ref_counts)


def can_allocate(allocator: PageAllocator, count: Array | int) -> Array:
    """bool[]: True if ``allocate`` of ``count`` pages would succeed."""
    count = jnp.asarray(count, jnp.int32)
    return (count >= 0) & (count <= allocator.num_free)


def allocate(
    allocator: PageAllocator, count: Array | int, *, max_count: int
) -> tuple[PageAllocator, Array, Array]:
    """Allocates ``count`` pages with a reference count of 1, all of them or none.

    Args:
      allocator: the state.
      count: i32[], number of pages, at most ``max_count``.
      max_count: static length of the result.

    Returns:
      ``(allocator, pages i32[max_count], ok bool[])``; pages beyond ``count`` are N, and all of
      them when not ok.
    """
    n = allocator.num_pages
    count = jnp.asarray(count, jnp.int32)
    ok = can_allocate(allocator, count) & (count <= max_count)
    taken = jnp.where(ok, count, 0)
    rank = jnp.arange(max_count, dtype=jnp.int32)
    top = jnp.where(rank < taken, allocator.num_free - 1 - rank, n)
    pages = allocator.free_pages.at[top].get(mode="fill", fill_value=n)
    ref_counts = allocator.ref_counts.at[pages].set(1, mode="drop")
    return PageAllocator(allocator.free_pages, allocator.num_free - taken, ref_counts), pages, ok


def retain(allocator: PageAllocator, pages: Array) -> PageAllocator:
    """Adds a reference to each of ``pages i32[M]``; ignores N, and counts duplicates."""
    ref_counts = allocator.ref_counts.at[pages].add(1, mode="drop")
    return PageAllocator(allocator.free_pages, allocator.num_free, ref_counts)


def release(allocator: PageAllocator, pages: Array) -> PageAllocator:
    """Drops a reference to each of ``pages i32[M]``; frees pages that have none left.

    Ignores N, and counts duplicates. The cost depends on M, not on N.
    """
    n, m = allocator.num_pages, pages.shape[0]
    ref_counts = allocator.ref_counts.at[pages].add(-1, mode="drop")
    emptied = ref_counts.at[pages].get(mode="fill", fill_value=1) == 0
    # A page may occur several times and must be pushed once. Its occurrences write negative numbers
    # to its reference count, which is unused now; the last one wins, pushes it and restores the 0.
    claim = -1 - jnp.arange(m, dtype=jnp.int32)
    claims = ref_counts.at[jnp.where(emptied, pages, n)].min(claim, mode="drop")
    pushed = emptied & (claims.at[pages].get(mode="fill", fill_value=0) == claim)
    ref_counts = claims.at[jnp.where(pushed, pages, n)].set(0, mode="drop")
    top = jnp.where(pushed, allocator.num_free + jnp.cumsum(pushed, dtype=jnp.int32) - 1, n)
    free_pages = allocator.free_pages.at[top].set(pages, mode="drop")
    return PageAllocator(free_pages, allocator.num_free + jnp.sum(pushed, dtype=jnp.int32), ref_counts)
