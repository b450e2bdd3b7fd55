"""Random operations on a donated cache, compared with the oracle: ok, entries, counts, contents."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from cache_oracle import (
    NARROW,
    Oracle,
    assert_same,
    jit_ask,
    jit_clear,
    jit_copy,
    jit_defragment,
    jit_keep,
    jit_remove,
    jit_reorder,
    jit_shift,
    jit_step,
    make_cache,
    snapshot,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from jaxpaged.cache.interface import ALL
from jaxpaged.pages.batch import Batch

MAX_SEQS, NUM_TOKENS = 4, 40
ids = st.integers(0, MAX_SEQS - 1)
# Positions beyond the end, negative ones, and both sides of page boundaries.
positions = st.integers(-2, 50) | st.sampled_from([7, 8, 9, 15, 16, 17, 24, 32])
few = st.sampled_from([0, 1, 1, 1, 2, 9])
counts = st.sampled_from([0, 0, 1, 1, 1, 2, 3, 7, 8, 9, 17])


class CacheMachine(RuleBasedStateMachine):
    """Many pages per sequence: the pool is exhausted before a row is full."""

    sizes: ClassVar[dict[str, int]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.cache = make_cache(max_seqs=MAX_SEQS, **self.sizes)
        self.oracle = Oracle.of(self.cache)
        self.token = 0

    def finish(self, ok: bool, expected: bool, before: list[np.ndarray]) -> None:
        assert bool(ok) == expected
        self.check()
        if not expected:
            assert_same(self.cache, before)
        needed, can, fits, length, low, high, used = map(
            np.asarray, jit_ask(self.cache, jnp.zeros(MAX_SEQS, jnp.int32))
        )
        assert not needed.any() and can and fits.all() and used == self.oracle.pages_used
        for seq in range(MAX_SEQS):
            contents = self.oracle.contents(seq)
            assert length[seq] == len(contents)
            assert (low[seq], high[seq]) == ((contents[0][0], contents[-1][0]) if contents else (-1, -1))

    def write(self, num_new: jax.Array) -> tuple[Batch, jax.Array]:
        """Reserves, and writes the next tokens."""
        self.cache, batch, ok = jit_step(self.cache, num_new, self.token, num_tokens=NUM_TOKENS)
        return batch, ok

    def check(self) -> None:
        self.oracle.check(self.cache)

    @property
    def crowded(self) -> bool:
        """Precondition of operations that empty sequences: a third of the pool is in use."""
        return self.oracle.pages_used > self.oracle.num_pages // 3

    def add(self, num_new: list[int]) -> None:
        before = snapshot(self.cache)
        counts = jnp.asarray(num_new, jnp.int32)
        needed, can, fits, *_ = map(np.asarray, jit_ask(self.cache, counts))
        wide = [
            self.oracle.entries_after(seq, n) <= self.cache.max_pages_per_seq for seq, n in enumerate(num_new)
        ]
        free = self.oracle.num_pages - self.oracle.pages_used
        expected, taken = self.oracle.reserve(num_new, self.token, NUM_TOKENS)
        batch, ok = self.write(counts)
        if min(num_new) >= 0:
            assert needed.tolist() == taken
            assert bool(can) == bool(fits.all())
            for seq, pages in enumerate(taken):  # by id, skipping those that do not fit
                assert fits[seq] == (wide[seq] and pages <= free)
                free -= pages if fits[seq] else 0
            if sum(num_new) <= NUM_TOKENS:
                assert bool(can) == expected
        assert np.asarray(batch.q_lens).tolist() == (num_new if expected else [0] * MAX_SEQS)
        self.token += sum(num_new) if expected else 0
        self.finish(ok, expected, before)

    @initialize(count=counts)
    def start(self, count: int) -> None:
        self.add([count, 0, 0, 0])

    @rule(num_new=st.lists(counts, min_size=MAX_SEQS, max_size=MAX_SEQS))
    def reserve(self, num_new: list[int]) -> None:
        self.add(num_new)

    @rule()
    def decode(self) -> None:
        self.add([int(self.oracle.length(seq) > 0) for seq in range(MAX_SEQS)])

    @precondition(lambda self: self.crowded)
    @rule(seq=ids | st.just(ALL), p0=positions, p1=positions)
    def remove(self, seq: int, p0: int, p1: int) -> None:
        before = snapshot(self.cache)
        expected = self.oracle.remove(range(MAX_SEQS) if seq == ALL else [seq], p0, p1)
        self.cache, ok = jit_remove(self.cache, seq, p0, p1)
        self.finish(ok, expected, before)

    @rule(seq=ids | st.just(ALL), at=st.integers(0, 99), count=st.sampled_from([1, 2, 3, 8, 11]))
    def punch(self, seq: int, at: int, count: int) -> None:
        """Removes a range of existing tokens."""
        p0 = at % max(1, max(len(self.oracle.contents(i)) for i in range(MAX_SEQS)))
        self.remove(seq, p0, p0 + count)

    @precondition(lambda self: self.crowded)
    @rule(seq=ids | st.just(ALL))
    def forget(self, seq: int) -> None:
        self.remove(seq, 0, -1)

    @precondition(lambda self: self.crowded)
    @rule(marked=st.sets(ids), p0=positions, p1=positions)
    def remove_marked(self, marked: set[int], p0: int, p1: int) -> None:
        before = snapshot(self.cache)
        expected = self.oracle.remove(marked, p0, p1)
        mask = jnp.asarray([seq in marked for seq in range(MAX_SEQS)])
        self.cache, ok = jit_remove(self.cache, mask, p0, p1)
        self.finish(ok, expected, before)

    @rule(seq=ids | st.just(ALL), p0=positions, p1=positions | st.just(-1), delta=st.integers(-20, 20))
    def shift(self, seq: int, p0: int, p1: int, delta: int) -> None:
        before = snapshot(self.cache)
        expected = self.oracle.shift(range(MAX_SEQS) if seq == ALL else [seq], p0, p1, delta)
        self.cache, ok = jit_shift(self.cache, seq, p0, p1, delta)
        self.finish(ok, expected, before)

    @rule(
        marked=st.sets(ids, min_size=1),
        cuts=st.lists(
            st.tuples(st.integers(0, 99), st.sampled_from([1, 2, 3, 8, 11])),
            min_size=MAX_SEQS,
            max_size=MAX_SEQS,
        ),
        defragments=st.booleans(),
    )
    def context_shift(self, marked: set[int], cuts: list[tuple[int, int]], defragments: bool) -> None:
        """Removes a range per sequence, shifts the tokens behind it, and maybe defragments."""
        mask = jnp.asarray([seq in marked for seq in range(MAX_SEQS)])
        held = [[position for position, _ in self.oracle.contents(seq)] or [0] for seq in range(MAX_SEQS)]
        first = [positions[at % len(positions)] for positions, (at, _) in zip(held, cuts, strict=True)]
        p0, p1 = jnp.asarray(first), jnp.asarray([p + n for p, (_, n) in zip(first, cuts, strict=True)])
        before, old = snapshot(self.cache), self.oracle.sequences
        expected = all(self.oracle.remove([seq], int(p0[seq]), int(p1[seq])) for seq in marked)
        if not expected:
            self.oracle.sequences = old
        self.cache, ok = jit_remove(self.cache, mask, p0, p1)
        self.finish(ok, expected, before)
        if not expected:
            return
        before, old = snapshot(self.cache), self.oracle.sequences
        expected = all(self.oracle.shift([seq], int(p1[seq]), -1, int(p0[seq] - p1[seq])) for seq in marked)
        if not expected:
            self.oracle.sequences = old
        self.cache, ok = jit_shift(self.cache, mask, p1, -1, p0 - p1)
        self.finish(ok, expected, before)
        if defragments:
            self.defragment(min(marked))

    @rule(seq=ids | st.just(ALL))
    def defragment(self, seq: int) -> None:
        before = snapshot(self.cache)
        expected = self.oracle.defragment(range(MAX_SEQS) if seq == ALL else [seq])
        self.cache, ok = jit_defragment(self.cache, seq)
        self.finish(ok, expected, before)

    @rule(source=st.lists(st.integers(0, MAX_SEQS), min_size=MAX_SEQS, max_size=MAX_SEQS))
    def reorder(self, source: list[int]) -> None:
        if not self.crowded:  # empty sequences stay empty, or all soon would be
            source = [i if i == MAX_SEQS or self.oracle.sequences[i] else own for own, i in enumerate(source)]
        self.oracle.reorder(source)
        self.cache = jit_reorder(self.cache, jnp.asarray(source))
        self.finish(True, True, [])

    @rule(src=ids, dst=ids, p0=positions, p1=positions)
    def copy(self, src: int, dst: int, p0: int, p1: int) -> None:
        before = snapshot(self.cache)
        expected = self.oracle.copy(src, dst, p0, p1)
        self.cache, ok = jit_copy(self.cache, src, dst, p0, p1)
        self.finish(ok, expected, before)

    @rule(
        src=ids, others=st.sets(ids, min_size=1), num_new=st.lists(few, min_size=MAX_SEQS, max_size=MAX_SEQS)
    )
    def fork(self, src: int, others: set[int], num_new: list[int]) -> None:
        """Several sequences that share a last page write to it in one step."""
        self.remove_marked(others - {src}, 0, -1)
        for dst in sorted(others - {src}):
            self.copy(src, dst, 0, -1)
        self.add(num_new)

    @precondition(lambda self: self.crowded)
    @rule(seq=st.integers(-1, MAX_SEQS))
    def keep(self, seq: int) -> None:
        before = snapshot(self.cache)
        expected = 0 <= seq < MAX_SEQS
        if expected:
            self.oracle.remove([i for i in range(MAX_SEQS) if i != seq], 0, -1)
        self.cache, ok = jit_keep(self.cache, seq)
        self.finish(ok, expected, before)

    @precondition(lambda self: self.crowded)
    @rule()
    def clear(self) -> None:
        self.cache = jit_clear(self.cache)
        self.oracle.sequences = [[] for _ in range(MAX_SEQS)]
        self.finish(True, True, [])


class NarrowMachine(CacheMachine):
    """Few entries per sequence: splits and fresh pages overflow the table's rows."""

    sizes = NARROW


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=20, stateful_step_count=50)
TestNarrow = NarrowMachine.TestCase
TestNarrow.settings = TestCache.settings
