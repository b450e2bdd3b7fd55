"""A pool of more than 2^31 numbers, whose last layer begins behind the 2^31st."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged import PagedKVCache, Rope, check_invariants, reserve, seq_copy
from jaxpaged.attention import api
from jaxpaged.cache.sharing import read_pages, write_pages

LAYERS, PAGES, PAGE_SIZE, DIM, TOKENS = 67, 2000, 256, 64, 300


def make(layers: int, pages: int) -> PagedKVCache:
    formats = {"k_dtype": "fp8_e4m3", "v_dtype": "q4_0", "rope": Rope.create(())}
    sizes = {"num_layers": layers, "num_kv_heads": 1, "head_dim": DIM, "num_pages": pages}
    return PagedKVCache.create(**sizes, max_seqs=2, page_size=PAGE_SIZE, max_seq_len=1024, **formats)


@functools.partial(jax.jit, static_argnames="layer", donate_argnames="cache")
def step(cache: PagedKVCache, num_new: jax.Array, q: jax.Array, k: jax.Array, layer: int) -> Any:
    cache, batch, ok = reserve(cache, num_new, num_tokens=len(q))
    out, cache = cache.attend(jnp.int32(layer), q, k, k, batch)
    return out, cache, ok


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["cpu_numba", "xla"])
def test_the_last_layer_of_a_large_pool_is_a_layer_of_its_own(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes, attention, copy-on-write, and pages by number: as in a small cache of one layer."""
    if implementation == "cpu_numba":
        pytest.importorskip("numba")
    monkeypatch.setenv(api.VARIABLE, implementation)
    assert (LAYERS - 1) * PAGES * PAGE_SIZE * DIM > 2**31
    large, small, last = make(LAYERS, PAGES), make(1, 8), LAYERS - 1
    assert np.prod(large.k_pages.shape) > 2**31 and large.bytes_per_page * PAGES > 3 * 2**30
    q = jax.random.normal(jax.random.key(0), (TOKENS, 2, DIM))
    k = jax.random.normal(jax.random.key(1), (TOKENS, 1, DIM))
    for count in ([TOKENS, 0], [1, 1]):
        rows = sum(count)
        if count[1]:  # both write to a page that they share
            (large, ok), (small, also) = (seq_copy(cache, 0, 1) for cache in (large, small))
            assert ok and also
        wanted, small, _ = step(small, jnp.array(count), q[:rows], k[:rows], 0)
        out, large, ok = step(large, jnp.array(count), q[:rows], k[:rows], last)
        assert ok
        np.testing.assert_array_equal(out, wanted)
    check_invariants(large)
    pages = jnp.unique(large.table.pages[:, :2])
    data = read_pages(large, pages)
    same = jax.tree.map(
        lambda big, one: np.array_equal(big[:, last], one[:, 0]), data, read_pages(small, pages)
    )
    assert all(jax.tree.leaves(same))
    moved = jax.jit(write_pages, donate_argnums=0)(large, pages + 1000, data)
    for big, one in zip(jax.tree.leaves(read_pages(moved, pages + 1000)), jax.tree.leaves(data), strict=True):
        np.testing.assert_array_equal(big, one)
