"""Scheduler: which samples run, what a step computes of each, who waits and who gives way.

One budget of tokens a step. Those that run go first, oldest first, decoding and reading alike; what is left of the
budget admits those that wait. When pages run out the newest gives way, and nobody is admitted in that step.

Reference: Orca (iteration-level scheduling), Sarathi-Serve (chunked prompts), vLLM.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxpaged.engine.pool import Pool, Start
from jaxpaged.engine.sample_state import SampleState

_LEAST_FILLED = 0.7
"""Of a step's size: below that a smaller step is taken."""
_LEAST_READ = 16
"""Tokens of prompts that a step reads beside those that decode, if there are as many."""


@dataclass(frozen=True)
class Plan:
    """What one step computes."""

    work: dict[SampleState, int] = field(default_factory=dict)
    """How many tokens of which samples."""
    steps: int = 1
    """Tokens to draw for each, one after the other."""
    stop_early: bool = False
    """Whether somebody waits for a sequence to end."""

    @property
    def decodes(self) -> bool:
        """Whether every sample computes one token and draws the next."""
        return all(count == 1 == sample.num_uncomputed for sample, count in self.work.items())


class Scheduler:
    """Waiting and running samples.

    Args:
      pool: the pages.
      num_slots: sequences of the cache.
      sizes: tokens that steps are compiled for, ascending; the last one, at least ``num_slots``, is the budget.
      decode_steps: most tokens of each sample between two looks at those who wait.
    """

    def __init__(self, pool: Pool, *, num_slots: int, sizes: Sequence[int], decode_steps: int) -> None:
        self.pool = pool
        self.running: list[SampleState] = []
        self._waiting: list[SampleState] = []
        # The one that was free longest comes next, so that what a slot held last can be asked for as long as may be.
        self._free_slots = list(range(num_slots))
        self._sizes = sizes
        self._decode_steps = decode_steps
        self.wanted_steps = decode_steps
        """Steps of a round trip that its user would not notice."""

    @property
    def waiting(self) -> tuple[SampleState, ...]:
        """Who waits, the next one first."""
        return tuple(self._waiting)

    def add(self, sample: SampleState) -> None:
        """The sample waits, among those of its priority at the place of its arrival."""
        bisect.insort(self._waiting, sample, key=lambda other: other.order)

    def drop(self, sample: SampleState) -> None:
        """The sample does not wait any more."""
        self._waiting.remove(sample)

    def leave(self, sample: SampleState) -> None:
        """The sample runs no more; its slot serves another."""
        self.running.remove(sample)
        assert sample.slot is not None
        self._free_slots.append(sample.slot)

    def preempt_newest(self) -> SampleState:
        """The newest of the running samples waits again."""
        victim = max(self.running, key=lambda sample: sample.order)
        self.leave(victim)
        self.pool.preempt(victim)
        self.add(victim)
        return victim

    def plan(self) -> Plan:
        """Decides on a step; admits and preempts. Its pages are free when this returns."""
        work: dict[SampleState, int] = {}
        pages: dict[SampleState, int] = {}
        preempted = False
        budget = self._budget()
        for sample in sorted(self.running, key=lambda sample: sample.order):
            if sample.slot is None:
                continue
            count = min(sample.num_uncomputed, budget - sum(work.values()))
            if count == 0:
                continue
            needed = self.pool.pages_for(sample, count)
            while needed + sum(pages.values()) > self.pool.available:
                preempted = True
                victim = self.preempt_newest()
                work.pop(victim, None)
                pages.pop(victim, None)
                if victim is sample:
                    break
            else:
                work[sample], pages[sample] = count, needed
        if not preempted:
            self._admit(work, pages, budget)
        plan = self._plan_of(work, preempted)
        self.pool.ensure(self._pages_of(work, plan.steps))
        return plan

    def _budget(self) -> int:
        """Tokens of the next step.

        A step costs what it was compiled for, not what is in it. So rather than fill half of a large one, a smaller one
        is filled now, and what is left goes into the next.
        """
        wanted = sum(sample.num_uncomputed for sample in self.running)
        decoding = len(self.running)
        for sample, _ in zip(self._waiting, self._free_slots, strict=False):
            wanted += sample.num_uncomputed
        smaller = 0
        for size in self._sizes:
            if wanted <= size:
                enough = max(_LEAST_FILLED * size, decoding + _LEAST_READ)
                return size if wanted >= enough or smaller < decoding + _LEAST_READ else smaller
            smaller = size
        return self._sizes[-1]

    def _admit(self, work: dict[SampleState, int], pages: dict[SampleState, int], most: int) -> None:
        """Lets samples in while there are slots, budget, and pages for all that is still to be read."""
        admitted: list[tuple[SampleState, Start]] = []
        promised = sum(pages.values()) + sum(
            self.pool.pages_for(sample, sample.num_uncomputed) - pages.get(sample, 0)
            for sample in self.running
            if sample.num_uncomputed > 1
        )
        for sample in list(self._waiting):
            budget = most - sum(work.values())
            if not self._free_slots or budget == 0:
                break
            wanted = sample.request.slot if sample.index == 0 else None
            if not sample.ready or (wanted is not None and wanted not in self._free_slots):
                continue
            start = self.pool.start(sample, self.running)
            # Whoever decodes will want a page soon: to admit, and to preempt at once, helps nobody.
            soon = len(self.running) + len(admitted)
            if promised + start.num_pages + soon > self.pool.available and (self.running or admitted):
                self.pool.cancel(start)
                break
            self.drop(sample)
            sample.slot = self._free_slots[0] if wanted is None else wanted
            self._free_slots.remove(sample.slot)
            admitted.append((sample, start))
            promised += start.num_pages
            work[sample] = min(len(sample.tokens) - start.num_tokens, budget)
        if admitted:
            self.pool.admit(admitted)
            self.running += [sample for sample, _ in admitted]

    def _plan_of(self, work: dict[SampleState, int], preempted: bool) -> Plan:
        plan = Plan(work)
        if preempted or not work or not plan.decodes:
            return plan
        # Whoever waits now waits for a sequence to end.
        blocked = bool(self._waiting)
        left = max(sample.limit - sample.num_generated for sample in work)
        steps = max(1, min(self._decode_steps, self.wanted_steps, left))
        while steps > 1 and self._pages_of(work, steps) > self.pool.available:
            steps //= 2
        return Plan(work, steps, stop_early=blocked)

    def _pages_of(self, work: dict[SampleState, int], steps: int) -> int:
        return sum(self.pool.pages_for(sample, max(count, steps)) for sample, count in work.items())
