"""Laws of ContiguousKVCache, and its agreement with PagedKVCache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.cache.contiguous import ContiguousKVCache
from jaxpaged.cache.paged import PagedKVCache

KV, G, D, S, MAX = 2, 3, 16, 3, 300
SIZES = {"num_layers": 2, "num_kv_heads": KV, "head_dim": D, "max_seqs": S}


def contiguous(**options):
    return ContiguousKVCache.create(**SIZES, **{"max_length": MAX, **options})


# Results are compared, not timed, and most of a small program's compilation is optimization.
@functools.partial(
    jax.jit,
    static_argnames=("window", "soft_cap"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def step(cache, num_new, q, k, v, sinks, window=None, soft_cap=None):
    cache, batch, ok = cache.reserve(num_new, num_tokens=q.shape[0])
    outs = []
    for layer in range(2):
        out, cache = cache.attend(layer, q, k, v, batch, window=window, soft_cap=soft_cap, sinks=sinks)
        outs.append(out)
        k, v = k + out[:, :KV], v + out[:, :KV]  # as in a model: a layer writes after the one before has read
    return jnp.stack(outs), cache, ok


@pytest.mark.parametrize(
    ("dtype", "options"),
    [("f32", {}), ("f16", {"window": 40, "soft_cap": 3.0})],
    ids=["f32", "f16 with every mask"],
)
def test_equals_the_paged_cache(dtype, options):
    rng = np.random.default_rng(0)
    one = contiguous(dtype=dtype)
    other = PagedKVCache.create(**SIZES, num_pages=40, page_size=32, dtype=dtype)
    sinks = jnp.asarray(rng.standard_normal(KV * G), jnp.float32) if options else None
    # Prefill, decode tokens and idle sequences in one step; the last step passes the first chunk of 256.
    for num_new in ([70, 3, 0], [1, 1, 64], [64, 1, 1], [70, 0, 1], [60, 1, 3], [1, 1, 1]):
        shape = 75 if sum(num_new) > 3 else 3, KV, D
        k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
        q = jnp.asarray(rng.standard_normal((shape[0], KV * G, D)), jnp.float32)
        a, one, ok_one = step(one, jnp.asarray(num_new), q, k, v, sinks, **options)
        b, other, ok_other = step(other, jnp.asarray(num_new), q, k, v, sinks, **options)
        assert ok_one and ok_other
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
        np.testing.assert_array_equal(one.lengths, other.lengths)
    assert one.lengths[0] > 256


def filled(*lengths):
    cache, _, ok = contiguous().reserve(jnp.asarray(lengths))
    assert ok
    return cache


def test_reserve_is_all_or_nothing():
    cache = filled(MAX - 1, 5, 0)
    assert cache.can_reserve_each(jnp.array([2, 2, MAX + 1])).tolist() == [False, True, False]
    after, batch, ok = cache.reserve(jnp.array([2, 2, 0]))
    assert not ok and not batch.valid.any()
    np.testing.assert_array_equal(after.lengths, cache.lengths)
    after, batch, ok = cache.reserve(jnp.array([1, 2, 0]), num_tokens=5)
    assert ok and after.lengths.tolist() == [MAX, 7, 0]
    assert batch.sequence.tolist() == [0, 1, 1, S, S]
    assert batch.position[:3].tolist() == batch.slot[:3].tolist() == [MAX - 1, 5, 6]
    assert batch.page.tolist() == [0, 1, 1, S, S]
    assert not cache.reserve(jnp.array([1, 2, 0]), num_tokens=2)[2]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0,), [0, 7, 0]),
        ((-1,), [0, 0, 0]),
        ((1, 4), [9, 4, 0]),
        ((1, 4, 100), [9, 4, 0]),
        ((jnp.array([True, True, False]), 8), [8, 7, 0]),
        ((0, 9, 20), [9, 7, 0]),
        ((0, 3, 3), [9, 7, 0]),
        ((0, 2, 5), None),
        ((-1, 0, 8), None),
    ],
)
def test_remove_truncates_or_fails(arguments, expected):
    cache, ok = filled(9, 7, 0).seq_remove(*arguments)
    assert bool(ok) == (expected is not None)
    assert cache.lengths.tolist() == (expected or [9, 7, 0])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0, 2), [9, 7, 9]),
        ((0, 2, 0, 4), [9, 7, 4]),
        ((2, 2), [9, 7, 0]),
        ((0, 1), None),
        ((0, 2, 3), None),
        ((0, 3), None),
        ((-1, 2), None),
    ],
)
def test_copy_copies_a_prefix_to_an_empty_sequence_or_fails(arguments, expected):
    before = filled(9, 7, 0)
    marks = jnp.arange(1, len(before.k) + 1).reshape(-1, 1, 1, 1)
    before = dataclasses.replace(before, k=before.k + marks)
    cache, ok = before.seq_copy(*arguments)
    assert bool(ok) == (expected is not None)
    assert cache.lengths.tolist() == (expected or [9, 7, 0])
    for first in range(0, before.num_layers * S, S):
        old, new = before.k[first : first + S], cache.k[first : first + S]
        rows = old.at[2].set(old[0]) if ok and arguments[0] == 0 else old
        np.testing.assert_array_equal(new, rows)


def test_a_donated_cache_is_updated_in_place():
    cache = contiguous()
    q, k = jnp.zeros((S, KV * G, D)), jnp.zeros((S, KV, D))
    jitted = jax.jit(step.__wrapped__, donate_argnums=0)
    program = jitted.lower(cache, jnp.ones(S, jnp.int32), q, k, k, None).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= S * cache.bytes_per_page
    assert memory.temp_size_in_bytes < S * cache.bytes_per_page // 2


def test_sizes_are_properties_and_checked():
    cache = contiguous(max_length=10, dtype="bf16")
    assert (cache.kind, cache.max_seqs, cache.num_layers, cache.num_pages) == ("contiguous", S, 2, S)
    assert cache.bytes_per_page == 2 * 2 * KV * 10 * D * 2
    assert filled(3, 0, 1).pages_used == 2
    with pytest.raises(ValueError, match="max_seqs must be positive, got 0"):
        ContiguousKVCache.create(**{**SIZES, "max_seqs": 0}, max_length=8)
    with pytest.raises(ValueError, match="'f64' is not known"):
        contiguous(dtype="f64")
