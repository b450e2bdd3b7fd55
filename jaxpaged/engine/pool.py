"""Host-side management of an engine's pages: holders, prefix sharing, eviction, preemption.

``Pool`` is for a contiguous cache, where each sequence has all its memory from the start.
``PagedPool`` counts pages, finds shared prefixes, and moves pages between sequences, prefix cache
and host memory. Page counts come from the device with every program.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.engine.device_shard import DeviceShard
from jaxpaged.engine.prefix_index import Node, PrefixIndex, common_prefix, root_key
from jaxpaged.engine.request import EngineRequest
from jaxpaged.engine.sample_state import SampleState
from jaxpaged.engine.swap import SwapCosts


@dataclass(frozen=True)
class Start:
    """Pages that a sample begins with: shared ones, or its own from host memory."""

    num_tokens: int = 0
    """Tokens that need not be computed."""
    num_pages: int = 0
    """Pages needed for all of its tokens, shared ones not counted."""
    nodes: tuple[Node, ...] = ()
    borrowed: Node | None = None
    tail_page: int | None = None
    """Page of its last tokens, shared until its first write."""


@dataclass
class PoolCounts:
    """Monotonic counters."""

    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    swaps: int = 0
    shifts: int = 0


class Pool:
    """The pool of a contiguous cache, where a sequence never lacks memory."""

    def __init__(self, device: DeviceShard) -> None:
        self.device = device
        self.counts = PoolCounts()
        self.costs = SwapCosts()
        self.swapped_bytes = 0

    @property
    def available(self) -> int:
        """Pages that are free or evictable; unlimited without pages."""
        return sys.maxsize

    def pages_for_text(self, num_tokens: int) -> int:
        """Pages that a text takes, at most."""
        return 0

    def pages_for(self, sample: SampleState, count: int) -> int:
        """Pages that ``count`` more tokens of a running sample take."""
        return 0

    def ensure(self, count: int) -> None:
        """Evicts pages until ``count`` are free."""

    def root(self, request: EngineRequest) -> bytes:
        """Root key of a request's chain of pages."""
        return b""

    def start(self, sample: SampleState, running: Iterable[SampleState]) -> Start:
        """Finds pages to begin with, and holds them until ``admit`` or ``cancel``."""
        return Start()

    def cancel(self, start: Start) -> None:
        """Releases the pages held by ``start``; the sample stays in the queue."""

    def admit(self, admitted: Sequence[tuple[SampleState, Start]]) -> None:
        """Starts samples in their slots."""

    def computed(self, sample: SampleState) -> None:
        """Indexes pages that a step completed."""

    def end(self, samples: Sequence[SampleState]) -> None:
        """Releases the pages of finished samples."""
        self.device.edit(removed=[s.slot for s in samples if s.slot is not None])

    def preempt(self, sample: SampleState) -> None:
        """Releases the pages of a running sample that goes back to the queue."""
        raise NotImplementedError

    def shift(self, sample: SampleState, keep: int, discard: int) -> bool:
        """Drops ``discard`` tokens of a context after the first ``keep``; False if it cannot."""
        return False

    def drop_swapped(self, sample: SampleState) -> None:
        """Frees a sample's copy in host memory, if there is one."""


class PagedPool(Pool):
    """The pool of a paged cache; see the module.

    Args:
      device: one with a paged cache.
      prefix_cache: keep pages of finished samples for later texts with the same prefix.
      swap_bytes: host memory for preempted sequences.
    """

    def __init__(self, device: DeviceShard, *, prefix_cache: bool, swap_bytes: int) -> None:
        super().__init__(device)
        cache = device.cache
        assert isinstance(cache, PagedKVCache)
        self.page_size = cache.page_size
        self.index = PrefixIndex(self.page_size)
        self._prefix_cache = prefix_cache
        self._swap_bytes = swap_bytes if device.swaps else 0
        # A residual page is in its sequence's staging slot, where it cannot be kept or shared.
        self._shares_tails = cache.staging is None

    @property
    def available(self) -> int:
        return self.device.state.num_free + self.index.num_unused

    def pages_for_text(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def pages_for(self, sample: SampleState, count: int) -> int:
        room = int(self.device.state.free_slots[sample.slot])
        return self.pages_for_text(max(0, count - room)) + (sample.copies and room > 0 and count > 0)

    def ensure(self, count: int) -> None:
        missing = count - self.device.state.num_free
        if missing > 0:
            self.device.edit(unpinned=self.index.evict(missing))

    # Admission

    def _caches(self, request: EngineRequest) -> bool:
        return self._prefix_cache and request.cache_prompt

    def root(self, request: EngineRequest) -> bytes:
        if self._caches(request):
            return root_key(cache_salt=request.cache_salt)
        # Samples of one request share its prompt anyway.
        return root_key(cache_salt=request.cache_salt, request=request.request_id)

    def start(self, sample: SampleState, running: Iterable[SampleState]) -> Start:
        swapped = sample.swapped
        if swapped is not None:
            room = self.pages_for_text(max(0, len(sample.tokens) - swapped.num_computed))
            return Start(swapped.num_computed, swapped.num_pages + room)
        limit = len(sample.tokens) - 1
        match = self.index.match(sample.root, sample.tokens, limit, tails=self._shares_tails)
        self.index.acquire(match.nodes)
        borrowed, num_tail = match.tail, match.num_tail
        page = None if borrowed is None else borrowed.page
        if self._shares_tails:
            begin = len(match.nodes) * self.page_size
            rest = sample.tokens[begin : min(limit, begin + self.page_size)]
            for other in running:  # a page that is being written is not in the index yet
                if num_tail < len(rest) and _continues(other, sample.root, match.nodes):
                    count = common_prefix(other.tokens[begin : other.num_computed], rest)
                    if count > num_tail:
                        num_tail, borrowed = count, None
                        page = int(self.device.state.pages[other.slot, len(match.nodes)])
        if borrowed is not None:
            self.index.acquire([borrowed])
        return Start(
            num_tokens=len(match.nodes) * self.page_size + num_tail,
            num_pages=self.pages_for_text(len(sample.tokens)) - len(match.nodes),
            nodes=match.nodes,
            borrowed=borrowed,
            tail_page=page,
        )

    def cancel(self, start: Start) -> None:
        self.index.release_shared(start.nodes + (() if start.borrowed is None else (start.borrowed,)))

    def admit(self, admitted: Sequence[tuple[SampleState, Start]]) -> None:
        attached = []
        for sample, start in admitted:
            assert sample.slot is not None
            if sample.swapped is not None:
                begin = time.monotonic()
                self.ensure(sample.swapped.num_pages)
                self.device.swap_in(sample.slot, sample.swapped)
                self.costs.observe_copy(sample.swapped.num_bytes, time.monotonic() - begin)
                self.drop_swapped(sample)
            elif start.num_tokens:
                tail = [] if start.tail_page is None else [start.tail_page]
                attached.append(
                    (sample.slot, [*(node.page for node in start.nodes), *tail], start.num_tokens)
                )
            sample.num_computed = start.num_tokens
            sample.chain, sample.borrowed = list(start.nodes), start.borrowed
            sample.copies = start.tail_page is not None
            if sample.num_cached is None:
                sample.num_cached = start.num_tokens
                self.counts.prefix_queries += sample.prompt_len
                self.counts.prefix_hits += start.num_tokens
        self.device.attach(attached)

    # Running

    def computed(self, sample: SampleState) -> None:
        sample.copies = False
        if sample.borrowed is not None:  # its first write copied the page
            self.index.release_shared([sample.borrowed])
            sample.borrowed = None
        ps = self.page_size
        while sample.indexed and (len(sample.chain) + 1) * ps <= sample.num_computed:
            i = len(sample.chain)
            parent = sample.chain[-1] if sample.chain else None
            page = int(self.device.state.pages[sample.slot, i])
            node, new = self.index.insert(sample.root, parent, sample.tokens[i * ps : (i + 1) * ps], page)
            if not new and not self._caches(sample.request):
                # Not to be used without pinning it: its page belongs to another sequence.
                self.index.release([node], keep=False)
                sample.indexed = False
                return
            sample.chain.append(node)

    def shift(self, sample: SampleState, keep: int, discard: int) -> bool:
        assert sample.slot is not None
        self.device.edit(pinned=self._release(sample))  # before the sequence releases pages of its chain
        sample.indexed = False
        if not self.device.shift(sample.slot, keep, discard):
            return False
        self.counts.shifts += 1
        return True

    # Release

    def _release(self, sample: SampleState) -> list[int]:
        """Releases a sample's nodes; returns pages to pin before its sequence is removed."""
        keep = self._caches(sample.request)
        if sample.borrowed is not None:
            self.index.release_shared([sample.borrowed])
        pinned = self.index.release(sample.chain, keep=keep)
        sample.chain, sample.borrowed = [], None
        return pinned

    def end(self, samples: Sequence[SampleState]) -> None:
        pinned: list[int] = []
        unpinned: list[int] = []
        for sample in samples:
            if sample.finish_reason == "nan":
                chain = sample.chain
                pinned += self._release(sample)
                unpinned += self.index.drop(chain)[0]
                continue
            tail, superseded = self._keep_tail(sample)
            pinned += tail + self._release(sample)
            unpinned += superseded
        removed = [sample.slot for sample in samples if sample.slot is not None]
        self.device.edit(pinned=pinned, removed=removed, unpinned=unpinned)

    def _keep_tail(self, sample: SampleState) -> tuple[list[int], list[int]]:
        """Indexes the partial last page of a finished sample: ``(page to pin, pages to unpin)``."""
        begin = len(sample.chain) * self.page_size
        tail = tuple(sample.tokens[begin : sample.num_computed])
        possible = (
            sample.indexed and sample.slot is not None and sample.borrowed is None and self._shares_tails
        )
        if not possible or not tail or len(tail) >= self.page_size or not self._caches(sample.request):
            return [], []
        parent = sample.chain[-1] if sample.chain else None
        others = self.index.beginning_with(sample.root, parent, tail[0])
        if any(other.tokens[: len(tail)] == tail for other in others):
            return [], []
        superseded: list[int] = []
        for other in others:
            if other.tokens == tail[: len(other.tokens)]:
                superseded += self.index.remove(other)
        page = int(self.device.state.pages[sample.slot, len(sample.chain)])
        node, _ = self.index.insert(sample.root, parent, tail, page)
        return self.index.release([node]), superseded

    def preempt(self, sample: SampleState) -> None:
        assert sample.slot is not None
        self.counts.preemptions += 1
        cache = self.device.cache
        num_bytes = self.pages_for_text(sample.num_computed) * cache.bytes_per_page
        fits = self.swapped_bytes + num_bytes <= self._swap_bytes
        # A shifted context cannot be recomputed: its dropped tokens are unknown.
        if fits and (sample.num_forgotten or self.costs.swap_is_cheaper(sample.num_computed, num_bytes)):
            begin = time.monotonic()
            sample.swapped = self.device.swap_out(sample.slot, sample.num_computed)
            self.costs.observe_copy(sample.swapped.num_bytes, time.monotonic() - begin)
            self.swapped_bytes += sample.swapped.num_bytes
            self.counts.swaps += 1
        self.device.edit(pinned=self._release(sample), removed=[sample.slot])
        sample.slot, sample.num_computed = None, 0
        sample.indexed = sample.swapped is None and not sample.num_forgotten

    def drop_swapped(self, sample: SampleState) -> None:
        if sample.swapped is not None:
            self.swapped_bytes -= sample.swapped.num_bytes
            sample.swapped = None


def _continues(other: SampleState, root: bytes, nodes: tuple[Node, ...]) -> bool:
    """True if a running sample begins with the pages of ``nodes`` and is filling its next page."""
    if other.slot is None or not other.indexed or other.root != root or len(other.chain) != len(nodes):
        return False
    return not nodes or other.chain[-1] is nodes[-1]
