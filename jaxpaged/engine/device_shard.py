"""DeviceShard: sequences and pages of one data shard of a ``Device``, by methods that take host data."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpaged.cache.groups import parts_of
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.engine import programs
from jaxpaged.engine.device import PAGES_PER_COPY, Device
from jaxpaged.engine.programs import Edit, TableState
from jaxpaged.engine.swap import SwappedPages, SwappedSequence, numbered
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.storage import mesh_snapshots, snapshots
from jaxpaged.storage.snapshot_file import Snapshot


class HostTable:
    """``TableState`` on the host; each field is fetched at its first use."""

    def __init__(self, state: TableState) -> None:
        self._state = state

    @functools.cached_property
    def num_free(self) -> int:
        return int(self._state.num_free)

    @functools.cached_property
    def free_slots(self) -> np.ndarray:
        return np.asarray(self._state.free_slots)

    @functools.cached_property
    def pages(self) -> np.ndarray:
        return np.asarray(self._state.pages)

    @functools.cached_property
    def page_tokens(self) -> np.ndarray:
        return np.asarray(self._state.page_tokens)

    @functools.cached_property
    def first_page(self) -> np.ndarray:
        return np.asarray(self._state.first_page)


PagesOfGroups = Sequence[Sequence[int]]
"""Pages of each layer group; empty = none of any."""


class Attachment(NamedTuple):
    """Pages that an empty sequence attaches."""

    slot: int
    pages: PagesOfGroups
    first: Sequence[int]
    """Pages of the text before the first one attached, in each layer group."""
    num_tokens: int
    """Tokens of the text, up to the end of its last page attached."""


class DeviceShard:
    """Data shard ``index`` of a device, with a pool and S sequences of its own; the only one where
    there is no mesh."""

    def __init__(self, device: Device, index: int) -> None:
        self._device, self._index = device, index
        self.cache = device.local
        """Cache of one device, with shapes in place of arrays."""
        self.slots = device.slots[index]
        self.swaps = device.swaps
        self.first_slot = index * self.cache.max_seqs
        """Number of its first sequence among the slots of an engine."""
        self.parts = device.parts
        """The cache of each layer group, with shapes in place of arrays; none without pages."""
        self.tables: tuple[HostTable, ...]
        """The block table of each layer group as it is now."""
        self.update(tuple(_empty(self.cache.max_seqs, part) for part in self.parts or (None,)))

    def update(self, states: Sequence[TableState]) -> None:
        """Takes over the ``table_state`` that a program returned."""
        self.tables = tuple(map(HostTable, states))

    @property
    def state(self) -> HostTable:
        """The block table of the group that sees furthest."""
        return self.tables[0]

    def page(self, group: int, slot: int, index: int) -> int | None:
        """Page ``index`` of a sequence's text in a layer group; None if its window has left it."""
        table = self.tables[group]
        at = index - (int(table.first_page[slot]) if group else 0)
        return int(table.pages[slot, at]) if at >= 0 else None

    def metadata(self) -> Any:
        """See ``Device.metadata``."""
        return self._device.metadata(self._index)

    def block_tables(self) -> list[BlockTable]:
        """The whole block table of each layer group on the host."""
        return [jax.tree.map(np.asarray, part.table) for part in parts_of(self.metadata())]

    def _run(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        return self._device.run(name, self._index, *arguments)

    def _change(self, name: str, *arguments: Any) -> bool:
        """Runs a program that changes the block table; returns its ``ok``."""
        ok, states = self._run(name, *arguments)
        self.update(states)
        return bool(ok)

    # Edits

    def edit(
        self, *, pinned: PagesOfGroups = (), removed: Sequence[int] = (), unpinned: PagesOfGroups = ()
    ) -> None:
        """Pins pages of each layer group, removes sequences, unpins pages, in this order."""
        if not self.parts:
            if removed:
                marked = np.zeros(self.cache.max_seqs, bool)
                marked[list(removed)] = True
                self._run("remove", marked)
            return
        first, *pins = self._pieces(pinned)
        unpins = self._pieces(unpinned)
        for more in pins:
            self._edit(pinned=more)
        if any(first) or removed or any(unpins[0]):
            self._edit(pinned=first, removed=removed, unpinned=unpins[0])
        for more in unpins[1:]:
            self._edit(unpinned=more)

    def _pieces(self, pages: PagesOfGroups) -> list[list[Sequence[int]]]:
        """Pages in as many parts as fit one edit each, at least one."""
        widths = [part.max_pages_per_seq for part in self.parts]
        given = pages or [()] * len(widths)
        count = max(1, *(-(-len(own) // width) for own, width in zip(given, widths, strict=True)))
        return [
            [own[i * width : (i + 1) * width] for own, width in zip(given, widths, strict=True)]
            for i in range(count)
        ]

    def attach(self, rows: Sequence[Attachment]) -> None:
        """Attaches pages to empty sequences."""
        for i in range(0, len(rows), programs.ATTACHED_PER_EDIT):
            self._edit(attached=rows[i : i + programs.ATTACHED_PER_EDIT])

    def _edit(
        self,
        *,
        pinned: PagesOfGroups = (),
        removed: Sequence[int] = (),
        attached: Sequence[Attachment] = (),
        unpinned: PagesOfGroups = (),
    ) -> None:
        given = tuple(map(Edit.none, self.parts))
        for g, edit in enumerate(given):
            _put(edit.pinned, pinned[g] if pinned else ())
            edit.removed[list(removed)] = True
            _put(edit.unpinned, unpinned[g] if unpinned else ())
            for i, one in enumerate(attached):
                edit.attached[i], edit.attached_tokens[i] = one.slot, one.num_tokens
                edit.attached_first[i] = one.first[g]
                _put(edit.attached_pages[i], one.pages[g])
        ok = self._change("edit", given)
        assert ok, f"pages could not be attached to sequences {[one.slot for one in attached]}"

    def shift(self, slot: int, keep: int, discard: int) -> bool:
        """Removes tokens of a sequence after the first ``keep``; False if its row is too narrow."""
        return self._change("shift", np.int32(slot), np.int32(keep), np.int32(discard))

    # Pages to and from the host

    def swap_out(self, slot: int, num_computed: int) -> SwappedSequence:
        """Copies a sequence to host memory; it also stays in the cache."""
        tables = self.block_tables()
        groups = [self._read(g, jax.tree.map(lambda x: x[slot], table)) for g, table in enumerate(tables)]
        return SwappedSequence(tuple(groups), num_computed)

    def _read(self, group: int, row: BlockTable) -> SwappedPages:
        row, pages = numbered(row)
        chunks = []
        for i in range(0, len(pages), PAGES_PER_COPY):
            asked = np.zeros(PAGES_PER_COPY, np.int32)
            asked[: len(pages) - i] = pages[i : i + PAGES_PER_COPY]
            (data,) = self._run(f"read_pages {group}", asked)
            chunks.append(jax.tree.map(np.array, data))
        return SwappedPages(row, len(pages), chunks)

    def swap_in(self, slot: int, swapped: SwappedSequence) -> None:
        """Restores a copy made by ``swap_out`` into an empty sequence; enough pages must be free."""
        for g, own in enumerate(swapped.groups):
            ok = self._change(f"allocate {g}", np.int32(slot), own.row, np.int32(own.num_pages))
            assert ok, f"a swapped sequence of {own.num_pages} pages does not fit into sequence {slot}"
            none = self.parts[g].num_pages
            numbers = np.full(own.num_pages, none, np.int32)
            used = int(own.row.num_entries)
            numbers[np.asarray(own.row.pages[:used])] = self.tables[g].pages[slot, :used]
            for i, chunk in enumerate(own.chunks):
                asked = np.full(PAGES_PER_COPY, none, np.int32)
                _put(asked, numbers[i * PAGES_PER_COPY : (i + 1) * PAGES_PER_COPY])
                self._run(f"write_pages {g}", asked, chunk)

    # Files

    def snapshot(
        self, path: str | os.PathLike[str], slot: int, token_ids: Sequence[int], fingerprint: str
    ) -> None:
        """Writes a sequence to a file."""
        write: Any = snapshots.snapshot if self._device.mesh is None else mesh_snapshots.snapshot
        seq = self._seq_of(slot)
        write(self._device.cache, path, seq=seq, token_ids=token_ids, fingerprint=fingerprint)

    def restore(self, saved: Snapshot, slot: int) -> None:
        """Fills an empty sequence from a file; unchanged if it raises."""
        restore: Any = snapshots.restore if self._device.mesh is None else mesh_snapshots.restore
        self._device.cache = restore(self._device.cache, saved, seq=self._seq_of(slot))
        self.update(jax.tree.map(np.asarray, programs.table_state(self.metadata())))

    def _seq_of(self, slot: int) -> int:
        """Number of a sequence in the whole cache, see ``ShardedCache``."""
        return slot * self._device.num_shards + self._index


def _empty(max_seqs: int, part: PagedKVCache | None) -> TableState:
    """State of a layer group without tokens; of a cache without pages if ``part`` is None."""
    p, n = (0, 0) if part is None else (part.max_pages_per_seq, part.num_pages)
    zeros: Any = np.zeros((max_seqs, p), np.int32)
    none: Any = np.zeros(max_seqs, np.int32)
    num_free: Any = np.int32(n)
    return TableState(num_free, none, np.full_like(zeros, n), zeros, none)


def _put(row: Any, values: Sequence[int] | np.ndarray) -> None:
    row[: len(values)] = values
