"""Sequences as block tables: the ``seq_*`` operations of paged caches. No key or value is touched.

``interface.py`` documents each operation. Edits loop over the rows they name, so that their cost is
O(P) a sequence, whatever S and N are, and everything else in the state stays in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Self, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxpaged.cache import reservation
from jaxpaged.cache.checks import sequence_mask
from jaxpaged.cache.interface import Integer
from jaxpaged.cache.reservation import Metadata
from jaxpaged.pages import allocator as pages_of
from jaxpaged.pages import block_table as tables
from jaxpaged.pages.allocator import PageAllocator
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.rope import Rope

_SHIFT_PAGES = 2
"""Pages beyond those that its tokens fill, in which a shifted sequence may hold some."""


@dataclass(frozen=True)
class Sequences:
    """S sequences mapped to a pool of N pages; a paged cache without its pages."""

    allocator: PageAllocator
    table: BlockTable
    rope: Rope | None = field(metadata={"static": True})
    """Rotary embedding of the keys in the cache, which attention needs after ``seq_shift``."""
    window: int | None = field(default=None, kw_only=True, metadata={"static": True})
    """Tokens that a query sees in every layer, its own included; None = all. ``reserve`` frees the pages
    before them, so a sequence holds its last tokens only."""

    def rotation(self, rope: Rope | None = None) -> Rope | None:
        """Rotary embedding for attention, by default the cache's; None if no dimension is rotated."""
        rope = self.rope if rope is None else rope
        return rope if rope is not None and rope.rotary_dim else None

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
        """P, static: entries of a row of the table."""
        return self.table.max_pages_per_seq

    @property
    def pages_used(self) -> Array:
        """i32[]: number of pages that are not free."""
        return self.num_pages - self.allocator.num_free

    @property
    def pages_free(self) -> Array:
        """i32[]: number of free pages."""
        return self.allocator.num_free

    @property
    def metadata(self) -> Metadata:
        """Allocator, table, staging slots and page size."""
        raise NotImplementedError

    @property
    def lengths(self) -> Array:
        """i32[S]: number of tokens of each sequence."""
        return tables.lengths(self.table)

    def seq_position_min(self) -> Array:
        """i32[S]: smallest position of each sequence; -1 when empty."""
        return tables.position_min(self.table)

    def seq_position_max(self) -> Array:
        """i32[S]: largest position of each sequence; -1 when empty."""
        return tables.position_max(self.table)

    def can_reserve(self, num_new: Array) -> Array:
        """See ``jaxpaged.can_reserve``."""
        return self.without_unseen().has_pages(num_new)

    def has_pages(self, num_new: Array) -> Array:
        """bool[]: ``can_reserve`` of what ``without_unseen`` returned."""
        plan = reservation.plan(self.metadata, num_new)
        enough = jnp.sum(plan.needed, dtype=jnp.int32) <= self.allocator.num_free
        return jnp.all(plan.representable) & enough

    # The following ones count pages that ``reserve`` would free first; ``without_unseen`` frees them now.

    def has_room(self, num_new: Array) -> Array:
        """bool[S]: True if the table's row holds ``num_new i32[S]`` more tokens, however few pages are free."""
        return reservation.plan(self.metadata, num_new).representable

    def can_reserve_each(self, num_new: Array) -> Array:
        """bool[S]: True for sequences that get their pages when served by id, skipping those that do not fit.

        One that does not fit is expected to be removed: its shared page may then need no copy, and
        its own pages serve the others in the next step.
        """
        return reservation.can_reserve_each(self.metadata, num_new)

    def pages_needed(self, num_new: Array, *, limit: int | None = None, step: int | None = None) -> Array:
        """i32[S]: pages that ``num_new i32[S]`` more tokens take, copies of shared pages included.

        Args:
          num_new: i32[S].
          limit: tokens that a sequence holds at most, because contexts are shifted.
          step: tokens of one sequence that one ``reserve`` adds at most, if ``num_new`` are added in
            several; pages before the window are freed in between.
        """
        needed, size = reservation.plan(self.metadata, num_new).needed, self.metadata.page_size
        bounds = [] if limit is None else [-(-limit // size) + _SHIFT_PAGES]
        if self.window is not None and step is not None:
            bounds.append(pages_held(self.window, step, size) + (_SHIFT_PAGES if bounds else 0))
        if not bounds:
            return needed
        return jnp.minimum(needed, jnp.maximum(min(bounds) - self.table.num_entries, 0))

    def whole_pages(self, num_tokens: Array) -> Array:
        """Number of pages that ``num_tokens`` tokens fill to the last slot, and that stay."""
        return num_tokens // self.metadata.page_size if self.window is None else jnp.zeros_like(num_tokens)

    def seq_remove(self, seq: Integer, p0: Integer = 0, p1: Integer = -1) -> tuple[Self, Array]:
        """See ``jaxpaged.seq_remove``."""
        if isinstance(p0, int) and isinstance(p1, int) and p0 <= 0 and p1 < 0:
            return _edit(self, seq, _empty, can_fail=False)
        window = self.window

        def remove(row: BlockTable, p0: Array, p1: Array, num_pages: int) -> tuple[BlockTable, Array]:
            edited, ok = tables.remove_range(row, p0, p1, num_pages)
            if window is not None:
                last = tables.position_max(row)
                seen = jnp.maximum(jnp.minimum(p0, last + 1) + 1 - window, 0)
                ok &= (p1 <= last) | (p0 <= 0) | (tables.position_min(row) <= seen)
            return edited, ok

        return _edit(self, seq, remove, *tables.clamp_range(p0, p1))

    def seq_copy(self, src: Integer, dst: Integer, p0: Integer = 0, p1: Integer = -1) -> tuple[Self, Array]:
        """See ``jaxpaged.seq_copy``: shares pages; writes copy them later, where needed."""
        s = self.max_seqs
        src, dst = jnp.asarray(src, jnp.int32), jnp.asarray(dst, jnp.int32)
        p0, p1 = tables.clamp_range(p0, p1)
        known = (src >= 0) & (src < s) & (dst >= 0) & (dst < s)
        old = tables.get_row(self.table, jnp.clip(dst, 0, s - 1))
        ok = known & (old.num_entries == 0)
        if self.window is not None:
            source = tables.get_row(self.table, src)
            end = jnp.minimum(p1, tables.position_max(source) + 1)
            ok &= tables.position_min(source) <= jnp.maximum(jnp.maximum(p0, end + 1 - self.window), 0)
        shared = tables.slice_range(tables.get_row(self.table, src), p0, p1, self.num_pages)
        row = tables.choose(ok, shared, old)
        retained = jnp.where(ok, row.pages, self.num_pages)
        table = tables.set_row(self.table, jnp.clip(dst, 0, s - 1), row)
        return replace(self, allocator=pages_of.retain(self.allocator, retained), table=table), ok

    def seq_keep(self, seq: Integer) -> tuple[Self, Array]:
        """See ``jaxpaged.seq_keep``."""
        seq = jnp.asarray(seq)
        ok = (seq >= 0) & (seq < self.max_seqs)
        kept, _ = self.seq_remove((jnp.arange(self.max_seqs, dtype=jnp.int32) != seq) & ok)
        return kept, ok

    def seq_shift(self, seq: Integer, p0: Integer, p1: Integer, delta: Integer) -> tuple[Self, Array]:
        """See ``jaxpaged.seq_shift``."""
        if self.rope is None:
            raise ValueError(
                "seq_shift needs a cache that knows how keys are rotated: create it with rope=Rope.create(inv_freq), "
                "or rope=Rope.create(()) for a model without rotary embeddings"
            )
        return _edit(self, seq, tables.shift_range, *tables.clamp_range(p0, p1), jnp.asarray(delta))

    def seq_reorder(self, source: Array) -> Self:
        """See ``jaxpaged.seq_reorder``."""
        source = jnp.asarray(source, jnp.int32)
        known = (source >= 0) & (source < self.max_seqs)
        reordered = jax.tree.map(lambda field: field.at[source].get(mode="clip"), self.table)
        table = tables.choose(known, reordered, tables.empty_like(self.table, self.num_pages))
        allocator = _swap_pages(self.allocator, self.table.pages.reshape(-1), table.pages.reshape(-1))
        return replace(self, allocator=allocator, table=table)

    def without_unseen(self) -> Self:
        """The cache without the pages that no further token of their sequence will see."""
        return self if self.window is None else self.seq_drop_unseen(self.window)

    def seq_drop_unseen(self, window: int) -> Self:
        """Frees the pages at the start of each sequence that none of its next tokens will see.

        For a model whose every layer sees at most ``window`` tokens, the query's own included.
        Tokens leave in whole entries, so a step costs O(S) while none leaves, and no entry is split.
        """
        table = self.table
        # The last token stays, seen or not: the next one's position follows from it.
        first_seen = tables.position_max(table) + 2 - max(window, 2)
        # Positions increase along a row, so the first entry is the first to leave.
        leaves = (table.num_entries > 0) & (table.position[:, 0] + table.num_tokens[:, 0] <= first_seen)

        def drop(row: BlockTable, seen: Array, n: int) -> tuple[BlockTable, Array]:
            return tables.keep(row, row.position + row.num_tokens > seen, n), jnp.bool_(True)

        return _edit(self, leaves, drop, first_seen, can_fail=False)[0]


def pages_held(window: int, step_tokens: int, page_size: int) -> int:
    """Pages that a sequence holds at most in layers with a window, after a step that adds
    ``step_tokens``: what the first of them sees, and themselves."""
    num_tokens = window - 1 + step_tokens
    return (num_tokens + page_size - 2) // page_size + 1  # the first and the last page in part


Cache = TypeVar("Cache", bound=Sequences)


def _empty(row: BlockTable, num_pages: int) -> tuple[BlockTable, Array]:
    return tables.empty_like(row, num_pages), jnp.bool_(True)


def _edit(
    cache: Cache,
    seq: Integer,
    edit: Callable[..., tuple[BlockTable, Array]],
    *arguments: Array,
    can_fail: bool = True,
) -> tuple[Cache, Array]:
    """Edits the rows of the sequences named, all of them or none, and updates reference counts.

    Args:
      cache: the state.
      seq: an id, a negative one for every sequence, or bool[S].
      edit: ``(row, *arguments, num_pages) -> (row, ok bool[])``, as the edits of ``block_table``.
      arguments: i32[], or i32[S] for one value a sequence.
      can_fail: False if ``edit`` is ok for every row.
    """
    n, s = cache.num_pages, cache.max_seqs
    seq = jnp.asarray(seq)
    marked = sequence_mask(seq, s)
    known = jnp.bool_(True) if seq.dtype == jnp.bool_ else seq < s
    each = [jnp.broadcast_to(jnp.asarray(a, jnp.int32), (s,)) for a in arguments]
    ids = jnp.nonzero(marked, size=s, fill_value=0)[0].astype(jnp.int32)
    count = jnp.sum(marked, dtype=jnp.int32)
    # Several rows are all checked before the first one is changed.
    checks = jnp.where(count > 1, count, 0) if can_fail else jnp.int32(0)

    def visit(
        i: Array, carry: tuple[PageAllocator, BlockTable, Array]
    ) -> tuple[PageAllocator, BlockTable, Array]:
        allocator, table, ok = carry
        at = ids[i % count]
        row = tables.get_row(table, at)
        edited, fitted = edit(row, *(a[at] for a in each), n)
        applies = (i >= checks) & ok & fitted
        ok &= fitted | (i >= count)
        new = tables.choose(applies, edited, row)
        allocator = _swap_pages(allocator, jnp.where(applies, row.pages, n), jnp.where(applies, new.pages, n))
        return allocator, tables.set_row(table, at, new), ok

    state = cache.allocator, cache.table, known
    allocator, table, ok = jax.lax.fori_loop(0, checks + count, visit, state)
    return replace(cache, allocator=allocator, table=table), ok


def _swap_pages(allocator: PageAllocator, old: Array, new: Array) -> PageAllocator:
    """Reference counts after entries that named ``old`` name ``new``; pages in both are never freed."""
    return pages_of.release(pages_of.retain(allocator, new), old)
