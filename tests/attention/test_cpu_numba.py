"""The CPU kernel where its own decisions matter: splits, tiles, threads, and the pool it must not copy."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("numba")

from jaxpaged import PagedKVCache
from jaxpaged.attention import paged_attention
from jaxpaged.attention.cases import SMOLLM2_135M, Case
from jaxpaged.testing.conformance import build_case, check_conformance

kernel = functools.partial(paged_attention, implementation="cpu_numba")


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize(
    "case",
    [
        # One sequence is cut into parts for all threads, with sinks counted once.
        Case("split", **SMOLLM2_135M, lengths=(3000,), q_lens=(1,), sinks=True),
        Case("split_beside_short", **SMOLLM2_135M, lengths=(2500, 3, 40), q_lens=(1, 1, 1), padding=2),
        Case("split_drafts", **SMOLLM2_135M, lengths=(2000, 900), q_lens=(5, 2), slices=True, rotary_dim=64),
        # Runs that end anywhere in a tile, and tiles that end anywhere in a run.
        Case("crumbs", **SMOLLM2_135M, lengths=(700,), q_lens=(3,), slices=True, gaps=True, page_size=8),
        Case("long_pages", **SMOLLM2_135M, lengths=(900, 513), q_lens=(2, 70), slices=True, page_size=256),
        Case("many_rows_window", **SMOLLM2_135M, lengths=(500,), q_lens=(200,), window=90, soft_cap=3.0),
        # Rows at the border between keys read in place and keys transposed.
        Case("8_rows", num_q_heads=8, num_kv_heads=1, head_dim=128, lengths=(200,), q_lens=(1,)),
        Case("9_rows", num_q_heads=9, num_kv_heads=1, head_dim=128, lengths=(200,), q_lens=(1,)),
    ],
    ids=lambda case: case.name,
)
def test_cut_anywhere_it_conforms(case, dtype):
    check_conformance(jax.jit(kernel, static_argnames=("window", "soft_cap", "scale", "return_lse")),
                      dataclasses.replace(case, dtype=dtype))  # fmt: skip


def test_heads_it_cannot_widen_are_refused_with_the_reason():
    built = build_case(Case("odd", num_q_heads=2, num_kv_heads=1, head_dim=12, lengths=(9,), q_lens=(1,)))
    arguments = built.q, built.k_pages, built.v_pages, built.table, built.batch
    np.testing.assert_allclose(kernel(*arguments), built.out, rtol=2e-5, atol=2e-5)
    half = built.k_pages.astype(jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="multiple of 8, got 12"):
        kernel(built.q, half, half, *arguments[3:])
    assert jnp.isfinite(paged_attention(built.q, half, half, *arguments[3:])).all()


def test_pages_laid_out_for_a_tpu_are_read_where_they_are_the_same_bytes():
    built = build_case(Case("packed", **SMOLLM2_135M, lengths=(70, 9), q_lens=(3, 1), slices=True))
    packed = [x.reshape(*x.shape[:2], -1, 128) for x in (built.k_pages, built.v_pages)]
    out = kernel(built.q, *packed, built.table, built.batch)
    np.testing.assert_allclose(out, built.out, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_quantized_pages_laid_out_for_a_tpu_are_left_to_another(dtype):
    def attended(layout):
        cache = PagedKVCache.create(
            num_layers=1, num_kv_heads=2, head_dim=64, num_pages=4, max_seqs=2, dtype=dtype, layout=layout
        )
        cache, batch, _ = cache.reserve(jnp.array([40, 9]), num_tokens=49)
        q, k, v = (jax.random.normal(jax.random.key(i), (49, heads, 64)) for i, heads in enumerate((4, 2, 2)))
        return cache.attend(0, q, k, v, batch)

    out, cache = attended("lanes")
    np.testing.assert_allclose(out, attended("plain")[0], rtol=2e-5, atol=2e-5)
    batch = cache.reserve(jnp.array([1, 1]), num_tokens=2)[1]
    with pytest.raises(NotImplementedError, match=f"{dtype} pages laid out for a TPU"):
        kernel(jnp.ones((2, 4, 64)), *cache.pages(0), cache.table, batch)


def step(cache, num_new, num_tokens, kernel_name):
    cache, batch, _ = cache.reserve(num_new, num_tokens=num_tokens)
    k, q = jnp.ones((num_tokens, 3, 64)), jnp.ones((num_tokens, 9, 64))
    cache = cache.write(0, k, k, batch)
    out = paged_attention(q, *cache.pages(0), cache.table, batch, implementation=kernel_name)
    return out, cache


@pytest.mark.parametrize(
    ("kernel_name", "num_tokens", "dtype"),
    [
        *itertools.product(["cpu_numba", "xla"], [2, 64], ["f32"]),
        ("cpu_numba", 2, "q8_0"),
        ("xla", 64, "q4_0"),
        ("cpu_numba", 64, "q4_k"),
        ("xla", 2, "kivi4"),
    ],
)
def test_a_step_writes_into_the_pool_and_copies_none_of_it(kernel_name, num_tokens, dtype):
    sizes = {"num_layers": 1, "num_kv_heads": 3, "head_dim": 64, "num_pages": 4096, "max_seqs": 2}
    cache = PagedKVCache.create(**sizes, dtype=dtype)
    run = jax.jit(functools.partial(step, num_tokens=num_tokens, kernel_name=kernel_name), donate_argnums=0)
    program = run.lower(cache, jnp.array([1, num_tokens - 1])).compile()
    memory = program.memory_analysis()
    pool = 4096 * cache.bytes_per_page
    assert memory.alias_size_in_bytes >= pool, "the pages that come out are those that went in"
    assert memory.temp_size_in_bytes < 4096 * 3 * 32 * 64 * 8 / 50, (
        "and no other memory is of their numbers' size"
    )
    copies = [
        line
        for line in program.as_text().splitlines()
        if "[4096,3,32," in line.split("(")[0] and " copy(" in line
    ]
    assert not copies


def test_shifted_keys_are_not_touched_and_not_missed():
    """A rotation beyond 31 bits of angle, both ways."""
    case = Case("far", **SMOLLM2_135M, lengths=(300, 300), q_lens=(1, 40), rotary_dim=64, shared=True)
    check_conformance(jax.jit(kernel, static_argnames=("window", "soft_cap", "scale", "return_lse")), case)
