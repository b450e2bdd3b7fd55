"""The operations on sequences, ``seq_*``: edits of the block table that keep the reference counts in step.

No key or value is read or moved here. Every operation is pure, ``op(cache, ...) -> cache``, and un-jitted, and nothing
depends on the values of ids, lengths or ranges at trace time. An operation that can fail returns ``ok`` and, when it is
false, the cache unchanged. Ranges are ``[p0, p1)`` in positions; ``p0 < 0`` is 0 and ``p1 < 0`` is the end, as in
llama.cpp's ``llama_memory_seq_*``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxpaged.pages import allocator as pages_of
from jaxpaged.pages import block_table as tables
from jaxpaged.pages.allocator import PageAllocator
from jaxpaged.pages.block_table import BlockTable

ALL = -1
"""In place of a sequence's id: every sequence."""


@dataclass(frozen=True)
class Sequences:
    """S sequences as maps into a pool of N pages: what a paged cache is, beside the pages."""

    allocator: PageAllocator
    table: BlockTable

    @property
    def num_pages(self) -> int:
        """N, static."""
        return self.allocator.num_pages

    @property
    def max_seqs(self) -> int:
        """S, static."""
        return self.table.max_seqs

    @property
    def max_pages_per_seq(self) -> int:
        """P, static."""
        return self.table.max_pages_per_seq

    @property
    def pages_used(self) -> Array:
        """i32[]: pages that are not free."""
        return self.num_pages - self.allocator.num_free

    @property
    def pages_free(self) -> Array:
        """i32[]: pages that ``reserve`` can take."""
        return self.allocator.num_free

    @property
    def lengths(self) -> Array:
        """i32[S]: tokens each sequence holds."""
        return tables.lengths(self.table)


Cache = TypeVar("Cache", bound=Sequences)


def seq_remove(
    cache: Cache, seq: Array | int, p0: Array | int = 0, p1: Array | int = -1
) -> tuple[Cache, Array]:
    """Forgets the tokens of ``seq`` in [p0, p1). No key or value moves; pages nobody points at return to the pool.

    Args:
      cache: the state.
      seq: an id, ``ALL`` (or any negative id) for every sequence, or ``bool[S]`` for the sequences marked.
      p0, p1: any range, aligned to pages or not; i32[S] for a range of its own for each sequence.

    Returns:
      ``(cache, ok bool[])``. Not ok: the id is too large, or an entry has to be split and the table's row is full.
      Removing whole sequences never fails.
    """
    if isinstance(p0, int) and isinstance(p1, int) and p0 <= 0 and p1 < 0:
        s, seq = cache.max_seqs, jnp.asarray(seq)
        marked = seq if seq.dtype == bool else (seq < 0) | (jnp.arange(s) == seq)
        return _remove_whole(cache, marked), jnp.bool_(True) if seq.dtype == bool else seq < s
    return _edit(cache, seq, tables.remove_range, *tables.clamp_range(p0, p1))


def seq_copy(
    cache: Cache, src: Array | int, dst: Array | int, p0: Array | int = 0, p1: Array | int = -1
) -> tuple[Cache, Array]:
    """Lets ``dst`` share the tokens of ``src`` in [p0, p1). No key or value moves; writes copy later, where needed.

    Returns:
      ``(cache, ok bool[])``. Not ok: an id outside [0, S), or ``dst`` is not empty.
    """
    s = cache.max_seqs
    src, dst = jnp.asarray(src, jnp.int32), jnp.asarray(dst, jnp.int32)
    p0, p1 = tables.clamp_range(p0, p1)
    known = (src >= 0) & (src < s) & (dst >= 0) & (dst < s)
    ok = known & (cache.table.num_entries[jnp.clip(dst, 0, s - 1)] == 0)
    shared = tables.slice_range(tables.get_row(cache.table, src), p0, p1, cache.num_pages)
    shared = tables.choose(ok, shared, tables.empty_like(shared, cache.num_pages))
    table = tables.choose(ok, tables.set_row(cache.table, dst, shared), cache.table)
    return replace(cache, allocator=pages_of.retain(cache.allocator, shared.pages), table=table), ok


def seq_keep(cache: Cache, seq: Array | int) -> tuple[Cache, Array]:
    """Removes every sequence but ``seq``.

    Returns:
      ``(cache, ok bool[])``. Not ok: the id is outside [0, S).
    """
    seq = jnp.asarray(seq)
    ok = (seq >= 0) & (seq < cache.max_seqs)
    kept, _ = seq_remove(cache, (jnp.arange(cache.max_seqs) != seq) & ok)
    return kept, ok


def seq_shift(
    cache: Cache, seq: Array | int, p0: Array | int, p1: Array | int, delta: Array | int
) -> tuple[Cache, Array]:
    """Adds ``delta`` to the positions of ``seq`` in [p0, p1). No key moves, on shared pages neither.

    Keys stay rotated where they were written; the entry remembers by how much (``BlockTable.rotation``), and attention
    turns the query instead. Tokens whose position becomes negative are removed.

    Args:
      cache: the state.
      seq: an id, ``ALL`` (or any negative id) for every sequence, or ``bool[S]`` for the sequences marked.
      p0, p1, delta: any range, aligned to pages or not; i32[S] for one of its own for each sequence.

    Returns:
      ``(cache, ok bool[])``. Not ok: the id is too large; positions would collide, change places or leave int32; an
      entry has to be split and the table's row is full.
    """
    return _edit(cache, seq, tables.shift_range, *tables.clamp_range(p0, p1), jnp.asarray(delta))


def seq_reorder(cache: Cache, source: Array) -> Cache:
    """Lets each sequence become what another was: sequence i shares what ``source[i]`` held. No key or value moves.

    What a beam search does after each step, and a fork of many at once.

    Args:
      cache: the state.
      source: i32[S], in [0, S]; S = the sequence ends empty.
    """
    source = jnp.asarray(source, jnp.int32)
    known = (source >= 0) & (source < cache.max_seqs)
    reordered = jax.tree.map(lambda field: field.at[source].get(mode="clip"), cache.table)
    table = tables.choose(known, reordered, tables.empty_like(cache.table, cache.num_pages))
    return replace(cache, allocator=_swap_entries(cache.allocator, cache.table, table), table=table)


def seq_drop_unseen(cache: Cache, window: int) -> Cache:
    """Gives back the pages at the beginning of each sequence that none of its next tokens will see.

    For a model whose every layer sees ``window`` tokens at most, the query's own included. Tokens leave in whole
    entries, so that a step costs next to nothing while there is none to leave, and no entry is ever split.
    """
    table = cache.table
    first_seen = tables.position_max(table)[:, None] + 2 - window
    used = jnp.arange(cache.max_pages_per_seq) < table.num_entries[:, None]
    unseen = used & (table.position + table.num_tokens <= first_seen)

    def drop() -> tuple[PageAllocator, BlockTable]:
        kept = jax.vmap(lambda row, drops: tables.keep(row, ~drops, cache.num_pages))(table, unseen)
        released = jnp.where(unseen, table.pages, cache.num_pages)
        return pages_of.release(cache.allocator, released.reshape(-1)), kept

    # Positions increase along a row, so the first entry is the first to leave.
    allocator, table = jax.lax.cond(jnp.any(unseen[:, 0]), drop, lambda: (cache.allocator, table))
    return replace(cache, allocator=allocator, table=table)


def seq_length(cache: Cache) -> Array:
    """i32[S]: tokens each sequence holds; 0 when empty."""
    return tables.lengths(cache.table)


def seq_position_min(cache: Cache) -> Array:
    """i32[S]: smallest position of each sequence; -1 when empty."""
    return tables.position_min(cache.table)


def seq_position_max(cache: Cache) -> Array:
    """i32[S]: largest position of each sequence; -1 when empty."""
    return tables.position_max(cache.table)


def _remove_whole(cache: Cache, marked: Array) -> Cache:
    """``seq_remove`` of everything in the sequences marked: nothing to cut, so a fraction of the work."""
    released = jnp.where(marked[:, None], cache.table.pages, cache.num_pages)
    return replace(
        cache,
        allocator=pages_of.release(cache.allocator, released.reshape(-1)),
        table=tables.choose(marked, tables.empty_like(cache.table, cache.num_pages), cache.table),
    )


def _edit(
    cache: Cache, seq: Array | int, edit: Callable[..., tuple[BlockTable, Array]], *arguments: Array
) -> tuple[Cache, Array]:
    """Edits the rows of the sequences named, all of them or none, and brings reference counts in step.

    Args:
      cache: the state.
      seq: an id, a negative one for every sequence, or ``bool[S]``.
      edit: ``(row, *arguments, num_pages) -> (row, ok)``, as the edits of ``block_table``.
      arguments: i32[], or i32[S] for one a sequence.
    """
    n, s = cache.num_pages, cache.max_seqs
    seq = jnp.asarray(seq)
    if seq.dtype == bool and seq.shape != (s,):
        raise ValueError(f"a mask of sequences must have shape ({s},), got {seq.shape}")
    each = [jnp.broadcast_to(jnp.asarray(a, jnp.int32), (s,)) for a in arguments]

    def edit_marked(marked: Array) -> tuple[PageAllocator, BlockTable, Array]:
        edited, fitted = jax.vmap(lambda row, *a: edit(row, *a, n))(cache.table, *each)
        ok = jnp.all(fitted | ~marked)
        table = tables.choose(marked & ok, edited, cache.table)
        return _swap_entries(cache.allocator, cache.table, table), table, ok

    def edit_one() -> tuple[PageAllocator, BlockTable, Array]:
        row = tables.get_row(cache.table, seq)
        edited, fitted = edit(row, *(a.at[seq].get(mode="clip") for a in each), n)
        ok = fitted & (seq < s)
        edited = tables.choose(ok, edited, row)
        table = tables.set_row(cache.table, seq, edited)
        return _swap_entries(cache.allocator, row, edited), table, ok

    if seq.dtype == bool:
        allocator, table, ok = edit_marked(seq)
    else:
        allocator, table, ok = jax.lax.cond(seq < 0, lambda: edit_marked(jnp.ones(s, bool)), edit_one)
    return replace(cache, allocator=allocator, table=table), ok


def _swap_entries(allocator: PageAllocator, old: BlockTable, new: BlockTable) -> PageAllocator:
    """Reference counts after the entries ``old`` became ``new``; pages that both name are never seen as free."""
    held = pages_of.retain(allocator, new.pages.reshape(-1))
    return pages_of.release(held, old.pages.reshape(-1))
