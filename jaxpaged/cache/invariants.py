"""Invariants of a cache after every operation, checked on the host."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from jaxpaged.cache.contiguous import ContiguousKVCache
from jaxpaged.cache.groups import GroupedKVCache
from jaxpaged.cache.sequences import Sequences
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.residual import StagingSlots


class InvariantError(AssertionError):
    """A cache is in a state that no operations reach; the message names the page or sequence."""


def check_invariants(
    cache: Sequences | GroupedKVCache | ContiguousKVCache,
    pins: np.ndarray | Sequence[np.ndarray] | None = None,
) -> None:
    """Checks a cache's metadata for consistency; reads it back from the device, never the pages.

    Args:
      cache: concrete, not traced.
      pins: i32[N], references to each page from outside the table, or one array for each layer group;
        None = no pins.

    Raises:
      InvariantError: the first invariant violated; in a cache of several layer groups also that groups
        hold different tokens, except for those that no next token sees.
    """
    if isinstance(cache, GroupedKVCache):
        each = [None] * len(cache.parts) if pins is None else list(pins)
        first = cache.parts[0]
        for group, part, own in zip(cache.groups, cache.parts, each, strict=True):
            try:
                check_invariants(part, own)
                _check_positions(first, part)
            except InvariantError as error:
                raise InvariantError(f"group of {group.title}: {error}") from error
        return
    if isinstance(cache, ContiguousKVCache):
        lengths = np.asarray(cache.lengths)
        if (lengths < 0).any() or (lengths > cache.max_length).any():
            raise InvariantError(f"lengths outside [0, {cache.max_length}]: {lengths}")
        return
    allocator, table, staging, ps = jax.tree.map(np.asarray, cache.metadata)
    n = cache.num_pages
    if (table.num_entries < 0).any() or (table.num_entries > cache.max_pages_per_seq).any():
        raise InvariantError(f"num_entries outside [0, {cache.max_pages_per_seq}]: {table.num_entries}")
    counts = np.zeros(n, np.int64) if pins is None else np.asarray(pins, np.int64).copy()
    for seq in range(cache.max_seqs):
        used = int(table.num_entries[seq])
        pages = table.pages[seq, :used]
        first, num, position = (
            table.first_slot[seq, :used],
            table.num_tokens[seq, :used],
            table.position[seq, :used],
        )
        if (table.pages[seq, used:] != n).any() or table.num_tokens[seq, used:].any():
            raise InvariantError(f"sequence {seq}: an entry behind num_entries = {used} is not empty")
        if ((pages < 0) | (pages >= n)).any():
            raise InvariantError(f"sequence {seq}: a page outside [0, {n}): {pages}")
        if (num < 1).any() or (first < 0).any() or (first + num > ps).any():
            raise InvariantError(
                f"sequence {seq}: an entry outside its page of {ps}: first {first}, tokens {num}"
            )
        if used and position[0] < 0:
            raise InvariantError(f"sequence {seq}: negative position {position[0]}")
        if (position[1:] < position[:-1] + num[:-1]).any():
            raise InvariantError(f"sequence {seq}: positions out of order: {position}, tokens {num}")
        np.add.at(counts, pages, 1)
    wrong = np.flatnonzero(counts != allocator.ref_counts)
    if wrong.size:
        page = wrong[0]
        raise InvariantError(
            f"page {page}: reference count {allocator.ref_counts[page]}, but {counts[page]} entries point at it"
        )
    free = allocator.free_pages[: int(allocator.num_free)]
    if not 0 <= allocator.num_free <= n or len(set(free.tolist())) != len(free):
        raise InvariantError(
            f"the free stack holds a page twice, or has an impossible size {allocator.num_free}"
        )
    expected = np.flatnonzero(counts == 0)
    if set(free.tolist()) != set(expected.tolist()):
        raise InvariantError(
            f"the free stack holds {len(free)} pages, {len(expected)} have reference count 0"
        )
    if staging is not None:
        _check_staging(staging, allocator.ref_counts, table)


def _check_positions(first: Sequences, part: Sequences) -> None:
    """Checks that a group holds no token that the first one, which sees furthest, lacks, and every one that
    a next token sees."""
    ours, theirs = (jax.tree.map(np.asarray, one.table) for one in (part, first))
    for seq in range(first.max_seqs):
        held, all_held = _positions(ours, seq), _positions(theirs, seq)
        begin = int(all_held.max(initial=-1)) + 2 - part.window if part.window is not None else 0
        # The first group may have freed more than this one, if it has a window, too.
        low = all_held[0] if first.window is not None and all_held.size else 0
        if (extra := np.setdiff1d(held[held >= low], all_held)).size:
            raise InvariantError(
                f"sequence {seq}: position {extra[0]} is not in the group that sees furthest"
            )
        if (lacking := np.setdiff1d(all_held[all_held >= begin], held)).size:
            raise InvariantError(
                f"sequence {seq}: position {lacking[0]}, which the next token sees, is missing"
            )


def _positions(table: BlockTable, seq: int) -> np.ndarray:
    """i64: positions of a sequence's tokens."""
    starts = zip(table.position[seq], table.num_tokens[seq], strict=True)
    return np.concatenate([np.arange(start, start + count) for start, count in starts])


def _check_staging(staging: StagingSlots, counts: np.ndarray, table: BlockTable) -> None:
    slots = staging.num_slots
    live = np.flatnonzero((counts > 0) & (staging.slot_of_page < slots))
    for page in live:
        if staging.page_of_slot[staging.slot_of_page[page]] != page:
            raise InvariantError(f"page {page}: staging slot {staging.slot_of_page[page]} holds another page")
    for seq, used in enumerate(table.num_entries):
        pages = table.pages[seq, :used]
        if left := set(pages[np.isin(pages, live)].tolist()) - set(pages[-1:].tolist()):
            raise InvariantError(f"sequence {seq}: pages {sorted(left)} are residual, but not its last one")
