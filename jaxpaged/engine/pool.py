"""Host-side management of an engine's pages: holders, prefix sharing, eviction, preemption.

``Pool`` is for a contiguous cache, where each sequence has all its memory from the start.
``PagedPool`` counts pages, finds shared prefixes, and moves pages between sequences, prefix cache
and host memory. Page counts come from the device with every program. They are tuples, one number for
each layer group of the cache.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxpaged.cache.sequences import pages_held
from jaxpaged.engine.device_shard import Attachment, DeviceShard
from jaxpaged.engine.prefix_index import Match, Node, PrefixIndex, common_prefix, root_key
from jaxpaged.engine.request import EngineRequest
from jaxpaged.engine.sample_state import SampleState
from jaxpaged.engine.swap import SwapCosts

Counts = tuple[int, ...]
"""A number of pages in each layer group."""


def added(*counts: Counts) -> Counts:
    """Sums of counts."""
    return tuple(map(sum, zip(*counts, strict=True)))


def exceeds(counts: Counts, most: Counts) -> bool:
    """True if there are too many pages in any layer group."""
    return any(count > limit for count, limit in zip(counts, most, strict=True))


@dataclass(frozen=True)
class Start:
    """Pages that a sample begins with: shared ones, or its own from host memory."""

    num_tokens: int = 0
    """Tokens that need not be computed."""
    num_pages: Counts = (0,)
    """Pages needed for all of its tokens, shared ones not counted."""
    nodes: tuple[Node, ...] = ()
    borrowed: Node | None = None
    tail_pages: tuple[int, ...] = ()
    """In each layer group, page of its last tokens, shared until its first write; or none."""


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
    def available(self) -> Counts:
        """Pages that are free or evictable; unlimited without pages."""
        return (sys.maxsize,)

    def pages_for(self, sample: SampleState, count: int) -> Counts:
        """Pages that ``count`` more tokens of a running sample take."""
        return (0,)

    def pages_ahead(self, sample: SampleState) -> Counts:
        """Pages that the rest of a running sample's prompt takes, in all the steps for it."""
        return (0,)

    @property
    def no_pages(self) -> Counts:
        """Zeros."""
        return (0,) * len(self.available)

    def ensure(self, counts: Counts) -> None:
        """Evicts pages until ``counts`` are free."""

    def root(self, request: EngineRequest) -> bytes:
        """Root key of a request's chain of pages."""
        return b""

    def start(self, sample: SampleState, running: Iterable[SampleState]) -> Start:
        """Finds pages to begin with, and holds them until ``admit`` or ``cancel``."""
        return Start()

    def cancel(self, start: Start, sample: SampleState) -> None:
        """Releases the pages held by ``start``; the sample stays in the queue."""

    def admit(self, admitted: Sequence[tuple[SampleState, Start]]) -> None:
        """Starts samples in their slots."""

    def moved(self, samples: Iterable[SampleState]) -> None:
        """Forgets pages that the windows of samples have left in a step; before any ``computed``."""

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
      step_tokens: tokens of a step, at most.

    Raises:
      ValueError: a group with a window has too few pages for one sequence.
    """

    def __init__(self, device: DeviceShard, *, prefix_cache: bool, swap_bytes: int, step_tokens: int) -> None:
        super().__init__(device)
        first = device.parts[0]
        self.page_size = first.page_size
        self._windows = [part.window for part in device.parts[1:]]
        self._held: Counts = ()
        """Pages that a sequence holds at most in each group with a window."""
        for part in device.parts[1:]:
            assert part.window is not None, "only the first group sees everything"
            held = pages_held(part.window, step_tokens, self.page_size)
            if part.num_pages < held:
                raise ValueError(
                    f"a window of {part.window} tokens and steps of {step_tokens} need {held} pages of "
                    f"{self.page_size}, the group has {part.num_pages}"
                )
            self._held += (held,)
        self.index = PrefixIndex(self.page_size, (None, *self._windows))
        self._prefix_cache = prefix_cache
        self._swap_bytes = swap_bytes if device.swaps else 0
        # A residual page is in its sequence's staging slot, where it cannot be kept or shared.
        self._shares_tails = first.staging is None

    @property
    def available(self) -> Counts:
        unused = self.index.num_unused
        return tuple(table.num_free + n for table, n in zip(self.device.tables, unused, strict=True))

    def pages_for_text(self, num_tokens: int) -> int:
        """Pages that a text takes in the group that sees everything."""
        return -(-num_tokens // self.page_size)

    def pages_for(self, sample: SampleState, count: int) -> Counts:
        room = int(self.device.state.free_slots[sample.slot])
        # The same in all groups: what windows leave meanwhile is not counted.
        pages = self.pages_for_text(max(0, count - room)) + (sample.copies and room > 0 and count > 0)
        return (pages,) * len(self.device.tables)

    def pages_ahead(self, sample: SampleState) -> Counts:
        first, *others = self.pages_for(sample, sample.num_uncomputed)
        return first, *map(min, others, self._held)

    def pages_ahead_of(self, num_tokens: int) -> Counts:
        """Pages that a sequence takes for ``num_tokens`` more tokens, in all the steps for them."""
        pages = self.pages_for_text(num_tokens)
        return pages, *(min(pages, held) for held in self._held)

    def ensure(self, counts: Counts) -> None:
        missing = [count - table.num_free for count, table in zip(counts, self.device.tables, strict=True)]
        if any(count > 0 for count in missing):
            self.device.edit(unpinned=self.index.evict(missing))

    # Admission

    def _caches(self, request: EngineRequest) -> bool:
        return self._prefix_cache and request.cache_prompt

    def root(self, request: EngineRequest) -> bytes:
        if self._caches(request):
            return root_key(cache_salt=request.cache_salt)
        # Samples of one request share its prompt anyway.
        return root_key(cache_salt=request.cache_salt, request=request.request_id)

    def match(self, root: bytes, tokens: Sequence[int], limit: int) -> Match:
        """The longest prefix of a text in the index, at most ``limit`` tokens."""
        return self.index.match(root, tokens, limit, tails=self._shares_tails)

    def start(self, sample: SampleState, running: Iterable[SampleState]) -> Start:
        swapped = sample.swapped
        if swapped is not None:
            room = self.pages_ahead_of(max(0, len(sample.tokens) - swapped.num_computed))
            own = tuple(group.num_pages for group in swapped.groups)
            return Start(swapped.num_computed, added(own, room))
        limit = len(sample.tokens) - 1
        match = self.match(sample.root, sample.tokens, limit)
        self.index.acquire(match.nodes)
        borrowed, num_tail = match.tail, match.num_tail
        pages = () if borrowed is None else _pages_of(borrowed)
        if self._shares_tails:
            begin = len(match.nodes) * self.page_size
            rest = sample.tokens[begin : min(limit, begin + self.page_size)]
            for other in running:  # a page that is being written is not in the index yet
                if num_tail < len(rest) and _continues(other, sample.root, match.nodes):
                    count = common_prefix(other.tokens[begin : other.num_computed], rest)
                    if count > num_tail:
                        num_tail, borrowed = count, None
                        pages = self._own_pages(other, len(match.nodes))
        num_tokens = len(match.nodes) * self.page_size + num_tail
        if borrowed is not None:
            self.index.acquire([borrowed])
        sample.windows = [deque() for _ in self._windows]
        for g, windows in enumerate(sample.windows, 1):
            begin = self.index.first_seen(g, num_tokens)
            windows += list(enumerate(match.nodes))[begin:]
            if borrowed is not None:
                windows.append((len(match.nodes), borrowed))
            for _, node in windows:
                self.index.use(g, node)
        return Start(
            num_tokens=num_tokens,
            num_pages=self.pages_ahead_of(len(sample.tokens) - len(match.nodes) * self.page_size),
            nodes=match.nodes,
            borrowed=borrowed,
            tail_pages=pages,
        )

    def _own_pages(self, sample: SampleState, index: int) -> tuple[int, ...]:
        """Page ``index`` of a running sample's text in each layer group."""
        assert sample.slot is not None
        pages = [self.device.page(g, sample.slot, index) for g in range(len(self.device.tables))]
        assert None not in pages, "a page that a sequence writes is in its window"
        return tuple(page for page in pages if page is not None)

    def cancel(self, start: Start, sample: SampleState) -> None:
        self._leave_windows(sample)
        self.index.release_shared(start.nodes + (() if start.borrowed is None else (start.borrowed,)))

    def _leave_windows(self, sample: SampleState) -> None:
        """Removes a sample from the users of pages in groups with a window."""
        for g, windows in enumerate(sample.windows, 1):
            for _, node in windows:
                self.index.leave(g, node)
            windows.clear()

    def admit(self, admitted: Sequence[tuple[SampleState, Start]]) -> None:
        attached = []
        for sample, start in admitted:
            assert sample.slot is not None
            if sample.swapped is not None:
                begin = time.monotonic()
                self.ensure(tuple(group.num_pages for group in sample.swapped.groups))
                self.device.swap_in(sample.slot, sample.swapped)
                self.costs.observe_copy(sample.swapped.num_bytes, time.monotonic() - begin)
                self.drop_swapped(sample)
            elif start.num_tokens:
                attached.append(
                    self._attachment(sample.slot, start.nodes, start.tail_pages, start.num_tokens)
                )
            sample.num_computed = start.num_tokens
            sample.chain, sample.borrowed = list(start.nodes), start.borrowed
            sample.copies = bool(start.tail_pages)
            if sample.num_cached is None:
                sample.num_cached = start.num_tokens
                self.counts.prefix_queries += sample.prompt_len
                self.counts.prefix_hits += start.num_tokens
        self.device.attach(attached)

    def attachment(self, slot: int, found: Match) -> Attachment:
        """The pages of an indexed prefix, for an empty sequence."""
        tail = () if found.tail is None else _pages_of(found.tail)
        return self._attachment(slot, found.nodes, tail, found.num_tokens)

    def _attachment(
        self, slot: int, nodes: Sequence[Node], tail: tuple[int, ...], num_tokens: int
    ) -> Attachment:
        groups = range(len(self.device.tables))
        first = [self.index.first_seen(g, num_tokens) for g in groups]
        pages = [
            [node.windows[g].page if g else node.page for node in nodes[first[g] :]] + list(tail[g : g + 1])
            for g in groups
        ]
        return Attachment(slot, pages, first, num_tokens)

    # Running

    def moved(self, samples: Iterable[SampleState]) -> None:
        for sample in samples:
            for g, windows in enumerate(sample.windows, 1):
                first = int(self.device.tables[g].first_page[sample.slot])
                while windows and windows[0][0] < first:
                    self.index.leave(g, windows.popleft()[1])

    def computed(self, sample: SampleState) -> None:
        sample.copies = False
        if sample.borrowed is not None:  # its first write copied the page
            self._return_borrowed(sample)
        ps = self.page_size
        assert sample.slot is not None
        while sample.indexed and (len(sample.chain) + 1) * ps <= sample.num_computed:
            i = len(sample.chain)
            parent = sample.chain[-1] if sample.chain else None
            page = self.device.page(0, sample.slot, i)
            assert page is not None
            node, new = self.index.insert(sample.root, parent, sample.tokens[i * ps : (i + 1) * ps], page)
            if not new and not self._caches(sample.request):
                # Not to be used without pinning it: its page belongs to another sequence.
                self.index.release([node], keep=False)
                sample.indexed = False
                return
            sample.chain.append(node)
            for g, windows in enumerate(sample.windows, 1):
                page = self.device.page(g, sample.slot, i)
                if page is not None and self.index.use(g, node, page):
                    windows.append((i, node))
        self._keep_prompt(sample)

    def _return_borrowed(self, sample: SampleState) -> None:
        assert sample.borrowed is not None
        for g, windows in enumerate(sample.windows, 1):
            if windows and windows[-1][1] is sample.borrowed:
                self.index.leave(g, windows.pop()[1])
        self.index.release_shared([sample.borrowed])
        sample.borrowed = None

    def _keep_prompt(self, sample: SampleState) -> None:
        """Keeps the windows at the end of a prompt that was just read: other texts may go on from there."""
        done = sample.saved_prompt or not sample.indexed or not self._caches(sample.request)
        # A last token alone is computed in a decode program, whose further steps would leave pages.
        if done or not sample.windows or sample.num_computed < sample.prompt_len - 1:
            return
        sample.saved_prompt = True
        count = min(len(sample.chain), sample.prompt_len // self.page_size)
        pinned = [[], *(self._keep_window(sample, g, count) for g in range(1, len(self.device.tables)))]
        if any(pinned):
            self.device.edit(pinned=pinned)

    def _keep_window(self, sample: SampleState, group: int, count: int) -> list[int]:
        """Keeps what the token behind ``count`` pages of a sample's chain sees in a group with a window;
        returns pages to pin."""
        assert sample.slot is not None
        pinned = []
        for i in range(self.index.first_seen(group, count * self.page_size), count):
            page = self.device.page(group, sample.slot, i)
            if page is not None:
                pinned += self.index.pin(group, sample.chain[i], page)
        return pinned

    def shift(self, sample: SampleState, keep: int, discard: int) -> bool:
        assert sample.slot is not None
        self.device.edit(pinned=self._release(sample))  # before the sequence releases pages of its chain
        sample.indexed = False
        if not self.device.shift(sample.slot, keep, discard):
            return False
        self.counts.shifts += 1
        return True

    # Release

    def _release(self, sample: SampleState) -> list[list[int]]:
        """Releases a sample's nodes; returns pages to pin before its sequence is removed."""
        keep = self._caches(sample.request)
        if sample.borrowed is not None:
            self._return_borrowed(sample)
        pinned: list[list[int]] = [[] for _ in self.device.tables]
        if keep and sample.chain and sample.indexed:
            for g in range(1, len(pinned)):
                pinned[g] = self._keep_window(sample, g, len(sample.chain))
        self._leave_windows(sample)
        pinned[0] = self.index.release(sample.chain, keep=keep)
        sample.chain = []
        return pinned

    def end(self, samples: Sequence[SampleState]) -> None:
        pinned: list[list[int]] = [[] for _ in self.device.tables]
        unpinned: list[list[int]] = [[] for _ in self.device.tables]
        for sample in samples:
            if sample.finish_reason == "nan":
                chain = sample.chain
                _extend(pinned, self._release(sample))
                _extend(unpinned, self.index.drop(chain)[0])
                continue
            tail, superseded = self._keep_tail(sample)
            _extend(pinned, tail)
            _extend(pinned, self._release(sample))
            _extend(unpinned, superseded)
        removed = [sample.slot for sample in samples if sample.slot is not None]
        self.device.edit(pinned=pinned, removed=removed, unpinned=unpinned)

    def _keep_tail(self, sample: SampleState) -> tuple[list[list[int]], list[list[int]]]:
        """Indexes the partial last page of a finished sample: ``(pages to pin, pages to unpin)``."""
        pinned: list[list[int]] = [[] for _ in self.device.tables]
        superseded: list[list[int]] = [[] for _ in self.device.tables]
        begin = len(sample.chain) * self.page_size
        tail = tuple(sample.tokens[begin : sample.num_computed])
        possible = (
            sample.indexed and sample.slot is not None and sample.borrowed is None and self._shares_tails
        )
        if not possible or not tail or len(tail) >= self.page_size or not self._caches(sample.request):
            return pinned, superseded
        parent = sample.chain[-1] if sample.chain else None
        others = self.index.beginning_with(sample.root, parent, tail[0])
        if any(other.tokens[: len(tail)] == tail for other in others):
            return pinned, superseded
        for other in others:
            if other.tokens == tail[: len(other.tokens)]:
                self.index.remove(other, superseded)
        page, *others_pages = self._own_pages(sample, len(sample.chain))
        node, _ = self.index.insert(sample.root, parent, tail, page)
        for g, own in enumerate(others_pages, 1):
            pinned[g] = self.index.pin(g, node, own)
        pinned[0] = self.index.release([node])
        return pinned, superseded

    def preempt(self, sample: SampleState) -> None:
        assert sample.slot is not None
        self.counts.preemptions += 1
        pages = self.pages_ahead_of(sample.num_computed)
        num_bytes = sum(
            count * part.bytes_per_page for count, part in zip(pages, self.device.parts, strict=True)
        )
        fits = self.swapped_bytes + num_bytes <= self._swap_bytes
        # A shifted context cannot be recomputed: its dropped tokens are unknown.
        if fits and (sample.num_forgotten or self.costs.swap_is_cheaper(sample.num_computed, num_bytes)):
            begin = time.monotonic()
            sample.swapped = self.device.swap_out(sample.slot, sample.num_computed)
            self.costs.observe_copy(sample.swapped.num_bytes, time.monotonic() - begin)
            self.swapped_bytes += sample.swapped.num_bytes
            self.counts.swaps += 1
        self.device.edit(pinned=self._release(sample), removed=[sample.slot])
        sample.slot, sample.num_computed, sample.saved_prompt = None, 0, False
        sample.indexed = sample.swapped is None and not sample.num_forgotten

    def drop_swapped(self, sample: SampleState) -> None:
        if sample.swapped is not None:
            self.swapped_bytes -= sample.swapped.num_bytes
            sample.swapped = None


def _pages_of(node: Node) -> tuple[int, ...]:
    """A node's page in each layer group."""
    return node.page, *(node.windows[g].page for g in sorted(node.windows))


def _extend(pages: list[list[int]], more: list[list[int]]) -> None:
    for own, one in zip(pages, more, strict=True):
        own += one


def _continues(other: SampleState, root: bytes, nodes: tuple[Node, ...]) -> bool:
    """True if a running sample begins with the pages of ``nodes`` and is filling its next page."""
    if other.slot is None or not other.indexed or other.root != root or len(other.chain) != len(nodes):
        return False
    return not nodes or other.chain[-1] is nodes[-1]
