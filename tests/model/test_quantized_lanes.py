"""Quantized matrices in the layout for accelerators, and the TPU kernel in its interpreter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxpaged_model.quantized import lanes, product, tpu_kernel
from jaxpaged_model.quantized.formats import WEIGHT_FORMATS
from jaxpaged_model.quantized.layouts import empty_parts
from quantized_matrices import numbers, packed, random_raw, random_weights_raw, stacked

from jaxpaged.pages.formats.lane_blocks import half_to_float

ONE_OF_EACH_KIND = ("Q8_0", "Q5_1", "Q6_K", "IQ4_XS")
"""One plane, two planes with minima, groups of 16 with steps, a table."""


def relative(found: Any, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted))


def test_matrices_packed_one_after_another_are_one_matrix() -> None:
    fmt, raw = WEIGHT_FORMATS["Q5_K"], random_raw("Q5_K", 30, 512)
    parts = empty_parts("lanes", fmt, 30, 512)
    for begin, end in ((7, 30), (0, 7)):
        lanes.pack(fmt, raw[begin:end], parts, begin)
    for key, part in packed("Q5_K", raw, 512, lanes).items():
        np.testing.assert_array_equal(parts[key], part)


@pytest.mark.parametrize("rows", [40, 128, 300])
def test_columns_are_taken_by_blocks_of_lanes(rows: int) -> None:
    index = jnp.array([rows - 1, 0, 17, 17, rows // 2])
    for part in packed("Q4_K", random_raw("Q4_K", rows, 256), 256, lanes).values():
        np.testing.assert_array_equal(lanes.take_by_lanes(part, index), part[:, index])


@pytest.mark.parametrize(
    ("name", "rows", "columns", "tokens"),
    [
        *((name, 130, 512, 3) for name in ONE_OF_EACH_KIND),
        *((name, 20, 4096, 9) for name in ("Q4_0", "Q4_K", "Q2_K")),  # several steps of a program
        ("Q5_0", 72, 576, 20),  # columns that are filled up
        ("Q8_0", 256, 96, 600),  # several blocks of tokens
    ],
)
def test_products_equal_those_of_dequantized_matrices(
    name: str, rows: int, columns: int, tokens: int
) -> None:
    raw = random_weights_raw(name, rows, columns)
    x = np.random.default_rng(1).standard_normal((tokens, columns)).astype(np.float32)
    wanted = x.astype(np.float64) @ numbers(name, raw).T
    parts = packed(name, raw, columns, lanes)
    for dtype, bound in ((jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)):
        found = tpu_kernel.matmul(WEIGHT_FORMATS[name], jnp.asarray(x, dtype), parts, interpret=True)
        assert found.shape == (tokens, rows) and found.dtype == dtype
        assert relative(found, wanted) < bound


@pytest.mark.parametrize("how", ["xla", "tpu"])
@pytest.mark.parametrize(("name", "columns"), [("Q8_0", 96), ("Q5_1", 512), ("Q4_K", 512)])
def test_a_layer_of_a_stack_is_the_matrix_alone(
    name: str, columns: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "tpu":
        kernel = tpu_kernel.matmul
        monkeypatch.setattr(tpu_kernel, "matmul", lambda *a: kernel(*a, interpret=True))
    parts = packed(name, random_weights_raw(name, 130, columns), columns, lanes)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, columns)), jnp.float32)
    around: dict[str, Any] = {"layout": "lanes", "implementation": how}
    alone = product.product(x, name, parts, 130, **around)
    for layer in (1, 2):
        stack = stacked(parts, layer)
        found = jax.jit(lambda i, stack=stack: product.product(x, name, stack, 130, layer=i, **around))(layer)
        assert relative(found, np.asarray(alone, np.float64)) < 1e-6


def test_extreme_scales() -> None:
    """Subnormal scales, zeros of both signs, the largest and the smallest."""
    given = np.array([0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x7BFF, 0xFBFF, 0x3C00], np.uint16)
    found = half_to_float(jnp.asarray(given.view(np.int16), jnp.int32))
    np.testing.assert_array_equal(found, given.view(np.float16).astype(np.float32))


@pytest.mark.parametrize("how", ["xla", "tpu"])
def test_fused_operations(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, rng = random_weights_raw("Q4_1", 96, 256), np.random.default_rng(2)
    parts, matrix = packed("Q4_1", raw, 256, lanes), numbers("Q4_1", raw).astype(np.float64)
    x, add = (rng.standard_normal((5, n)).astype(np.float32) for n in (256, 96))
    scale, eps = rng.random(256).astype(np.float32), 1e-2
    normed = x / np.sqrt(np.mean(np.square(x, dtype=np.float64), -1, keepdims=True) + eps) * scale
    if how == "tpu":
        kernel = tpu_kernel.matmul
        monkeypatch.setattr(tpu_kernel, "matmul", lambda *a, **_: kernel(*a, interpret=True))
    around: dict[str, Any] = {"norm": (scale, eps), "layout": "lanes", "implementation": how}
    out = normed @ matrix.T
    gate, up = out[:, :48], out[:, 48:]
    gated = product.product(jnp.asarray(x), "Q4_1", parts, 48, gated=True, **around)
    assert relative(gated, gate / (1 + np.exp(-gate)) * up) < 1e-5
    added = product.product(jnp.asarray(x), "Q4_1", parts, 96, add=add, **around)
    assert relative(added, out + add) < 1e-6


def test_unsupported_products_raise_and_are_left_to_xla() -> None:
    raw = random_weights_raw("Q8_0", 32, 64)
    x, parts = jnp.ones((2, 64), jnp.float16), packed("Q8_0", raw, 64, lanes)
    with pytest.raises(NotImplementedError, match="multiplies float32 and bfloat16, not float16"):
        tpu_kernel.matmul(WEIGHT_FORMATS["Q8_0"], x, parts)
    found = product.product(x, "Q8_0", parts, 32, layout="lanes", implementation="tpu")
    assert relative(found, np.ones((2, 64)) @ numbers("Q8_0", raw).T) < 1e-2


def test_a_platform_has_its_layout() -> None:
    assert [product.layout_for(platform) for platform in ("cpu", "gpu", "tpu")] == [
        "panels",
        "lanes",
        "lanes",
    ]
    assert [product.choose(platform) for platform in ("cpu", "gpu", "tpu")] == ["cpu", "gpu", "tpu"]
