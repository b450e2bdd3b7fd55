"""Statistics of an engine: counters, the state of each page of the pool, the state of each slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpaged.cache.contiguous import ContiguousKVCache
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.engine.device import Device, HostTable
from jaxpaged.engine.pool import PagedPool, Pool
from jaxpaged.engine.request import EngineRequest, EngineStats
from jaxpaged.engine.sample_state import SampleState
from jaxpaged.engine.scheduler import Scheduler

FREE, USED, SHARED, CACHED = 0, 1, 2, 3
"""States of a page: free; held by one sequence; by several; by the prefix cache alone."""


@dataclass(frozen=True)
class PoolState:
    """The state of each page between two steps."""

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


@dataclass
class StepCounts:
    """Counters of steps, as in ``EngineStats``."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    nan_samples: int = 0
    compiled_late: int = 0


class Monitor:
    """Collects statistics from the parts of an engine; changes nothing."""

    def __init__(self, device: Device, pool: Pool, scheduler: Scheduler) -> None:
        self._device, self._pool, self._scheduler = device, pool, scheduler
        self._use: tuple[HostTable, PoolUse] | None = None

    def stats(self, steps: StepCounts) -> EngineStats:
        """Gauges and counters as they are now."""
        cache, counts = self._device.cache, self._pool.counts
        running, waiting = self._scheduler.running, self._scheduler.waiting
        page_size = _page_size(cache)
        if isinstance(self._pool, PagedPool):
            total, free, use = cache.num_pages, self._device.state.num_free, self._page_use()
            cached, evictions = total - free - use.used, self._pool.index.evictions
        else:
            use = PoolUse(len(running), sum(sample.num_computed for sample in running))
            total, free, cached, evictions = cache.max_seqs, cache.max_seqs - len(running), 0, 0
        slots_used = use.used * page_size
        return EngineStats(
            running=len(running),
            waiting=len(waiting),
            swapped=sum(sample.swapped is not None for sample in waiting),
            pages_total=total,
            pages_used=use.used,
            pages_cached=cached,
            pages_free=free,
            page_size=page_size,
            tokens_live=use.live,
            waste=1 - use.live / slots_used if slots_used else 0.0,
            bytes_per_page=cache.bytes_per_page,
            prefix_queries=counts.prefix_queries,
            prefix_hits=counts.prefix_hits,
            preemptions=counts.preemptions,
            swaps=counts.swaps,
            evictions=evictions,
            shifts=counts.shifts,
            compiled=self._device.compiled,
            **vars(steps),
        )

    def _page_use(self) -> PoolUse:
        table = self._device.state
        if self._use is None or self._use[0] is not table:
            cache = self._device.cache
            self._use = table, page_use(table.pages, table.page_tokens, cache.num_pages, cache.page_size)
        return self._use[1]

    def pool_state(self) -> PoolState:
        """The state of each page; in a contiguous cache, of each sequence."""
        running = sorted(self._scheduler.running, key=lambda sample: sample.slot or 0)
        sequences = [
            {
                "slot": sample.slot,
                "request_id": sample.request.request_id,
                "tokens": sample.num_computed,
                "state": "prefill" if sample.num_uncomputed > 1 else "decode",
            }
            for sample in running
        ]
        cache = self._device.cache
        if isinstance(self._pool, PagedPool):
            pages, num_pages = self._device.state.pages, cache.num_pages
            state, owner = page_states(pages, num_pages, self._pool.index.pinned_pages())
        else:
            num_pages = cache.max_seqs
            pages = np.full((num_pages, 1), num_pages, np.int32)
            for sample in running:
                pages[sample.slot] = sample.slot
            state, owner = page_states(pages, num_pages, [])
        return PoolState(num_pages, _page_size(cache), state, owner, sequences)


def slot_state(slot: int, sample: SampleState | None, n_ctx: int) -> SlotState:
    """The state of a slot, given the last sample that ran in it."""
    if sample is None:
        return SlotState(slot, None, False, 0, 0, 0, n_ctx, None)
    return SlotState(
        slot,
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


def _page_size(cache: PagedKVCache | ContiguousKVCache) -> int:
    return cache.page_size if isinstance(cache, PagedKVCache) else cache.max_length
