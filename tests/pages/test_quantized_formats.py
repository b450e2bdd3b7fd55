"""Laws of quantized page formats: ggml's bytes, bounded errors, refusal of sizes that do not fit."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxpaged import PagedKVCache
from jaxpaged.pages.formats import (
    PAGE_FORMATS,
    BlockFormat,
    Float8Format,
    ResidualFormat,
    hadamard_transform,
    k_quants,
)

BY_ROW = [
    name
    for name, one in PAGE_FORMATS.items()
    if isinstance(one, BlockFormat) and not one.has_residual and not isinstance(one, Float8Format)
]
BY_PAGE = [name for name, one in PAGE_FORMATS.items() if one.has_residual]
QUANTIZERS = [name for name in BY_ROW if name != "iq4_nl"]  # which the gguf package only reads


def plain(name: str) -> Any:
    """The format without the Hadamard transform."""
    return PAGE_FORMATS[name].with_hadamard(False)


def rows() -> np.ndarray:
    """f32[..., 128]: normal rows, large and small ones, ties between codes, constants, outliers."""
    rng = np.random.default_rng(0)
    scale = 10 ** rng.uniform(-3, 3, (500, 1))
    kinds = [
        rng.standard_normal((500, 128)) * scale,
        rng.integers(-20, 20, (500, 128)),
        rng.integers(-20, 20, (500, 128)) / 8,
        rng.standard_t(2, (500, 128)),
        np.zeros((1, 128)),
        np.ones((1, 128)),
        -np.ones((1, 128)),
        np.tile(np.arange(-8, 8), 8)[None],
    ]
    return np.concatenate(kinds).astype(np.float32)


@functools.cache
def encoder(name: str) -> Any:
    return jax.jit(plain(name).encode)


def ggml_bytes_of(name: str, x: np.ndarray) -> np.ndarray:
    return plain(name).ggml_bytes(encoder(name)(x))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_rows_have_the_bytes_of_ggml(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[name.upper()]
    np.testing.assert_array_equal(ggml_bytes_of(name, rows()), gguf.quantize(rows(), kind))


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, (1, 32), elements=st.floats(-1000, 1000, width=32, allow_subnormal=False)))
def test_any_row_has_the_bytes_of_ggml(x: np.ndarray) -> None:
    gguf = pytest.importorskip("gguf")
    for name in QUANTIZERS:
        if np.abs(x).max() < 1e-30:  # XLA flushes subnormal float32 to zero
            continue
        expected = gguf.quantize(x, gguf.GGMLQuantizationType[name.upper()])
        np.testing.assert_array_equal(ggml_bytes_of(name, x), expected, err_msg=name)


@pytest.mark.parametrize("name", BY_ROW)
def test_a_page_has_the_bytes_of_ggml_and_decodes_to_the_same_numbers(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[name.upper()]
    storage = plain(name)
    x = np.random.default_rng(1).standard_normal((8, 2, 64)).astype(np.float32)
    write = jax.jit(lambda x: storage.write(storage.create(3, 2, 8, 64), jnp.full(8, 2), jnp.arange(8), x))
    pages = write(x)
    stored = storage.ggml_bytes({part: np.asarray(array)[2] for part, array in pages.parts.items()})
    if name in QUANTIZERS:
        np.testing.assert_array_equal(stored, gguf.quantize(x.swapaxes(0, 1), kind))
    loaded = jax.jit(storage.load)(pages, jnp.asarray([2]))[0]
    np.testing.assert_array_equal(loaded, gguf.dequantize(stored, kind).reshape(loaded.shape))


def test_q4_k_decodes_as_in_ggml() -> None:
    gguf = pytest.importorskip("gguf")
    x = np.concatenate([rows()[:1024], rows()[-512:]]).reshape(-1, 16, 64)
    storage = plain("q4_k")
    parts = {name: np.asarray(part) for name, part in encoder("q4_k")(x).items()}
    read = gguf.dequantize(k_quants.ggml_bytes(parts), gguf.GGMLQuantizationType.Q4_K)
    np.testing.assert_array_equal(storage.decode(parts, 16, 64), read.reshape(x.shape))


def errors(name: str, x: np.ndarray) -> np.ndarray:
    """Mean square error of each page of ``x [pages, page_size, head_dim]``."""
    storage = plain(name)
    sizes = x.shape[-2:] if isinstance(storage, ResidualFormat) else ()
    decoded = jax.jit(lambda x: storage.decode(storage.encode(x), *sizes))(x)
    return ((np.asarray(decoded) - x) ** 2).mean((-1, -2))


def test_at_the_same_bits_better_codes_have_smaller_errors() -> None:
    x = np.random.default_rng(2).standard_normal((200, 16, 64)).astype(np.float32)
    error = {name: errors(name, x).mean() for name in (*BY_ROW, *BY_PAGE)}
    order = ["q8_0", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "kivi2"]
    assert sorted(order, key=error.__getitem__) == order
    assert error["iq4_nl"] < error["q4_0"] and error["kivi4"] < error["q4_0"]


def test_the_search_of_q4_k_beats_scales_from_minimum_and_maximum() -> None:
    x = np.random.default_rng(3).standard_t(4, (300, 16, 64)).astype(np.float32)
    assert (errors("q4_k", x) < errors("q4_1", x)).mean() > 0.95


@pytest.mark.parametrize("bits", [2, 4])
def test_an_outlier_channel_does_not_change_the_others(bits: int) -> None:
    storage = plain(f"kivi{bits}")
    x = np.random.default_rng(4).standard_normal((1, 32, 64)).astype(np.float32)
    outlier = x.copy()
    outlier[..., 5] = 50 + 3 * outlier[..., 5]
    expected, actual = (np.asarray(storage.decode(storage.encode(y), 32, 64)) for y in (x, outlier))
    others = np.arange(64) != 5
    np.testing.assert_array_equal(expected[..., others], actual[..., others])
    step = (outlier.max(1) - outlier.min(1)) / (2**bits - 1)
    assert (np.abs(actual - outlier) <= step * 0.52 + 0.05).all()  # with the rounding of f16 scales


@pytest.mark.parametrize("name", PAGE_FORMATS)
def test_bytes_per_page_are_those_of_the_arrays(name: str) -> None:
    for storage in (PAGE_FORMATS[name], PAGE_FORMATS[name].for_values()):
        pages = storage.create(6, 2, 16, 64)
        assert storage.bytes_per_page(2, 16, 64) * 6 == pages.nbytes
    cache = PagedKVCache.create(
        num_layers=3, num_kv_heads=2, head_dim=64, num_pages=6, max_seqs=2, page_size=16, dtype=name
    )
    assert cache.bytes_per_page == 3 * sum(
        storage.bytes_per_page(2, 16, 64) for storage in (cache.k_format, cache.v_format)
    )
    assert (cache.bytes_of_staging > 0) == PAGE_FORMATS[name].has_residual


@pytest.mark.parametrize("name", [*BY_ROW, "fp8_e4m3"])
def test_rows_are_written_back_bit_for_bit(name: str) -> None:
    storage = PAGE_FORMATS[name]
    rows = jax.random.normal(jax.random.key(0), (5, 2, 64))
    page, slot = jnp.array([0, 4, 2, 5, 5]), jnp.array([7, 0, 3, 7, 0])

    @jax.jit
    def write_twice(rows: jax.Array) -> tuple[Any, Any]:
        first = storage.write(storage.create(5, 2, 8, 64), page, slot, rows)
        stored = storage.read(first, page[:3], slot[:3])
        return first, storage.put(storage.create(5, 2, 8, 64), page[:3], slot[:3], stored)

    first, again = write_twice(rows)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)  # nothing is written to page 5, which is none


def test_float8_saturates() -> None:
    storage = PAGE_FORMATS["fp8_e4m3"]
    assert storage.round(jnp.array([1e9, -1e9, 448.0, 460.0])).astype(jnp.float32).tolist() == [
        448,
        -448,
        448,
        448,
    ]


@pytest.mark.parametrize(
    ("name", "page_size", "head_dim", "message"),
    [
        (
            "q8_0",
            32,
            80,
            "head_dim must be a multiple of 32, got 80; formats for any head_dim are f32, bf16, f16",
        ),
        ("q4_0", 32, 16, "head_dim must be a multiple of 32, got 16"),
        ("q4_k", 8, 80, "got 8 * 80; for head_dim 80 page sizes that fit are 16, 32, 64, 128, 256"),
        ("q4_k", 8, 3, "for head_dim 3 page sizes that fit are 256"),
        ("kivi4", 32, 80, "head_dim must be a multiple of 32, got 80"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(
    name: str, page_size: int, head_dim: int, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PagedKVCache.create(
            num_layers=1,
            num_kv_heads=1,
            head_dim=head_dim,
            num_pages=2,
            max_seqs=1,
            page_size=page_size,
            dtype=name,
        )


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_the_hadamard_transform_keeps_products_and_is_its_own_inverse(head_dim: int) -> None:
    q, k = np.random.default_rng(5).standard_normal((2, 50, head_dim)).astype(np.float32)
    transformed_q, transformed_k = (
        np.asarray(hadamard_transform(jnp.asarray(x)), np.float64) for x in (q, k)
    )
    rounding = 2e-7 * np.linalg.norm(q, axis=1).max() * np.linalg.norm(k, axis=1).max()
    np.testing.assert_allclose(
        transformed_q @ transformed_k.T, q.astype(np.float64) @ k.T, rtol=0, atol=rounding
    )
    np.testing.assert_allclose(
        hadamard_transform(jnp.asarray(transformed_k, jnp.float32)), k, rtol=0, atol=rounding / 4
    )
    outlier = np.zeros(head_dim, np.float32)
    outlier[7] = 1
    spread = np.abs(hadamard_transform(jnp.asarray(outlier)))
    assert spread.max() <= (head_dim & -head_dim) ** -0.5 * 1.0001
