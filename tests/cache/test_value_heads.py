"""Laws of heads of values of another size than those of keys: results are those of values padded with zeros."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from jaxpaged import (
    ContiguousKVCache,
    GroupedKVCache,
    LayerGroup,
    PagedKVCache,
    SnapshotError,
    check_invariants,
    read_snapshot,
    restore,
    seq_copy,
    seq_defragment,
    seq_remove,
    seq_shift,
    snapshot,
)
from jaxpaged.attention import paged_attention
from jaxpaged.pages.rope import Rope

KV, GROUP, DK, DV, T, SEQS = 2, 2, 64, 32, 24, 3
ROPE = Rope.create(10_000.0 ** (-np.arange(0, 32, 2) / 32))
LAYERS = 2


def rows(step: int, dim: int, heads: int = KV) -> jax.Array:
    rng = np.random.default_rng([step, dim, heads])
    return jnp.asarray(rng.standard_normal((T, heads, dim)), jnp.float32)


@functools.partial(jax.jit, static_argnames="v_dim", compiler_options={"xla_backend_optimization_level": 0})
def step(cache: Any, num_new: Any, q: Any, k: Any, v: Any, v_dim: int) -> tuple[Any, Any]:
    cache, batch, ok = cache.reserve(num_new, num_tokens=T)
    v = jnp.pad(v, ((0, 0), (0, 0), (0, v_dim - v.shape[2])))
    outs = []
    for layer in range(LAYERS):
        out, cache = cache.attend(layer, q, k + layer, v * (1 + layer), batch)
        assert out.shape == (T, KV * GROUP, v_dim)
        outs.append(jnp.where(batch.valid[:, None, None], out, 0))
    return cache, jnp.where(ok, jnp.stack(outs), jnp.nan)


def history(cache: Any, v_dim: int, *, edits: bool) -> list[np.ndarray]:
    """Results of steps between which sequences are forked, cut, shifted and moved together."""
    outs = []

    def run(number: int, *num_new: int) -> None:
        nonlocal cache
        given = rows(number, DK, KV * GROUP), rows(number, DK), rows(number + 50, DV)
        cache, out = step(cache, jnp.asarray(num_new), *given, v_dim)
        outs.append(np.asarray(out[..., :DV]))

    def edit(operation: Any, *arguments: int) -> None:
        nonlocal cache
        cache, ok = operation(cache, *arguments)
        assert ok

    run(0, 20, 3, 0)
    edit(seq_copy, 0, 2)
    run(1, 1, 9, 5)
    if edits:
        edit(seq_remove, 0, 3, 12)
        edit(seq_shift, 0, 12, -1, -9)
        run(2, 2, 1, 1)
        edit(seq_defragment, 0)
        run(3, 1, 1, 1)
        check_invariants(cache)
    return outs


def paged(v_head_dim: int, **options: Any) -> PagedKVCache:
    sizes = {"num_layers": LAYERS, "num_kv_heads": KV, "head_dim": DK, "max_seqs": SEQS, "page_size": 8}
    return PagedKVCache.create(**sizes, num_pages=24, rope=ROPE, v_head_dim=v_head_dim, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "f32", "implementation": "reference"},
        {"dtype": "f32", "implementation": "xla"},
        {"dtype": "bf16", "implementation": "xla", "layout": "lanes"},
        {"dtype": "f32"},
        {"k_dtype": "q8_0", "v_dtype": "q4_0", "hadamard": False},
        {"dtype": "kivi4", "hadamard": False, "implementation": "xla"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_results_are_those_of_padded_values(options: dict[str, Any]) -> None:
    narrow, padded = paged(DV, **options), paged(DK, **options)
    assert (narrow.head_dim, narrow.v_head_dim, padded.v_head_dim) == (DK, DV, DK)
    edits = options.get("dtype") != "kivi4"  # which quantizes moved pages again
    for one, other in zip(history(narrow, DV, edits=edits), history(padded, DK, edits=edits), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
        assert np.abs(one).max() > 0.1


@pytest.mark.parametrize("implementation", ["cpu_numba", "xla"])
def test_rows_without_pages_agree(implementation: str) -> None:
    sizes = {"num_layers": LAYERS, "num_kv_heads": KV, "head_dim": DK, "max_seqs": SEQS, "dtype": "f32"}
    create = functools.partial(
        ContiguousKVCache.create, **sizes, implementation=implementation, max_length=64
    )
    cache = create(v_head_dim=DV)
    assert cache.v.shape[3] == DV and cache.k.shape[3] == DK
    found = history(cache, DV, edits=False)
    for one, other in zip(found, history(paged(DK, dtype="f32"), DK, edits=False), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_groups_have_heads_of_their_own() -> None:
    groups = [LayerGroup((0,), KV, DK, v_head_dim=DV), LayerGroup((1,), KV, 32, window=12)]
    cache = GroupedKVCache.create(groups, num_pages=24, max_seqs=SEQS, page_size=8, dtype="f32")
    assert [part.v_head_dim for part in cache.parts] == [DV, 32]
    cache, batch, ok = cache.reserve(jnp.asarray([9, 2, 0]), num_tokens=T)
    assert ok
    for layer, dim in ((0, DK), (1, 32)):
        given = rows(layer, dim, KV * GROUP), rows(layer, dim), rows(layer, 32)
        out, cache = cache.attend(layer, *given, batch)
        assert out.shape == (T, KV * GROUP, 32)
    cache, ok = seq_copy(cache, 0, 2)
    assert ok
    check_invariants(cache)


@pytest.mark.parametrize("dtypes", [("f32", "f32"), ("q8_0", "q4_0"), ("kivi2", "kivi2")])
def test_snapshots_bring_them_back(tmp_path: Path, dtypes: tuple[str, str]) -> None:
    options = {"k_dtype": dtypes[0], "v_dtype": dtypes[1], "implementation": "xla"}
    cache, file = paged(DV, **options), tmp_path / "saved"
    given = rows(0, DK, KV * GROUP), rows(0, DK), rows(50, DV)
    cache, _ = step(cache, jnp.asarray([20, 3, 0]), *given, DV)
    snapshot(cache, file, seq=0, token_ids=list(range(20)), fingerprint="a model")
    saved = read_snapshot(file, fingerprint="a model")
    assert saved.groups[0].v_head_dim == DV and f"of {DK} and {DV} values" in repr(saved)
    other = restore(paged(DV, **options), saved)
    one, two = (
        step(each, jnp.asarray([1, 0, 0]), *given, DV)[1] for each in (cache, other)
    )  # sequence 0 goes on
    np.testing.assert_array_equal(one, two)
    with pytest.raises(SnapshotError, match=f"of {DK} and {DV} values in .* the cache has .* of {DK} values"):
        restore(paged(DK, **options), saved)


def test_files_of_equal_heads_are_as_before(tmp_path: Path) -> None:
    cache, file = paged(DK, dtype="f32"), tmp_path / "saved"
    cache, *_ = cache.reserve(jnp.asarray([3, 0, 0]))
    snapshot(cache, file, seq=0, token_ids=[1, 2, 3], fingerprint="a model")
    with safe_open(file, framework="numpy") as reader:
        assert "v_head_dim" not in reader.metadata()
    assert read_snapshot(file, fingerprint="a model").groups[0].v_head_dim == DK


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="v_head_dim must be positive, got 0"):
        paged(0)
    with pytest.raises(ValueError, match="v_head_dim must be positive, got -1"):
        LayerGroup((0,), 1, 8, v_head_dim=-1)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 32, got 40"):
        paged(40, dtype="q8_0")
    cache = paged(DV, dtype="f32")
    cache, batch, _ = cache.reserve(jnp.asarray([1, 0, 0]), num_tokens=T)
    given = rows(0, DK, KV * GROUP), rows(0, DK)
    with pytest.raises(ValueError, match=rf"v must be \[.*v_head_dim\] = \({T}, {KV}, {DV}\), got .*{DK}\)"):
        cache.attend(0, *given, rows(0, DK), batch)
    attend = functools.partial(paged_attention, given[0], cache.k_pages)
    with pytest.raises(ValueError, match="must be alike but for heads of 64 and 48 numbers"):
        attend(cache.v_pages, cache.table, batch, v_head_dim=48)
    with pytest.raises(ValueError, match="must be alike"):
        attend(cache.v_pages[:, :, :4], cache.table, batch)
