"""Laws of operations on page numbers: attach, pin, copy to the host and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged import PagedKVCache, check_invariants, reserve, seq_remove
from jaxpaged.cache.sharing import (
    pin_pages,
    read_pages,
    seq_allocate,
    seq_attach,
    unpin_pages,
    with_page_indices,
    write_pages,
)
from jaxpaged.engine.swap import numbered

S, N, P, PS = 3, 12, 6, 8


def filled(
    dtype: str = "f32", layout: str | None = None, lengths=(19, 0, 8), window: int | None = None
) -> PagedKVCache:
    """Sequences with random keys and values in two layers."""
    cache = PagedKVCache.create(
        num_layers=2, num_kv_heads=2, head_dim=64, num_pages=N, max_seqs=S, page_size=PS, max_seq_len=(P - 1) * PS,
        dtype=dtype, layout=layout, window=window,
    )  # fmt: skip
    rows = np.random.default_rng(0).normal(size=(2, 2, sum(lengths), 2, 64))
    return write_rows(cache, np.array(lengths), jnp.asarray(rows, jnp.float32))


@jax.jit
def write_rows(cache: PagedKVCache, lengths: jax.Array, rows: jax.Array) -> PagedKVCache:
    cache, batch, _ = reserve(cache, lengths, num_tokens=rows.shape[2])
    for layer, (k, v) in enumerate(rows):
        cache = cache.write(layer, k, v, batch)
    return cache


def attach(cache: PagedKVCache, seq: int, pages: list[int], tokens: int, first_page: int = 0):
    rows, counts, first = np.full((S, P), N, np.int32), np.zeros(S, np.int32), np.zeros(S, np.int32)
    rows[seq, : len(pages)], counts[seq], first[seq] = pages, tokens, first_page
    return seq_attach(cache, jnp.asarray(rows), jnp.asarray(counts), jnp.asarray(first))


def attended(cache: PagedKVCache, seq: int) -> np.ndarray:
    """Attention output of one more token of the sequence."""
    q = jnp.asarray(np.random.default_rng(1).normal(size=(1, 4, 64)), jnp.float32)
    out, ok = attend_one(cache, np.eye(S, dtype=np.int32)[seq], q)
    assert ok
    return np.asarray(out)


@jax.jit
def attend_one(cache: PagedKVCache, num_new: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    cache, batch, ok = reserve(cache, num_new, num_tokens=1)
    k = jnp.ones((1, 2, 64), jnp.float32)
    return cache.attend(1, q, k, k, batch)[0], ok


@pytest.mark.parametrize("tokens", [1, 8, 13, 16, 19])
def test_attached_pages_are_attended_like_the_original_sequence(tokens):
    cache = filled()
    pages = np.asarray(cache.table.pages[0, : -(-tokens // PS)]).tolist()
    attached, ok = attach(cache, 1, pages, tokens)
    assert ok
    check_invariants(attached)
    copied, ok = seq_remove(attached, 0, tokens, -1)
    assert ok
    np.testing.assert_array_equal(attended(attached, 1), attended(copied, 0))
    assert all(
        a is b for a, b in zip(jax.tree.leaves(attached.k_pages), jax.tree.leaves(cache.k_pages), strict=True)
    )


@pytest.mark.parametrize(("tokens", "first_page"), [(40, 4), (39, 3), (33, 2), (24, 1), (9, 0)])
def test_the_last_pages_of_a_window_are_attended_like_all_of_them(tokens, first_page):
    cache = filled(lengths=(40, 0, 8), window=9)
    pages = np.asarray(cache.table.pages[0, first_page : -(-tokens // PS)]).tolist()
    attached, ok = attach(cache, 1, pages, tokens, first_page)
    assert ok
    check_invariants(attached)
    assert (
        attached.seq_position_min()[1] == first_page * PS and attached.lengths[1] == tokens - first_page * PS
    )
    assert attached.seq_position_max()[1] == tokens - 1
    whole, ok = seq_remove(attached, 0, tokens, -1)
    assert ok
    np.testing.assert_array_equal(attended(attached, 1), attended(whole, 0))


@pytest.mark.parametrize(
    ("tokens", "first_page", "window"),
    [
        (40, 4, 10),  # the next token sees position 31
        (39, 4, 9),
        (40, -1, 9),
        (40, 5, 1),  # no page is left, and the next position would not be known
        (40, 1, None),
    ],
)
def test_pages_behind_what_the_next_token_sees_are_not_attached(tokens, first_page, window):
    cache = filled(lengths=(40, 0, 8), window=window)
    after, ok = attach(
        cache, 1, np.asarray(cache.table.pages[0, max(first_page, 0) :]).tolist(), tokens, first_page
    )
    assert not ok
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize(
    ("seq", "pages", "tokens"),
    [
        (0, [0], 8),  # not empty
        (1, [11], 8),  # a free page
        (1, [N], 8),
        (1, [-1], 8),
        (1, [0, 11], 9),
        (1, [0, 1, 2, 0, 1, 2], 49),  # more entries than a row has
        (1, [0], -1),
    ],
)
def test_a_failed_attach_changes_nothing(seq, pages, tokens):
    cache = filled()
    after, ok = attach(cache, seq, pages, tokens)
    assert not ok
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(new, old)


def test_pinned_pages_outlive_their_sequence():
    cache = filled()
    pages = cache.table.pages[0, :3]
    cache = pin_pages(cache, jnp.concatenate([pages, jnp.array([N])]))
    pins = np.bincount(np.asarray(pages), minlength=N)
    cache, _ = seq_remove(cache, 0)
    check_invariants(cache, pins)
    assert int(cache.pages_free) == N - 4
    cache, ok = attach(cache, 1, np.asarray(pages).tolist(), 19)
    assert ok
    cache = unpin_pages(cache, pages)
    check_invariants(cache)
    cache, _ = seq_remove(cache, 1)
    assert int(cache.pages_free) == N - 1


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [("f32", "plain"), ("bf16", "lanes"), ("q8_0", "plain"), ("q8_0", "lanes"), ("q4_0", "plain")],
)
def test_pages_go_to_the_host_and_back(dtype, layout):
    cache = filled(dtype, layout)
    before = attended(cache, 0)
    row, pages = numbered(jax.tree.map(lambda field: np.asarray(field)[0], cache.table))
    data = jax.tree.map(np.array, read_pages(cache, jnp.asarray(pages)))
    cache, _ = seq_remove(cache, 0)
    cache = write_pages(cache, jnp.arange(N), jax.tree.map(jnp.zeros_like, read_pages(cache, jnp.arange(N))))
    cache, ok = seq_allocate(cache, jnp.int32(1), row, jnp.int32(len(pages)))
    assert ok
    check_invariants(cache)
    cache = write_pages(cache, cache.table.pages[1, : len(pages)], data)
    np.testing.assert_array_equal(attended(cache, 1), before)


def test_seq_allocate_is_all_or_nothing():
    cache = filled(lengths=(19, 0, 40))
    row, _ = numbered(jax.tree.map(lambda field: np.asarray(field)[2], cache.table))
    for seq, count in ((1, 5), (0, 1)):  # four pages are free; a sequence is not empty
        after, ok = seq_allocate(cache, jnp.int32(seq), row, jnp.int32(count))
        assert not ok
        for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(cache), strict=True):
            np.testing.assert_array_equal(new, old)


def test_entries_that_share_a_page_share_it_after_seq_allocate():
    cache = filled()
    cache, ok = seq_remove(cache, 0, 3, 5)  # splits the first page into two entries
    assert ok
    row, pages = numbered(jax.tree.map(lambda field: np.asarray(field)[0], cache.table))
    assert len(pages) == 3
    assert row.pages[:4].tolist() == [0, 0, 1, 2]
    cache, _ = seq_remove(cache, 0)
    cache, ok = seq_allocate(cache, jnp.int32(1), row, jnp.int32(3))
    assert ok
    check_invariants(cache)
    cache, _ = seq_remove(cache, 1)
    check_invariants(cache)


def test_formats_with_residual_pages_are_not_copied_to_the_host():
    cache = filled("kivi4", lengths=(8, 0, 3))
    with pytest.raises(ValueError, match="kivi4"):
        read_pages(cache, jnp.arange(2))


def test_a_cache_goes_on_with_the_page_table_of_another_library():
    cache = filled()
    before = attended(cache, 0)
    indices, lengths = cache.table.to_page_indices(PS)
    indices, lengths = indices.at[1].set(indices[0]), lengths.at[1].set(lengths[0])  # a fork
    taken = jax.jit(with_page_indices)(cache, indices, lengths)
    check_invariants(taken)
    assert taken.allocator.ref_counts[taken.table.pages[0, 0]] == 2
    for seq in (0, 1):
        np.testing.assert_array_equal(attended(taken, seq), before)
    taken, batch, ok = reserve(taken, jnp.array([1, 1, 0]), num_tokens=2)
    assert ok and batch.page[0] != batch.page[1], "a shared last page is copied before it is written"
    check_invariants(taken)
    with pytest.raises(ValueError, match=r"kivi4.* no page table knows"):
        with_page_indices(filled("kivi4", lengths=(8, 0, 3)), indices, lengths)
