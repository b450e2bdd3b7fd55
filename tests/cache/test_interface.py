"""Laws of every kind of cache through one interface, and wrong arguments, which nothing broadcasts."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpaged
from jaxpaged import ContiguousKVCache, PagedKVCache, Rope, check_invariants

S, KV, D, LAYERS = 3, 2, 4, 2
KINDS = ("paged", "contiguous")


def make(kind: str, **options: Any) -> Any:
    sizes = {"num_layers": LAYERS, "num_kv_heads": KV, "head_dim": D, "max_seqs": S, "rope": Rope.create(())}
    if kind == "contiguous":
        return ContiguousKVCache.create(**sizes, max_length=24, **options)
    return PagedKVCache.create(**sizes, num_pages=9, page_size=8, max_seq_len=16, **options)


# Compiled once for all tests; most of a small program's compilation is optimization.
OPTIONS = {"compiler_options": {"xla_backend_optimization_level": 0}}
ops = SimpleNamespace(
    reserve=jax.jit(jaxpaged.reserve, static_argnames="num_tokens", **OPTIONS),
    clear=jax.jit(jaxpaged.clear, static_argnames="scrub", **OPTIONS),
    **{
        name: jax.jit(getattr(jaxpaged, name), **OPTIONS)
        for name in (
            "seq_copy", "seq_defragment", "seq_keep", "seq_remove", "seq_reorder", "seq_shift", "can_reserve",
        )
    },
)  # fmt: skip


@functools.cache
def filled(kind: str, *lengths: int) -> Any:
    cache, _, ok = ops.reserve(make(kind), jnp.asarray(lengths), num_tokens=16)
    assert ok
    return cache


@functools.cache
def step_of(kind: str) -> Any:
    """A cache and its batch, shapes alone."""
    return jax.eval_shape(lambda: jaxpaged.reserve(make(kind), jnp.array([3, 0, 1]), num_tokens=4)[:2])


def unchanged(cache: Any, other: Any) -> bool:
    leaves = zip(jax.tree.leaves(cache), jax.tree.leaves(other), strict=True)
    return all((np.asarray(a) == np.asarray(b)).all() for a, b in leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_takes_every_cache(kind: str) -> None:
    cache = filled(kind, 5, 0, 9)
    assert jaxpaged.seq_length(cache).tolist() == [5, 0, 9]
    assert jaxpaged.seq_position_min(cache).tolist() == [0, -1, 0]
    assert jaxpaged.seq_position_max(cache).tolist() == [4, -1, 8]
    assert ops.can_reserve(cache, jnp.array([1, 2, 3]))
    cache, ok = ops.seq_copy(cache, 0, 1, 0, 3)
    assert ok and jaxpaged.seq_length(cache).tolist() == [5, 3, 9]
    cache, ok = ops.seq_remove(cache, 2, 4)
    assert ok and jaxpaged.seq_length(cache).tolist() == [5, 3, 4]
    cache, ok = ops.seq_remove(cache, jnp.array([True, False, False]))
    assert ok and jaxpaged.seq_length(cache).tolist() == [0, 3, 4]
    cache, ok = ops.seq_defragment(cache, jaxpaged.ALL)
    assert ok
    cache = ops.seq_reorder(cache, jnp.array([2, S, 1]))
    assert jaxpaged.seq_length(cache).tolist() == [4, 0, 3]
    cache, batch = jaxpaged.reserve_or_raise(cache, [1, 2, 0])
    assert batch.position[:3].tolist() == [4, 0, 1]
    cache, ok = ops.seq_keep(cache, 0)
    assert ok and jaxpaged.seq_length(cache).tolist() == [5, 0, 0]
    assert jaxpaged.seq_length(ops.clear(cache, scrub=True)).tolist() == [0, 0, 0]
    check_invariants(cache)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_done_changes_nothing(kind: str) -> None:
    cache = filled(kind, 5, 5, 0)
    refused = [
        ops.reserve(cache, jnp.array([-2, 1, 0]), num_tokens=16)[::2],
        ops.reserve(cache, jnp.array([0, 0, 100]), num_tokens=200)[::2],
        ops.seq_remove(cache, S),
        ops.seq_copy(cache, 0, S),
        ops.seq_copy(cache, -1, 2),
        ops.seq_copy(cache, 0, 1),
        ops.seq_keep(cache, S),
        ops.seq_keep(cache, -1),
        ops.seq_shift(cache, S, 0, -1, 1),
    ]
    for after, ok in refused:
        assert not ok and unchanged(after, cache)
    for counts in ([-1, 0, 0], [0, 0, 100]):
        assert not ops.can_reserve(cache, jnp.asarray(counts))
        with pytest.raises((ValueError, jaxpaged.OutOfPages)):
            jaxpaged.reserve_or_raise(cache, counts)


ROWS = jnp.ones((4, KV, D))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("layer", "shapes", "message"),
    [
        (-1, {}, r"layer must be in \[0, 2\), got -1"),
        (LAYERS, {}, r"layer must be in \[0, 2\), got 2"),
        (0.0, {}, "layer must be one integer, got 0.0"),
        (0, {"k": (1, KV, D)}, r"k must be .* = \(4, 2, 4\), got \(1, 2, 4\)"),
        (0, {"k": (4, 1, D)}, r"k must be .* = \(4, 2, 4\), got \(4, 1, 4\)"),
        (0, {"v": (4, KV, 1)}, r"v must be .* = \(4, 2, 4\), got \(4, 2, 1\)"),
        (0, {"v": (KV, D)}, r"v must be .* = \(4, 2, 4\), got \(2, 4\)"),
        (0, {"q": (1, 2 * KV, D)}, "q"),
        (0, {"q": (4, 3, D)}, "heads"),
        (0, {"q": (4, KV, 2 * D)}, "q"),
    ],
)
def test_layers_and_shapes_are_checked(kind: str, layer: Any, shapes: dict[str, Any], message: str) -> None:
    rows = {name: jax.ShapeDtypeStruct(shapes.get(name, (4, KV, D)), jnp.float32) for name in ("q", "k", "v")}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda cache, batch, r: cache.attend(layer, **r, batch=batch)[0], *step_of(kind), rows)


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_of_rows_and_counts_are_checked(kind: str) -> None:
    with pytest.raises(ValueError, match="k must be of floating point, got int32"):
        jax.eval_shape(lambda c, batch: c.attend(0, ROWS, ROWS.astype(int), ROWS, batch)[0], *step_of(kind))
    cache = make(kind)
    with pytest.raises(ValueError, match="num_new must be of integers, got float32"):
        jaxpaged.reserve(cache, jnp.ones(S), num_tokens=4)
    with pytest.raises(ValueError, match=r"a sequence must be one integer or bool\[3\]"):
        ops.seq_remove(cache, jnp.array([0, 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_run_in_a_scan(kind: str) -> None:
    """A traced layer gives the outputs and the cache of static ones."""
    cache, batch, _ = ops.reserve(make(kind), jnp.array([3, 0, 1]), num_tokens=4)
    rows = jax.random.normal(jax.random.key(0), ROWS.shape)

    def attend(carry: tuple[Any, Any], layer: Any) -> tuple[Any, Any]:
        x, cache = carry
        out, cache = cache.attend(layer, x, x, x, batch)
        return (x + out, cache), out

    static, outs = (rows, cache), []
    for layer in range(cache.num_layers):
        static, out = attend(static, layer)
        outs.append(out)
    scanned, out = jax.lax.scan(attend, (rows, cache), jnp.arange(cache.num_layers))
    np.testing.assert_array_equal(out, np.stack(outs))
    for a, b in zip(jax.tree.leaves(scanned), jax.tree.leaves(static), strict=True):
        np.testing.assert_array_equal(a, b)
    for wrong in (jnp.float32(0), jnp.zeros(1, jnp.int32)):
        with pytest.raises(ValueError, match="layer must be one integer, got"):
            jax.eval_shape(lambda i: cache.attend(i, rows, rows, rows, batch)[0], wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_repr_names_sizes_and_reads_no_array(kind: str) -> None:
    text = repr(jax.eval_shape(lambda: make(kind)))
    assert len(text) < 200 and "2 layers" in text and "f32" in text and "Array" not in text


def test_a_shift_needs_to_know_the_rotation() -> None:
    cache = PagedKVCache.create(num_layers=1, num_kv_heads=1, head_dim=4, num_pages=2, max_seqs=1)
    with pytest.raises(ValueError, match="create it with rope="):
        ops.seq_shift(cache, 0, 0, -1, 1)


def test_attention_follows_a_shift_without_being_told() -> None:
    """Removing the first tokens and shifting the rest back gives what attention over the rest alone gives."""
    rope, rng = Rope.create([1.0, 0.3]), np.random.default_rng(0)
    tokens, removed = 11, 4
    x = {name: jnp.asarray(rng.normal(size=(tokens, KV, D)), jnp.float32) for name in ("q", "k", "v")}

    @jax.jit
    def attend(cache: Any, num_new: Any, q: Any, k: Any, v: Any) -> Any:
        cache, batch, _ = cache.reserve(num_new, num_tokens=10)
        q, k = (rope.rotate(rows, batch.rope_positions) for rows in (q, k))
        return cache.attend(0, q, k, v, batch)

    def run(cache: Any, first: int, last: int) -> tuple[jax.Array, Any]:
        part = [x[name][jnp.minimum(first + jnp.arange(10), tokens - 1)] for name in ("q", "k", "v")]
        out, cache = attend(cache, jnp.array([last - first, 0, 0]), *part)
        return out[: last - first], cache

    def empty() -> PagedKVCache:
        sizes = {"num_layers": 1, "num_kv_heads": KV, "head_dim": D, "max_seqs": S, "num_pages": 8}
        return PagedKVCache.create(**sizes, page_size=8, rope=rope)

    _, cache = run(empty(), 0, tokens - 1)
    cache, ok = ops.seq_remove(cache, 0, 0, removed)
    cache, moved = ops.seq_shift(cache, 0, removed, -1, -removed)
    assert ok and moved
    shifted, _ = run(cache, tokens - 1, tokens)
    _, cache = run(empty(), removed, tokens - 1)
    alone, _ = run(cache, tokens - 1, tokens)
    np.testing.assert_allclose(shifted, alone, atol=2e-6)


def test_a_page_that_nobody_shares_is_not_copied() -> None:
    """A removal inside the last page leaves two entries in it; writing behind them takes no page."""
    cache = filled("paged", 6, 0, 0)
    cache, ok = ops.seq_remove(cache, 0, 2, 4)
    assert ok and cache.table.num_entries[0] == 2
    assert cache.pages_needed(jnp.array([1, 0, 0])).tolist() == [0, 0, 0]
    cache, batch, ok = ops.reserve(cache, jnp.array([2, 0, 0]), num_tokens=16)
    assert (
        ok
        and cache.pages_used == 1
        and batch.page[:2].tolist() == [0, 0]
        and batch.slot[:2].tolist() == [6, 7]
    )
    check_invariants(cache)


def test_a_copy_takes_all_entries_of_the_page_along() -> None:
    cache = filled("paged", 6, 0, 0)
    cache, _ = ops.seq_remove(cache, 0, 2, 4)
    cache, _ = ops.seq_copy(cache, 0, 1)
    assert cache.pages_needed(jnp.array([1, 1, 0])).tolist() == [1, 0, 0]
    cache, _, ok = ops.reserve(cache, jnp.array([1, 1, 0]), num_tokens=16)
    assert ok and cache.pages_used == 2
    pages = cache.table.pages[:2, :2]
    assert (pages[:, 0] == pages[:, 1]).all() and pages[0, 0] != pages[1, 0]
    check_invariants(cache)


def sizes_made(jaxpr: Any) -> Iterator[int]:
    """Elements of each array that a program makes anew; updates in place count as what they write."""
    for equation in jaxpr.eqns:
        inner = [p for p in equation.params.values() if hasattr(p, "jaxpr") or hasattr(p, "eqns")]
        if inner:
            for program in inner:
                yield from sizes_made(getattr(program, "jaxpr", program))
        elif equation.primitive.name == "dynamic_update_slice":
            yield equation.invars[1].aval.size
        elif equation.primitive.name.startswith("scatter"):
            yield equation.invars[2].aval.size
        else:
            yield from (out.aval.size for out in equation.outvars)


@pytest.mark.parametrize("arguments", [(0,), (0, 3, 5), (0, 3, -1)], ids=["all", "range", "tail"])
def test_removal_costs_the_rows_that_it_edits(arguments: tuple[int, ...]) -> None:
    """By id or mask: nothing is computed for all S rows of P entries, nor for all N pages."""
    many, wide, pool = 64, 48, 4096
    cache = jax.eval_shape(
        lambda: PagedKVCache.create(
            num_layers=1, num_kv_heads=1, head_dim=4, num_pages=pool, max_seqs=many, max_seq_len=47 * 32
        )
    )
    assert cache.max_pages_per_seq == wide
    for seq in (jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((many,), bool)):
        traced = jax.make_jaxpr(lambda cache, seq: jaxpaged.seq_remove(cache, seq, *arguments[1:]))(
            cache, seq
        )
        assert max(sizes_made(traced.jaxpr)) <= 8 * wide < many * wide
