"""Save and restore sequences of a paged cache; host functions, not for ``jit``.

A snapshot holds rows in slots, independent of a pool. Restoring chooses a slot for each row: the
slot it had, if pages have the same size, or the next one behind the previous row. Each row gets one
slot, so that shared rows stay shared, in pages of any size.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpaged.cache.groups import GroupedKVCache, map_parts, parts_of
from jaxpaged.cache.interface import ALL, OutOfPages
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.pages.allocator import PageAllocator
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.formats import PageFormat, ResidualFormat, ResidualPages, heads_title
from jaxpaged.pages.residual import StagingSlots
from jaxpaged.storage.snapshot_file import (
    SavedGroup,
    Snapshot,
    SnapshotError,
    Stored,
    Tokens,
    expand,
    write_snapshot,
)

Paged = PagedKVCache | GroupedKVCache
Restored = TypeVar("Restored", bound=Paged)


def snapshot(
    cache: Paged,
    path: str | os.PathLike[str],
    *,
    seq: int = ALL,
    token_ids: Sequence[int] | Sequence[Sequence[int]],
    fingerprint: str,
) -> None:
    """Saves one sequence, or all, to a safetensors file: rows of live tokens, and table entries.

    Args:
      cache: concrete, not traced; it is not changed. ``mesh_snapshots`` saves caches on a mesh.
      path: the file; an existing one is replaced once the new one is complete.
      seq: an id, or ``ALL``.
      token_ids: one token id for each token of the sequence, in order, for those too that a cache
        with a window has freed; for ``ALL`` one list a sequence.
      fingerprint: any text that identifies the model; ``read_snapshot`` must be given the same.

    Raises:
      ValueError: an id outside [0, S), or a number of token ids that is not the sequence's length: in
        a cache whose every layer has a window, at least the tokens held and at most one for each
        position.
      ImportError: safetensors is not installed.
      OSError: the file cannot be written.
    """
    write_snapshot(path, take(cache, seq=seq, token_ids=token_ids, fingerprint=fingerprint))


def take(
    cache: Paged,
    *,
    seq: int = ALL,
    token_ids: Sequence[int] | Sequence[Sequence[int]],
    fingerprint: str,
) -> Snapshot:
    """Copies sequences to the host: the content of ``snapshot``'s file.

    Raises:
      ValueError: as ``snapshot``.
    """
    if seq != ALL and not 0 <= seq < cache.max_seqs:
        raise ValueError(f"seq must be ALL or an id from 0 to {cache.max_seqs - 1}, got {seq}")
    ids = range(cache.max_seqs) if seq == ALL else (seq,)
    given: Sequence[Sequence[int]] = token_ids if seq == ALL else (token_ids,)  # type: ignore[assignment]
    if len(given) != len(ids):
        raise ValueError(f"token_ids must have one list for each of {len(ids)} sequences, got {len(given)}")
    parts = parts_of(cache)
    held, end = np.asarray(parts[0].lengths), np.asarray(parts[0].seq_position_max()) + 1
    for i, tokens in zip(ids, given, strict=True):
        if not held[i] <= len(tokens) <= (held[i] if parts[0].window is None else end[i]):
            raise ValueError(f"sequence {i} holds {held[i]} tokens, token_ids has {len(tokens)} for it")
    return Snapshot(
        fingerprint=fingerprint,
        page_size=cache.page_size,
        sequences=tuple(ids),
        lengths=np.asarray([len(tokens) for tokens in given], np.int64),
        tokens=np.asarray([token for tokens in given for token in tokens], np.int32),
        groups=tuple(_take(part, layers, ids) for part, layers in zip(parts, _layers(cache), strict=True)),
    )


def _take(cache: PagedKVCache, layers_of_model: tuple[int, ...], ids: Sequence[int]) -> SavedGroup:
    """Copies sequences of one layer group."""
    table = jax.tree.map(np.asarray, cache.table)
    entries = np.concatenate([_entries(table, i) for i in ids])
    homes = expand(ids, entries, cache.page_size)
    page, slot = divmod(homes.home[np.unique(homes.row, return_index=True)[1]], cache.page_size)
    # Pages are renumbered, so that equal sequences give equal files wherever their pages are.
    pages, first, inverse = np.unique(entries[:, 1], return_index=True, return_inverse=True)
    entries[:, 1] = np.argsort(np.argsort(first))[inverse]
    pages, slots = pages[np.argsort(first)], np.zeros(0, np.int32)
    if cache.staging is not None:
        slots = np.asarray(cache.staging.slot_of_page)[pages]
    residual = np.flatnonzero(slots < cache.max_seqs) if len(slots) else np.zeros(0, np.int64)

    layers = range(cache.num_layers)

    def stored(storage: PageFormat, pool: Any) -> tuple[Stored, ...]:
        if isinstance(storage, ResidualFormat):
            s = cache.max_seqs
            return tuple(
                _read_pages(pool, layer * cache.num_pages + pages, layer * s + slots[residual])
                for layer in layers
            )
        return tuple(_read_rows(storage, pool, layer * cache.num_pages + page, slot) for layer in layers)

    keys, values = stored(cache.k_format, cache.k_pages), stored(cache.v_format, cache.v_pages)
    return SavedGroup(
        layers=layers_of_model,
        k_format=cache.k_format,
        v_format=cache.v_format,
        num_kv_heads=cache.num_kv_heads,
        head_dim=cache.head_dim,
        v_head_dim=cache.v_head_dim,
        entries=entries,
        keys=keys,
        values=values,
        residual=residual.astype(np.int32),
    )


def _layers(cache: Paged) -> list[tuple[int, ...]]:
    """Layers of the model in each group."""
    if isinstance(cache, GroupedKVCache):
        return [group.layers for group in cache.groups]
    return [tuple(range(cache.num_layers))]


def restore(cache: Restored, saved: Snapshot, *, seq: int | None = None, p1: int = -1) -> Restored:
    """Restores the sequences of a snapshot, replacing the sequences of a cache with their ids.

    The pool may have another number of pages, and pages of another size, unless the format is a
    residual one. Rows that were shared are shared again. Keys keep the positions at which they were
    rotated. Rows are packed if that saves pages; otherwise they get the slots they had, so that a
    cache with as many pages as the original always suffices. Groups with a window get what a
    ``reserve`` would leave of them.

    Args:
      cache: **donated** when it succeeds, untouched when it raises. Other sequences do not change.
      saved: result of ``read_snapshot``.
      seq: another id for the only sequence of the snapshot; as in llama.cpp, its tokens are
        replaced.
      p1: restore only tokens at positions before this one; negative = all.

    Returns:
      The cache.

    Raises:
      OutOfPages: a pool, without the replaced sequences, has too few pages.
      SnapshotError: pages of another format, pages of a residual format of another size, other
        layers or heads, too few sequences, or a sequence with more entries than a row of the table;
        layers with a window of which the snapshot lacks what the next token sees.
      ValueError: ``seq`` is outside [0, S), or the snapshot has not exactly one sequence for it.
    """
    return map_parts(_write_group, cache, _plans(cache, saved, seq, p1), saved.groups)


def _write_group(cache: PagedKVCache, plan: _Plan, saved: SavedGroup) -> PagedKVCache:
    """Writes the rows of one layer group, and replaces the metadata."""
    layout, pages = plan.layout, plan.pages
    page, slot = divmod(layout.slot, cache.page_size)

    def written(storage: PageFormat, pool: Any, saved_layers: tuple[Any, ...]) -> Any:
        for layer, one in enumerate(saved_layers):
            first = layer * cache.num_pages
            if isinstance(storage, ResidualFormat):
                slots = np.where(
                    plan.slots < cache.max_seqs, layer * cache.max_seqs + plan.slots, len(pool.residual)
                )
                pool = _write_pages(pool, one, first + pages, layout.sources, slots)
            else:
                rows = jax.tree.map(lambda x: x[layout.rows], one)
                pool = _write_rows(storage, pool, first + pages[page], slot, rows)
        return pool

    k_pages = written(cache.k_format, cache.k_pages, saved.keys)
    v_pages = written(cache.v_format, cache.v_pages, saved.values)
    return replace(
        cache,
        allocator=plan.allocator,
        table=plan.table,
        k_pages=k_pages,
        v_pages=v_pages,
        staging=plan.staging,
    )


def check_restore(cache: Paged, saved: Snapshot, *, seq: int | None = None, p1: int = -1) -> None:
    """Raises the errors of ``restore``, without changes."""
    _plans(cache, saved, seq, p1)


@dataclass(frozen=True)
class _Plan:
    """Target of a group of a snapshot in its pool, and the metadata afterwards."""

    layout: _Layout
    allocator: PageAllocator
    table: BlockTable
    staging: StagingSlots | None
    pages: np.ndarray
    """Page allocated for each page of the layout."""
    slots: np.ndarray
    """Staging slot of each residual page; S = not restored."""


def _plans(cache: Paged, saved: Snapshot, seq: int | None, p1: int) -> list[_Plan]:
    """Plans of all groups: what cannot be restored raises here, before anything is written."""
    _check_format(cache, saved)
    targets, parts = _targets(cache, saved, seq), parts_of(cache)
    each = zip(parts, saved.groups, _tokens_to_restore(parts, saved, p1), strict=True)
    return [_plan(part, group, saved.page_size, targets, tokens) for part, group, tokens in each]


def _tokens_to_restore(parts: Sequence[PagedKVCache], saved: Snapshot, p1: int) -> list[Tokens]:
    """Tokens of each group before ``p1``, without entries that no next token sees.

    Raises:
      SnapshotError: one that the next token sees is missing.
    """
    every = [saved.expand(g) for g in range(len(parts))]
    before = [tokens if p1 < 0 else tokens[tokens.position < p1] for tokens in every]
    count = len(saved.sequences)
    end, start = np.zeros(count, np.int64), np.zeros(count, np.int64)
    np.maximum.at(end, before[0].owner, before[0].position + 1)
    owners, first = np.unique(every[0].owner, return_index=True)
    start[owners] = every[0].position[first]
    held = saved.groups[0].held(saved.sequences)
    cut = np.bincount(before[0].owner, minlength=count) < held

    kept = []
    for g, (part, group) in enumerate(zip(parts, saved.groups, strict=True)):
        window = np.iinfo(np.int64).max if part.window is None else max(part.window, 2)
        begin = np.maximum(end + 1 - window, 0)

        def seen(tokens: Tokens, begin: np.ndarray = begin) -> np.ndarray:
            return np.bincount(tokens.owner[tokens.position >= begin[tokens.owner]], minlength=count)

        lacks = seen(before[g]) != seen(before[0])
        if g == 0 and p1 != 0:  # nothing else tells what it had before its first token
            lacks = (start > begin) & ((saved.lengths > held) | (cut & (part.window is not None)))
        if lacks.any():
            i = int(np.argmax(lacks))
            layers = ", ".join(map(str, group.layers))
            raise SnapshotError(
                f"a token at position {end[i] if g else max(p1, end[i])} of sequence {saved.sequences[i]} sees "
                f"others from position {begin[i]} on, of which the snapshot lacks some in layers {layers}"
            )
        position, num_tokens = group.entries[:, 4].astype(np.int64), group.entries[:, 3]
        entry_end = np.repeat(position + num_tokens, num_tokens)
        sees = entry_end > begin[every[g].owner]
        kept.append(every[g][sees & ((p1 < 0) | (every[g].position < p1))])
    return kept


def _plan(
    cache: PagedKVCache, saved: SavedGroup, page_size: int, targets: np.ndarray, tokens: Tokens
) -> _Plan:
    """Plans one group. page_size: that of the snapshot."""
    layouts = []
    if not saved.has_residual:
        layouts.append(_Layout.of(tokens, _packed(tokens, cache.page_size), cache.page_size))
    if cache.page_size == page_size:
        layouts.insert(0, _Layout.of(tokens, tokens.home, cache.page_size))
    if not layouts:
        raise SnapshotError(
            f"the snapshot has quantized pages of {page_size} tokens, which cannot change their size; "
            f"the cache has pages of {cache.page_size}"
        )
    layout = min(layouts, key=lambda one: (one.widest > cache.max_pages_per_seq, one.num_pages))
    if layout.widest > cache.max_pages_per_seq:
        raise SnapshotError(
            f"a sequence needs {layout.widest} table entries, max_pages_per_seq is {cache.max_pages_per_seq}"
        )
    allocator, table, pages = _allocate(cache, layout, targets)
    staging, slots = cache.staging, np.zeros(0, np.int32)
    if staging is not None:
        staging, slots = _assign_staging_slots(staging, allocator, layout, pages, saved.residual)
    return _Plan(layout, allocator, table, staging, pages, slots)


def _check_format(cache: Paged, saved: Snapshot) -> None:
    def words(one: SavedGroup | PagedKVCache, layers: int) -> str:
        k, v = one.k_format.title, one.v_format.title
        heads = heads_title(one.num_kv_heads, one.head_dim, one.v_head_dim)
        return f"{layers} layers of {heads} values in {k if k == v else f'{k} and {v}'}"

    theirs = [words(one, len(one.keys)) for one in saved.groups]
    ours = [words(part, part.num_layers) for part in parts_of(cache)]
    if theirs != ours:
        raise SnapshotError(f"the snapshot has {'; '.join(theirs)}; the cache has {'; '.join(ours)}")
    for group, layers in zip(saved.groups, _layers(cache), strict=True):
        if group.layers != layers:
            raise SnapshotError(f"the snapshot has a group of layers {group.layers}, the cache of {layers}")


def _targets(cache: Paged, saved: Snapshot, seq: int | None) -> np.ndarray:
    """i64[len(saved.sequences)]: id of each in the cache; S for empty ones beyond it."""
    s = cache.max_seqs
    if seq is None:
        targets = np.asarray(saved.sequences)
        if (missing := targets[(saved.lengths > 0) & (targets >= s)]).size:
            raise SnapshotError(f"the snapshot has a sequence {missing[0]}, the cache {s} (max_seqs)")
        return np.minimum(targets, s)
    if not 0 <= seq < s:
        raise ValueError(f"seq must be an id from 0 to {s - 1}, got {seq}")
    if len(saved.sequences) != 1:
        raise ValueError(f"seq is for a snapshot of one sequence; this one has {len(saved.sequences)}")
    return np.asarray([seq])


def _entries(table: BlockTable, seq: int) -> np.ndarray:
    """i32[entries of the sequence, 6], see ``SavedGroup.entries``."""
    used = slice(int(table.num_entries[seq]))
    fields = (table.pages, table.first_slot, table.num_tokens, table.position, table.rotation)
    columns = [np.asarray(field)[seq, used] for field in fields]
    return np.stack([np.full_like(columns[0], seq), *columns], axis=1)


@dataclass(frozen=True)
class _Layout:
    """Slots of rows, and the resulting entries. Pages are numbered from 0."""

    rows: np.ndarray
    """i64[R]: rows of the snapshot that are used."""
    slot: np.ndarray
    """i64[R]: ``page * page_size + slot`` of each."""
    sources: np.ndarray
    """i64[pages]: page of the snapshot for each page, if rows keep their slots."""
    entries: np.ndarray
    """i64[E, 6]: owner, page, first slot, tokens, position, rotation."""
    index: np.ndarray
    """i64[E]: index among the entries of its owner."""

    @property
    def num_pages(self) -> int:
        return len(self.sources)

    @property
    def widest(self) -> int:
        """Largest number of entries of a sequence."""
        return int(self.index.max(initial=-1)) + 1

    @classmethod
    def of(cls, tokens: Tokens, home: np.ndarray, page_size: int) -> _Layout:
        """Layout for slots ``home i64[T]``: a run of slots and positions with one rotation is an
        entry."""
        used, dense = np.unique(home // page_size, return_inverse=True)
        at = dense * page_size + home % page_size
        page = at // page_size
        joined = np.ones(max(len(at) - 1, 0), bool)
        for field, step in (
            (tokens.owner, 0), (page, 0), (at, 1), (tokens.position, 1), (tokens.rotation, 0)
        ):  # fmt: skip
            joined &= np.diff(field) == step
        starts = np.flatnonzero(np.concatenate([np.ones(min(len(at), 1), bool), ~joined]))
        count = np.diff(starts, append=len(at))
        owner = tokens.owner[starts]
        columns = (
            page[starts],
            at[starts] % page_size,
            count,
            tokens.position[starts],
            tokens.rotation[starts],
        )
        rows, first = np.unique(tokens.row, return_index=True)
        index = np.arange(len(owner)) - np.searchsorted(owner, owner)
        return cls(rows, at[first], used, np.stack([owner, *columns], axis=1), index)


def _packed(tokens: Tokens, page_size: int) -> np.ndarray:
    """i64[T]: slots without gaps. Rows that a sequence does not share with earlier ones begin on a
    new page."""
    rows, first, inverse = np.unique(tokens.row, return_index=True, return_inverse=True)
    order = np.argsort(first)
    owner = tokens.owner[first[order]]
    count = np.bincount(owner)
    pages = -(-count // page_size)
    start = (np.cumsum(pages) - pages) * page_size - (np.cumsum(count) - count)
    slot = np.empty(len(rows), np.int64)
    slot[order] = start[owner] + np.arange(len(rows))
    return slot[inverse]


def _allocate(
    cache: PagedKVCache, layout: _Layout, targets: np.ndarray
) -> tuple[PageAllocator, BlockTable, np.ndarray]:
    """Allocator and table with the layout as the target sequences, and the page for each of the
    layout's."""
    allocator, table = jax.tree.map(np.array, (cache.allocator, cache.table))
    cleared = targets[targets < cache.max_seqs]
    counts = allocator.ref_counts
    released = table.pages[cleared]
    released = released[released < cache.num_pages]
    np.subtract.at(counts, released, 1)
    emptied = np.unique(released[counts[released] == 0])
    free = np.concatenate([allocator.free_pages[: allocator.num_free], emptied])
    left = len(free) - layout.num_pages
    if left < 0:
        raise OutOfPages(layout.num_pages, len(free))
    pages = free[left:][::-1]  # from the top of the stack, as the allocator does
    owner, page, first, count, position, rotation = layout.entries.T
    np.add.at(counts, pages[page], 1)
    allocator.free_pages[:left] = free[:left]
    for field, padding in (
        (table.pages, cache.num_pages), (table.first_slot, 0), (table.num_tokens, 0), (table.position, 0),
        (table.rotation, 0),
    ):  # fmt: skip
        field[cleared] = padding
    seq = targets[owner]
    for field, column in (
        (table.pages, pages[page]), (table.first_slot, first), (table.num_tokens, count),
        (table.position, position), (table.rotation, rotation),
    ):  # fmt: skip
        field[seq, layout.index] = column
    table.num_entries[cleared] = np.bincount(owner, minlength=len(targets))[targets < cache.max_seqs]
    state = replace(allocator, num_free=np.int32(left)), table
    return *jax.tree.map(
        lambda new, old: jax.device_put(new, old.sharding), state, (cache.allocator, cache.table)
    ), pages


def _assign_staging_slots(
    staging: StagingSlots, allocator: PageAllocator, layout: _Layout, pages: np.ndarray, residual: np.ndarray
) -> tuple[StagingSlots, np.ndarray]:
    """Assigns slots to the residual pages of a snapshot: ``(staging, i32[O] slot of each, S = not
    restored)``."""
    s = staging.num_slots
    # Counts include the restored pages, which were free: their former slots are not in use.
    counts = np.array(allocator.ref_counts)
    counts[pages] = 0
    free = np.flatnonzero(~np.asarray(staging.in_use(jnp.asarray(counts))))
    slot_of_page, page_of_slot = np.array(staging.slot_of_page), np.array(staging.page_of_slot)
    slot_of_page[pages] = s
    restored = np.isin(residual, layout.sources)
    slots = np.full(len(residual), s, np.int32)
    slots[restored] = free[: restored.sum()]
    target = pages[np.searchsorted(layout.sources, residual[restored])]
    slot_of_page[target], page_of_slot[slots[restored]] = slots[restored], target
    state = jax.tree.map(
        lambda old, new: jax.device_put(new, old.sharding),
        staging,
        StagingSlots(slot_of_page, page_of_slot),  # type: ignore[arg-type]
    )
    return state, slots


@functools.partial(jax.jit, static_argnums=0)
def _read(storage: PageFormat, pages: Any, page: Array, slot: Array) -> Any:
    return storage.read(pages, page, slot)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _write(storage: PageFormat, pages: Any, page: Array, slot: Array, rows: Any) -> Any:
    return storage.put(pages, page, slot, rows)


@jax.jit
def _read_residual(pages: ResidualPages, page: Array, slot: Array) -> dict[str, Array]:
    return {**{name: part[page] for name, part in pages.parts.items()}, "residual": pages.residual[slot]}


@functools.partial(jax.jit, donate_argnums=0)
def _write_residual(
    pages: ResidualPages, stored: dict[str, Array], page: Array, slot: Array
) -> ResidualPages:
    parts = {name: part.at[page].set(stored[name], mode="drop") for name, part in pages.parts.items()}
    return replace(pages, parts=parts, residual=pages.residual.at[slot].set(stored["residual"], mode="drop"))


def _read_pages(pages: ResidualPages, page: np.ndarray, slot: np.ndarray) -> dict[str, np.ndarray]:
    """Pages ``page``, and residual pages at the staging slots ``slot``."""
    found = _read_residual(pages, _padded(page), _padded(slot))
    return {
        name: np.asarray(part)[: len(slot) if name == "residual" else len(page)]
        for name, part in found.items()
    }


def _write_pages(
    pages: ResidualPages,
    stored: dict[str, np.ndarray],
    page: np.ndarray,
    source: np.ndarray,
    slot: np.ndarray,
) -> ResidualPages:
    """Writes stored page ``source[i]`` to page ``page[i]``, and residual page j to staging slot
    ``slot[j]``."""
    parts = {name: _padded(part if name == "residual" else part[source]) for name, part in stored.items()}
    num_pages = pages.shape[0]
    return _write_residual(pages, parts, _padded(page, num_pages), _padded(slot, len(pages.residual)))


def _padded(array: np.ndarray, padding: int = 0) -> np.ndarray:
    """Pads to a power of two, so that few programs are compiled."""
    spare = (1 << max(len(array) - 1, 0).bit_length()) - len(array)
    return np.pad(array, [(0, spare)] + [(0, 0)] * (array.ndim - 1), constant_values=padding)


def _read_rows(storage: PageFormat, pool: Any, page: np.ndarray, slot: np.ndarray) -> Stored:
    read: Stored = jax.tree.map(
        lambda x: np.asarray(x)[: len(page)], _read(storage, pool, _padded(page), _padded(slot))
    )
    return read


def _write_rows(storage: PageFormat, pool: Any, page: np.ndarray, slot: np.ndarray, rows: Stored) -> Any:
    index = _padded(page, pool.shape[0]), _padded(slot)
    return _write(storage, pool, *index, jax.tree.map(_padded, rows))
