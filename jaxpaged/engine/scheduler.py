"""Scheduler: admission, token budget and preemption, step by step.

Each step has a token budget. Running samples come first, oldest first, whether they decode or
prefill; the rest of the budget admits waiting samples. When pages run out, the newest sample is
preempted and nothing is admitted in that step.

Reference: Orca (iteration-level scheduling), Sarathi-Serve (chunked prefill), vLLM.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxpaged.engine.pool import Counts, Pool, Start, added, exceeds
from jaxpaged.engine.sample_state import SampleState

_MIN_FILL = 0.7
"""Share of a step's size below which a smaller step is preferred."""
_MIN_PREFILL = 16
"""Prefill tokens that a step has beside decoding samples, if that many are waiting."""


@dataclass(frozen=True)
class Plan:
    """The work of one step."""

    work: dict[SampleState, int] = field(default_factory=dict)
    """Tokens to compute of each sample."""
    steps: int = 1
    """Decode steps in one program."""
    stop_early: bool = False
    """True: return as soon as a sequence ends, because samples are waiting."""

    @property
    def masks(self) -> dict[int, np.ndarray]:
        """Masks of the constrained samples that sample a token, by slot."""
        masks = {}
        for sample, count in self.work.items():
            if sample.mask is not None and count == sample.num_uncomputed:
                assert sample.slot is not None
                masks[sample.slot] = sample.mask
        return masks

    @property
    def decodes(self) -> bool:
        """True if every sample computes one token and samples the next."""
        return all(count == 1 == sample.num_uncomputed for sample, count in self.work.items())


class Scheduler:
    """Queues of waiting and running samples.

    Args:
      pool: the page pool.
      num_slots: sequences of the cache.
      sizes: token counts that steps are compiled for, ascending; the last, at least ``num_slots``,
        is the budget.
      decode_steps: decode steps in one program, at most.
    """

    def __init__(self, pool: Pool, *, num_slots: int, sizes: Sequence[int], decode_steps: int) -> None:
        self.pool = pool
        self.running: list[SampleState] = []
        self._waiting: list[SampleState] = []
        # First in, first out: a slot's last text can be saved for as long as possible.
        self._free_slots = list(range(num_slots))
        self._sizes = sizes
        self._decode_steps = decode_steps
        self.wanted_steps = decode_steps
        """Decode steps that fit the longest acceptable round trip, as measured by the engine."""

    @property
    def waiting(self) -> tuple[SampleState, ...]:
        """Waiting samples, next one first."""
        return tuple(self._waiting)

    def add(self, sample: SampleState) -> None:
        """Queues a sample by priority and arrival."""
        bisect.insort(self._waiting, sample, key=lambda other: other.order)

    def dequeue(self, sample: SampleState) -> None:
        """Removes a sample from the queue."""
        self._waiting.remove(sample)

    def leave(self, sample: SampleState) -> None:
        """Removes a running sample and frees its slot."""
        self.running.remove(sample)
        assert sample.slot is not None
        self._free_slots.append(sample.slot)

    def preempt_newest(self) -> SampleState:
        """Moves the newest running sample back to the queue."""
        victim = max(self.running, key=lambda sample: sample.order)
        self.leave(victim)
        self.pool.preempt(victim)
        self.add(victim)
        return victim

    def plan(self) -> Plan:
        """Plans a step, with admissions and preemptions. The pages it needs are free afterwards."""
        work: dict[SampleState, int] = {}
        pages: dict[SampleState, Counts] = {}
        preempted = False
        budget = self._budget()
        for sample in sorted(self.running, key=lambda sample: sample.order):
            if sample.slot is None:
                continue
            count = min(sample.num_uncomputed, budget - sum(work.values()))
            if count == 0:
                continue
            needed = self.pool.pages_for(sample, count)
            while exceeds(added(needed, *pages.values()), self.pool.available):
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
        """Token budget of the next step.

        A step costs what its program was compiled for, padding included: a full smaller step and
        the rest in the next one is better than a half empty step.
        """
        wanted = sum(sample.num_uncomputed for sample in self.running)
        decoding = len(self.running)
        for sample, _ in zip(self._waiting, self._free_slots, strict=False):
            wanted += sample.num_uncomputed
        smaller = 0
        for size in self._sizes:
            if wanted <= size:
                enough = max(_MIN_FILL * size, decoding + _MIN_PREFILL)
                return size if wanted >= enough or smaller < decoding + _MIN_PREFILL else smaller
            smaller = size
        return self._sizes[-1]

    def _admit(self, work: dict[SampleState, int], pages: dict[SampleState, Counts], most: int) -> None:
        """Admits samples while there are slots, budget, and pages for all prefills in progress."""
        admitted: list[tuple[SampleState, Start]] = []
        whole = {s: self.pool.pages_ahead(s) for s in self.running if s.num_uncomputed > 1}
        promised = added(self.pool.no_pages, *(pages | whole).values())
        for sample in list(self._waiting):
            budget = most - sum(work.values())
            if not self._free_slots or budget == 0:
                break
            wanted = sample.request.slot if sample.index == 0 else None
            if not sample.ready or (wanted is not None and wanted not in self._free_slots):
                continue
            start = self.pool.start(sample, self.running)
            # Every running sample will soon need another page: admit none that would be preempted
            # at once.
            soon = (len(self.running) + len(admitted),) * len(promised)
            needed = added(promised, start.num_pages, soon)
            if exceeds(needed, self.pool.available) and (self.running or admitted):
                self.pool.cancel(start, sample)
                break
            self.dequeue(sample)
            sample.slot = self._free_slots[0] if wanted is None else wanted
            self._free_slots.remove(sample.slot)
            admitted.append((sample, start))
            promised = added(promised, start.num_pages)
            work[sample] = min(len(sample.tokens) - start.num_tokens, budget)
        if admitted:
            self.pool.admit(admitted)
            self.running += [sample for sample, _ in admitted]

    def _plan_of(self, work: dict[SampleState, int], preempted: bool) -> Plan:
        plan = Plan(work)
        constrained = any(sample.mask is not None for sample in work)
        if preempted or not work or not plan.decodes or constrained:
            return plan
        left = max(sample.limit - sample.num_generated for sample in work)
        steps = max(1, min(self._decode_steps, self.wanted_steps, left))
        while steps > 1 and exceeds(self._pages_of(work, steps), self.pool.available):
            steps //= 2
        return Plan(work, steps, stop_early=bool(self._waiting))

    def _pages_of(self, work: dict[SampleState, int], steps: int) -> Counts:
        each = (self.pool.pages_for(sample, max(count, steps)) for sample, count in work.items())
        return added(self.pool.no_pages, *each)
