"""Laws of the 17 tests of llama.cpp's paged fork (allocator and table), for this cache.

Terms of the fork: block = page, `needs_new_block` = `pages_needed`, `share` = `seq_copy`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_oracle import jit_ask, jit_clear, jit_copy, jit_remove, jit_reserve

from jaxpaged.cache.interface import ALL
from jaxpaged.cache.invariants import check_invariants
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.pages import allocator as pages_of

N, S, PAGE_SIZE = 16, 3, 32
allocate = jax.jit(pages_of.allocate, static_argnames="max_count")
retain, release, can_allocate = map(jax.jit, (pages_of.retain, pages_of.release, pages_of.can_allocate))


def empty(page_size: int = PAGE_SIZE) -> PagedKVCache:
    return PagedKVCache.create(
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        num_pages=N,
        max_seqs=S,
        page_size=page_size,
        max_seq_len=7 * page_size,
    )


def grow(cache: PagedKVCache, *num_new: int) -> PagedKVCache:
    counts = jnp.asarray([*num_new, *[0] * (S - len(num_new))], jnp.int32)
    cache, _, ok = jit_reserve(cache, counts, num_tokens=256)
    assert ok
    check_invariants(cache)
    return cache


def forget(cache: PagedKVCache, seq: int, p0: int = 0, p1: int = -1) -> PagedKVCache:
    cache, ok = jit_remove(cache, seq, p0, p1)
    assert ok
    check_invariants(cache)
    return cache


def pages(cache: PagedKVCache, seq: int) -> list[int]:
    return np.asarray(cache.table.pages)[seq, : int(cache.table.num_entries[seq])].tolist()


def cell(cache: PagedKVCache, seq: int, position: int) -> int | None:
    """Index of a token in the pool, in slots."""
    table = jax.tree.map(lambda x: np.asarray(x)[seq], cache.table)
    for e in range(int(table.num_entries)):
        if table.position[e] <= position < table.position[e] + table.num_tokens[e]:
            return int(table.pages[e] * cache.page_size + table.first_slot[e] + position - table.position[e])
    return None


def test_01_128_tokens_take_4_pages_of_32() -> None:
    cache = grow(empty(), 128)
    assert len(set(pages(cache, 0))) == 4 == int(cache.pages_used)


def test_02_a_freed_page_is_allocated_next() -> None:
    allocator, taken, _ = allocate(pages_of.create(4), 3, max_count=3)
    allocator = release(allocator, taken[1:2])
    _, again, _ = allocate(allocator, 1, max_count=3)
    assert again[0] == taken[1]


def test_03_reference_counts_go_1_2_1_0() -> None:
    allocator, taken, _ = allocate(pages_of.create(4), 1, max_count=1)
    counts = [int(allocator.ref_counts[taken[0]])]
    for operation in (retain, release, release):
        allocator = operation(allocator, taken)
        counts.append(int(allocator.ref_counts[taken[0]]))
    assert counts == [1, 2, 1, 0] and int(allocator.num_free) == 4


def test_04_can_allocate_compares_with_the_free_pages() -> None:
    allocator = pages_of.create(4)
    assert can_allocate(allocator, 4) and not can_allocate(allocator, 5)
    allocator, _, _ = allocate(allocator, 3, max_count=3)
    assert can_allocate(allocator, 1) and not can_allocate(allocator, 2)


def test_05_all_pages_can_be_freed_and_allocated_again() -> None:
    allocator, taken, _ = allocate(pages_of.create(4), 4, max_count=4)
    allocator = release(allocator, taken)
    assert int(allocator.num_free) == 4
    _, again, ok = allocate(allocator, 4, max_count=4)
    assert ok and sorted(again.tolist()) == sorted(taken.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("position", [0, 31, 32, 50])
def test_06_a_position_lies_in_its_page_at_its_offset(position: int) -> None:
    cache = grow(empty(), 64)
    assert cell(cache, 0, position) == pages(cache, 0)[position // 32] * 32 + position % 32


def test_07_positions_behind_a_gap_stay_where_they_were() -> None:
    cache = grow(empty(), 128)
    before = [cell(cache, 0, p) for p in range(128)]
    cache = forget(cache, 0, 32, 64)
    after = [cell(cache, 0, p) for p in range(128)]
    assert after == [None if 32 <= p < 64 else at for p, at in enumerate(before)]


def test_08_two_sequences_never_share_a_cell() -> None:
    cache = grow(empty(), 50, 40)
    cells = [cell(cache, seq, p) for seq, length in ((0, 50), (1, 40)) for p in range(length)]
    assert None not in cells and len(set(cells)) == 90


@pytest.mark.parametrize(("length", "needs"), [(0, 1), (31, 0), (32, 1), (33, 0)])
def test_09_a_new_page_is_needed_only_at_page_boundaries(length: int, needs: int) -> None:
    cache = grow(empty(), length)
    assert jit_ask(cache, jnp.asarray([1, 0, 0]))[0].tolist() == [needs, 0, 0]


def test_10_capacity_is_the_number_of_slots_of_its_pages() -> None:
    cache = grow(empty(), 40)
    capacity = len(pages(cache, 0)) * cache.page_size
    assert capacity == 64
    assert jit_ask(cache, jnp.asarray([capacity - 40, 0, 0]))[0][0] == 0
    assert jit_ask(cache, jnp.asarray([capacity - 40 + 1, 0, 0]))[0][0] == 1


def test_11_sharing_gives_the_same_cells_and_counts_of_2() -> None:
    cache, ok = jit_copy(grow(empty(), 64), 0, 1)
    assert ok
    check_invariants(cache)
    assert [cell(cache, 1, p) for p in range(64)] == [cell(cache, 0, p) for p in range(64)]
    assert np.asarray(cache.allocator.ref_counts)[pages(cache, 0)].tolist() == [2, 2]
    cache = forget(cache, 0)
    assert int(cache.pages_used) == 2 == len(pages(cache, 1))


def test_12_freeing_a_sequence_twice_changes_nothing() -> None:
    cache = forget(grow(empty(), 64, 10), 0)
    once = jax.tree.map(np.array, (cache.allocator, cache.table))
    again = forget(cache, 0)
    jax.tree.map(np.testing.assert_array_equal, once, (again.allocator, again.table))
    assert int(again.pages_used) == 1


def test_13_removing_an_aligned_range_of_2_of_4_pages_leaves_2() -> None:
    cache = grow(empty(), 128)
    first, *_, last = pages(cache, 0)
    cache = forget(cache, 0, 32, 96)
    assert pages(cache, 0) == [first, last] and int(cache.pages_used) == 2


def test_14_clear_frees_everything() -> None:
    cache = jit_clear(grow(empty(), 64, 40, 1))
    check_invariants(cache)
    assert int(cache.pages_used) == 0 and cache.lengths.tolist() == [0] * S


def test_15_a_single_token_takes_one_page() -> None:
    cache = grow(empty(), 1)
    assert pages(cache, 0) == [0] and cell(cache, 0, 0) == 0 and cell(cache, 0, 1) is None


def test_16_pages_of_16_tokens() -> None:
    cache = grow(empty(16), 50)
    assert len(pages(cache, 0)) == 4
    assert [cell(cache, 0, p) for p in range(50)] == [
        pages(cache, 0)[p // 16] * 16 + p % 16 for p in range(50)
    ]


def test_17_three_sequences_hold_distinct_pages() -> None:
    cache = grow(empty(), 64, 64, 64)
    held = [page for seq in range(3) for page in pages(cache, seq)]
    assert len(set(held)) == len(held) == 6


def test_18_lifetime_of_two_sequences() -> None:
    cache = grow(empty(), 80, 80)
    assert [len(pages(cache, seq)) for seq in (0, 1)] == [3, 3]
    cache = forget(cache, 0, 32, 64)
    assert [len(pages(cache, seq)) for seq in (0, 1)] == [2, 3] and int(cache.pages_used) == 5
    cache = forget(forget(cache, 0), 1)
    assert int(cache.pages_used) == 0
    assert int(forget(grow(empty(), 80, 80), ALL).pages_used) == 0


def test_an_unaligned_removal_keeps_the_tokens_that_the_fork_loses() -> None:
    cache = grow(empty(), 128)
    before = [cell(cache, 0, p) for p in range(128)]
    cache = forget(cache, 0, 40, 90)
    assert [cell(cache, 0, p) for p in range(128)] == before[:40] + [None] * 50 + before[90:]
    assert int(cache.pages_used) == 4
