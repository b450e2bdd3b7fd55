"""Pages named by their numbers: sequences that take up pages of the pool, pins, and pages to and from the host.

What a prefix cache and a scheduler need beside ``seq_*``: the host remembers which page holds which tokens, pins the
page so that it outlives its sequence, and hands it to the next sequence that begins the same. As everywhere, operations
are pure and un-jitted, and one that can fail returns ``ok`` and, when it is false, the cache unchanged.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.pages import allocator as pages_of
from jaxpaged.pages import block_table as tables
from jaxpaged.pages.block_table import BlockTable

PagesOfLayers = Any
"""A pytree ``(keys of L layers, values of L layers)`` of arrays whose first axis is the page."""


def seq_attach(cache: PagedKVCache, pages: Array, num_tokens: Array) -> tuple[PagedKVCache, Array]:
    """Lets empty sequences share pages that are named by their numbers. No key or value moves.

    Token i of the sequence is what slot ``i % page_size`` of its page ``i // page_size`` holds, rotated at position i.

    Args:
      cache: the state.
      pages: i32[S, P], in order; of a row the first ``ceil(num_tokens / page_size)`` are looked at.
      num_tokens: i32[S]; 0 = leave the sequence alone. Tokens behind the last whole page share that page; who writes
        behind them copies it first.

    Returns:
      ``(cache, ok bool[])``. Not ok: a sequence is not empty, a page is none of the pool's or nobody holds it, the
      table's row is too narrow, or a count is negative.

    Reference: vLLM's automatic prefix caching.
    """
    n, ps, width = cache.num_pages, cache.page_size, cache.max_pages_per_seq
    num_tokens = jnp.asarray(num_tokens, jnp.int32)
    count = -(-num_tokens // ps)
    used = jnp.arange(width) < count[:, None]
    pages = jnp.where(used & (pages >= 0), pages, n)
    held = cache.allocator.ref_counts.at[pages].get(mode="fill", fill_value=0) > 0
    adopts = num_tokens > 0
    possible = (cache.table.num_entries == 0) & (count <= width) & jnp.all(held | ~used, axis=1)
    ok = jnp.all(possible | ~adopts) & jnp.all(num_tokens >= 0)
    adopts &= ok
    first = jnp.arange(width, dtype=jnp.int32) * ps
    none = jnp.zeros_like(pages)
    row = BlockTable(
        pages=pages,
        first_slot=none,
        num_tokens=jnp.where(used, jnp.clip(num_tokens[:, None] - first, 0, ps), 0),
        position=jnp.where(used, first, 0),
        rotation=none,
        num_entries=count,
    )
    shared = jnp.where(adopts[:, None], pages, n).reshape(-1)
    cache = replace(cache, table=tables.choose(adopts, row, cache.table))
    return pin_pages(cache, shared), ok


def pin_pages(cache: PagedKVCache, pages: Array) -> PagedKVCache:
    """One more reference to each of ``pages i32[M]``, so that they outlive their sequences; N is ignored."""
    return replace(cache, allocator=pages_of.retain(cache.allocator, pages))


def unpin_pages(cache: PagedKVCache, pages: Array) -> PagedKVCache:
    """Takes back ``pin_pages``; pages that nobody holds then return to the pool."""
    return replace(cache, allocator=pages_of.release(cache.allocator, pages))


def seq_allocate(
    cache: PagedKVCache, seq: Array, row: BlockTable, count: Array
) -> tuple[PagedKVCache, Array]:
    """Gives an empty sequence the entries of ``row``, on fresh pages, which are to be written (``write_pages``).

    Args:
      cache: the state.
      seq: i32[], in [0, S).
      row: ``[P]`` fields; ``row.pages`` names pages 0 to ``count``, the k-th one it takes, and N in padding.
      count: i32[], pages to take.

    Returns:
      ``(cache, ok bool[])``. Not ok: the sequence is not empty, or fewer pages are free.
    """
    n, width = cache.num_pages, cache.max_pages_per_seq
    ok = (cache.table.num_entries[seq] == 0) & pages_of.can_allocate(cache.allocator, count)
    count = jnp.where(ok, count, 0)
    allocator, taken, _ = pages_of.allocate(cache.allocator, count, max_count=width)
    used = (jnp.arange(width) < row.num_entries) & ok
    pages = jnp.where(used, taken.at[row.pages].get(mode="fill", fill_value=n), n)
    # Allocated with one reference each; every entry is to have one.
    allocator = pages_of.release(pages_of.retain(allocator, pages), taken)
    placed = tables.set_row(cache.table, seq, replace(row, pages=pages))
    return replace(cache, allocator=allocator, table=tables.choose(ok, placed, cache.table)), ok


def read_pages(cache: PagedKVCache, pages: Array) -> PagesOfLayers:
    """What ``pages i32[M]`` hold, in all layers; arbitrary pages for N.

    Raises:
      ValueError: a format seals pages: what is still open lies apart from the pool.
    """
    if cache.staging is not None:
        raise ValueError(
            f"pages of {cache.k_format.title} and {cache.v_format.title} are read by snapshots alone"
        )
    return jax.tree.map(lambda pool: pool.at[pages].get(mode="clip"), (cache.k_pages, cache.v_pages))


def write_pages(cache: PagedKVCache, pages: Array, data: PagesOfLayers) -> PagedKVCache:
    """Overwrites ``pages i32[M]`` with what ``read_pages`` gave; N is ignored."""
    k_pages, v_pages = jax.tree.map(
        lambda pool, new: pool.at[pages].set(new, mode="drop"), (cache.k_pages, cache.v_pages), data
    )
    return replace(cache, k_pages=k_pages, v_pages=v_pages)
