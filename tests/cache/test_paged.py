"""Laws of PagedKVCache: copy-on-write, failures that change nothing, the cost of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_oracle import (
    NARROW,
    SMALL,
    Oracle,
    assert_same,
    counted,
    encode,
    jit_ask,
    jit_clear,
    jit_copy,
    jit_keep,
    jit_remove,
    jit_reserve,
    jit_step,
    make_cache,
    read_back,
    snapshot,
    traces,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged.cache.contiguous import ContiguousKVCache
from jaxpaged.cache.interface import (
    ALL,
    OutOfPages,
    can_reserve,
    clear,
    reserve,
    reserve_or_raise,
    seq_copy,
    seq_keep,
    seq_position_max,
    seq_remove,
    seq_reorder,
    seq_shift,
)
from jaxpaged.cache.invariants import InvariantError, check_invariants
from jaxpaged.cache.paged import PagedKVCache

S, T = 4, 40


def arr(*counts: int) -> jax.Array:
    return jnp.asarray(counts, jnp.int32)


class Driver:
    """A cache and its oracle, stepped and checked together."""

    def __init__(self, **sizes: int) -> None:
        self.cache = make_cache(**sizes)
        self.oracle = Oracle.of(self.cache)
        self.token = 0

    def step(self, *num_new: int) -> Any:
        expected, _ = self.oracle.reserve(num_new, self.token, T)
        self.cache, batch, ok = jit_step(self.cache, arr(*num_new), self.token, num_tokens=T)
        assert bool(ok) == expected
        self.token += sum(num_new) if expected else 0
        self.oracle.check(self.cache)
        return batch

    def copy(self, src: int, dst: int, p0: int = 0, p1: int = -1) -> None:
        assert self.oracle.copy(src, dst, p0, p1)
        self.cache, ok = jit_copy(self.cache, src, dst, p0, p1)
        assert ok
        self.oracle.check(self.cache)

    def remove(self, seq: int, p0: int = 0, p1: int = -1) -> bool:
        expected = self.oracle.remove(range(S) if seq == ALL else [seq], p0, p1)
        self.cache, ok = jit_remove(self.cache, seq, p0, p1)
        assert bool(ok) == expected
        self.oracle.check(self.cache)
        return expected

    def pages(self, seq: int) -> list[int]:
        return np.asarray(self.cache.table.pages)[seq, : int(self.cache.table.num_entries[seq])].tolist()

    @property
    def used(self) -> int:
        return int(self.cache.pages_used)


# Targets of tokens


def test_a_batch_has_page_and_slot_of_each_token() -> None:
    d = Driver()
    d.step(5, 0, 9, 0)
    batch = jax.tree.map(np.asarray, d.step(4, 0, 1, 2))
    assert batch.sequence.tolist() == [0] * 4 + [2] + [3] * 2 + [S] * (T - 7)
    assert batch.position.tolist() == [5, 6, 7, 8, 9, 0, 1] + [0] * (T - 7)
    np.testing.assert_array_equal(batch.rope_positions, batch.position)
    assert batch.cu_q_lens.tolist() == [0, 4, 4, 5, 7]
    first, second = d.pages(0)
    assert batch.page.tolist() == [first] * 3 + [second, d.pages(2)[1]] + d.pages(3) * 2 + [14] * (T - 7)
    assert batch.slot.tolist() == [5, 6, 7, 0, 1, 0, 1] + [0] * (T - 7)


def test_a_step_after_a_removal_in_the_middle_continues_at_the_last_position() -> None:
    d = Driver()
    d.step(20, 0, 0, 0)
    d.remove(0, 3, 13)
    batch = d.step(2, 0, 0, 0)
    assert np.asarray(batch.position)[:2].tolist() == [20, 21]
    assert d.oracle.contents(0)[-1] == (21, 21)


def test_a_step_after_truncation_continues_in_the_same_page() -> None:
    d = Driver()
    d.step(12, 0, 0, 0)
    held = d.pages(0)
    d.remove(0, 10)
    batch = d.step(1, 0, 0, 0)
    assert (int(batch.position[0]), int(batch.page[0]), int(batch.slot[0])) == (10, held[1], 2)


def test_an_emptied_sequence_starts_again_at_position_0() -> None:
    d = Driver()
    d.step(12, 0, 0, 0)
    d.remove(0)
    assert np.asarray(d.step(1, 0, 0, 0).position)[0] == 0


def test_padding_rows_never_write_the_last_page() -> None:
    d = Driver(**SMALL)
    d.step(8, 8, 8, 9)  # T - 33 rows of poison; Driver looks for it in all pages
    assert np.isnan(np.asarray(d.cache.k_pages)[4, :, 1:]).all()


def test_unaligned_removal_splits_an_entry_and_fails_if_the_row_is_full() -> None:
    d = Driver(**NARROW)
    d.step(26, 0, 0, 0)
    before = snapshot(d.cache)
    assert not d.remove(0, 2, 4)
    assert_same(d.cache, before)
    assert d.remove(0, 2, 12) and d.remove(0, 26)
    assert d.remove(0, 0, 8) and d.remove(0, 20, 22)
    assert d.remove(0) and d.used == 0


# Copy on write


def test_a_fork_shares_pages_until_one_writes() -> None:
    d = Driver()
    d.step(12, 0, 0, 0)
    d.copy(0, 1)
    assert d.pages(0) == d.pages(1) and d.used == 2
    d.step(0, 1, 0, 0)
    assert d.pages(0)[0] == d.pages(1)[0] and d.pages(0)[1] != d.pages(1)[1] and d.used == 3
    d.step(1, 1, 0, 0)
    assert d.used == 3


def test_of_sequences_that_write_a_shared_page_the_last_keeps_the_original() -> None:
    d = Driver()
    d.step(12, 0, 0, 0)
    original = d.pages(0)[1]
    for dst in (1, 2, 3):
        d.copy(0, dst)
    assert jit_ask(d.cache, arr(1, 1, 1, 1))[0].tolist() == [1, 1, 1, 0]
    assert jit_ask(d.cache, arr(1, 1, 0, 1))[0].tolist() == [1, 1, 0, 1]
    d.step(1, 1, 1, 1)
    last = [d.pages(seq)[1] for seq in range(S)]
    assert len(set(last)) == 4 and last[3] == original
    assert d.used == 5


def test_a_full_shared_page_is_not_copied() -> None:
    d = Driver()
    d.step(16, 0, 0, 0)
    d.copy(0, 1)
    d.step(1, 1, 0, 0)
    assert d.pages(0)[:2] == d.pages(1)[:2] and d.used == 4


def test_a_fork_of_a_shorter_prefix_does_not_overwrite_the_longer() -> None:
    d = Driver()
    d.step(14, 0, 0, 0)
    d.copy(0, 1, 0, 10)
    d.step(0, 1, 0, 0)
    assert d.pages(0)[1] != d.pages(1)[1]


def test_a_page_is_not_copied_once_its_other_sequences_are_gone() -> None:
    d = Driver()
    d.step(12, 0, 0, 0)
    d.copy(0, 1)
    d.remove(0)
    d.step(0, 1, 0, 0)
    assert d.used == 2


def test_copy_needs_an_empty_destination_and_may_start_in_the_middle() -> None:
    d = Driver()
    d.step(20, 1, 0, 0)
    before = snapshot(d.cache)
    for src, dst in ((0, 1), (0, 0), (0, S), (S, 2), (-1, 2), (0, -1)):
        d.cache, ok = jit_copy(d.cache, src, dst, 0, -1)
        assert not ok
        assert_same(d.cache, before)
    d.copy(0, 2, 3, 11)
    assert jit_ask(d.cache, arr(0, 0, 0, 0))[4].tolist() == [0, 0, 3, -1]
    assert np.asarray(d.step(0, 0, 1, 0).position)[0] == 11


# Exhaustion


def test_a_pool_filled_to_the_last_page_allocates_no_page_twice() -> None:
    d = Driver(**SMALL)
    d.step(8, 8, 8, 8)
    d.step(1, 0, 0, 0)
    held = [page for seq in range(S) for page in d.pages(seq)]
    assert sorted(held) == list(range(5))
    d.step(1, 1, 0, 0)  # refused: Driver checks that nothing changed
    d.step(7, 0, 0, 0)
    assert d.used == 5


def test_a_failed_step_is_all_padding_and_changes_nothing() -> None:
    cache = make_cache(**SMALL)
    cache, _, ok = jit_step(cache, arr(10, 0, 0, 0), 0, num_tokens=T)
    assert ok
    before = snapshot(cache)
    for num_new in (
        arr(0, 2**31 - 1, 0, 0),
        arr(0, 0, 0, -(2**31)),
        arr(1, 1, 30, 0),
        arr(1, -1, 0, 0),
        arr(30, 11, 0, 0),
    ):
        cache, batch, ok = jit_step(cache, num_new, 0, num_tokens=T)
        assert not ok and not batch.valid.any() and (batch.page == 5).all()
        assert batch.cu_q_lens.tolist() == [0] * (S + 1)
        assert_same(cache, before)


def test_a_row_of_the_table_never_overflows() -> None:
    d = Driver(**NARROW)
    d.step(32, 0, 0, 0)
    before = snapshot(d.cache)
    assert not jit_ask(d.cache, arr(1, 0, 0, 0))[1]
    d.step(1, 0, 0, 0)
    assert_same(d.cache, before)


def test_no_page_leaks_over_many_lifetimes() -> None:
    d = Driver()
    for _ in range(5):
        d.step(12, 0, 0, 0)
        d.copy(0, 1)
        d.copy(1, 2, 2, 9)
        d.step(3, 3, 1, 0)
        d.remove(0, 5, 9)
        d.remove(1)
        d.remove(ALL, 2, 7)
        d.remove(ALL)
        assert d.used == 0
        assert sorted(np.asarray(d.cache.allocator.free_pages).tolist()) == list(range(14))


@settings(max_examples=30)
@given(
    st.lists(st.integers(0, 32), min_size=S, max_size=S),
    st.lists(st.integers(0, 32), min_size=S, max_size=S),
    st.booleans(),
)
def test_sequences_that_fit_can_reserve_once_the_others_are_gone(
    held: list[int], wanted: list[int], share: bool
) -> None:
    cache = make_cache(**NARROW)
    cache, _, ok = jit_reserve(cache, arr(*held), num_tokens=128)
    assert ok
    if share:
        cache, _ = jit_remove(cache, 1)
        cache, _ = jit_copy(cache, 0, 1)
    fits = jit_ask(cache, arr(*wanted))[2]
    assert bool(fits.all()) == bool(jit_ask(cache, arr(*wanted))[1])
    cache, ok = jit_remove(cache, ~fits)
    assert ok
    cache, _, ok = jit_reserve(cache, jnp.where(fits, arr(*wanted), 0), num_tokens=128)
    assert ok
    check_invariants(cache)


def test_a_sequence_that_does_not_fit_is_skipped() -> None:
    cache = make_cache(**SMALL)
    assert jit_ask(cache, arr(16, 32, 24, 8))[2].tolist() == [True, False, True, False]


def test_a_step_of_single_tokens_fails_for_two() -> None:
    cache = make_cache()
    before = snapshot(cache)
    same, batch, ok = reserve(cache, arr(1, 2, 0, 0), num_tokens=4, max_new=1)
    assert not ok and batch.max_q_len == 1
    assert_same(same, before)


def test_a_sequence_with_a_full_row_takes_no_pages_from_the_others() -> None:
    cache = make_cache(**NARROW)
    assert jit_ask(cache, arr(80, 8, 8, 0))[2].tolist() == [False, True, True, True]


def test_sequences_are_served_in_order_of_their_ids() -> None:
    cache = make_cache(**SMALL)
    assert jit_ask(cache, arr(24, 16, 1, 0))[2].tolist() == [True, True, False, True]


# Host wrapper


def test_out_of_pages_has_both_numbers_and_leaves_the_cache_usable() -> None:
    cache, _ = reserve_or_raise(make_cache(**SMALL), arr(10, 0, 0, 0), num_tokens=24)
    before = snapshot(cache)
    with pytest.raises(OutOfPages, match=r"out of pages: 4 requested, 3 free") as error:
        reserve_or_raise(cache, arr(7, 17, 0, 0), num_tokens=24)
    assert (error.value.requested, error.value.free) == (4, 3)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(cache))
    assert_same(cache, before)
    after, batch = reserve_or_raise(cache, arr(7, 8, 0, 0), num_tokens=24)
    assert batch.num_tokens == 24 and after.lengths.tolist() == [17, 8, 0, 0]
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize(
    ("num_new", "num_tokens", "message"),
    [
        ((1, -2, 0, 0), None, "num_new must not be negative, got -2"),
        ((3, 2, 0, 0), 4, "asks for 5 tokens, the step has 4 rows"),
        ((0, 0, 81, 0), None, "sequence 2 has no room for its new tokens in PagedKVCache"),
        ((1, 1, 1), None, r"one count per sequence, \[4\], got shape \(3,\)"),
        ((1, 1, 1, 1), 0, "num_tokens must be positive, got 0"),
    ],
)
def test_impossible_requests_are_value_errors(
    num_new: tuple[int, ...], num_tokens: int | None, message: str
) -> None:
    cache = make_cache(**SMALL)
    with pytest.raises(ValueError, match=message):
        reserve_or_raise(cache, arr(*num_new), num_tokens=num_tokens)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(cache))


def test_counts_may_be_a_list_or_numpy() -> None:
    cache, batch = reserve_or_raise(make_cache(**SMALL), [3, 0, 2, 0])
    cache, _ = reserve_or_raise(cache, np.asarray([1, 0, 0, 0]), num_tokens=24)
    assert batch.num_tokens == 5 and cache.lengths.tolist() == [4, 0, 2, 0]


# Shapes


def test_rows_of_a_step_are_static() -> None:
    cache = make_cache()
    with pytest.raises(ValueError, match="num_tokens must be given under jit"):
        jax.jit(reserve)(cache, arr(1, 0, 0, 0))
    with pytest.raises(
        ValueError, match=r"num_new must have one count per sequence, \[4\], got shape \(2,\)"
    ):
        reserve(cache, arr(1, 2))
    with pytest.raises(ValueError, match="num_tokens must be positive, got 0"):
        reserve(cache, arr(1, 0, 0, 0), num_tokens=0)

    def rows(num_new: Any) -> int:
        return jax.eval_shape(lambda c: reserve(c, num_new)[1], cache).num_tokens

    # Known under another program's trace too, unless the counts are traced.
    assert rows([1, 2, 0, 3]) == rows(np.asarray([1, 2, 0, 3])) == rows(arr(1, 2, 0, 3)) == 6
    assert rows([0, 0, 0, 0]) == 1
    _, batch, ok = jit_reserve(cache, arr(1, 2, 0, 3), num_tokens=14)
    assert ok and batch.num_tokens == 14 and int(batch.valid.sum()) == 6


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"page_size": 12}, "page_size must be a power of two from 8 to 256, got 12"),
        ({"page_size": 4}, "from 8 to 256, got 4"),
        ({"page_size": 512}, "from 8 to 256, got 512"),
        ({"num_pages": 0}, "num_pages must be positive, got 0"),
        ({"max_seqs": -1}, "max_seqs must be positive, got -1"),
        ({"max_seq_len": 0}, "max_seq_len must be positive, got 0"),
        ({"num_layers": 0}, "num_layers must be positive, got 0"),
        ({"num_kv_heads": 0}, "num_kv_heads must be positive, got 0"),
        ({"head_dim": 0}, "head_dim must be positive, got 0"),
        ({"dtype": "int8"}, "'int8' is not known; known are f32"),
        ({"implementation": "cuda"}, "unknown implementation 'cuda'; there are cpu_numba"),
    ],
)
def test_impossible_sizes_are_refused(size: dict[str, Any], message: str) -> None:
    sizes = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 2, "num_pages": 4, "max_seqs": 2}
    with pytest.raises(ValueError, match=message):
        PagedKVCache.create(**(sizes | size))


def test_a_cache_names_its_implementation_and_the_environment_does_not_override_it(monkeypatch: Any) -> None:
    sizes = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 4, "max_seqs": 1}
    monkeypatch.setenv("JAXPAGED_ATTENTION", "xla")
    paged = PagedKVCache.create(**sizes, num_pages=2, implementation="mosaic_gpu")
    contiguous = ContiguousKVCache.create(**sizes, max_length=8, dtype="bf16", implementation="cpu_numba")
    for cache, reason in (
        (paged, "mosaic_gpu: .*not of float32"),
        (contiguous, "cpu_numba: .*multiple of 8, got 4"),
    ):
        cache, batch, _ = cache.reserve(arr(1), num_tokens=1)
        rows = jnp.zeros((1, 1, 4))
        with pytest.raises(NotImplementedError, match=reason):
            cache.attend(0, rows, rows, rows, batch)
    with pytest.raises(ValueError, match='read by "cpu_numba" or "xla", got \'mosaic_gpu\''):
        ContiguousKVCache.create(**sizes, max_length=8, implementation="mosaic_gpu")


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_sizes_are_those_of_the_arrays(dtype: str) -> None:
    cache = PagedKVCache.create(
        num_layers=3, num_kv_heads=2, head_dim=5, num_pages=7, max_seqs=2, dtype=dtype
    )
    assert (cache.num_layers, cache.num_pages, cache.max_seqs, cache.max_pages_per_seq) == (3, 7, 2, 7)
    assert cache.page_size == 32 and cache.kind == "paged"
    assert cache.bytes_per_page * 7 == cache.k_pages.nbytes + cache.v_pages.nbytes
    check_invariants(cache)


@pytest.mark.parametrize("seq", [S, S + 1, 2**31 - 1])
def test_unknown_sequences_are_refused(seq: int) -> None:
    cache, _, _ = jit_step(make_cache(), arr(5, 5, 5, 5), 0, num_tokens=T)
    before = snapshot(cache)
    for operation, args in ((jit_remove, (seq,)), (jit_keep, (seq,)), (jit_keep, (-1,))):
        cache, ok = operation(cache, *args)
        assert not ok
        assert_same(cache, before)


def test_every_negative_id_is_all() -> None:
    cache, _, _ = jit_step(make_cache(), arr(5, 5, 5, 5), 0, num_tokens=T)
    cache, ok = jit_remove(cache, -7, 2, 4)
    assert ok and cache.lengths.tolist() == [3] * S


def test_keep_and_clear() -> None:
    d = Driver()
    d.step(5, 9, 5, 5)
    kept = read_back(d.cache, 1)
    d.cache, ok = jit_keep(d.cache, 1)
    assert ok and d.cache.lengths.tolist() == [0, 9, 0, 0] and d.used == 2
    jax.tree.map(np.testing.assert_array_equal, kept, read_back(d.cache, 1))
    check_invariants(d.cache)
    d.cache = jit_clear(d.cache)
    check_invariants(d.cache)
    assert d.used == 0 and np.isfinite(np.asarray(d.cache.k_pages)).any()
    d.cache = jit_clear(d.cache, scrub=True)
    check_invariants(d.cache)
    assert not any(np.asarray(pages).any() for pages in (d.cache.k_pages, d.cache.v_pages))
    d.oracle, d.token = Oracle.of(d.cache), 0
    d.step(1, 1, 1, 1)  # the cleared cache owns its buffers and can be donated


def test_attend_writes_the_batch_s_slots_of_one_layer() -> None:
    cache, batch, ok = jit_reserve(make_cache(), arr(3, 0, 9, 0), num_tokens=14)
    assert ok
    tokens = np.where(np.asarray(batch.valid), np.arange(14), -1)
    k, v = (jnp.asarray(encode(tokens, 1, which, 2, 2)) for which in (0, 1))
    out, after = jax.jit(lambda c, b, k, v: c.attend(1, k, k, v, b))(cache, batch, k, v)
    assert out.shape == (14, 2, 2) and not out[12:].any()
    assert all(np.isnan(np.asarray(pages)).all() for pages in after.pages(0)), "of the other layer"
    for seq, of_seq in ((0, slice(0, 3)), (2, slice(3, 12))):
        _, k_read, v_read = read_back(after, seq)
        np.testing.assert_array_equal(k_read[:, 1], np.asarray(k)[of_seq])
        np.testing.assert_array_equal(v_read[:, 1], np.asarray(v)[of_seq])


# Compiled programs


def test_other_ids_lengths_and_ranges_are_not_retraced() -> None:
    def use(seq: int) -> None:
        cache = make_cache()
        cache, _, _ = jit_step(cache, jnp.asarray(np.roll([9, 1, 0, 0], seq), jnp.int32), seq, num_tokens=T)
        cache, _ = jit_copy(cache, seq, (seq + 2) % S, seq, 9 + seq)
        cache, _ = jit_remove(cache, seq, seq, seq + 2)
        cache, _ = jit_remove(cache, jnp.arange(S) > seq, seq, -1)
        cache, _ = jit_keep(cache, seq)
        jit_ask(cache, arr(seq, 1, 2, 3))
        check_invariants(jit_clear(cache))

    use(0)
    before = dict(traces)
    for seq in range(1, S):
        use(seq)
    assert dict(traces) == before and min(before.values()) > 0


def test_host_wrapper_compiles_once_for_all_counts() -> None:
    from jaxpaged.cache import interface as module

    cache = make_cache(**SMALL)
    cache, _ = reserve_or_raise(cache, arr(1, 0, 0, 0), num_tokens=24)
    compiled = module._reserve_donating._cache_size(), module._needs._cache_size()
    for num_new in ((0, 3, 1, 0), (2, 2, 2, 2), (8, 0, 0, 0), (0, 0, 0, 0)):
        cache, _ = reserve_or_raise(cache, arr(*num_new), num_tokens=24)
    assert compiled == (module._reserve_donating._cache_size(), module._needs._cache_size())


def test_every_operation_keeps_all_types_for_loop_carries() -> None:
    cache = make_cache()
    types = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), jax.eval_shape(lambda: cache))
    mask = jnp.ones(S, bool)
    for operation in (
        lambda c: reserve(c, arr(1, 0, 0, 0), num_tokens=4)[0],
        lambda c: seq_remove(c, 1, 2, 3)[0],
        lambda c: seq_remove(c, mask)[0],
        lambda c: seq_copy(c, 1, 2)[0],
        lambda c: seq_keep(c, 1)[0],
        clear,
        lambda c: clear(c, scrub=True),
    ):
        after = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), jax.eval_shape(operation, cache))
        assert after == types


def test_a_while_loop_runs_until_the_pool_is_exhausted() -> None:
    @counted
    def fill(cache: PagedKVCache) -> PagedKVCache:
        one = jnp.ones(S, jnp.int32)
        return jax.lax.while_loop(
            lambda c: can_reserve(c, one), lambda c: reserve(c, one, num_tokens=S)[0], cache
        )

    cache = fill(make_cache())
    check_invariants(cache)
    assert cache.lengths.tolist() == [24] * S and seq_position_max(cache).tolist() == [23] * S


def big_step(num_pages: int) -> tuple[PagedKVCache, jax.stages.Compiled]:
    cache = PagedKVCache.create(
        num_layers=2,
        num_kv_heads=1,
        head_dim=2,
        num_pages=num_pages,
        max_seqs=256,
        page_size=8,
        max_seq_len=63 * 8,
    )
    step = jax.jit(reserve, static_argnames="num_tokens", donate_argnames="cache")
    return cache, step.lower(cache, jnp.ones(256, jnp.int32), num_tokens=256).compile()


def test_a_step_of_256_sequences_updates_the_pool_in_place() -> None:
    cache, compiled = big_step(65_536)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    memory = compiled.memory_analysis()
    assert "input_output_alias" in compiled.as_text()
    assert memory.alias_size_in_bytes >= size
    # No temporary depends on the size of the pool, not even one number per page.
    small = big_step(1_024)[1].memory_analysis()
    assert memory.temp_size_in_bytes == small.temp_size_in_bytes
    for _ in range(10):
        cache, batch, ok = compiled(cache, jnp.ones(256, jnp.int32))
        assert ok
    check_invariants(cache)
    assert cache.lengths.tolist() == [10] * 256 and int(cache.pages_used) == 512
    assert len(set(batch.page.tolist())) == 256


# check_invariants


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda a, t: (replace(a, ref_counts=a.ref_counts.at[1].add(1)), t),
            "page 1: reference count 2, but 1",
        ),
        (lambda a, t: (replace(a, num_free=a.num_free - 1), t), "free stack holds 10 pages, 11 have"),
        (lambda a, t: (replace(a, num_free=a.num_free + 1), t), "free stack holds"),
        (lambda a, t: (replace(a, free_pages=a.free_pages.at[0].set(a.free_pages[1])), t), "a page twice"),
        (
            lambda a, t: (a, replace(t, pages=t.pages.at[0, 0].set(14))),
            r"sequence 0: a page outside \[0, 14\)",
        ),
        (lambda a, t: (a, replace(t, pages=t.pages.at[2, 0].set(0))), "page 0: reference count 1, but 2"),
        (
            lambda a, t: (a, replace(t, position=t.position.at[0, 1].set(7))),
            "sequence 0: positions out of order",
        ),
        (
            lambda a, t: (a, replace(t, position=t.position.at[0, 0].set(-1))),
            "sequence 0: negative position -1",
        ),
        (
            lambda a, t: (a, replace(t, num_tokens=t.num_tokens.at[0, 1].set(9))),
            "sequence 0: an entry outside",
        ),
        (
            lambda a, t: (a, replace(t, num_tokens=t.num_tokens.at[0, 0].set(0))),
            "sequence 0: an entry outside",
        ),
        (lambda a, t: (a, replace(t, num_entries=t.num_entries.at[0].set(1))), "sequence 0: an entry behind"),
        (lambda a, t: (a, replace(t, num_entries=t.num_entries.at[0].set(11))), "num_entries outside"),
    ],
)
def test_check_invariants_names_the_damage(damage: Callable[..., Any], message: str) -> None:
    cache, _, _ = jit_step(make_cache(), arr(12, 0, 3, 0), 0, num_tokens=T)
    check_invariants(cache)
    allocator, table = damage(cache.allocator, cache.table)
    with pytest.raises(InvariantError, match=message):
        check_invariants(replace(cache, allocator=allocator, table=table))


def test_check_invariants_counts_pins() -> None:
    cache, _, _ = jit_step(make_cache(), arr(12, 0, 0, 0), 0, num_tokens=T)
    allocator = replace(cache.allocator, ref_counts=cache.allocator.ref_counts.at[0].add(1))
    pins = np.zeros(14, np.int32)
    pins[0] = 1
    check_invariants(replace(cache, allocator=allocator), pins)
    with pytest.raises(InvariantError, match="page 0: reference count 1, but 2"):
        check_invariants(cache, pins)


@pytest.mark.parametrize(
    "operation",
    [
        lambda cache: seq_remove(cache, 0, 3, 21)[0],
        lambda cache: seq_remove(cache, ALL, 3, 21)[0],
        lambda cache: seq_shift(cache, 0, 8, -1, 5)[0],
        lambda cache: seq_shift(cache, ALL, 8, -1, 5)[0],
        lambda cache: seq_copy(cache, 0, 1, 2, 20)[0],
        lambda cache: seq_reorder(cache, arr(0, 0, 0, S)),
        lambda cache: cache.seq_drop_unseen(9),
    ],
    ids=["remove", "remove_all", "shift", "shift_all", "copy", "reorder", "drop_unseen"],
)
def test_no_operation_on_sequences_reads_a_page(operation: Callable[[PagedKVCache], Any]) -> None:
    """In the program, every page array goes unused from input to output.

    The operations edit tables only, so a shift costs the same for any number of tokens.
    """
    cache = make_cache()
    program = jax.make_jaxpr(operation)(cache).jaxpr
    is_page = [leaf.ndim == 4 for leaf in jax.tree.leaves(cache)]
    pools = [v for v, page in zip(program.invars, is_page, strict=True) if page]
    assert [v for v, page in zip(program.outvars, is_page, strict=True) if page] == pools
    assert not any(pool in equation.invars for equation in program.eqns for pool in pools)
