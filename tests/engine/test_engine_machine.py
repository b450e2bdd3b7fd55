"""Random requests, aborts and steps on small pools: every text is right, every page comes back."""

from __future__ import annotations

import functools
import os

import numpy as np
import pytest
from engine_kit import FEW_PAGES, N_CTX, alone, collect, greedy, make_engine, prompt
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from toy_transformer import WINDOW, toy_groups

from jaxpaged.engine import Engine, QueueFullError
from jaxpaged.engine.stats import CACHED, FREE
from jaxpaged.engine.swap import SwapCosts


@functools.cache
def engine_of(windows: tuple[int | None, ...]) -> Engine:
    """One engine for all examples: what an example leaves behind in the prefix cache is the next one's beginning."""
    if len(windows) == 1:
        return make_engine(num_pages=FEW_PAGES)
    # Of the window's pages, as many as two sequences hold at most.
    return make_engine(groups=toy_groups(), num_pages=(FEW_PAGES, 12))


class EngineMachine(RuleBasedStateMachine):
    """Requests of a model whose only layer sees everything."""

    windows: tuple[int | None, ...] = (None,)

    def __init__(self) -> None:
        super().__init__()
        self.engine = engine_of(self.windows)
        (self.shard,) = self.engine.shards
        self.requests: dict = {}
        self.results: dict = {}
        self.count = 0

    @rule(
        # A few beginnings, so that many are shared.
        beginning=st.integers(0, 3),
        shared=st.integers(1, 30),
        own=st.sampled_from([0, 0, 1, 7, 20]),
        seed=st.integers(0, 3),
        new=st.integers(0, 24),
        n=st.integers(1, 3),
        salt=st.sampled_from(["", "", "a"]),
        priority=st.integers(0, 1),
        cache_prompt=st.booleans(),
    )
    def add(self, beginning, shared, own, seed, new, n, salt, priority, cache_prompt):
        text = prompt(beginning, 30)[:shared] + prompt(100 + seed, own)
        request = greedy(
            f"r{self.count}", text, new, n=n, cache_salt=salt, priority=priority, cache_prompt=cache_prompt
        )
        self.count += 1
        waiting = len({sample.request.request_id for sample in self.shard.scheduler.waiting})
        if waiting == 8:
            with pytest.raises(QueueFullError):
                self.engine.add_request(request)
            return
        self.engine.add_request(request)
        self.requests[request.request_id] = request

    @rule(steps=st.integers(1, 6))
    def step(self, steps):
        for _ in range(steps):
            collect(self.results, self.engine.step())
            self.engine.check_state()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        self.engine.abort(request_id)
        del self.requests[request_id]

    @rule(cheaper=st.booleans())
    def change_what_is_cheaper(self, cheaper):
        self.shard.pool.costs = SwapCosts()
        if cheaper:
            self.shard.pool.costs.tokens_per_second = 1e-3
            self.shard.pool.costs.bytes_per_second = 1e12

    @invariant()
    def counts_agree(self):
        stats = self.engine.stats()
        assert stats.pages_used + stats.pages_cached + stats.pages_free == stats.pages_total
        state = self.engine.pool_state().state
        assert np.count_nonzero(state == FREE) == stats.pages_free
        assert np.count_nonzero(state == CACHED) == stats.pages_cached
        assert stats.waste < 1
        assert self.shard.pool.swapped_bytes >= 0

    def teardown(self):
        for _ in range(3000):
            if not self.engine.has_work:
                break
            collect(self.results, self.engine.step())
            self.engine.check_state()
        assert not self.engine.has_work
        for request in self.requests.values():
            count = min(request.max_new_tokens, N_CTX - len(request.prompt))
            expected = alone(request.prompt, count, self.windows)
            for index in range(request.n):
                assert self.results[request.request_id, index].tokens == expected
        stats = self.engine.stats()
        assert stats.running == stats.waiting == stats.pages_used == self.shard.pool.swapped_bytes == 0
        assert stats.pages_free + stats.pages_cached == stats.pages_total
        assert len(self.shard.scheduler._free_slots) == self.engine.max_seqs
        assert stats.compiled_late == 0


class GroupsMachine(EngineMachine):
    """Requests of a model whose second layer sees a window."""

    windows = (None, WINDOW)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=int(os.environ.get("JAXPAGED_ENGINE_EXAMPLES", "12")), stateful_step_count=30
)
TestGroupsMachine = GroupsMachine.TestCase
TestGroupsMachine.settings = TestEngineMachine.settings
