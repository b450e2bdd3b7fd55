"""PageAllocator: which pages are free, and how many table entries point at the others."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PageAllocator:
    """A stack of free pages and the reference counts of all pages. N = num_pages; "no page" is N.

    Taking a page is a read from the top of the stack and never a search, so its cost does not depend on N.
    """

    free_pages: Array
    """i32[N]: ``free_pages[:num_free]`` are exactly the pages of count 0, the next one to hand out last."""
    num_free: Array
    """i32[]"""
    ref_counts: Array
    """i32[N]: how many table entries (and pins) point at each page."""

    @property
    def num_pages(self) -> int:
        """N, static."""
        return self.free_pages.shape[0]


def create(num_pages: int) -> PageAllocator:
    """All pages free; they are handed out 0, 1, 2, ... at first, and last returned, first out from then on.

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


def can_allocate(allocator: PageAllocator, count: Array | int) -> Array:
    """bool[]: whether ``allocate`` of ``count`` pages would succeed."""
    return (jnp.asarray(count) >= 0) & (jnp.asarray(count) <= allocator.num_free)


def allocate(
    allocator: PageAllocator, count: Array | int, *, max_count: int
) -> tuple[PageAllocator, Array, Array]:
    """Takes ``count`` pages, each with reference count 1; all of them or none.

    Args:
      allocator: the state.
      count: i32[], pages wanted, at most ``max_count``.
      max_count: static length of the answer.

    Returns:
      ``(allocator, pages i32[max_count], ok bool[])``; pages beyond ``count`` are N, and all are N when not ok.
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
    """One more reference to each of ``pages i32[M]``; N is ignored, and a page named twice counts twice."""
    ref_counts = allocator.ref_counts.at[pages].add(1, mode="drop")
    return PageAllocator(allocator.free_pages, allocator.num_free, ref_counts)


def release(allocator: PageAllocator, pages: Array) -> PageAllocator:
    """One reference less to each of ``pages i32[M]``; pages whose count falls to 0 return to the stack.

    N is ignored, and a page named twice loses two references. The cost depends on M, not on N.
    """
    n, m = allocator.num_pages, pages.shape[0]
    ref_counts = allocator.ref_counts.at[pages].add(-1, mode="drop")
    emptied = ref_counts.at[pages].get(mode="fill", fill_value=1) == 0
    # A page may be named several times and must be pushed once: its namings claim the (unused) count of the
    # emptied page with negative numbers, the last naming wins, and the winner sets the count back to 0.
    claim = -1 - jnp.arange(m, dtype=jnp.int32)
    claims = ref_counts.at[jnp.where(emptied, pages, n)].min(claim, mode="drop")
    pushed = emptied & (claims.at[pages].get(mode="fill", fill_value=0) == claim)
    ref_counts = claims.at[jnp.where(pushed, pages, n)].set(0, mode="drop")
    place = jnp.where(pushed, allocator.num_free + jnp.cumsum(pushed, dtype=jnp.int32) - 1, n)
    free_pages = allocator.free_pages.at[place].set(pages, mode="drop")
    return PageAllocator(free_pages, allocator.num_free + jnp.sum(pushed, dtype=jnp.int32), ref_counts)
