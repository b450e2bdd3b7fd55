"""Quantized pages in the GPU kernel: against attention to the same numbers in float16, and against the true ones."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mosaic_gpu import (
    check_a_layer_of_a_pool,
    interpreted,
    lowered_for_cuda,
    needs_interpreter,
    with_reference,
)

from jaxpaged.attention.base import make_config
from jaxpaged.attention.cases import CASES, Case
from jaxpaged.attention.gpu import backend as mosaic_gpu
from jaxpaged.attention.gpu.quantized import CODES, to_columns, to_numbers
from jaxpaged.attention.gpu.tile_config import make_plan
from jaxpaged.pages.formats import BlockPages, hadamard_transform, page_format
from jaxpaged.testing.conformance import build_case, check_conformance

PAIRS = [("q8_0", "q8_0"), ("q8_0", "q4_0"), ("q4_0", "q4_0")]
HEADS_OF_64 = {"num_q_heads": 3, "num_kv_heads": 1, "head_dim": 64}
HEADS_OF_128 = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 128}
TWO_WARPGROUPS = {"num_q_heads": 4, "num_kv_heads": 1, "head_dim": 256}
REPRESENTATIVE = [
    Case("decode", **HEADS_OF_128, lengths=(70, 19), q_lens=(1, 1), dtype="q8_0"),
    Case(
        "everything",
        **HEADS_OF_64,
        lengths=(90, 70, 0, 12),
        q_lens=(1, 23, 0, 7),
        padding=3,
        window=60,
        soft_cap=5.0,
        sinks=True,
        slices=True,
        gaps=True,
        dtype="q8_0",
        v_dtype="q4_0",
    ),
    Case(
        "shared",
        **HEADS_OF_128,
        lengths=(70, 70),
        q_lens=(1, 3),
        page_size=16,
        shared=True,
        dtype="q4_0",
        hadamard=True,
    ),
    Case("pages_of_128", **HEADS_OF_64, lengths=(150, 40), q_lens=(1, 2), page_size=128, dtype="q4_1"),
    Case(
        "shifted",
        **HEADS_OF_64,
        lengths=(80, 12),
        q_lens=(3, 1),
        slices=True,
        rotary_dim=64,
        dtype="q4_0",
        hadamard=True,
    ),
    Case(
        "two_warpgroups_shifted",
        **TWO_WARPGROUPS,
        lengths=(40, 9),
        q_lens=(3, 1),
        rotary_dim=256,
        slices=True,
        page_size=8,
        dtype="q8_0",
        v_dtype="q4_0",
        hadamard=True,
    ),
]


def served(case):
    """True if the scales of a page, or of 64 tokens of a longer one, are a multiple of 128 bytes, and keys and
    values share a tile."""
    return case.v_head_dim is None and min(case.page_size, 64) * case.head_dim % 2048 == 0


def every_case():
    """The kit's cases, each in one of the kinds of pages in turn."""
    kinds = itertools.cycle([(*pair, turned) for turned in (False, True) for pair in PAIRS])
    for case in CASES:
        if case.head_dim == 96:
            case = dataclasses.replace(case, page_size=64)
        if not served(case):
            continue
        k, v, turned = next(kinds)
        if case.head_dim % 64:
            k, v = "q8_0", "q8_0"
        one = dataclasses.replace(case, dtype=k, v_dtype=v, hadamard=turned)
        yield dataclasses.replace(one, name=f"{case.name}_{k}_{v}")


def build(case):
    built = build_case(case)
    if max(case.q_lens) == 1:
        built = dataclasses.replace(built, batch=dataclasses.replace(built.batch, max_q_len=1))
    return built


def attention(q, k_pages, v_pages, *args, **options):
    """The kernel, with outputs turned back as ``api.paged_attention`` does."""
    out, lse = interpreted(q, k_pages, v_pages, *args, **options)
    return (hadamard_transform(out).astype(q.dtype) if v_pages.format.hadamard else out), lse


def in_float16(pages):
    """f32[N, KV, page_size, D]: what pages hold, rounded to float16 as it is stored, then turned back."""
    numbers = pages.format.load(pages, jnp.arange(pages.shape[0])).astype(jnp.float16)
    return hadamard_transform(numbers) if pages.format.hadamard else numbers.astype(jnp.float32)


def with_numbers_in_float16(built):
    plain = dataclasses.replace(built, k_pages=in_float16(built.k_pages), v_pages=in_float16(built.v_pages))
    truth = with_reference(plain)
    return dataclasses.replace(built, out=truth.out, lse=truth.lse)


@needs_interpreter
@pytest.mark.parametrize(
    "case",
    [*REPRESENTATIVE, *(pytest.param(case, marks=pytest.mark.slow) for case in every_case())],
    ids=lambda case: case.name,
)
def test_the_kernel_attends_to_quantized_pages(case):
    """Unused slots and free pages hold rubbish codes and NaN scales, which change nothing.

    Of 11 bits a number keeps 2 ** -12 on average, a score as much of its own spread (2 here) with either side, and a
    result is a mean of values whose weights are off by that: 5e-4, of which five standard deviations are allowed.
    """
    built = build(case)
    arguments = built.q, built.k_pages, built.v_pages, built.table, built.batch
    results = attention(*arguments, **built.options, return_lse=True)
    check_conformance(lambda *_, **__: results, built, rtol=2.5e-3, atol=2.5e-3)
    if case.dtype != "q4_1":  # a product and a sum, each rounded
        check_conformance(lambda *_, **__: results, with_numbers_in_float16(built), rtol=1e-4, atol=1e-4)


@needs_interpreter
def test_a_layer_of_a_pool_is_the_layer_alone():
    check_a_layer_of_a_pool(attention, build(REPRESENTATIVE[0]))


@needs_interpreter
def test_bfloat16_queries_lose_nothing_and_nothing_races(capfd):
    """Weights are rounded to 11 bits; queries only where they are turned."""
    built = build(REPRESENTATIVE[-1])
    built = with_reference(dataclasses.replace(built, q=built.q.astype(jnp.bfloat16)))
    built = dataclasses.replace(built, out=np.asarray(hadamard_transform(jnp.asarray(built.out)), np.float64))
    # Output is compared in bfloat16: half a unit of 4 is 0.008.
    check_conformance(functools.partial(attention, races=True), built, rtol=1e-2, atol=1e-2)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize(("head_dim", "parts"), [(64, 1), (128, 1), (256, 2)])
def test_columns_are_numbers_in_an_order_that_hadamards_matrix_keeps(name, head_dim, parts):
    code, numbers = CODES[name], jnp.arange(head_dim)
    columns = to_columns(numbers, code, parts)
    assert sorted(columns.tolist()) == numbers.tolist()
    assert (to_numbers(columns, code, parts) == numbers).all()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, head_dim)), jnp.float32)
    np.testing.assert_allclose(
        to_columns(hadamard_transform(x), code, parts),
        hadamard_transform(to_columns(x, code, parts)),
        atol=1e-5,
    )


def on_gpu(built):
    case = built.case
    config = make_config(case.head_dim, case.scale, case.window, case.soft_cap)

    def kernel(q, k_pages, v_pages, table, batch, sinks, rope):
        return mosaic_gpu.paged_attention(q, k_pages, v_pages, table, batch, config, sinks, rope)

    arguments = built.q, built.k_pages, built.v_pages, built.table, built.batch, built.sinks, built.rope
    return lowered_for_cuda(jax.jit(kernel), *arguments)


@pytest.mark.parametrize("case", [REPRESENTATIVE[0], REPRESENTATIVE[-1]], ids=lambda case: case.name)
def test_the_kernel_lowers_for_cuda(case):
    assert "mosaic_gpu" in on_gpu(build(case))


def test_a_donated_step_aliases_its_pages():
    built = build(REPRESENTATIVE[0])
    write, config = built.k_pages.format.write, make_config(128, None, None, None)

    def step(k_pages, v_pages, q, k, table, batch):
        k_pages, v_pages = (write(pages, batch.page, batch.slot, k) for pages in (k_pages, v_pages))
        out, _ = mosaic_gpu.paged_attention(q, k_pages, v_pages, table, batch, config, None, None)
        return k_pages, v_pages, out

    given = built.k_pages, built.v_pages, built.q, built.q[:, :2], built.table, built.batch
    text = lowered_for_cuda(jax.jit(step, donate_argnums=(0, 1)), *given)
    assert "mosaic_gpu" in text and text.count("tf.aliasing_output") == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"formats": ("q5_0", "q8_0")}, "reads quantized pages of q8_0, q4_0, q4_1, not of q5_0"),
        ({"head_dim": 160}, "multiple of 32 up to 128, or of 64 up to 256; it is 160"),
        (
            {"head_dim": 96, "formats": ("q8_0", "q4_0")},
            "multiple of 64 up to 128, or of 128 up to 256; it is 96",
        ),
        (
            {"page_size": 8},
            "scales of head_dim 64 are copied 128 bytes at a time: page_size must be at least 32",
        ),
        ({"page_size": 8, "head_dim": 128}, "at least 16; it is 8"),
    ],
)
def test_what_the_kernel_cannot_serve_is_refused_with_the_reason(change, message):
    sizes = {"head_dim": 64, "page_size": 32, "formats": ("q8_0", "q8_0")} | change
    with pytest.raises(NotImplementedError, match=message):
        describe(sizes["formats"], sizes["head_dim"], sizes["page_size"])


def test_pages_of_another_kind_are_refused():
    built = build(REPRESENTATIVE[0])
    plain = dataclasses.replace(built, v_pages=jnp.zeros(built.v_pages.shape, jnp.bfloat16))
    with pytest.raises(
        NotImplementedError, match="reads plain pages, or q8_0, q4_0, q4_1 of keys and of values"
    ):
        on_gpu(plain)
    with pytest.raises(NotImplementedError, match="these are kivi4"):
        on_gpu(build(dataclasses.replace(REPRESENTATIVE[0], dtype="kivi4")))
    phi = Case("phi", 2, 2, 96, (20,), (1,), page_size=64, rotary_dim=96, dtype="q8_0", hadamard=True)
    with pytest.raises(NotImplementedError, match="where head_dim is 64, 128 or 256; it is 96"):
        on_gpu(build(phi))


def describe(formats, head_dim=128, page_size=32, **options):
    formats = tuple(page_format(name) for name in formats)
    shape = 4096, 8, page_size, head_dim
    return mosaic_gpu.describe((8, 32, head_dim), shape, formats, 1, 8, 256, **options)


def test_describe_counts_codes_and_scales():
    sizes = describe(("q8_0", "q4_0"), live_tokens=8000)
    assert sizes["kv_bytes"] == 8 * 8000 * 4 * (34 + 18)
    pages = [
        jax.eval_shape(functools.partial(page_format(name).create, 1, 8, 32, 128))
        for name in ("q8_0", "q4_0")
    ]
    assert all(isinstance(one, BlockPages) for one in pages)
    held = sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(pages))
    assert sizes["kv_bytes"] == held // 32 * 8000
    # Queries of bfloat16 are one term of float16.
    assert sizes["terms"] == 1 and describe(("q8_0", "q8_0"), q_dtype="float32")["terms"] == 2


@pytest.mark.parametrize("formats", PAIRS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_ring_of_codes_keeps_enough_under_way(formats, head_dim):
    """Bytes of copies during the computation of a step, for 4.8 TB/s at 700 ns of latency: 25 KB a multiprocessor."""
    kinds = tuple(page_format(name) for name in formats)
    plan = make_plan(
        8, 32, (4096, 8, 32, head_dim), kinds, "bfloat16", max_q_len=1, max_seqs=8, max_pages_per_seq=256
    )
    step = 64 * head_dim // 32 * sum(one.code.bytes for one in kinds)
    assert plan.blocks_per_sm * (plan.stages - 1) * step > 25_000
