"""Bugs of paged caches in other projects, each as a law that would catch it here.

Bugs of prefix indices and asynchronous steps are tested with the serving engine.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_oracle import (
    NARROW,
    SMALL,
    assert_same,
    encode,
    jit_copy,
    jit_defragment,
    jit_keep,
    jit_remove,
    jit_reorder,
    jit_shift,
    jit_step,
    make_cache,
    read_back,
    snapshot,
    traces,
)

from jaxpaged.attention import paged_attention
from jaxpaged.cache.interface import ALL, OutOfPages, reserve_or_raise
from jaxpaged.cache.invariants import check_invariants
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.pages import allocator as pages_of
from jaxpaged.pages.rope import Rope


def filled(*lengths: int, **sizes: int) -> PagedKVCache:
    """A small cache with tokens 0, 1, 2, ... in order of sequence."""
    counts = jnp.asarray([*lengths, *[0] * (4 - len(lengths))], jnp.int32)
    cache, _, ok = jit_step(make_cache(**sizes), counts, 0, num_tokens=40)
    assert ok
    return cache


def tokens_of(cache: PagedKVCache, seq: int) -> list[int]:
    """Tokens of a sequence, decoded from its keys."""
    _, k, _ = read_back(cache, seq)
    return (k[:, 0, 0, 0] // 64).astype(int).tolist()


def test_freeing_a_sequence_twice_frees_its_pages_once() -> None:
    cache = filled(20, 9)
    cache, _ = jit_copy(cache, 0, 2, 0, -1)
    for _ in range(2):
        cache, ok = jit_remove(cache, 0, 0, -1)
        assert ok
        check_invariants(cache)
    cache, _ = jit_remove(cache, ALL, 0, -1)
    check_invariants(cache)
    assert int(cache.pages_used) == 0


def test_a_page_released_twice_in_one_call_is_freed_once() -> None:
    allocator, pages, _ = pages_of.allocate(pages_of.create(6), 2, max_count=2)
    allocator = pages_of.retain(allocator, pages[:1])
    allocator = pages_of.release(allocator, jnp.concatenate([pages, pages[:1]]))
    assert sorted(np.asarray(allocator.free_pages).tolist()) == list(range(6))
    assert int(allocator.num_free) == 6
    assert not np.asarray(allocator.ref_counts).any()  # no count clipped at 0 to hide a double free


def test_an_exhausted_pool_allocates_no_page_in_use() -> None:
    cache = filled(32, 8, **SMALL)
    before = snapshot(cache)
    cache, batch, ok = jit_step(cache, jnp.array([0, 0, 1, 0]), 99, num_tokens=40)
    assert not ok and not batch.valid.any()
    assert_same(cache, before)


def test_a_full_pool_is_an_error_and_not_an_empty_prompt() -> None:
    cache = filled(32, **SMALL)
    with pytest.raises(OutOfPages, match="2 requested, 1 free"):
        reserve_or_raise(cache, np.array([0, 9, 0, 0]))
    assert tokens_of(cache, 0) == list(range(32))


def test_a_row_of_the_table_never_overflows_into_the_next() -> None:
    cache = filled(32, 8, **NARROW)  # sequence 0 has all four entries of its row
    before = snapshot(cache)
    cache, _, ok = jit_step(cache, jnp.array([1, 0, 0, 0]), 99, num_tokens=40)
    assert not ok
    assert_same(cache, before)
    for refused in (jit_remove, lambda c, *a: jit_shift(c, *a, 0 - 3)):
        cache, ok = refused(cache, 0, 11, 13)  # would split an entry
        assert not ok
        assert_same(cache, before)


def test_forked_sequences_write_to_their_own_pages() -> None:
    cache = filled(12)
    cache = jit_reorder(cache, jnp.array([0, 0, 0, 4]))
    for step in range(3):
        cache, _, ok = jit_step(cache, jnp.array([1, 1, 1, 0]), 100 + 3 * step, num_tokens=40)
        assert ok
        check_invariants(cache)
    for seq in range(3):
        assert tokens_of(cache, seq) == [*range(12), *(100 + seq + 3 * i for i in range(3))]
    # One page is shared; two of the three sequences got a copy of the other one.
    assert int(cache.pages_used) == 1 + 3


def test_beams_that_swap_parents_keep_their_parents_tokens() -> None:
    cache = filled(9, 10)
    cache = jit_reorder(cache, jnp.array([1, 0, 4, 4]))
    check_invariants(cache)
    assert (tokens_of(cache, 0), tokens_of(cache, 1)) == (list(range(9, 19)), list(range(9)))


def test_page_0_is_not_special() -> None:
    cache = filled(3)
    assert int(cache.table.pages[0, 0]) == 0
    cache, _, _ = jit_step(cache, jnp.array([0, 5, 0, 0]), 50, num_tokens=40)  # 35 rows of padding
    cache, _ = jit_remove(cache, 2, 0, -1)  # entries of an empty row refer to no page
    assert tokens_of(cache, 0) == [0, 1, 2]
    np.testing.assert_array_equal(read_back(cache, 0)[1][:, 0], encode(np.arange(3), 0, 0, 2, 2))


def test_nan_in_unused_slots_and_free_pages_reaches_no_output() -> None:
    cache = filled(11, 3)  # unwritten slots are NaN
    cache, _ = jit_remove(cache, 0, 2, 5)
    rope = Rope.create(np.ones(1))
    cache, batch, _ = jit_step(cache, jnp.array([1, 1, 0, 0]), 20, num_tokens=40)
    out = paged_attention(jnp.ones((40, 4, 2)), cache.k_pages, cache.v_pages, cache.table, batch, rope=rope)
    assert np.isfinite(out).all()


def test_other_sequences_ranges_and_distances_are_not_retraced() -> None:
    cache = filled(20, 9)
    operations = {
        "seq_remove": lambda c, i: jit_remove(c, i, 3 + i, 5 + i),
        "seq_shift": lambda c, i: jit_shift(c, i, 6 + i, -1, i + 1),
        "seq_copy": lambda c, i: jit_copy(c, i, i, i, 9),
        "seq_keep": lambda c, i: jit_keep(c, 7 + i),
        "seq_defragment": lambda c, i: jit_defragment(c, i),
        "seq_reorder": lambda c, i: (jit_reorder(c, jnp.array([0, 1, i, 4])), True),
    }
    for operation in operations.values():
        cache, _ = operation(cache, 0)
    before = dict(traces)
    for i in range(1, 4):
        for operation in operations.values():
            cache, _ = operation(cache, i)
    assert dict(traces) == before


def test_allocating_and_freeing_loops_over_no_pages() -> None:
    def cycle(allocator: pages_of.PageAllocator) -> pages_of.PageAllocator:
        allocator, pages, _ = pages_of.allocate(allocator, 64, max_count=64)
        return pages_of.release(allocator, pages)

    program = str(jax.make_jaxpr(cycle)(pages_of.create(4096)))
    assert "cumsum[" in program  # the format that the next line searches
    assert not any(f" {name}[" in program for name in ("while", "scan", "sort", "top_k"))


def test_a_shift_does_not_move_sequences_that_share_its_pages() -> None:
    """In llama.cpp a cell has one position for all its sequences."""
    cache = filled(20)
    cache, _ = jit_copy(cache, 0, 1, 0, -1)
    cache, ok = jit_remove(cache, 0, 4, 9)
    assert ok
    cache, ok = jit_shift(cache, 0, 9, -1, -5)
    assert ok
    check_invariants(cache)
    assert read_back(cache, 0)[0] == list(range(15)) and read_back(cache, 1)[0] == list(range(20))
    assert tokens_of(cache, 1) == list(range(20))


def test_removing_part_of_a_page_keeps_the_rest_of_it() -> None:
    """The fork dropped whole blocks, with live tokens in them."""
    cache = filled(30)
    cache, ok = jit_remove(cache, 0, 5, 27)
    assert ok
    assert tokens_of(cache, 0) == [0, 1, 2, 3, 4, 27, 28, 29]
    cache, ok = jit_defragment(cache, 0)
    assert ok and int(cache.pages_used) == 1
    check_invariants(cache)
    assert tokens_of(cache, 0) == [0, 1, 2, 3, 4, 27, 28, 29]
    assert read_back(cache, 0)[0] == [0, 1, 2, 3, 4, 27, 28, 29]


def test_positions_that_would_overflow_collide_or_swap_are_refused() -> None:
    cache = filled(20)
    before = snapshot(cache)
    for p0, p1, delta in ((10, -1, 2**31 - 25), (10, -1, 2**31 - 1), (10, 15, 3), (10, -1, -3), (3, 5, 40)):
        cache, ok = jit_shift(cache, 0, p0, p1, delta)
        assert bool(ok) == (delta == 2**31 - 25)
        if ok:
            cache, _ = jit_shift(cache, 0, 25, -1, -delta)
            assert read_back(cache, 0)[0] == list(range(20))
            cache = filled(20)
        assert_same(cache, before)
