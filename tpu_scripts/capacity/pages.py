"""Pool of a simulated replica: pages held, pages cached, and the order of eviction.

The counts of ``jaxpaged.engine.PagedPool`` and its prefix index, without pages; see ``replica``.
"""

from __future__ import annotations

from collections import deque


class Pages:
    """Counts of a pool: pages held by running requests, and cached ones in the order of eviction."""

    def __init__(self, num_pages: int, keeps: bool, num_prefixes: int, prefix_pages: int) -> None:
        """``keeps``: unused pages stay cached, as with a prefix cache."""
        self.num_pages = num_pages
        self.keeps = keeps
        self.used = self.cached = self.peak = self.evictions = 0
        # [pages] each, so that a request that returns takes its own out of the middle.
        self._order: deque[list[int]] = deque()
        self._own: dict[int, list[int]] = {}
        self.whole = prefix_pages
        self._prefix = [[0] for _ in range(num_prefixes)]
        self._users = [0] * num_prefixes

    @property
    def available(self) -> int:
        return self.num_pages - self.used

    def take(self, count: int) -> None:
        self.ensure(count)
        self.used += count
        if self.used > self.peak:
            self.peak = self.used

    def ensure(self, count: int) -> None:
        """Makes ``count`` pages free by evicting cached ones."""
        missing = count + self.used + self.cached - self.num_pages
        if missing > 0:
            self._evict(missing)

    def _evict(self, count: int) -> None:
        self.evictions += count
        self.cached -= count
        while count:
            oldest = self._order[0]
            given = min(count, oldest[0])
            oldest[0] -= given
            count -= given
            if not oldest[0]:
                self._order.popleft()

    def _keep(self, count: int) -> list[int]:
        pages = [count if self.keeps else 0]
        self.cached += pages[0]
        if pages[0]:
            self._order.append(pages)
        return pages

    def release(self, count: int) -> None:
        """Releases pages of a finished request; they stay cached, as the pool cannot know that none will need them."""
        self.used -= count
        self._keep(count)

    def preempt(self, request: int, count: int, whole: int) -> None:
        """Releases pages of a preempted request, of which ``whole`` are full."""
        self.used -= count
        self._own[request] = self._keep(whole)

    def found(self, request: int, prefix: int) -> tuple[int, int, int]:
        """Cached pages of a waiting request: whole ones of its shared prefix, its own behind them, and unused ones."""
        shared = self._prefix[prefix][0] if prefix >= 0 else 0
        idle = shared if prefix >= 0 and not self._users[prefix] else 0
        own = self._own.get(request)
        if own is None or (prefix >= 0 and shared < self.whole):
            return shared, 0, idle
        return shared, own[0], idle + own[0]

    def touch(self, request: int, prefix: int, shared: int, own: int) -> None:
        """Moves the pages found for a request that keeps waiting to the end of the order of eviction."""
        if own:
            self._own[request] = self._moved_behind(self._own[request])
        if shared and not self._users[prefix]:
            self._prefix[prefix] = self._moved_behind(self._prefix[prefix])

    def _moved_behind(self, pages: list[int]) -> list[int]:
        moved = [pages[0]]
        pages[0] = 0
        while self._order and not self._order[0][0]:
            self._order.popleft()
        self._order.append(moved)
        return moved

    def acquire(self, request: int, prefix: int, shared: int, own: int) -> None:
        """Gives a request the pages that were found."""
        if shared:
            if not self._users[prefix]:
                self._take_out(self._prefix[prefix], shared)
                self._prefix[prefix] = [shared]
            self._users[prefix] += 1
        if own:
            self._take_out(self._own[request], own)
        self._own.pop(request, None)

    def _take_out(self, pages: list[int], count: int) -> None:
        pages[0] = 0
        self.cached -= count
        self.used += count
        if self.used > self.peak:
            self.peak = self.used
        while self._order and not self._order[0][0]:
            self._order.popleft()

    def publish(self, prefix: int, shared: int, whole: int) -> int:
        """Adds a request's prefilled pages to the shared prefix; returns how many, 0 if they were there."""
        whole = min(whole, self.whole)
        if not self.keeps or self._prefix[prefix][0] != shared or whole <= shared:
            return 0
        if not shared:
            self._users[prefix] = 1
        self._prefix[prefix] = [whole]
        return whole - shared

    def release_prefix(self, prefix: int) -> None:
        """Releases one user of a shared prefix."""
        self._users[prefix] -= 1
        if not self._users[prefix]:
            count = self._prefix[prefix][0]
            self.used -= count
            self._prefix[prefix] = self._keep(count)
