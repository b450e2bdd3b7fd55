"""One replica of the server, simulated step by step: its pool, admission, and preemption.

It decides what ``jaxpaged.engine.Scheduler`` decides of a step: one budget of tokens, of the compiled sizes; running
requests go first, oldest first; the rest of the budget admits waiting ones, in order, while there are sequences, and
pages for all that is still to be prefilled and one more per running request; when pages run out the newest is preempted
and none is admitted; up to ``decode_steps`` tokens between two schedulings, fewer if they would take longer than a
reader notices, and a scheduling as soon as one ends that another waits for. As in ``PagedPool`` whole pages of a shared
prefix are held once, its last tokens are copied, unused pages stay until they are needed, least recently used first,
and a preempted request finds those of its own that are still there.

All decoding requests advance in lockstep: they are a few sums, a heap of ends and a count by slot in the last page, and
a step costs the same whatever their number.

Simpler than the engine:
  * preempted requests are always recomputed; the server may copy their pages to host memory (``--swap-space``).
  * a request ends after its sampled number of tokens, each has one sample, all have one priority, none is cancelled.
  * the queue is unbounded; the server rejects requests behind ``--max-queue``.
  * of a page that is not full, tokens are shared where they end a shared prefix, and nowhere else.
  * steps between two schedulings follow from the last step's time, not from the median of eight.
  * a window of attention counts as full attention.
"""

from __future__ import annotations

import bisect
import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import isnan

import numpy as np

from tpu_scripts.capacity.chips import StepTimes
from tpu_scripts.capacity.load import Requests
from tpu_scripts.capacity.pages import Pages

_LEAST_FILLED, _LEAST_READ = 0.7, 16
_ROUND_TRIP_SECONDS = 0.04
"""Constants of the scheduler and the engine."""

Watch = Callable[[float, float, int, int, int], None]
"""Called for each scheduling with its start and the time to the next one, in seconds, the numbers of waiting and of
running requests, and the pages that these hold at its end."""


@dataclass(frozen=True)
class Replica:
    """Options of a server."""

    times: StepTimes
    num_pages: int
    page_size: int = 32
    slots: int = 256
    batch_tokens: int = 512
    """Maximum tokens of a step."""
    decode_steps: int = 8
    prefix_cache: bool = True
    shares_tails: bool = True
    """True if pages are shared in part; residual formats cannot."""


@dataclass
class Outcome:
    """Results of R requests."""

    first: np.ndarray
    """Seconds when the first token was returned, nan if the run was aborted, f64[R]."""
    finish: np.ndarray
    """Seconds when the last token was returned, f64[R]."""
    begun: np.ndarray
    """Seconds when the first step began, f64[R]."""
    generated: np.ndarray
    """Number of returned tokens, i64[R]."""
    begin: float
    """Seconds of the first arrival; ``end`` of the last token."""
    end: float
    busy: float
    """Seconds in which the device computed."""
    steps: int
    """Runs of the model."""
    peak_pages: int
    """Maximum number of pages held by running requests."""
    preemptions: int
    evictions: int
    """Number of cached pages evicted."""
    cached_tokens: int
    """Tokens found in the pool when a request was first admitted."""
    useful_tokens: int
    """Computed tokens of finished requests, each once and without those found in the pool."""
    aborted: bool
    """True if it ended because too many requests were late."""


@dataclass(frozen=True)
class Limits:
    """Latencies; a run is aborted as soon as more than ``most`` of the counted requests exceed one of them."""

    ttft: float
    """Seconds."""
    tpot: float
    most: int


class _Run:
    """State of a simulation; requests are numbered in order of arrival."""

    def __init__(
        self, replica: Replica, requests: Requests, prefix_tokens: int, limits: Limits | None
    ) -> None:
        self.replica, self.times, self.limits = replica, replica.times, limits
        self.arrival, self.prompt = requests.arrival.tolist(), requests.prompt.tolist()
        self.output, self.prefix = requests.output.tolist(), requests.prefix.tolist()
        self.counted = requests.counted.tolist()
        count = len(requests)
        longest = int((requests.prompt + requests.output).max(initial=0))
        if (needed := -(-longest // replica.page_size)) > replica.num_pages:
            raise ValueError(f"a request may need {needed} pages, the whole pool has {replica.num_pages}")
        prefixes = int(requests.prefix.max(initial=-1)) + 1
        self.prefix_tokens = prefix_tokens
        self.pages = Pages(
            replica.num_pages, replica.prefix_cache, prefixes, prefix_tokens // replica.page_size
        )
        sizes = _sizes(max(replica.batch_tokens, replica.slots))
        self.sizes = [size for size in sizes if size >= replica.slots][-4:]
        self.decode_sizes = [n for n in _sizes(replica.slots) if n != 2 or replica.slots == 2]

        self.now = self.arrival[0] if count else 0.0
        self.waiting: deque[int] = deque()
        self.partial: tuple[int, int, int] | None = None
        """The request that is prefilled in part: index, tokens computed, own pages."""
        self.steps = 0
        """Decode steps so far: the clock of all decoding requests."""
        self.decoding = 0
        self.base = [0] * count
        """Tokens computed minus ``steps``, constant while a request decodes."""
        self.base_sum = 0
        self.ends: list[tuple[int, int]] = []
        """Heap of (``steps`` at the last token, request); stale where ``end_of`` differs."""
        self.latest = 0
        """Latest end that is not stale."""
        self.end_of = [-1] * count
        """End of each request, -1 if it does not decode."""
        self.base_counts = [0] * replica.page_size
        """Number of decoding requests by ``base`` modulo the page size: they need a page when it meets the clock."""
        self.stack: list[int] = []
        """Decoding requests, newest last; finished ones are still in it."""
        self.generated = [0] * count
        self.shared = [0] * count
        """Whole pages of a shared prefix held by each running request."""
        self.wanted = replica.decode_steps
        nan = float("nan")
        self.first, self.finish, self.begun = [nan] * count, [nan] * count, [nan] * count
        self.busy = 0.0
        self.runs = self.preemptions = self.cached_tokens = self.useful_tokens = 0
        self.late_first = self.late_tokens = 0

    def run(self, watch: Watch | None) -> Outcome:
        arrival, waiting, count = self.arrival, self.waiting, len(self.arrival)
        come, begin, host = 0, self.now, self.times.host
        limit = self.limits.most if self.limits else count
        while self.late_first <= limit and self.late_tokens <= limit:
            while come < count and arrival[come] <= self.now:
                waiting.append(come)
                come += 1
            if not waiting and not self.decoding and self.partial is None:
                if come == count:
                    break
                self.now = arrival[come]
                continue
            began = self.now
            chunks, preempted = self._plan()
            running = self.decoding + len(chunks)
            steps = 1 if preempted else self.replica.decode_steps
            if any(count > 1 or computed + 1 < self._length(r) for r, computed, count, _ in chunks):
                ended = self._prefill(chunks)
            else:  # one token left to prefill is a decode step
                self.partial = None
                for request, computed, _, own in chunks:
                    self._start_to_decode(
                        request, computed, own, self.output[request] - self.generated[request]
                    )
                ended = self._decode(steps)
                for request, *_ in chunks:
                    self._first_token(request, self.now + host)
            self.now += host
            for request in ended:
                self._end(request)
            if watch is not None:
                watch(began, self.now - began, len(waiting), running, self.pages.used)
        pages = self.pages
        return Outcome(
            np.array(self.first),
            np.array(self.finish),
            np.array(self.begun),
            np.array(self.generated, np.int64),
            begin=begin,
            end=self.now,
            busy=self.busy,
            steps=self.runs,
            peak_pages=pages.peak,
            preemptions=self.preemptions,
            evictions=pages.evictions,
            cached_tokens=self.cached_tokens,
            useful_tokens=self.useful_tokens,
            aborted=come < count or bool(waiting) or self.decoding > 0 or self.partial is not None,
        )

    # Planning

    def _plan(self) -> tuple[list[tuple[int, int, int, int]], bool]:
        """Admits and preempts; returns ``(chunks of prompts, True if a request was preempted)``.

        A chunk is (request, tokens computed, tokens to compute, own pages so far).
        """
        pages, page_size = self.pages, self.replica.page_size
        preempted = False
        budget = self._budget() if self.waiting or self.partial else self.sizes[-1]
        needed = self.base_counts[-self.steps % page_size]
        chunk = None
        if self.partial is not None:
            request, computed, own = self.partial
            count = min(self._length(request) - computed, budget - self.decoding)
            if count > 0:
                chunk = request, computed, count, own
                needed += self._pages_to(request, computed + count, own)
        while needed > pages.available:
            preempted = True
            if self.partial is not None:
                if chunk is not None:
                    needed -= self._pages_to(request, computed + count, own)
                    chunk = None
                self._preempt_partial()
            else:
                needed -= self._preempt_newest()
        chunks = [] if chunk is None else [chunk]
        if not preempted and self.waiting:
            self._admit(chunks, needed, budget)
        return chunks, preempted

    def _budget(self) -> int:
        wanted = decoding = self.decoding
        if self.partial is not None:
            wanted += self._length(self.partial[0]) - self.partial[1]
            decoding += 1
        largest = self.sizes[-1]
        for request in self.waiting:
            if wanted > largest or decoding >= self.replica.slots:
                break
            wanted += self._length(request)
            decoding += 1
        decoding = self.decoding + (self.partial is not None)
        smaller = 0
        for size in self.sizes:
            if wanted <= size:
                enough = max(_LEAST_FILLED * size, decoding + _LEAST_READ)
                return size if wanted >= enough or smaller < decoding + _LEAST_READ else smaller
            smaller = size
        return largest

    def _admit(self, chunks: list[tuple[int, int, int, int]], needed: int, budget: int) -> None:
        pages, page_size = self.pages, self.replica.page_size
        running = self.decoding + (self.partial is not None)
        left = budget - self.decoding - sum(count for _, _, count, _ in chunks)
        promised = needed
        if self.partial is not None:
            request, computed, own = self.partial
            planned = computed + (chunks[0][2] if chunks else 0)
            promised += self._pages_to(request, self._length(request), own)
            promised -= self._pages_to(request, planned, own) if chunks else 0
        while self.waiting and left > 0 and running < self.replica.slots:
            request = self.waiting[0]
            prefix, length = self.prefix[request], self._length(request)
            shared, kept, idle = pages.found(request, prefix)
            own = -(-length // page_size) - shared - kept
            if promised + own + running > pages.available - idle and running:
                pages.touch(request, prefix, shared, kept)
                break
            self.waiting.popleft()
            pages.acquire(request, prefix, shared, kept)
            self.shared[request] = shared
            computed = (shared + kept) * page_size
            if shared and not kept and shared == pages.whole and self.replica.shares_tails:
                computed = self.prefix_tokens
            computed = min(computed, length - 1)
            if isnan(self.begun[request]):
                self.begun[request] = self.now
                self.cached_tokens += computed
                self.useful_tokens -= computed
            count = min(length - computed, left)
            chunks.append((request, computed, count, kept))
            promised += own
            running += 1
            left -= count

    def _length(self, request: int) -> int:
        """Tokens of a waiting or partly prefilled request."""
        return self.prompt[request] + self.generated[request]

    def _pages_to(self, request: int, computed: int, own: int) -> int:
        """Additional pages of a request for so many computed tokens."""
        return -(-computed // self.replica.page_size) - self.shared[request] - own

    def _preempt_partial(self) -> None:
        assert self.partial is not None
        request, computed, own = self.partial
        self.partial = None
        self._requeue(request, computed, own)

    def _preempt_newest(self) -> int:
        """Preempts the newest decoding request; returns the pages that its next token would have needed."""
        while self.end_of[self.stack[-1]] < 0:
            self.stack.pop()
        request = self.stack.pop()
        computed = self.base[request] + self.steps
        self.generated[request] = self.output[request] - (self.end_of[request] - self.steps)
        self._stop(request)
        self.latest = max((end for end, other in self.ends if self.end_of[other] == end), default=0)
        self._requeue(request, computed, self._pages_to(request, computed, 0))
        return int(computed % self.replica.page_size == 0)

    def _requeue(self, request: int, computed: int, own: int) -> None:
        self.preemptions += 1
        whole = computed // self.replica.page_size - self.shared[request]
        self.pages.preempt(request, own, max(0, whole))
        self._release(request)
        self.waiting.appendleft(request)

    def _release(self, request: int) -> None:
        if self.shared[request]:
            self.pages.release_prefix(self.prefix[request])
            self.shared[request] = 0

    def _stop(self, request: int) -> None:
        """Removes a request from those that decode."""
        self.end_of[request] = -1
        self.decoding -= 1
        self.base_sum -= self.base[request]
        self.base_counts[self.base[request] % self.replica.page_size] -= 1

    # Computing

    def _prefill(self, chunks: list[tuple[int, int, int, int]]) -> list[int]:
        """Runs a step of prompt chunks and one token of each decoding request; returns the finished ones."""
        pages, page_size = self.pages, self.replica.page_size
        pages.take(self.base_counts[-self.steps % page_size])
        rows, read = self.decoding, self.base_sum + self.decoding * (self.steps + 1)
        pairs = read
        self.steps += 1
        for _, computed, count, _ in chunks:
            rows += count
            read += computed + count
            pairs += computed * count + count * (count + 1) // 2
        size = self.sizes[bisect.bisect_left(self.sizes, rows)]
        seconds = self.times.step(size, self.replica.slots, read, pairs)
        self.now += seconds
        self.busy += seconds
        self.runs += 1
        ended = self._ended_now()
        self.partial = None
        returned = self.now + self.times.host
        for request, computed, count, own in chunks:
            computed += count
            more = self._pages_to(request, computed, own)
            pages.take(more)
            own += more
            if (prefix := self.prefix[request]) >= 0:
                found = pages.publish(prefix, self.shared[request], computed // page_size)
                self.shared[request] += found
                own -= found
            if computed < self._length(request):
                self.partial = request, computed, own
                continue
            self._first_token(request, returned)
            left = self.output[request] - self.generated[request] - 1
            if left:
                self._start_to_decode(request, computed, own, left)
            else:
                ended.append(request)
        return ended

    def _first_token(self, request: int, when: float) -> None:
        if isnan(self.first[request]):
            self.first[request] = when
            limits = self.limits
            if limits and self.counted[request]:
                self.late_first += when - self.arrival[request] > limits.ttft

    def _start_to_decode(self, request: int, computed: int, own: int, left: int) -> None:
        """Adds a request to those that decode, with ``computed`` tokens and ``left`` to come."""
        self.pages.take(self._pages_to(request, computed, own))  # a copy, if it shares a part of a page
        base = self.base[request] = computed - self.steps
        self.base_sum += base
        self.base_counts[base % self.replica.page_size] += 1
        self.decoding += 1
        end = self.end_of[request] = self.steps + left
        self.latest = max(self.latest, end)
        heapq.heappush(self.ends, (end, request))
        self.stack.append(request)

    def _decode(self, most: int) -> list[int]:
        """Runs up to ``most`` decode steps in one program; returns the finished requests."""
        pages, base_counts, page_size, times = (
            self.pages,
            self.base_counts,
            self.replica.page_size,
            self.times,
        )
        steps = max(1, min(most, self.wanted, self.latest - self.steps))
        while steps > 1 and self._pages_of(steps) > pages.available:
            steps //= 2
        pages.ensure(self._pages_of(steps))  # requests that end do not take theirs
        blocked, ended = bool(self.waiting), []
        rows = self.decode_sizes[bisect.bisect_left(self.decode_sizes, self.decoding)]
        # A step takes the larger of two linear functions of the tokens read.
        fixed = rows * times.reduce_row + times.reduce
        compute = rows * (times.row + times.logits)
        weights, kv_token, pair = times.weights, times.kv_token, times.pair
        total, done = 0.0, 0
        while done < steps and self.decoding:
            pages.take(base_counts[-self.steps % page_size])
            self.steps += 1
            read = self.base_sum + self.decoding * self.steps
            total += fixed + max(weights + read * kv_token, compute + read * pair)
            done += 1
            if self.ends[0][0] <= self.steps:
                ended += self._ended_now()
                if blocked and ended:
                    break
        self.wanted = max(1, int(_ROUND_TRIP_SECONDS / max(total / done, 1e-6)))
        self.now += total
        self.busy += total
        self.runs += done
        return ended

    def _pages_of(self, steps: int) -> int:
        """Pages that all decoding requests take in so many steps."""
        size = self.replica.page_size
        return sum(self.base_counts[(-self.steps - i) % size] for i in range(steps))

    def _ended_now(self) -> list[int]:
        """Removes requests that had their last token; they hold their pages until it is returned."""
        ended, ends = [], self.ends
        while ends and ends[0][0] <= self.steps:
            end, request = heapq.heappop(ends)
            if self.end_of[request] == end:
                self._stop(request)
                ended.append(request)
        return ended

    def _end(self, request: int) -> None:
        """Returns the last token and releases the pages."""
        output, now = self.output[request], self.now
        self.generated[request] = output
        self.finish[request] = now
        limits = self.limits
        if limits and output > 1 and self.counted[request]:
            self.late_tokens += now - self.first[request] > limits.tpot * (output - 1)
        computed = self.prompt[request] + output - 1
        self.useful_tokens += computed
        self.pages.release(self._pages_to(request, computed, 0))
        self._release(request)


def _sizes(largest: int) -> list[int]:
    """Sizes of the engine's programs: ``largest``, and half of the next one each, down to 1."""
    sizes = [largest]
    while sizes[0] > 1:
        sizes.insert(0, -(-sizes[0] // 2))
    return sizes


def simulate(
    replica: Replica,
    requests: Requests,
    *,
    prefix_tokens: int = 0,
    limits: Limits | None = None,
    watch: Watch | None = None,
) -> Outcome:
    """Serves the requests until all are finished.

    Args:
      replica: the server.
      requests: in order of arrival.
      prefix_tokens: tokens of each shared prefix.
      limits: abort when they are missed.
      watch: called for each scheduling.

    Raises:
      ValueError: a request does not fit the pool, even alone.
    """
    return _Run(replica, requests, prefix_tokens, limits).run(watch)
