"""Laws of caches of several layer groups: each group is the cache that it would be alone, or nothing happens."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_oracle import assert_same, counted, snapshot
from groups_kit import (
    MAX_SEQS,
    NUM_TOKENS,
    PAGE_SIZE,
    contents,
    filled,
    grouped,
    jit,
    jit_step,
    layer_groups,
    write,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

import jaxpaged as ops
from jaxpaged import GroupedKVCache, LayerGroup, OutOfPages, PagedKVCache, check_invariants, reserve_or_raise
from jaxpaged.cache import InvariantError
from jaxpaged.cache.creation import create_untouched
from jaxpaged.cache.interface import ALL
from jaxpaged.pages.allocator import from_ref_counts
from jaxpaged.pages.rope import Rope

ids = st.integers(0, MAX_SEQS - 1)
positions = st.integers(-2, 60) | st.sampled_from([7, 8, 9, 15, 16, 17, 24, 32])
counts = st.sampled_from([0, 0, 1, 1, 1, 2, 3, 7, 8, 9, 17])


def step_alone(cache: PagedKVCache, num_new: jax.Array, first_token: jax.Array) -> Any:
    cache, batch, ok = ops.reserve(cache, num_new, num_tokens=NUM_TOKENS)
    return write(cache, batch, jnp.where(batch.valid, first_token + jnp.arange(NUM_TOKENS), -1)), batch, ok


jit_step_alone = counted(step_alone)
jit_can = counted(ops.can_reserve)


class GroupsMachine(RuleBasedStateMachine):
    """A cache of two groups beside the lone cache that sees everything, of as many pages."""

    window = 12

    def __init__(self) -> None:
        super().__init__()
        self.cache = grouped(self.window)
        self.alone = PagedKVCache.create(
            num_layers=1, num_kv_heads=1, head_dim=4, num_pages=20, max_seqs=MAX_SEQS, page_size=PAGE_SIZE,
            rope=Rope.create(()),
        )  # fmt: skip
        self.token = 0

    def finish(self, new: Any, alone: Any, ok: Any, ok_alone: Any, reserved: bool = False) -> None:
        before = self.cache
        assert not ok or ok_alone, "a group that sees everything succeeds whenever all groups do"
        if ok:
            self.cache, self.alone = new, alone
        elif reserved:  # pages that nothing sees may have been freed
            assert_same(new.parts[0].table, snapshot(before.parts[0].table))
            self.cache = new
        else:
            assert_same(new, snapshot(before))
        check_invariants(self.cache)
        full, narrow = map(contents, self.cache.parts)
        assert full == contents(self.alone)
        for seq in range(MAX_SEQS):
            assert narrow[seq].items() <= full[seq].items()
            seen = max(full[seq], default=-1) + 2 - self.window
            assert {p for p in full[seq] if p >= seen} <= set(narrow[seq])

    @rule(num_new=st.lists(counts, min_size=MAX_SEQS, max_size=MAX_SEQS))
    def reserve(self, num_new: list[int]) -> None:
        given = jnp.asarray(num_new, jnp.int32)
        can = jit_can(self.cache, given)
        new, batch, ok = jit_step(self.cache, given, self.token)
        alone, batch_alone, ok_alone = jit_step_alone(self.alone, given, self.token)
        if sum(num_new) <= NUM_TOKENS:
            assert bool(can) == bool(ok)
        if ok:
            for name in ("sequence", "position", "rope_positions", "cu_q_lens"):
                np.testing.assert_array_equal(getattr(batch, name), getattr(batch_alone, name))
            # What a step adds, and the window behind it, in whole pages.
            held = -(-(np.asarray(num_new) + self.window) // PAGE_SIZE) + 2
            assert (np.asarray(new.parts[1].table.num_entries) <= held + self.cuts).all()
        self.token += sum(num_new) if ok else 0
        self.finish(new, alone, ok, ok_alone, reserved=True)

    cuts = 0
    """Entries that edits inside of pages may have added to any sequence."""

    @rule()
    def decode(self) -> None:
        self.reserve([int(n > 0) for n in np.asarray(self.cache.lengths)])

    @rule()
    def decode_on(self) -> None:
        for _ in range(9):
            self.decode()

    @rule(seq=ids, count=st.integers(20, NUM_TOKENS))
    def grow(self, seq: int, count: int) -> None:
        self.reserve([count * (i == seq) for i in range(MAX_SEQS)])

    def apply(self, name: str, *arguments: Any) -> bool:
        new, ok = jit[name](self.cache, *arguments)
        alone, ok_alone = jit[name](self.alone, *arguments)
        self.finish(new, alone, ok, ok_alone)
        return bool(ok)

    @rule(seq=ids | st.just(ALL), p0=positions, p1=positions)
    def remove(self, seq: int, p0: int, p1: int) -> None:
        self.cuts += self.apply("seq_remove", seq, p0, p1)

    @rule(seq=ids, count=st.integers(1, 20))
    def take_back(self, seq: int, count: int) -> None:
        """Removes the newest tokens: possible as long as the window before them is held."""
        end = int(ops.seq_position_max(self.cache)[seq]) + 1
        held = contents(self.cache.parts[1])[seq]
        full = contents(self.cache.parts[0])[seq]
        p0 = max(0, end - count)
        possible = {p for p in full if p0 + 1 - self.window <= p < p0} <= set(held)
        assert self.apply("seq_remove", seq, p0, -1) == possible

    @rule(seq=ids, keep=st.sampled_from([0, 3]), half=st.booleans())
    def context_shift(self, seq: int, keep: int, half: bool) -> None:
        end = int(ops.seq_position_max(self.cache)[seq]) + 1
        discard = (end - keep) // 2 if half else 1
        if discard > 0 and self.apply("seq_remove", seq, keep, keep + discard):
            self.cuts += 1
            self.cuts += self.apply("seq_shift", seq, keep + discard, -1, -discard)

    @rule(seq=ids | st.just(ALL), p0=positions, p1=positions | st.just(-1), delta=st.integers(-20, 20))
    def shift(self, seq: int, p0: int, p1: int, delta: int) -> None:
        self.cuts += 2 * self.apply("seq_shift", seq, p0, p1, delta)

    @rule(seq=ids | st.just(ALL))
    def defragment(self, seq: int) -> None:
        before = [contents(part) for part in self.cache.parts]
        self.apply("seq_defragment", seq)
        assert [contents(part) for part in self.cache.parts] == before

    @rule(src=ids, dst=ids, p1=st.sampled_from([-1, -1, 9, 17]))
    def fork(self, src: int, dst: int, p1: int) -> None:
        if src != dst:
            self.apply("seq_remove", dst, 0, -1)
        self.apply("seq_copy", src, dst, 0, p1)

    @rule(source=st.lists(ids, min_size=MAX_SEQS, max_size=MAX_SEQS))
    def reorder(self, source: list[int]) -> None:
        new, alone = (jit["seq_reorder"](cache, jnp.asarray(source)) for cache in (self.cache, self.alone))
        self.finish(new, alone, True, True)

    @rule(seq=ids)
    def keep(self, seq: int) -> None:
        self.apply("seq_keep", seq)


class WideMachine(GroupsMachine):
    """A window that most texts fit in."""

    window = 33


TestGroups = GroupsMachine.TestCase
TestGroups.settings = settings(max_examples=15, stateful_step_count=40)
TestWide = WideMachine.TestCase
TestWide.settings = TestGroups.settings


def test_a_shift_fails_where_the_window_would_reach_tokens_that_were_freed() -> None:
    cache = filled(grouped(window=33, num_pages=30), [57, 0, 0, 0])
    assert int(cache.parts[1].seq_position_min()[0]) > 3
    cache, ok = jit["seq_remove"](cache, 0, 3, 40)
    assert ok  # the next token, at position 57, sees none of the first three
    shifted, ok = jit["seq_shift"](cache, 0, 40, -1, -37)
    assert not ok  # at position 20 it would
    assert_same(shifted, snapshot(cache))
    cache, ok = jit["seq_remove"](cache, 0, 0, 3)
    assert ok
    cache, ok = jit["seq_shift"](cache, 0, 40, -1, -40)
    assert ok and cache.lengths.tolist() == [17, 0, 0, 0]


def test_tokens_are_taken_back_as_long_as_the_window_before_them_is_held() -> None:
    cache = filled(grouped(num_pages=30), [57, 0, 0, 0])
    held = int(cache.parts[1].seq_position_min()[0])
    for p0 in range(57, 1, -1):
        _, ok = jit["seq_remove"](cache, 0, p0, -1)
        assert bool(ok) == (p0 + 1 - 12 >= held)
        assert bool(jit["seq_copy"](cache, 0, 1, 0, p0)[1]) == bool(ok)


def test_a_step_fails_in_all_groups_if_it_fails_in_one() -> None:
    cache = grouped(num_pages=(4, 20))
    cache = filled(cache, [8, 8, 8, 8])
    before = snapshot(cache)
    assert not ops.can_reserve(cache, jnp.asarray([1, 0, 0, 0]))
    after, batch, ok = jit_step(cache, jnp.asarray([1, 0, 0, 0]), 0)
    assert not ok and int(batch.num_valid) == 0
    assert_same(after, before)
    with pytest.raises(OutOfPages, match=r"out of pages: 1 requested, 0 free"):
        reserve_or_raise(cache, np.array([1, 0, 0, 0]))
    assert cache.pages_needed(jnp.asarray([1, 0, 9, 0])).tolist() == [[1, 1], [0, 0], [2, 2], [0, 0]]


def test_groups_are_defragmented_all_or_none() -> None:
    def forked(num_pages: tuple[int, int]) -> GroupedKVCache:
        """Two sequences that share two pages, of which one has a hole that a page would be saved without."""
        cache = filled(grouped(num_pages=num_pages), [16, 0, 0, 0])
        for name, *arguments in (("seq_copy", 0, 1), ("seq_remove", 1, 4, 12)):
            cache, ok = jit[name](cache, *arguments)
            assert ok
        return cache

    for num_pages in ((3, 2), (2, 3)):  # a page is free in one group, and each needs one
        cache = forked(num_pages)
        before = snapshot(cache)
        after, ok = jit["seq_defragment"](cache, ALL)
        assert not ok
        assert_same(after, before)
    after, ok = jit["seq_defragment"](forked((3, 3)), ALL)
    assert ok and after.parts[0].table.num_entries.tolist() == [2, 2, 0, 0]
    assert (np.asarray(after.parts[0].table.pages[1, :2]) == int(after.parts[0].table.pages[1, 0])).all()
    check_invariants(after)


def test_invariants_are_those_of_every_group_and_between_groups() -> None:
    cache = filled(grouped(num_pages=30), [40, 9, 0, 0])
    full, local = cache.parts
    assert int(local.seq_position_min()[0]) > 0
    check_invariants(cache)
    pinned = [jnp.zeros(30, jnp.int32).at[:3].set(1), jnp.zeros(30, jnp.int32).at[7].set(2)]
    parts = [
        replace(part, allocator=from_ref_counts(part.allocator.ref_counts + pins))
        for part, pins in zip(cache.parts, pinned, strict=True)
    ]
    check_invariants(replace(cache, parts=tuple(parts)), pinned)

    def says(message: str, *parts: PagedKVCache, pins: Any = None) -> None:
        with pytest.raises(InvariantError, match=message):
            check_invariants(replace(cache, parts=parts), pins)

    one, last = r"^group of layer 1: ", r"^group of layers 0, 2; window 12: "
    says(one + "page 0: reference count 2, but 1 ", parts[0], local)
    says(last + "page 7: reference count ", full, parts[1], pins=[np.zeros(30, int), np.zeros(30, int)])
    says(last + "sequence 1: position 8, which the next token sees, is missing",
         full, local.seq_remove(1, 8, 9)[0])  # fmt: skip
    says(last + "sequence 0: position 29, .*sees, is missing", full, local.seq_remove(0, 0, -1)[0])
    says(last + "sequence 1: position 3 is not in the group that sees furthest",
         full.seq_remove(1, 3, 5)[0], local)  # fmt: skip
    says(last + "sequence 1: position 0 is not in the group", full.seq_remove(1, 0, -1)[0], local)


def test_large_groups_take_memory_where_they_are_written() -> None:
    pytest.importorskip("llvmlite")

    def make() -> GroupedKVCache:
        groups = [LayerGroup((0,), 4, 64, window=64, v_dtype="q8_0"), LayerGroup((1, 2), 2, 64)]
        return GroupedKVCache.create(groups, num_pages=(1 << 14, 1 << 14), max_seqs=4, max_seq_len=512)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    sizes = [part.bytes_per_page << 14 for part in jax.eval_shape(make).parts]
    before = resident()
    cache = create_untouched(make)
    assert resident() - before < min(sizes) / 4, sizes
    check_invariants(cache)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == jax.tree.map(
        lambda x: (x.shape, x.dtype), jax.eval_shape(make)
    )


def test_positions_go_on_behind_a_window_of_one_token() -> None:
    cache = grouped(window=1)
    for count in (8, 8, 8, 3):
        cache = filled(cache, [count, 0, 0, 0])
    check_invariants(cache)
    assert [int(part.seq_position_max()[0]) for part in cache.parts] == [26, 26]
    assert int(cache.parts[1].pages_used) <= 2


def test_pages_of_a_window_are_bounded_through_prefill_and_decoding() -> None:
    window, page_size = 48, 8
    cache = GroupedKVCache.create(
        layer_groups(window), num_pages=200, max_seqs=1, page_size=page_size, step_tokens=32
    )
    local = cache.parts[1]
    assert local.num_pages == cache.groups[1].pages_per_seq(10**6, page_size, 32) == (48 + 32) // 8 + 1
    reserve = jax.jit(ops.reserve, static_argnames=("num_tokens", "max_new"))
    for count in [32] * 3 + [1] * 4 * window:
        cache, _, ok = reserve(cache, jnp.asarray([count]), num_tokens=count)
        assert ok
        local = cache.parts[1]
        behind = int(local.pages_used) - (count - 1) // page_size
        assert behind <= window // page_size + 1
    assert int(cache.pages_used[0]) == (96 + 4 * window) // page_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: LayerGroup((), 1, 4), "a layer group needs at least one layer"),
        (lambda: LayerGroup((0,), 1, 4, window=0), "window must be at least 1 token, or None for all, got 0"),
        (lambda: grouped(num_pages=(1, 2, 3)), "num_pages must have one entry for each of 2 groups, got 3"),
        (
            lambda: GroupedKVCache.create([LayerGroup((0, 2), 1, 4)], num_pages=4, max_seqs=1),
            r"groups must have each layer from 0 on once, got layers \[0, 2\]",
        ),
        (
            lambda: GroupedKVCache.create([LayerGroup((0,), 1, 4)] * 2, num_pages=4, max_seqs=1),
            r"groups must have each layer from 0 on once, got layers \[0, 0\]",
        ),
        (lambda: GroupedKVCache.create([], num_pages=4, max_seqs=1), "groups must be at least 1, got 0"),
    ],
)
def test_groups_that_cannot_be_are_named(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change()


def test_layers_attend_in_their_group_with_its_window() -> None:
    rng = np.random.default_rng(0)
    cache = grouped(num_pages=30)
    alone = [
        PagedKVCache.create(
            num_layers=1, num_kv_heads=g.num_kv_heads, head_dim=g.head_dim, num_pages=30, max_seqs=MAX_SEQS,
            page_size=PAGE_SIZE,
        )
        for g in cache.groups
    ]  # fmt: skip
    for counts in ([20, 3, 0, 17], [1, 1, 30, 1], [1, 0, 2, 1]):
        given, tokens = jnp.asarray(counts, jnp.int32), sum(counts)
        cache, batch, ok = ops.reserve(cache, given, num_tokens=tokens)
        assert ok
        for g, group in enumerate(cache.groups):
            heads, dim = group.num_kv_heads, group.head_dim
            q, k, v = (jnp.asarray(rng.normal(size=(tokens, n, dim)), jnp.float32) for n in (4, heads, heads))
            layer = group.layers[-1]
            out, after = cache.attend(layer, q, k, v, batch)
            traced, _ = jax.jit(lambda c, *a, g=g: c.attend(*a, group=g))(cache, layer, q, k, v, batch)
            alone[g], lone_batch, _ = ops.reserve(alone[g], given, num_tokens=tokens)
            expected, alone[g] = alone[g].attend(0, q, k, v, lone_batch, window=group.window)
            np.testing.assert_allclose(out, expected, atol=1e-6)
            np.testing.assert_allclose(traced, expected, atol=1e-6)
            again, same = after.attend(layer, q, None, None, batch)  # a layer that reads another's keys
            np.testing.assert_array_equal(again, out)
            assert_same(same, snapshot(after))
            cache = after
    with pytest.raises(ValueError, match="a layer that is traced needs group=, an index below 2, got None"):
        jax.jit(lambda c, layer: c.attend(layer, q, k, v, batch))(cache, 0)
    with pytest.raises(ValueError, match=r"layer must be in \[0, 3\), got 3"):
        cache.attend(3, q, k, v, batch)
    with pytest.raises(ValueError, match="layer 1 is in group 0, not in 1"):
        cache.attend(1, q, k, v, batch, group=1)
    with pytest.raises(ValueError, match="window must be at most the cache's 12 tokens, got 13"):
        cache.attend(2, q, k, v, batch, window=13)
