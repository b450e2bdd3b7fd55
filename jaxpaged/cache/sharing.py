"""Operations on pages by number: attach cached pages to a sequence, pin pages, read and write them.

For prefix caches and schedulers: the host remembers which page holds which tokens, pins the page so
that it outlives its sequence, and attaches it to the next sequence with the same prefix. Operations
are pure and un-jitted; one that can fail returns ``ok`` and, when it is false, the cache unchanged.
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
"""Pytree ``(keys, values)`` of arrays ``[M, L, ...]``: M pages in all layers."""


def seq_attach(
    cache: PagedKVCache, pages: Array, num_tokens: Array, first_page: Array | int = 0
) -> tuple[PagedKVCache, Array]:
    """Attaches pages to empty sequences, which then share them. No key or value moves.

    Token i of a sequence is slot ``i % page_size`` of its page ``i // page_size``, rotated at i.

    Args:
      cache: the state.
      pages: i32[S, P], in order, from page ``first_page`` of the sequence on; those up to page
        ``ceil(num_tokens / page_size)`` count.
      num_tokens: i32[S], tokens of the sequence, those before ``first_page`` included; 0 leaves the
        sequence alone. A last page may be attached in part; writing behind those tokens copies it first.
      first_page: i32[S] or i32[], pages of the sequence before the first one attached, whose tokens
        only a cache with a ``window`` may lack.

    Returns:
      ``(cache, ok bool[])``. Not ok: a sequence is not empty, a page is free or outside the pool, the
      table's row is too narrow, a count is negative, or the next token sees some before ``first_page``.

    Reference: vLLM's automatic prefix caching.
    """
    n, width = cache.num_pages, cache.max_pages_per_seq
    num_tokens = jnp.asarray(num_tokens, jnp.int32)
    adopts = num_tokens > 0
    begin = jnp.where(adopts, jnp.asarray(first_page, jnp.int32) * cache.page_size, 0)
    seen = 0 if cache.window is None else jnp.maximum(num_tokens + 1 - cache.window, 0)
    pages = jnp.where(pages >= 0, pages, n)
    row = BlockTable.from_page_indices(pages, num_tokens - begin, cache.page_size, n)
    used = jnp.arange(width, dtype=jnp.int32) < row.num_entries[:, None]
    row = replace(row, position=jnp.where(used, row.position + begin[:, None], 0))
    held = cache.allocator.ref_counts.at[row.pages].get(mode="fill", fill_value=0) > 0
    possible = (cache.table.num_entries == 0) & (row.num_entries <= width) & jnp.all(held | ~used, axis=1)
    possible &= (begin >= 0) & (begin <= seen) & (begin < num_tokens)
    ok = jnp.all(possible | ~adopts) & jnp.all(num_tokens >= 0)
    adopts &= ok
    shared = jnp.where(adopts[:, None], row.pages, n).reshape(-1)
    cache = replace(cache, table=tables.choose(adopts, row, cache.table))
    return pin_pages(cache, shared), ok


def with_page_indices(cache: PagedKVCache, page_indices: Array, lengths: Array) -> PagedKVCache:
    """The cache with the sequences of another library's page table in place of its own.

    Pages that several entries name are shared, the others free. Their keys and values stay: those of
    the other library are ``replace(cache, k_pages=..., v_pages=...)``, in the layout of
    ``PagedKVCache``.

    Args:
      cache: the state; its sequences and pins are forgotten.
      page_indices: i32[S, P], in [0, N), and
      lengths: i32[S], as for ``BlockTable.from_page_indices``.

    Raises:
      ValueError: shapes that do not match, or a format that quantizes whole pages.
    """
    if cache.staging is not None:
        raise ValueError(
            f"pages of {cache.k_format.title} and {cache.v_format.title} have parts that no page table knows"
        )
    table = BlockTable.from_page_indices(page_indices, lengths, cache.page_size, cache.num_pages)
    counts = jnp.zeros(cache.num_pages, jnp.int32).at[table.pages].add(1, mode="drop")
    return replace(cache, allocator=pages_of.from_ref_counts(counts), table=table)


def pin_pages(cache: PagedKVCache, pages: Array) -> PagedKVCache:
    """Adds a reference to each of ``pages i32[M]``, so that they outlive their sequences; N is ignored."""
    return replace(cache, allocator=pages_of.retain(cache.allocator, pages))


def unpin_pages(cache: PagedKVCache, pages: Array) -> PagedKVCache:
    """Undoes ``pin_pages``; pages without a reference are freed."""
    return replace(cache, allocator=pages_of.release(cache.allocator, pages))


def seq_allocate(
    cache: PagedKVCache, seq: Array, row: BlockTable, count: Array
) -> tuple[PagedKVCache, Array]:
    """Allocates fresh pages for the entries of ``row`` in an empty sequence, for ``write_pages``.

    Args:
      cache: the state.
      seq: i32[], in [0, S).
      row: ``[P]`` fields; ``row.pages`` holds indices below ``count`` of the pages allocated, and N in
        padding.
      count: i32[], pages to allocate.

    Returns:
      ``(cache, ok bool[])``. Not ok: the sequence is not empty, or fewer pages are free.
    """
    n, width = cache.num_pages, cache.max_pages_per_seq
    ok = (cache.table.num_entries[seq] == 0) & pages_of.can_allocate(cache.allocator, count)
    count = jnp.where(ok, count, 0)
    allocator, taken, _ = pages_of.allocate(cache.allocator, count, max_count=width)
    used = (jnp.arange(width, dtype=jnp.int32) < row.num_entries) & ok
    pages = jnp.where(used, taken.at[row.pages].get(mode="fill", fill_value=n), n)
    # allocate counted each page once; entries are counted instead.
    allocator = pages_of.release(pages_of.retain(allocator, pages), taken)
    placed = tables.set_row(cache.table, seq, replace(row, pages=pages))
    return replace(cache, allocator=allocator, table=tables.choose(ok, placed, cache.table)), ok


def read_pages(cache: PagedKVCache, pages: Array) -> PagesOfLayers:
    """Contents of ``pages i32[M]`` in all layers; arbitrary for N.

    Raises:
      ValueError: a format has residual pages, whose contents are not in the pool.
    """
    if cache.staging is not None:
        raise ValueError(
            f"pages of {cache.k_format.title} and {cache.v_format.title} are read by snapshots alone"
        )
    index = _in_all_layers(cache, pages)
    return jax.tree.map(lambda pool: pool.at[index].get(mode="clip"), (cache.k_pages, cache.v_pages))


def write_pages(cache: PagedKVCache, pages: Array, data: PagesOfLayers) -> PagedKVCache:
    """Overwrites ``pages i32[M]`` with the result of ``read_pages``; N is ignored."""
    index = _in_all_layers(cache, pages)
    k_pages, v_pages = jax.tree.map(
        lambda pool, new: pool.at[index].set(new, mode="drop"), (cache.k_pages, cache.v_pages), data
    )
    return replace(cache, k_pages=k_pages, v_pages=v_pages)


def _in_all_layers(cache: PagedKVCache, pages: Array) -> Array:
    """i32[M, L]: indices in the pool of ``pages i32[M]``."""
    return cache.pool_page(jnp.arange(cache.num_layers, dtype=jnp.int32), pages[:, None])
