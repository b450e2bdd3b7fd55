"""Monitor: what an engine shows of itself, put together from its parts; it changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxpaged.cache.contiguous import ContiguousKVCache
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.engine.device import Device, HostView
from jaxpaged.engine.pool import PagedPool, Pool
from jaxpaged.engine.request import EngineStats
from jaxpaged.engine.sample_state import SampleState
from jaxpaged.engine.scheduler import Scheduler
from jaxpaged.engine.views import PoolUse, PoolView, SlotView, page_use, pool_view


@dataclass
class StepCounts:
    """What steps did; counters, as ``EngineStats`` has them."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    compiled_late: int = 0


class Monitor:
    """See the module."""

    def __init__(self, device: Device, pool: Pool, scheduler: Scheduler) -> None:
        self._device, self._pool, self._scheduler = device, pool, scheduler
        self._use: tuple[HostView, PoolUse] | None = None

    def stats(self, steps: StepCounts) -> EngineStats:
        """Gauges and counters, now."""
        cache, view, counts = self._device.cache, self._device.view, self._pool.counts
        running, waiting = self._scheduler.running, self._scheduler.waiting
        page_size = _page_size(cache)
        if isinstance(self._pool, PagedPool):
            total, free, use = cache.num_pages, view.num_free, self._page_use()
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
            steps=steps.steps,
            prompt_tokens=steps.prompt_tokens,
            generated_tokens=steps.generated_tokens,
            prefix_queries=counts.prefix_queries,
            prefix_hits=counts.prefix_hits,
            preemptions=counts.preemptions,
            swaps=counts.swaps,
            evictions=evictions,
            shifts=counts.shifts,
            compiled=self._device.compiled,
            compiled_late=steps.compiled_late,
        )

    def _page_use(self) -> PoolUse:
        view = self._device.view
        if self._use is None or self._use[0] is not view:
            self._use = view, page_use(view.pages, view.page_tokens, self._device.cache.num_pages)
        return self._use[1]

    def pool_view(self) -> PoolView:
        """A picture of the pool; of a contiguous cache each sequence is a page."""
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
            pages, kept = self._device.view.pages, self._pool.index.pinned_pages()
            return pool_view(pages, cache.num_pages, _page_size(cache), kept, sequences)
        pages = np.full((cache.max_seqs, 1), cache.max_seqs, np.int32)
        for sample in running:
            pages[sample.slot] = sample.slot
        return pool_view(pages, cache.max_seqs, _page_size(cache), [], sequences)


def slot_view(slot: int, sample: SampleState | None, n_ctx: int) -> SlotView:
    """A slot and the sample that had it last."""
    if sample is None:
        return SlotView(slot, None, False, 0, 0, 0, n_ctx, None)
    return SlotView(
        slot,
        sample.request.request_id,
        sample.slot == slot and sample.finish_reason is None,
        sample.prompt_len,
        sample.num_computed,
        sample.num_generated,
        n_ctx,
        sample.request,
    )


def _page_size(cache: PagedKVCache | ContiguousKVCache) -> int:
    return cache.page_size if isinstance(cache, PagedKVCache) else cache.max_length
