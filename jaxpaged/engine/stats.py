"""Statistics of an engine: counters, the state of each page of the pool, the state of each slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxpaged.cache.contiguous import ContiguousKVCache
from jaxpaged.cache.groups import GroupedKVCache
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.engine.device import Device
from jaxpaged.engine.device_shard import HostTable
from jaxpaged.engine.pool import PagedPool
from jaxpaged.engine.request import EngineRequest, EngineStats, GroupStats
from jaxpaged.engine.sample_state import SampleState
from jaxpaged.engine.shard import EngineShard, StepCounts

FREE, USED, SHARED, CACHED = 0, 1, 2, 3
"""States of a page: free; held by one sequence; by several; by the prefix cache alone."""


@dataclass(frozen=True)
class PoolState:
    """The state of each page between two steps; pools of layer groups follow each other."""

    num_pages: int
    page_size: int
    state: np.ndarray
    """u8[N]: FREE, USED, SHARED or CACHED."""
    owner: np.ndarray
    """i32[N]: first slot that holds the page; -1 = none."""
    sequences: list[dict[str, Any]]
    """``slot``, ``request_id``, ``tokens``, ``state`` ("prefill", "decode") of the running ones."""


@dataclass(frozen=True)
class SlotState:
    """The state of a slot: a sequence of the cache, and the last sample that ran in it."""

    id: int
    request_id: str | None
    """None if the slot was never used."""
    is_processing: bool
    num_prompt: int
    num_computed: int
    num_generated: int
    n_ctx: int
    params: EngineRequest | None


@dataclass(frozen=True)
class PoolUse:
    """Pages and tokens that running sequences hold."""

    used: int
    live: int
    """Tokens; those in shared pages count once."""


class Monitor:
    """Collects statistics from the data shards of an engine; changes nothing."""

    def __init__(self, device: Device, shards: Sequence[EngineShard]) -> None:
        self._device, self._shards = device, shards
        self._use: dict[tuple[EngineShard, int], tuple[HostTable, PoolUse]] = {}

    def stats(self, steps: StepCounts) -> EngineStats:
        """Gauges and counters as they are now."""
        cache, shards = self._device.local, self._shards
        running = [sample for shard in shards for sample in shard.scheduler.running]
        waiting = [sample for shard in shards for sample in shard.scheduler.waiting]
        pools = [shard.pool for shard in shards]
        page_size = page_size_of(cache)
        if self._device.parts:
            pairs = [self._group(g) for g in range(len(self._device.parts))]
        else:
            use = PoolUse(len(running), sum(sample.num_computed for sample in running))
            total = cache.max_seqs * len(shards)
            pairs = [(use, GroupStats(cache.num_layers, None, total, use.used, 0, total - use.used, 0))]
        groups = tuple(group for _, group in pairs)
        sums = {
            name: sum(getattr(group, name) for group in groups)
            for name in ("pages_total", "pages_used", "pages_cached", "pages_free")
        }
        num_bytes = sum(group.pages_total * group.bytes_per_page for group in groups)
        slots_used = sums["pages_used"] * page_size
        return EngineStats(
            running=len(running),
            waiting=len(waiting),
            swapped=sum(sample.swapped is not None for sample in waiting),
            **sums,
            page_size=page_size,
            tokens_live=pairs[0][0].live,
            waste=1 - sum(use.live for use, _ in pairs) / slots_used if slots_used else 0.0,
            bytes_per_page=num_bytes // sums["pages_total"]
            if self._device.parts
            else _bytes_per_row(cache) * self._device.devices_per_shard,
            groups=groups,
            evictions=sum(pool.index.evictions for pool in pools if isinstance(pool, PagedPool)),
            compiled=self._device.compiled,
            **{name: sum(vars(pool.counts)[name] for pool in pools) for name in vars(pools[0].counts)},
            **vars(steps),
        )

    def _group(self, group: int) -> tuple[PoolUse, GroupStats]:
        """Use and statistics of a layer group in all shards."""
        part, shards = self._device.parts[group], self._shards
        uses = [self._page_use(shard, group) for shard in shards]
        use = PoolUse(sum(one.used for one in uses), sum(one.live for one in uses))
        total = part.num_pages * len(shards)
        free = sum(shard.device.tables[group].num_free for shard in shards)
        num_bytes = part.bytes_per_page * self._device.devices_per_shard
        found = GroupStats(
            part.num_layers, part.window, total, use.used, total - free - use.used, free, num_bytes
        )
        return use, found

    def _page_use(self, shard: EngineShard, group: int) -> PoolUse:
        table, part = shard.device.tables[group], self._device.parts[group]
        known = self._use.get((shard, group))
        if known is None or known[0] is not table:
            use = page_use(table.pages, table.page_tokens, part.num_pages, part.page_size)
            known = self._use[shard, group] = table, use
        return known[1]

    def pool_state(self) -> PoolState:
        """The state of each page; in a contiguous cache, of each sequence. Pools of data shards are
        concatenated."""
        sizes = [part.num_pages for part in self._device.parts] or [self._device.local.max_seqs]
        states, owners = zip(*(self._pages(g, size) for g, size in enumerate(sizes)), strict=True)
        sequences = [
            {
                "slot": shard.device.first_slot + (sample.slot or 0),
                "request_id": sample.request.request_id,
                "tokens": sample.num_computed,
                "state": "prefill" if sample.num_uncomputed > 1 else "decode",
            }
            for shard in self._shards
            for sample in sorted(shard.scheduler.running, key=lambda sample: sample.slot or 0)
        ]
        state = np.concatenate(states)
        page_size = page_size_of(self._device.local)
        return PoolState(len(state), page_size, state, np.concatenate(owners), sequences)

    def _pages(self, group: int, each: int) -> tuple[np.ndarray, np.ndarray]:
        """``page_states`` of a layer group in all shards, of ``each`` pages."""
        total = each * len(self._shards)
        tables: list[np.ndarray] = []
        cached: list[int] = []
        for i, shard in enumerate(self._shards):
            if isinstance(shard.pool, PagedPool):
                table = shard.device.tables[group].pages
                cached += [i * each + page for page in shard.pool.index.pinned_pages(group)]
            else:
                table = np.full((each, 1), each, np.int32)
                for sample in shard.scheduler.running:
                    table[sample.slot] = sample.slot
            tables.append(np.where(table < each, i * each + table, total))
        return page_states(np.concatenate(tables), total, cached)

    def slot_states(self, n_ctx: int) -> list[SlotState]:
        """The state of each slot, given the last sample that ran in it."""
        return [
            _slot_state(slot, shard.device.first_slot, sample, n_ctx)
            for shard in self._shards
            for slot, sample in enumerate(shard.last)
        ]


def _slot_state(slot: int, first_slot: int, sample: SampleState | None, n_ctx: int) -> SlotState:
    number = first_slot + slot
    if sample is None:
        return SlotState(number, None, False, 0, 0, 0, n_ctx, None)
    return SlotState(
        number,
        sample.request.request_id,
        sample.slot == slot and sample.finish_reason is None,
        sample.prompt_len,
        sample.num_computed,
        sample.num_generated,
        n_ctx,
        sample.request,
    )


def page_use(pages: np.ndarray, page_tokens: np.ndarray, num_pages: int, page_size: int) -> PoolUse:
    """Counts pages and tokens of a table; a page's tokens are the most that one sequence has in it.

    Args:
      pages, page_tokens: i32[S, P], page (``num_pages`` = none) and tokens of each entry.
      num_pages, page_size: sizes of the pool.
    """
    entries = np.flatnonzero(page_tokens)
    page, tokens = pages.ravel()[entries], page_tokens.ravel()[entries]
    live = np.zeros(num_pages, np.int32)
    live[page[tokens == page_size]] = page_size
    # Few pages are held in part, and a sequence may have two entries in one of them.
    partial = np.flatnonzero(tokens < page_size)
    row = entries[partial] // pages.shape[1]
    key, entry_key = np.unique(row * num_pages + page[partial], return_inverse=True)
    np.maximum.at(live, key % num_pages, np.bincount(entry_key, tokens[partial]).astype(np.int32))
    return PoolUse(int(np.count_nonzero(live)), int(live.sum()))


def page_states(pages: np.ndarray, num_pages: int, cached: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """State u8[N] and owner i32[N] of each page, from a table's pages i32[S, P]."""
    entries = np.flatnonzero(pages < num_pages)
    page, row = pages.ravel()[entries], entries // pages.shape[1]
    owner = np.full(num_pages, -1, np.int32)
    owner[page[::-1]] = row[::-1]  # of several assignments the last one counts: the first row's
    state = np.zeros(num_pages, np.uint8)
    state[cached] = CACHED
    state[page] = USED
    state[page[owner[page] != row]] = SHARED
    return state, owner


def page_size_of(cache: PagedKVCache | GroupedKVCache | ContiguousKVCache) -> int:
    """Tokens of a page; of a sequence in a contiguous cache."""
    return cache.max_length if isinstance(cache, ContiguousKVCache) else cache.page_size


def _bytes_per_row(cache: ContiguousKVCache) -> int:
    """Bytes of a sequence in all layers."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.k, cache.v))) // cache.max_seqs
