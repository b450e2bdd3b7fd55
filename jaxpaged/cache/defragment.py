"""seq_defragment: the one operation that moves keys and values, on request."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxpaged.attention.base import Pages
from jaxpaged.cache.contiguous import ContiguousKVCache
from jaxpaged.cache.groups import map_parts, parts_of
from jaxpaged.cache.interface import Cache, Integer
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.pages import allocator as pages_of
from jaxpaged.pages import block_table as tables
from jaxpaged.pages.allocator import PageAllocator
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.formats import PageFormat


def seq_defragment(cache: Cache, seq: Integer) -> tuple[Cache, Array]:
    """Moves the tokens of ``seq`` to the fewest pages; positions and attention stay the same.

    Full pages at its start, such as a shared prefix, stay. Behind them tokens move up into the
    sequence's own pages; a shared page is replaced by a free one. A sequence without a superfluous
    page is not touched. Residual formats quantize moved tokens again, and leave no free slot behind
    them. Rows of a contiguous cache have no gaps: it is returned as it is.

    Args:
      cache: the state.
      seq: an id, or ``ALL`` for one sequence after the other.

    Returns:
      ``(cache, ok bool[])``. Not ok, and nothing changed: the id is too large, or in a layer group too
      few pages are free to replace shared ones, or the table's row is too narrow for the new page
      boundaries.

    Raises:
      NotImplementedError: pages of a sequence lie on several devices.
    """
    s = cache.max_seqs
    if isinstance(cache, ContiguousKVCache):
        return cache, jnp.asarray(seq) < s
    parts = parts_of(cache)
    if not all(isinstance(part, PagedKVCache) for part in parts):
        raise NotImplementedError(f"seq_defragment needs pages of one device, got {cache!r}")
    seq = jnp.asarray(seq, jnp.int32)
    first, last = jnp.where(seq < 0, 0, seq), jnp.where(seq < 0, s, jnp.minimum(seq + 1, s))
    # Tables alone first: whether all goes well, in every group, is known before a page is written.
    ok = functools.reduce(jnp.logical_and, (_fits(part, first, last) for part in parts), seq < s)
    last = jnp.where(ok, last, first)
    return map_parts(lambda part: jax.lax.fori_loop(first, last, _defragment, part), cache), ok


def _fits(cache: PagedKVCache, first: Array, last: Array) -> Array:
    """bool[]: True if sequences ``[first, last)`` can all be defragmented, one after the other."""

    def try_one(
        i: Array, carry: tuple[PageAllocator, BlockTable, Array]
    ) -> tuple[PageAllocator, BlockTable, Array]:
        allocator, table, ok = carry
        allocator, row, _, _, fitted = _defragmented(allocator, tables.get_row(table, i), cache.page_size)
        return allocator, tables.set_row(table, i, row), ok & fitted

    *_, ok = jax.lax.fori_loop(first, last, try_one, (cache.allocator, cache.table, jnp.bool_(True)))
    return ok


def _defragment(i: Array, cache: PagedKVCache) -> PagedKVCache:
    """Moves the tokens of sequence ``i``, which is known to fit."""
    old = tables.get_row(cache.table, i)
    allocator, row, targets, start, _ = _defragmented(cache.allocator, old, cache.page_size)
    k_pages, v_pages = _move(cache, old, targets, start)
    table, staging = tables.set_row(cache.table, i, row), cache.staging
    if staging is not None:  # pages written here are quantized, the last one too
        slots = staging.slot_of_page.at[targets].set(staging.num_slots, mode="drop")
        staging = replace(staging, slot_of_page=slots)
    return replace(cache, allocator=allocator, table=table, k_pages=k_pages, v_pages=v_pages, staging=staging)


def _defragmented(
    allocator: PageAllocator, row: BlockTable, page_size: int
) -> tuple[PageAllocator, BlockTable, Array, Array, Array]:
    """Plans one row.

    Returns:
      ``(allocator, row, targets i32[P], start i32[], ok bool[])``. From ``start // page_size`` on,
      page j, tokens ``j * page_size ..``, is written to ``targets[j]``; N where nothing moves.
    """
    n, width = allocator.num_pages, row.max_pages_per_seq
    entry = jnp.arange(width, dtype=jnp.int32)
    used = entry < row.num_entries
    before = jnp.cumsum(row.num_tokens, dtype=jnp.int32) - row.num_tokens
    length = jnp.sum(row.num_tokens, dtype=jnp.int32)
    full = used & (row.first_slot == 0) & (row.num_tokens == page_size)
    num_full = jnp.sum(
        jnp.cumprod(full, dtype=jnp.int32), dtype=jnp.int32
    )  # whole pages at the beginning stay
    start = num_full * page_size
    needed = -(-(length - start) // page_size)

    # The other pages, each once, in token order.
    rest = used & (entry >= num_full)
    pages = jnp.where(rest, row.pages, n)
    first_seen = jnp.full(n, width, jnp.int32).at[pages].min(entry, mode="drop")
    distinct = rest & (first_seen.at[pages].get(mode="fill", fill_value=width) == entry)
    rank = jnp.cumsum(distinct, dtype=jnp.int32) - 1
    entries_here = jnp.zeros(n, jnp.int32).at[pages].add(1, mode="drop")
    shared = distinct & (
        allocator.ref_counts.at[pages].get(mode="clip") > entries_here.at[pages].get(mode="clip")
    )
    replaced = shared & (rank < needed)
    gains = needed < jnp.sum(distinct, dtype=jnp.int32)
    num_fresh = jnp.where(gains, jnp.sum(replaced, dtype=jnp.int32), 0)
    grown, fresh, enough = pages_of.allocate(allocator, num_fresh, max_count=width)
    target = jnp.where(replaced, fresh.at[jnp.cumsum(replaced, dtype=jnp.int32) - 1].get(mode="clip"), pages)
    place = jnp.where(distinct & (rank < needed) & gains, num_full + rank, width)
    targets = jnp.full(width, n, jnp.int32).at[place].set(target, mode="drop")

    # Entries end where pages end, and where positions or rotations do not continue.
    end_before = jnp.roll(row.position + row.num_tokens, 1)
    breaks = used & (
        (row.position != end_before) | (row.rotation != jnp.roll(row.rotation, 1)) | (entry == 0)
    )
    edges = entry * page_size
    starts = jnp.concatenate(
        [jnp.where(breaks, before, length), jnp.where(edges < length, edges, length)]
    ).astype(jnp.int32)
    starts = jnp.sort(starts)
    once = (starts < length) & (starts != jnp.roll(starts, 1).at[0].set(-1))
    num_entries = jnp.sum(once, dtype=jnp.int32)
    starts = (
        jnp.full(width + 1, length, jnp.int32)
        .at[jnp.where(once, jnp.cumsum(once, dtype=jnp.int32) - 1, width + 1)]
        .set(starts, mode="drop")
    )
    source = _entry_of(before, row.num_entries, starts[:-1])
    filled = entry < num_entries
    page_index = starts[:-1] // page_size
    kept = jnp.where(
        page_index < num_full, row.pages[jnp.minimum(page_index, width - 1)], targets[page_index]
    )
    packed = BlockTable(
        pages=jnp.where(filled, kept, n),
        first_slot=jnp.where(filled, starts[:-1] % page_size, 0),
        num_tokens=jnp.where(filled, starts[1:] - starts[:-1], 0),
        position=jnp.where(filled, row.position[source] + starts[:-1] - before[source], 0),
        rotation=jnp.where(filled, row.rotation[source], 0),
        num_entries=num_entries,
    )
    ok = ~gains | (enough & (num_entries <= width))
    changes = gains & ok
    packed = jax.tree.map(lambda new, old: jnp.where(changes, new, old), packed, row)
    # allocate counted each fresh page once; entries are counted instead.
    held = pages_of.retain(grown, packed.pages)
    held = pages_of.release(held, jnp.concatenate([row.pages, fresh]))
    allocator = jax.tree.map(lambda new, old: jnp.where(changes, new, old), held, allocator)
    return allocator, packed, jnp.where(changes, targets, n), start, ok


def _entry_of(before: Array, num_entries: Array, token: Array) -> Array:
    """i32: entry of a row that holds its ``token``-th token; ``before[P]``: tokens before each entry."""
    known = jnp.where(
        jnp.arange(before.shape[0], dtype=jnp.int32) < num_entries, before, jnp.iinfo(jnp.int32).max
    )
    return jnp.clip(jnp.searchsorted(known, token, side="right") - 1, 0, before.shape[0] - 1)


def _move(cache: PagedKVCache, row: BlockTable, targets: Array, start: Array) -> tuple[Pages, Pages]:
    """Fills the ``targets`` page by page from the front, in all layers.

    Each page is read before it is overwritten, because tokens only move towards the start.
    """
    ps = cache.page_size
    before = jnp.cumsum(row.num_tokens, dtype=jnp.int32) - row.num_tokens
    length = jnp.sum(row.num_tokens, dtype=jnp.int32)
    count = jnp.sum(targets < cache.num_pages, dtype=jnp.int32)

    def fill(j: Array, pools: tuple[Pages, Pages]) -> tuple[Pages, Pages]:
        i, layer = jnp.divmod(j, cache.num_layers)
        page = start // ps + i
        token = jnp.minimum(page * ps + jnp.arange(ps, dtype=jnp.int32), length - 1)
        entry = _entry_of(before, row.num_entries, token)
        slot = jnp.minimum(row.first_slot[entry] + token - before[entry], ps - 1)
        source = jnp.minimum(row.pages[entry], cache.num_pages - 1)

        read_from: Any = cache.as_read

        def gathered(storage: PageFormat, pages: Any) -> Any:
            first = layer * cache.num_pages
            moved: Any = storage.gather(read_from(pages), first + source, slot, first + targets[page])
            return replace(moved, slot_of_page=None) if storage.has_residual else moved

        k_pages, v_pages = pools
        return gathered(cache.k_format, k_pages), gathered(cache.v_format, v_pages)

    return jax.lax.fori_loop(0, count * cache.num_layers, fill, (cache.k_pages, cache.v_pages))
