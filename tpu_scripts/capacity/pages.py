"""The pool of a simulated replica: how many pages are held, which stay behind, and which of these leave first.

The counting of ``jaxpaged.engine.PagedPool`` and its prefix index, without pages: see ``capacity_replica``.
"""

from __future__ import annotations

from collections import deque


class Pages:
    """Counts of a pool: pages that running requests hold, and cached ones in the order in which they can leave."""

    def __init__(self, num_pages: int, keeps: bool, num_prefixes: int, prefix_pages: int) -> None:
        """``keeps``: pages stay when nobody uses them, as with a prefix cache."""
        self.num_pages = num_pages
        self.keeps = keeps
        self.used = self.cached = self.peak = self.evictions = 0
        # [pages] each, so that whoever comes back takes its own out of the middle.
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
        """Makes so many pages free; there are as many that nobody uses."""
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

    def leave(self, count: int) -> None:
        """Pages of a request that is done; nobody will ask for them, but the pool does not know."""
        self.used -= count
        self._keep(count)

    def leave_for_now(self, request: int, count: int, whole: int) -> None:
        """Pages of a request that gives way, of which ``whole`` are full."""
        self.used -= count
        self._own[request] = self._keep(whole)

    def found(self, request: int, prefix: int) -> tuple[int, int, int]:
        """What a waiting request could begin with: whole pages of the shared beginning, whole ones of its own behind
        them, and how many of all these nobody uses now."""
        shared = self._prefix[prefix][0] if prefix >= 0 else 0
        idle = shared if prefix >= 0 and not self._users[prefix] else 0
        own = self._own.get(request)
        if own is None or (prefix >= 0 and shared < self.whole):
            return shared, 0, idle
        return shared, own[0], idle + own[0]

    def touch(self, request: int, prefix: int, shared: int, own: int) -> None:
        """The request, which waits on, has looked at what was found: of all that nobody uses, it leaves last."""
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
        """The request holds what was found."""
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

    def read(self, prefix: int, shared: int, whole: int) -> int:
        """A request that shared so many pages of its beginning read it up to ``whole`` pages: how many of its own can
        be found there from now on, because they were the first."""
        whole = min(whole, self.whole)
        if not self.keeps or self._prefix[prefix][0] != shared or whole <= shared:
            return 0
        if not shared:
            self._users[prefix] = 1
        self._prefix[prefix] = [whole]
        return whole - shared

    def let_go(self, prefix: int) -> None:
        """A request uses a shared beginning no more."""
        self._users[prefix] -= 1
        if not self._users[prefix]:
            count = self._prefix[prefix][0]
            self.used -= count
            self._prefix[prefix] = self._keep(count)
