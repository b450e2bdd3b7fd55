"""Laws of the page allocator: all or nothing, last in first out, no page allocated or freed twice."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged.pages import allocator as pages_of
from jaxpaged.pages.allocator import PageAllocator

N, M = 12, 6
allocate = jax.jit(pages_of.allocate, static_argnames="max_count")
retain, release, can_allocate = map(jax.jit, (pages_of.retain, pages_of.release, pages_of.can_allocate))


def take(allocator: PageAllocator, count: int, max_count: int = N) -> tuple[PageAllocator, list[int]]:
    allocator, pages, ok = allocate(allocator, count, max_count=max_count)
    assert ok
    return allocator, np.asarray(pages)[:count].tolist()


def named(*pages: int) -> jax.Array:
    return jnp.asarray([*pages, *[N] * (M - len(pages))], jnp.int32)


def free(allocator: PageAllocator) -> list[int]:
    return np.asarray(allocator.free_pages)[: int(allocator.num_free)].tolist()


def check(allocator: PageAllocator) -> None:
    stack = free(allocator)
    assert len(set(stack)) == len(stack)
    assert set(stack) == set(np.flatnonzero(np.asarray(allocator.ref_counts) == 0).tolist())


def test_pages_are_allocated_in_order_then_last_in_first_out() -> None:
    allocator, pages = take(pages_of.create(N), 5)
    assert pages == [0, 1, 2, 3, 4]
    allocator = release(allocator, named(3, 1))
    allocator, pages = take(allocator, 3)
    assert pages == [1, 3, 5]
    check(allocator)


def test_allocation_is_all_or_nothing() -> None:
    allocator, _ = take(pages_of.create(N), N - 2)
    same, pages, ok = allocate(allocator, 3, max_count=4)
    assert not ok and pages.tolist() == [N] * 4
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), same, allocator))
    assert [bool(can_allocate(allocator, count)) for count in (-1, 0, 2, 3)] == [False, True, True, False]
    allocator, pages = take(allocator, 2, max_count=4)
    check(allocator)
    assert free(allocator) == []


@pytest.mark.parametrize("count", [-1, 5, 2**31 - 1])
def test_counts_out_of_bounds_fail(count: int) -> None:
    allocator, pages, ok = allocate(pages_of.create(N), count, max_count=4)
    assert not ok and pages.tolist() == [N] * 4 and int(allocator.num_free) == N


def test_an_empty_pool_allocates_nothing() -> None:
    allocator, pages = take(pages_of.create(N), N)
    assert sorted(pages) == list(range(N))
    for count in (1, N):
        _, pages, ok = allocate(allocator, count, max_count=N)
        assert not ok and (np.asarray(pages) == N).all()
    _, none = take(allocator, 0)
    assert none == []
    assert not can_allocate(allocator, 1)


def test_a_page_is_freed_with_its_last_reference() -> None:
    allocator, _ = take(pages_of.create(N), 4)
    allocator = retain(allocator, named(2, 2, 0))
    assert np.asarray(allocator.ref_counts)[:4].tolist() == [2, 1, 3, 1]
    allocator = release(allocator, named(2, 0))
    check(allocator)
    assert int(allocator.num_free) == N - 4
    allocator = release(allocator, named(2, 2, 0))
    check(allocator)
    assert int(allocator.num_free) == N - 2 and set(free(allocator)[-2:]) == {0, 2}


def test_the_sentinel_is_ignored() -> None:
    allocator, _ = take(pages_of.create(N), N)
    for operation in (retain, release):
        same = operation(allocator, named())
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), same, allocator))


def test_an_empty_pool_cannot_be_created() -> None:
    with pytest.raises(ValueError, match="num_pages must be positive, got 0"):
        pages_of.create(0)


operations = st.lists(
    st.tuples(st.sampled_from(["take", "retain", "release"]), st.lists(st.integers(0, 99), max_size=M)),
    max_size=20,
)


@settings(max_examples=40)
@given(operations)
def test_random_operations_keep_reference_counts_and_stack_consistent(
    script: list[tuple[str, list[int]]],
) -> None:
    allocator, counts = pages_of.create(N), [0] * N
    for operation, choice in script:
        # Only references that exist are retained or released.
        held = [page for page in range(N) for _ in range(counts[page])]
        if operation == "take":
            possible = len(choice) <= counts.count(0)
            allocator, pages, ok = allocate(allocator, len(choice), max_count=M)
            assert bool(ok) == possible
            got = [p for p in pages.tolist() if p < N]
            assert len(got) == (len(choice) if possible else 0)
            for page in got:
                assert counts[page] == 0
                counts[page] = 1
        elif held:
            pages = [held[i % len(held)] for i in choice]
            if operation == "release":
                pages = [p for i, p in enumerate(pages) if pages[:i].count(p) < counts[p]]
            allocator = (retain if operation == "retain" else release)(allocator, named(*pages))
            for page in pages:
                counts[page] += 1 if operation == "retain" else -1
        assert np.asarray(allocator.ref_counts).tolist() == counts
        check(allocator)
