"""BlockTable: the page entries of every sequence, and pure edits of them.

An entry is a slice of a page: tokens at positions ``position .. position + num_tokens`` of a
sequence lie in slots ``first_slot .. first_slot + num_tokens`` of one page. Removing a range thus
splits or shortens entries and moves no key or value. Reference counts are the cache's to update.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockTable:
    """Entries of each sequence in order of position; those beyond ``num_entries`` are padding.

    Padding has page N ("no page", one past the last) and zeros. A single row has fields ``[P]``.
    """

    pages: Array
    """i32[S, P]: physical page of each entry; N = no entry."""
    first_slot: Array
    """i32[S, P]: slot of the entry's first token."""
    num_tokens: Array
    """i32[S, P]: number of tokens, at least 1; 0 in padding."""
    position: Array
    """i32[S, P]: position of the entry's first token; increases along the row."""
    rotation: Array
    """i32[S, P]: rotation offset: position that keys were rotated at, minus their position."""
    num_entries: Array
    """i32[S]: number of entries."""

    @property
    def max_seqs(self) -> int:
        """S, static."""
        return self.pages.shape[0]

    @property
    def max_pages_per_seq(self) -> int:
        """P, static: maximal number of entries of a sequence."""
        return self.pages.shape[-1]

    @classmethod
    def from_page_indices(
        cls, page_indices: Array, lengths: Array, page_size: int, num_pages: int
    ) -> BlockTable:
        """Creates the table of sequences that fill their pages from the first slot on.

        That is what page tables of other libraries and kernels say: the token at position i lies in slot
        ``i % page_size`` of page ``page_indices[s, i // page_size]``, its key rotated at i.

        Args:
          page_indices: i32[S, P]; the first ``ceil(length / page_size)`` of a row count.
          lengths: i32[S], number of tokens of each sequence, at most ``P * page_size``.
          page_size: static.
          num_pages: N, static.

        Raises:
          ValueError: shapes that do not match. Values are not checked, see ``check_invariants``.
        """
        page_indices, lengths = jnp.asarray(page_indices, jnp.int32), jnp.asarray(lengths, jnp.int32)
        if page_indices.ndim != 2 or lengths.shape != page_indices.shape[:1]:
            raise ValueError(
                f"page_indices must be [S, P] and lengths [S], got shapes {page_indices.shape} and {lengths.shape}"
            )
        num_entries = -(-lengths // page_size)
        index = jnp.arange(page_indices.shape[1], dtype=jnp.int32)
        used = index < num_entries[:, None]
        none = jnp.zeros_like(page_indices)
        return cls(
            pages=jnp.where(used, page_indices, num_pages),
            first_slot=none,
            num_tokens=jnp.clip(lengths[:, None] - index * page_size, 0, page_size),
            position=jnp.where(used, index * page_size, 0),
            rotation=none,
            num_entries=num_entries,
        )

    def to_page_indices(self, page_size: int) -> tuple[Array, Array]:
        """Page indices and lengths for kernels of other libraries; undoes ``from_page_indices``.

        Such kernels read one page after the other, so no sequence may have been shifted, or changed
        elsewhere than at its end. Under ``jit`` that is not checked.

        Args:
          page_size: static.

        Returns:
          ``(page_indices i32[S, P], lengths i32[S])``. Indices behind a sequence's last page are 0:
          some kernels read them, and want a page there.

        Raises:
          ValueError: an entry is not where and what ``from_page_indices`` makes it; names the sequence.
        """
        count = lengths(self)
        plain = BlockTable.from_page_indices(self.pages, count, page_size, 0)
        used = jnp.arange(self.max_pages_per_seq, dtype=jnp.int32) < self.num_entries[:, None]
        same = self.num_entries == plain.num_entries
        for name in ("first_slot", "num_tokens", "position", "rotation"):
            same &= jnp.all(~used | (getattr(self, name) == getattr(plain, name)), axis=1)
        if not isinstance(same, jax.core.Tracer) and not same.all():
            raise ValueError(
                f"sequence {int(jnp.argmin(same))} does not fill its pages of {page_size} tokens one after the other "
                "from position 0 on, in keys as they were rotated first"
            )
        return jnp.where(used, self.pages, 0), count


def create(max_seqs: int, max_pages_per_seq: int, num_pages: int) -> BlockTable:
    """Creates a table of empty sequences.

    Raises:
      ValueError: a size is not positive.
    """
    for name, value in (
        ("max_seqs", max_seqs),
        ("max_pages_per_seq", max_pages_per_seq),
        ("num_pages", num_pages),
    ):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")

    def filled(value: int) -> Array:
        return jnp.full((max_seqs, max_pages_per_seq), value, jnp.int32)

    return BlockTable(
        filled(num_pages), filled(0), filled(0), filled(0), filled(0), jnp.zeros(max_seqs, jnp.int32)
    )


def lengths(table: BlockTable) -> Array:
    """i32[S]: number of tokens of each sequence."""
    return jnp.sum(table.num_tokens, axis=-1, dtype=jnp.int32)


def position_min(table: BlockTable) -> Array:
    """i32[S]: smallest position of each sequence; -1 when empty."""
    return jnp.where(table.num_entries > 0, table.position[..., 0], -1)


def position_max(table: BlockTable) -> Array:
    """i32[S]: largest position of each sequence; -1 when empty."""
    last = last_entry(table)
    return jnp.where(table.num_entries > 0, last.position + last.num_tokens - 1, -1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Entry:
    """One entry of each sequence; fields of ``BlockTable``, ``i32[S]`` each."""

    pages: Array
    first_slot: Array
    num_tokens: Array
    position: Array
    rotation: Array


def last_entry(table: BlockTable) -> Entry:
    """Last entry of each sequence; its first entry, which is padding, if it is empty."""
    index = jnp.maximum(table.num_entries - 1, 0)[..., None]

    def pick(field: Array) -> Array:
        # Fewer operations: this is a large part of a step's program.
        return jnp.take_along_axis(
            field, index, axis=-1, mode="promise_in_bounds", wrap_negative_indices=False
        )[..., 0]

    fields = table.pages, table.first_slot, table.num_tokens, table.position, table.rotation
    return Entry(*map(pick, fields))


def clamp_range(p0: Array | int, p1: Array | int) -> tuple[Array, Array]:
    """Range of positions as in llama.cpp, i32: p0 < 0 is 0, p1 < 0 is the end."""
    p0, p1 = jnp.asarray(p0, jnp.int32), jnp.asarray(p1, jnp.int32)
    return jnp.maximum(p0, 0), jnp.where(p1 < 0, jnp.iinfo(jnp.int32).max, p1)


def cut(row: BlockTable, at: Array) -> tuple[BlockTable, Array]:
    """Splits the entry of a row that has positions on both sides of ``at``, if there is one.

    Returns:
      ``(row, ok)``; not ok, and the row unchanged, if that takes more than P entries.
    """
    width = row.max_pages_per_seq
    index = jnp.arange(width, dtype=jnp.int32)
    inside = (row.position < at) & (at < row.position + row.num_tokens)
    split = jnp.any(inside)
    ok = ~split | (row.num_entries < width)
    k = jnp.where(split & ok, jnp.argmax(inside).astype(jnp.int32), width)
    source = jnp.where(index <= k, index, index - 1)
    left = at - row.position.at[k].get(mode="fill", fill_value=0)
    second = index == k + 1
    num_tokens = row.num_tokens[source]
    return (
        BlockTable(
            pages=row.pages[source],
            first_slot=row.first_slot[source] + jnp.where(second, left, 0),
            num_tokens=jnp.where(index == k, left, num_tokens - jnp.where(second, left, 0)),
            position=row.position[source] + jnp.where(second, left, 0),
            rotation=row.rotation[source],
            num_entries=row.num_entries + (split & ok),
        ),
        ok,
    )


def keep(row: BlockTable, kept: Array, num_pages: int) -> BlockTable:
    """The entries of a row where ``kept bool[P]`` is True, compacted."""
    kept = kept & (jnp.arange(row.max_pages_per_seq, dtype=jnp.int32) < row.num_entries)
    target = jnp.where(kept, jnp.cumsum(kept, dtype=jnp.int32) - 1, row.max_pages_per_seq)

    def compact(field: Array, padding: int) -> Array:
        return jnp.full_like(field, padding).at[target].set(field, mode="drop")

    return BlockTable(
        compact(row.pages, num_pages),
        compact(row.first_slot, 0),
        compact(row.num_tokens, 0),
        compact(row.position, 0),
        compact(row.rotation, 0),
        jnp.sum(kept, dtype=jnp.int32),
    )


def remove_range(row: BlockTable, p0: Array, p1: Array, num_pages: int) -> tuple[BlockTable, Array]:
    """Removes the tokens in [p0, p1) from a row.

    Returns:
      ``(row, ok)``; not ok, and the row unchanged, if the range lies inside one entry of a full
      row: the rest would take P + 1 entries.
    """
    within = (row.position < p0) & (p1 < row.position + row.num_tokens) & (p0 < p1)
    ok = ~jnp.any(within) | (row.num_entries < row.max_pages_per_seq)
    # Cutting at p0 and at p1 may take P + 2 entries even if the result fits, so entries are
    # shortened instead; only a range strictly inside one entry splits it, once.
    split, _ = cut(row, jnp.where(jnp.any(within) & ok, p0, 0))
    start, end = split.position, split.position + split.num_tokens
    head = jnp.clip(p0 - start, 0, split.num_tokens)  # tokens before the range
    tail = jnp.clip(end - jnp.maximum(p1, p0), 0, split.num_tokens)  # tokens behind it
    untouched = head + tail >= split.num_tokens
    from_head = untouched | (head > 0)
    num_tokens = jnp.where(untouched, split.num_tokens, jnp.where(head > 0, head, tail))
    skipped = jnp.where(from_head, 0, split.num_tokens - tail)
    return choose(ok, _shortened(split, skipped, num_tokens, num_pages), row), ok


def shift_range(
    row: BlockTable, p0: Array, p1: Array, delta: Array, num_pages: int
) -> tuple[BlockTable, Array]:
    """Adds ``delta`` to the positions in [p0, p1) of a row; the rotation of keys is kept.

    Tokens with a negative new position are removed.

    Returns:
      ``(row, ok)``; not ok, and the row unchanged, if positions would collide, change order or
      overflow, or if the result takes more than P entries.
    """
    p1 = jnp.where(delta == 0, p0, p1)  # nothing moves, so nothing is split
    # Two cuts may take P + 2 entries even if the result fits.
    wide = _widened(row, 2, num_pages)
    wide, _ = cut(wide, jnp.where(p0 < p1, p0, 0))
    wide, _ = cut(wide, jnp.where(p0 < p1, p1, 0))
    index = jnp.arange(wide.max_pages_per_seq, dtype=jnp.int32)
    moved = (index < wide.num_entries) & (wide.position >= p0) & (wide.position < p1)
    beyond = jnp.iinfo(jnp.int32).max - jnp.maximum(delta, 0)
    representable = jnp.all(~moved | (wide.position <= beyond - wide.num_tokens))
    shifted = replace(
        wide,
        position=wide.position + jnp.where(moved, delta, 0),
        rotation=wide.rotation - jnp.where(moved, delta, 0),
    )
    shifted = slice_range(shifted, *clamp_range(0, -1), num_pages)
    behind = index[1:] < shifted.num_entries
    ordered = jnp.all(~behind | (shifted.position[1:] >= (shifted.position + shifted.num_tokens)[:-1]))
    ok = representable & ordered & (shifted.num_entries <= row.max_pages_per_seq)
    narrow = jax.tree.map(lambda field: field[: row.max_pages_per_seq] if field.ndim else field, shifted)
    return choose(ok, narrow, row), ok


def _widened(row: BlockTable, by: int, num_pages: int) -> BlockTable:
    """Pads a row to ``by`` more entries."""

    def pad(field: Array, padding: int) -> Array:
        return jnp.pad(field, (0, by), constant_values=padding)

    return BlockTable(
        pad(row.pages, num_pages),
        pad(row.first_slot, 0),
        pad(row.num_tokens, 0),
        pad(row.position, 0),
        pad(row.rotation, 0),
        row.num_entries,
    )


def slice_range(row: BlockTable, p0: Array, p1: Array, num_pages: int) -> BlockTable:
    """The tokens in [p0, p1) of a row; shortens or drops entries, never splits one."""
    end = row.position + row.num_tokens
    skipped = jnp.clip(p0 - row.position, 0, row.num_tokens)
    num_tokens = jnp.clip(jnp.minimum(end, p1) - jnp.maximum(row.position, p0), 0, row.num_tokens)
    return _shortened(row, skipped, num_tokens, num_pages)


def _shortened(row: BlockTable, skipped: Array, num_tokens: Array, num_pages: int) -> BlockTable:
    """Keeps ``num_tokens i32[P]`` tokens of each entry of a row behind the first ``skipped i32[P]``."""
    shortened = replace(
        row, first_slot=row.first_slot + skipped, num_tokens=num_tokens, position=row.position + skipped
    )
    return keep(shortened, num_tokens > 0, num_pages)


def empty_like(row: BlockTable, num_pages: int) -> BlockTable:
    """A row or table of the same shape without entries."""
    zeros = jax.tree.map(jnp.zeros_like, row)
    return replace(zeros, pages=jnp.full_like(row.pages, num_pages))


def choose(mask: Array, new: BlockTable, old: BlockTable) -> BlockTable:
    """Rows of ``new`` where ``mask``, bool[S] or bool[] for all rows, is True; of ``old`` elsewhere."""

    def chosen(new: Array, old: Array) -> Array:
        return jnp.where(mask.reshape(*mask.shape, *[1] * (new.ndim - mask.ndim)), new, old)

    return jax.tree.map(chosen, new, old)


def get_row(table: BlockTable, seq: Array) -> BlockTable:
    """Row of one sequence, fields ``[P]``."""
    return jax.tree.map(lambda field: field[seq], table)


def set_row(table: BlockTable, seq: Array, row: BlockTable) -> BlockTable:
    """Replaces the row of one sequence."""
    return jax.tree.map(lambda field, value: field.at[seq].set(value), table, row)
