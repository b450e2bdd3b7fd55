"""Sequences between a PagedKVCache and a file: host functions, not for ``jit``.

What a file holds is a layout of rows in slots, apart from any pool. Putting it into a pool means choosing a slot for
every row: the slot it had, where pages have the size they had, or the next one behind the row before it. Either way
a row gets one slot, so that whatever was shared is shared again, in pages of any size.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpaged.cache.interface import ALL, OutOfPages
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.pages.allocator import PageAllocator
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.formats import BlockPages, PageFormat, ResidualFormat, ResidualPages
from jaxpaged.pages.residual import StagingSlots
from jaxpaged.storage.snapshot_file import Snapshot, SnapshotError, Stored, Tokens, expand, write_snapshot


def snapshot(
    cache: PagedKVCache,
    path: str | os.PathLike[str],
    *,
    seq: int = ALL,
    token_ids: Sequence[int] | Sequence[Sequence[int]],
    fingerprint: str,
) -> None:
    """Saves one sequence, or all, to a safetensors file: the rows of live tokens, and the entries that name them.

    Args:
      cache: concrete, not traced; it is only read. One that is spread over a mesh is saved by ``mesh_snapshots``.
      path: the file; one that is there is replaced, once the new one is complete.
      seq: an id, or ``ALL``.
      token_ids: a token id for each token the sequence holds, in order; for ``ALL`` one such list a sequence.
      fingerprint: any text that tells the model from others; ``read_snapshot`` has to be given the same.

    Raises:
      ValueError: an id that is not there, or as many token ids as the sequence has tokens are not given.
      ImportError: safetensors is not installed.
      OSError: the file cannot be written.
    """
    write_snapshot(path, take(cache, seq=seq, token_ids=token_ids, fingerprint=fingerprint))


def take(
    cache: PagedKVCache,
    *,
    seq: int = ALL,
    token_ids: Sequence[int] | Sequence[Sequence[int]],
    fingerprint: str,
) -> Snapshot:
    """What ``snapshot`` writes to a file.

    Raises:
      ValueError: as ``snapshot``.
    """
    if seq != ALL and not 0 <= seq < cache.max_seqs:
        raise ValueError(f"seq must be ALL or an id from 0 to {cache.max_seqs - 1}, got {seq}")
    ids = range(cache.max_seqs) if seq == ALL else (seq,)
    given: Sequence[Sequence[int]] = token_ids if seq == ALL else (token_ids,)  # type: ignore[assignment]
    if len(given) != len(ids):
        raise ValueError(f"token_ids must have one list for each of {len(ids)} sequences, got {len(given)}")
    table = jax.tree.map(np.asarray, cache.table)
    lengths = table.num_tokens.sum(axis=1)
    for i, tokens in zip(ids, given, strict=True):
        if len(tokens) != lengths[i]:
            raise ValueError(f"sequence {i} holds {lengths[i]} tokens, token_ids has {len(tokens)} for it")
    entries = np.concatenate([_entries(table, i) for i in ids])
    homes = expand(ids, entries, cache.page_size)
    page, slot = divmod(homes.home[np.unique(homes.row, return_index=True)[1]], cache.page_size)
    # Numbers of its own, so that the same sequences make the same file wherever they lie.
    pages, named, inverse = np.unique(entries[:, 1], return_index=True, return_inverse=True)
    entries[:, 1] = np.argsort(np.argsort(named))[inverse]
    pages, places = pages[np.argsort(named)], np.zeros(0, np.int32)
    if cache.staging is not None:
        places = np.asarray(cache.staging.slot_of_page)[pages]
    opened = np.flatnonzero(places < cache.max_seqs) if len(places) else np.zeros(0, np.int64)

    def stored(storage: PageFormat, layers: tuple[Any, ...]) -> tuple[Stored, ...]:
        if isinstance(storage, ResidualFormat):
            return tuple(_read_pages(one, pages, places[opened]) for one in layers)
        return _read_rows(storage, layers, page, slot)

    keys, values = stored(cache.k_format, cache.k_pages), stored(cache.v_format, cache.v_pages)
    _, num_kv_heads, head_dim = _sizes(cache)
    return Snapshot(
        fingerprint=fingerprint,
        k_format=cache.k_format,
        v_format=cache.v_format,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=cache.page_size,
        sequences=tuple(ids),
        entries=entries,
        tokens=np.asarray([token for tokens in given for token in tokens], np.int32),
        keys=keys,
        values=values,
        staging=opened.astype(np.int32),
    )


def restore(cache: PagedKVCache, saved: Snapshot, *, seq: int | None = None, p1: int = -1) -> PagedKVCache:
    """Puts the sequences of a snapshot into a cache, in the place of the sequences with their ids.

    The pool may have another number of pages, and pages of another size, unless the format seals pages. What sequences
    shared they share again. Keys keep the positions they were rotated at. Where it saves pages, rows are moved
    together; otherwise they get the slots they had, so that a cache like the one they come from always has room for
    them.

    Args:
      cache: **donated** when it succeeds, untouched when it raises. Sequences that the snapshot does not name stay.
      saved: what ``read_snapshot`` gave.
      seq: another id for the only sequence of the snapshot. As in llama.cpp, what it holds is forgotten first.
      p1: restore the tokens at positions before this one alone; negative = all of them.

    Returns:
      The cache.

    Raises:
      OutOfPages: the pool, without the sequences that are replaced, has too few pages.
      SnapshotError: pages of another format, sealed pages of another size, layers or heads of other sizes, fewer
        sequences, or a sequence of more entries than the table's rows have.
      ValueError: ``seq`` is not there, or the snapshot has several sequences for it.
    """
    place = _plan(cache, saved, seq, p1)
    layout, pages, places = place.layout, place.pages, place.places
    page, slot = divmod(layout.slot, cache.page_size)

    def written(
        storage: PageFormat, layers: tuple[Any, ...], saved_layers: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        if isinstance(storage, ResidualFormat):
            return tuple(
                _write_pages(old, new, pages, layout.sources, places)
                for old, new in zip(layers, saved_layers, strict=True)
            )
        rows = [jax.tree.map(lambda x: x[layout.rows], one) for one in saved_layers]
        return _write_rows(storage, cache.num_pages, layers, pages[page], slot, rows)

    k_pages = written(cache.k_format, cache.k_pages, saved.keys)
    v_pages = written(cache.v_format, cache.v_pages, saved.values)
    return replace(
        cache,
        allocator=place.allocator,
        table=place.table,
        k_pages=k_pages,
        v_pages=v_pages,
        staging=place.staging,
    )


def check_restore(cache: PagedKVCache, saved: Snapshot, *, seq: int | None = None, p1: int = -1) -> None:
    """Raises what ``restore`` would; changes nothing."""
    _plan(cache, saved, seq, p1)


@dataclass(frozen=True)
class _Restored:
    """Where a snapshot goes, and the tables afterwards."""

    layout: _Layout
    allocator: PageAllocator
    table: BlockTable
    staging: StagingSlots | None
    pages: np.ndarray
    """The page taken for each of the layout's."""
    places: np.ndarray
    """The place of each open page."""


def _plan(cache: PagedKVCache, saved: Snapshot, seq: int | None, p1: int) -> _Restored:
    _check_format(cache, saved)
    targets = _targets(cache, saved, seq)
    tokens = saved.expand()
    tokens = tokens if p1 < 0 else tokens[tokens.position < p1]
    layouts = []
    if not saved.sealed:
        layouts.append(_Layout.of(tokens, _packed(tokens, cache.page_size), cache.page_size))
    if cache.page_size == saved.page_size:
        layouts.insert(0, _Layout.of(tokens, tokens.home, cache.page_size))
    if not layouts:
        raise SnapshotError(
            f"the snapshot has sealed pages of {saved.page_size} tokens, which cannot be cut anew; "
            f"the cache has pages of {cache.page_size}"
        )
    layout = min(layouts, key=lambda one: (one.widest > cache.max_pages_per_seq, one.num_pages))
    if layout.widest > cache.max_pages_per_seq:
        raise SnapshotError(
            f"a sequence needs {layout.widest} table entries, max_pages_per_seq is {cache.max_pages_per_seq}"
        )
    allocator, table, pages = _place(cache, layout, targets)
    staging, places = cache.staging, np.zeros(0, np.int32)
    if staging is not None:
        staging, places = _assign_staging_slots(staging, allocator, layout, pages, saved.staging)
    return _Restored(layout, allocator, table, staging, pages, places)


def _sizes(cache: PagedKVCache) -> tuple[int, int, int]:
    """Layers, KV heads, and head_dim."""
    pages, storage = cache.k_pages[0], cache.k_format
    if isinstance(pages, BlockPages):
        return cache.num_layers, pages.shape[1], pages.head_dim
    rows = jax.eval_shape(storage.read, pages, np.zeros(1, int), np.zeros(1, int))
    return cache.num_layers, *rows.shape[1:]


def _check_format(cache: PagedKVCache, saved: Snapshot) -> None:
    def words(k: PageFormat, v: PageFormat, layers: int, heads: int, dim: int) -> str:
        stored = k.title if k.title == v.title else f"{k.title} and {v.title}"
        return f"{layers} layers of {heads} KV heads of {dim} values in {stored}"

    theirs = words(saved.k_format, saved.v_format, len(saved.keys), saved.num_kv_heads, saved.head_dim)
    ours = words(cache.k_format, cache.v_format, *_sizes(cache))
    if theirs != ours:
        raise SnapshotError(f"the snapshot has {theirs}; the cache has {ours}")


def _targets(cache: PagedKVCache, saved: Snapshot, seq: int | None) -> np.ndarray:
    """i64[len(saved.sequences)]: where each goes; S for those that are empty and have no counterpart."""
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
    """i32[entries of the sequence, 6], as ``Snapshot.entries``."""
    used = slice(int(table.num_entries[seq]))
    fields = (table.pages, table.first_slot, table.num_tokens, table.position, table.rotation)
    columns = [np.asarray(field)[seq, used] for field in fields]
    return np.stack([np.full_like(columns[0], seq), *columns], axis=1)


@dataclass(frozen=True)
class _Layout:
    """Slots for rows, and the entries that come of it. Pages are numbered from 0."""

    rows: np.ndarray
    """i64[R]: which rows of the snapshot are used."""
    slot: np.ndarray
    """i64[R]: ``page * page_size + slot`` of each."""
    sources: np.ndarray
    """i64[pages]: the page of the snapshot that each page comes from, where slots stay what they were."""
    entries: np.ndarray
    """i64[E, 6]: owner, page, first slot, tokens, position, rotation."""
    place: np.ndarray
    """i64[E]: which entry of its owner each is."""

    @property
    def num_pages(self) -> int:
        return len(self.sources)

    @property
    def widest(self) -> int:
        """Entries of the sequence that has most."""
        return int(self.place.max(initial=-1)) + 1

    @classmethod
    def of(cls, tokens: Tokens, home: np.ndarray, page_size: int) -> _Layout:
        """For tokens at slots ``home i64[T]``: each run of slots, positions and one rotation is an entry."""
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
        place = np.arange(len(owner)) - np.searchsorted(owner, owner)
        return cls(rows, at[first], used, np.stack([owner, *columns], axis=1), place)


def _packed(tokens: Tokens, page_size: int) -> np.ndarray:
    """i64[T]: slots without gaps. Each sequence's own rows, those that none before it has, begin on a fresh page."""
    rows, first, inverse = np.unique(tokens.row, return_index=True, return_inverse=True)
    order = np.argsort(first)
    owner = tokens.owner[first[order]]
    count = np.bincount(owner)
    pages = -(-count // page_size)
    start = (np.cumsum(pages) - pages) * page_size - (np.cumsum(count) - count)
    slot = np.empty(len(rows), np.int64)
    slot[order] = start[owner] + np.arange(len(rows))
    return slot[inverse]


def _place(
    cache: PagedKVCache, layout: _Layout, targets: np.ndarray
) -> tuple[PageAllocator, BlockTable, np.ndarray]:
    """Allocator and table with the layout in the place of the targets, and the page taken for each of the layout's."""
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
    pages = free[left:][::-1]  # as the allocator takes them, from the top of the stack
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
        field[seq, layout.place] = column
    table.num_entries[cleared] = np.bincount(owner, minlength=len(targets))[targets < cache.max_seqs]
    state = replace(allocator, num_free=np.int32(left)), table
    return *jax.tree.map(
        lambda new, old: jax.device_put(new, old.sharding), state, (cache.allocator, cache.table)
    ), pages


def _assign_staging_slots(
    staging: StagingSlots, allocator: PageAllocator, layout: _Layout, pages: np.ndarray, opened: np.ndarray
) -> tuple[StagingSlots, np.ndarray]:
    """Places for the open pages of a snapshot: ``(staging, i32[O] the place of each, S = not restored)``."""
    s = staging.num_slots
    # Counts hold what is restored too, whose pages were nobody's: what was open there is no longer.
    counts = np.array(allocator.ref_counts)
    counts[pages] = 0
    free = np.flatnonzero(~np.asarray(staging.in_use(jnp.asarray(counts))))
    place, page = np.array(staging.slot_of_page), np.array(staging.page_of_slot)
    place[pages] = s
    restored = np.isin(opened, layout.sources)
    places = np.full(len(opened), s, np.int32)
    places[restored] = free[: restored.sum()]
    target = pages[np.searchsorted(layout.sources, opened[restored])]
    place[target], page[places[restored]] = places[restored], target
    state = jax.tree.map(
        lambda old, new: jax.device_put(new, old.sharding),
        staging,
        StagingSlots(place, page),  # type: ignore[arg-type]
    )
    return state, places


@functools.partial(jax.jit, static_argnums=0)
def _read(storage: PageFormat, pages: Any, page: Array, slot: Array) -> Any:
    return storage.read(pages, page, slot)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _write(storage: PageFormat, pages: Any, page: Array, slot: Array, rows: Any) -> Any:
    return storage.put(pages, page, slot, rows)


@jax.jit
def _read_residual(pages: ResidualPages, page: Array, place: Array) -> dict[str, Array]:
    return {**{name: part[page] for name, part in pages.parts.items()}, "residual": pages.residual[place]}


@functools.partial(jax.jit, donate_argnums=0)
def _write_residual(
    pages: ResidualPages, stored: dict[str, Array], page: Array, place: Array
) -> ResidualPages:
    parts = {name: part.at[page].set(stored[name], mode="drop") for name, part in pages.parts.items()}
    return replace(pages, parts=parts, residual=pages.residual.at[place].set(stored["residual"], mode="drop"))


def _read_pages(pages: ResidualPages, page: np.ndarray, place: np.ndarray) -> dict[str, np.ndarray]:
    found = _read_residual(pages, _padded(page), _padded(place))
    return {
        name: np.asarray(part)[: len(place) if name == "residual" else len(page)] for name, part in found.items()
    }


def _write_pages(
    pages: ResidualPages,
    stored: dict[str, np.ndarray],
    page: np.ndarray,
    source: np.ndarray,
    place: np.ndarray,
) -> ResidualPages:
    """Page ``source[i]`` of what is stored becomes page ``page[i]``, open page j the one at ``place[j]``."""
    parts = {name: _padded(part if name == "residual" else part[source]) for name, part in stored.items()}
    num_pages = pages.shape[0]
    return _write_residual(pages, parts, _padded(page, num_pages), _padded(place, len(pages.residual)))


def _padded(array: np.ndarray, padding: int = 0) -> np.ndarray:
    """A length that is a power of two, so that few programs are compiled."""
    spare = (1 << max(len(array) - 1, 0).bit_length()) - len(array)
    return np.pad(array, [(0, spare)] + [(0, 0)] * (array.ndim - 1), constant_values=padding)


def _read_rows(
    storage: PageFormat, layers: tuple[Any, ...], page: np.ndarray, slot: np.ndarray
) -> tuple[Stored, ...]:
    index = _padded(page), _padded(slot)
    return tuple(
        jax.tree.map(lambda x: np.asarray(x)[: len(page)], _read(storage, pages, *index)) for pages in layers
    )


def _write_rows(
    storage: PageFormat,
    num_pages: int,
    layers: tuple[Any, ...],
    page: np.ndarray,
    slot: np.ndarray,
    rows: list[Stored],
) -> tuple[Any, ...]:
    index = _padded(page, num_pages), _padded(slot)
    return tuple(
        _write(storage, old, *index, jax.tree.map(_padded, new))
        for old, new in zip(layers, rows, strict=True)
    )
