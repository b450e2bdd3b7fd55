"""Laws of table edits: a row is a list of (position, page, slot), which an edit changes accordingly."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged.pages import block_table as tables
from jaxpaged.pages.block_table import BlockTable

N, P, PAGE_SIZE = 20, 6, 8
END = 2**31 - 1
cut = jax.jit(tables.cut)
remove_range = jax.jit(lambda row, p0, p1: tables.remove_range(row, p0, p1, N))
slice_range = jax.jit(lambda row, p0, p1: tables.slice_range(row, p0, p1, N))

Token = tuple[int, int, int, int]


def make_row(entries: list[tuple[int, int, int, int, int]]) -> BlockTable:
    """One row of entries ``(page, first_slot, num_tokens, position, rotation)``."""
    padded = np.asarray([*entries, *[(N, 0, 0, 0, 0)] * (P - len(entries))], np.int32).reshape(P, 5)
    return BlockTable(*(jnp.asarray(padded[:, i]) for i in range(5)), jnp.int32(len(entries)))


def tokens(row: BlockTable) -> list[Token]:
    """(position, page, slot, rotation) of each token; checks the padding."""
    row = jax.tree.map(np.asarray, row)
    used = int(row.num_entries)
    assert (row.pages[used:] == N).all() and not row.num_tokens[used:].any()
    assert (row.num_tokens[:used] > 0).all()
    return [
        (int(row.position[e]) + i, int(row.pages[e]), int(row.first_slot[e]) + i, int(row.rotation[e]))
        for e in range(used)
        for i in range(int(row.num_tokens[e]))
    ]


def assert_equal(a: BlockTable, b: BlockTable) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@st.composite
def rows(draw: st.DrawFn) -> BlockTable:
    entries, position = [], 0
    for _ in range(draw(st.integers(0, P))):
        first = draw(st.integers(0, PAGE_SIZE - 1))
        num = draw(st.integers(1, PAGE_SIZE - first))
        position += draw(st.sampled_from([0, 0, 0, 1, 5]))
        entries.append((draw(st.integers(0, N - 1)), first, num, position, draw(st.integers(-3, 3))))
        position += num
    return make_row(entries)


bounds = st.integers(0, 60) | st.just(END)


@settings(max_examples=60)
@given(rows(), bounds, bounds)
def test_removal_removes_the_range_and_nothing_else(row: BlockTable, p0: int, p1: int) -> None:
    removed, ok = remove_range(row, p0, p1)
    if ok:
        assert tokens(removed) == [t for t in tokens(row) if not p0 <= t[0] < p1]
    else:
        assert_equal(removed, row)
        start = np.asarray(row.position)
        assert int(row.num_entries) == P
        assert ((start < p0) & (p0 < p1) & (p1 < start + np.asarray(row.num_tokens))).any()


@settings(max_examples=60)
@given(rows(), bounds, bounds)
def test_a_slice_keeps_the_range_and_nothing_else(row: BlockTable, p0: int, p1: int) -> None:
    assert tokens(slice_range(row, p0, p1)) == [t for t in tokens(row) if p0 <= t[0] < p1]


@settings(max_examples=60)
@given(rows(), bounds)
def test_a_cut_splits_an_entry_and_changes_no_token(row: BlockTable, at: int) -> None:
    split, ok = cut(row, at)
    assert tokens(split) == tokens(row)
    across = (np.asarray(split.position) < at) & (
        at < np.asarray(split.position) + np.asarray(split.num_tokens)
    )
    assert bool(ok) == (not across.any())
    if not ok:
        assert_equal(split, row)


def test_removal_across_entries_of_a_full_row_succeeds() -> None:
    row = make_row([(e, 0, PAGE_SIZE, e * PAGE_SIZE, 0) for e in range(P)])
    removed, ok = remove_range(row, 3, 21)
    assert ok and int(removed.num_entries) == P - 1
    assert tokens(removed) == [t for t in tokens(row) if not 3 <= t[0] < 21]


@settings(max_examples=20)
@given(st.lists(rows(), min_size=1, max_size=4))
def test_lengths_and_positions(listed: list[BlockTable]) -> None:
    table = jax.tree.map(lambda *fields: jnp.stack(fields), *listed)
    expected = [[t[0] for t in tokens(row)] for row in listed]
    assert tables.lengths(table).tolist() == [len(p) for p in expected]
    assert tables.position_min(table).tolist() == [min(p, default=-1) for p in expected]
    assert tables.position_max(table).tolist() == [max(p, default=-1) for p in expected]


def test_an_empty_table_has_no_positions() -> None:
    table = tables.create(3, P, N)
    assert (table.max_seqs, table.max_pages_per_seq) == (3, P)
    assert tables.lengths(table).tolist() == [0] * 3
    assert tables.position_min(table).tolist() == tables.position_max(table).tolist() == [-1] * 3


@pytest.mark.parametrize(
    ("given_range", "expected"),
    [((-5, -1), (0, END)), ((3, -7), (3, END)), ((3, 9), (3, 9)), ((-1, 0), (0, 0))],
)
def test_negative_bounds_mean_what_they_do_in_llama_cpp(
    given_range: tuple[int, int], expected: tuple[int, int]
) -> None:
    p0, p1 = tables.clamp_range(*given_range)
    assert (int(p0), int(p1)) == expected


@pytest.mark.parametrize(
    ("sizes", "name"), [((0, 1, 1), "max_seqs"), ((1, 0, 1), "max_pages_per_seq"), ((1, 1, -4), "num_pages")]
)
def test_sizes_are_positive(sizes: tuple[int, int, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive, got {min(sizes)}"):
        tables.create(*sizes)


def made(*row_lists: list[tuple[int, int, int, int, int]]) -> BlockTable:
    return jax.tree.map(lambda *fields: jnp.stack(fields), *map(make_row, row_lists))


@settings(max_examples=60)
@given(st.lists(st.integers(0, P * PAGE_SIZE), min_size=1, max_size=4), st.randoms())
def test_page_indices_are_a_table_of_full_pages_and_back(lengths: list[int], random: Any) -> None:
    indices = np.array([random.choices(range(N), k=P) for _ in lengths])
    table = BlockTable.from_page_indices(jnp.asarray(indices), jnp.asarray(lengths), PAGE_SIZE, N)
    for s, length in enumerate(lengths):
        wanted = [(i, indices[s, i // PAGE_SIZE], i % PAGE_SIZE, 0) for i in range(length)]
        assert tokens(tables.get_row(table, jnp.int32(s))) == wanted
    found, count = table.to_page_indices(PAGE_SIZE)
    used = np.arange(P) * PAGE_SIZE < np.array(lengths)[:, None]
    np.testing.assert_array_equal(found, np.where(used, indices, 0))
    assert count.tolist() == lengths


@pytest.mark.parametrize(
    "row",
    [
        [(3, 0, 8, 0, 0), (4, 1, 5, 8, 0)],  # begins inside a page
        [(3, 0, 7, 0, 0), (4, 0, 5, 7, 0)],  # a page before the last has a free slot
        [(3, 0, 8, 8, 0)],  # begins behind position 0
        [(3, 0, 8, 0, 0), (4, 0, 5, 9, 0)],  # a gap
        [(3, 0, 8, 0, 2)],  # shifted
        [(3, 0, 4, 0, 0), (3, 4, 4, 4, 0)],  # two entries of one page
    ],
)
def test_a_table_that_page_indices_cannot_say_names_the_sequence(row: list[Any]) -> None:
    table = made([], [(1, 0, 8, 0, 0), (2, 0, 3, 8, 0)], row)
    with pytest.raises(ValueError, match="sequence 2 does not fill its pages of 8 tokens"):
        table.to_page_indices(PAGE_SIZE)
    jax.jit(lambda table: table.to_page_indices(PAGE_SIZE))(table)  # values are not known


def test_page_indices_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got shapes \(2, 3\) and \(3,\)"):
        BlockTable.from_page_indices(jnp.zeros((2, 3), jnp.int32), jnp.zeros(3, jnp.int32), PAGE_SIZE, N)
