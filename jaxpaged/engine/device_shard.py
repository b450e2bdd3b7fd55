"""DeviceShard: sequences and pages of one data shard of a ``Device``, by methods that take host data."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.engine import programs
from jaxpaged.engine.device import PAGES_PER_COPY, Device
from jaxpaged.engine.programs import Edit, TableState
from jaxpaged.engine.swap import SwappedPages, numbered
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
        paged = isinstance(self.cache, PagedKVCache)
        p, n = (self.cache.max_pages_per_seq, self.cache.num_pages) if paged else (0, 0)
        zeros: Any = np.zeros((self.cache.max_seqs, p), np.int32)
        empty: Any = (np.int32(n), np.zeros(len(zeros), np.int32), np.full_like(zeros, n), zeros)
        self.state = HostTable(TableState(*empty))
        """The block table as it is now."""

    def metadata(self) -> Any:
        """See ``Device.metadata``."""
        return self._device.metadata(self._index)

    def table(self) -> BlockTable:
        """The block table on the host."""
        return jax.tree.map(np.asarray, self.metadata().table)

    def _run(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        return self._device.run(name, self._index, *arguments)

    def _change(self, name: str, *arguments: Any) -> bool:
        """Runs a program that changes the block table; returns its ``ok``."""
        ok, state = self._run(name, *arguments)
        self.state = HostTable(state)
        return bool(ok)

    # Edits

    def edit(
        self, *, pinned: Sequence[int] = (), removed: Sequence[int] = (), unpinned: Sequence[int] = ()
    ) -> None:
        """Pins pages, removes sequences, unpins pages, in this order."""
        if not isinstance(self.cache, PagedKVCache):
            if removed:
                marked = np.zeros(self.cache.max_seqs, bool)
                marked[list(removed)] = True
                self._run("remove", marked)
            return
        width = self.cache.max_pages_per_seq
        for i in range(width, len(pinned), width):  # more than fit one edit
            self._edit(pinned=pinned[i : i + width])
        if pinned or removed or unpinned:
            self._edit(pinned=pinned[:width], removed=removed, unpinned=unpinned[:width])
        for i in range(width, len(unpinned), width):
            self._edit(unpinned=unpinned[i : i + width])

    def attach(self, rows: Sequence[tuple[int, Sequence[int], int]]) -> None:
        """Attaches pages to empty sequences. rows: ``(sequence, pages, tokens held)`` of each."""
        for i in range(0, len(rows), programs.ATTACHED_PER_EDIT):
            self._edit(attached=rows[i : i + programs.ATTACHED_PER_EDIT])

    def _edit(
        self,
        *,
        pinned: Sequence[int] = (),
        removed: Sequence[int] = (),
        attached: Sequence[tuple[int, Sequence[int], int]] = (),
        unpinned: Sequence[int] = (),
    ) -> None:
        given = Edit.none(self.cache)
        _put(given.pinned, pinned)
        given.removed[list(removed)] = True
        _put(given.unpinned, unpinned)
        for i, (slot, pages, count) in enumerate(attached):
            given.attached[i], given.attached_tokens[i] = slot, count
            _put(given.attached_pages[i], pages)
        ok = self._change("edit", given)
        assert ok, f"pages could not be attached to sequences {[slot for slot, _, _ in attached]}"

    def shift(self, slot: int, keep: int, discard: int) -> bool:
        """Removes tokens of a sequence after the first ``keep``; False if its row is too narrow."""
        return self._change("shift", np.int32(slot), np.int32(keep), np.int32(discard))

    # Pages to and from the host

    def swap_out(self, slot: int, num_computed: int) -> SwappedPages:
        """Copies a sequence to host memory; it also stays in the cache."""
        row, pages = numbered(jax.tree.map(lambda field: field[slot], self.table()))
        chunks = []
        for i in range(0, len(pages), PAGES_PER_COPY):
            asked = np.zeros(PAGES_PER_COPY, np.int32)
            asked[: len(pages) - i] = pages[i : i + PAGES_PER_COPY]
            (data,) = self._run("read_pages", asked)
            chunks.append(jax.tree.map(np.array, data))
        num_bytes = sum(leaf.nbytes for chunk in chunks for leaf in jax.tree.leaves(chunk))
        return SwappedPages(row, len(pages), chunks, num_computed, num_bytes)

    def swap_in(self, slot: int, swapped: SwappedPages) -> None:
        """Restores a copy made by ``swap_out`` into an empty sequence; enough pages must be free."""
        ok = self._change("allocate", np.int32(slot), swapped.row, np.int32(swapped.num_pages))
        assert ok, f"a swapped sequence of {swapped.num_pages} pages does not fit into sequence {slot}"
        numbers = np.full(swapped.num_pages, self.cache.num_pages, np.int32)
        used = int(swapped.row.num_entries)
        numbers[np.asarray(swapped.row.pages[:used])] = self.state.pages[slot, :used]
        for i, chunk in enumerate(swapped.chunks):
            asked = np.full(PAGES_PER_COPY, self.cache.num_pages, np.int32)
            _put(asked, numbers[i * PAGES_PER_COPY : (i + 1) * PAGES_PER_COPY])
            self._run("write_pages", asked, chunk)

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
        self.state = HostTable(jax.tree.map(np.asarray, programs.table_state(self.metadata())))

    def _seq_of(self, slot: int) -> int:
        """Number of a sequence in the whole cache, see ``ShardedCache``."""
        return slot * self._device.num_shards + self._index


def _put(row: Any, values: Sequence[int] | np.ndarray) -> None:
    row[: len(values)] = values
