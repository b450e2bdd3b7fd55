"""The GPU kernel of products with quantized matrices, in Pallas' GPU interpreter."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxpaged_model.quantized import gpu_kernel, lanes, product
from jaxpaged_model.quantized.formats import WEIGHT_FORMATS
from quantized_matrices import stacked

needs_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="jax before 0.11.2 offers no interpreter of GPU kernels"
)


def drawn(name, rows, columns, seed=0):
    """A matrix with random codes and scales around 0.01."""
    fmt, rng = WEIGHT_FORMATS[name], np.random.default_rng(seed)
    parts = {}
    for part, shape in lanes.part_shapes(fmt, rows, columns).items():
        if shape.dtype == jnp.float16:
            parts[part] = jnp.asarray(0.01 * rng.standard_normal(shape.shape), jnp.float16)
        else:
            limits = np.iinfo(shape.dtype)
            parts[part] = jnp.asarray(rng.integers(limits.min, limits.max + 1, shape.shape), shape.dtype)
    return parts


def activations(tokens, columns):
    return jnp.asarray(np.random.default_rng(1).standard_normal((tokens, columns)), jnp.bfloat16)


def relative(found, wanted):
    return np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)


@needs_interpreter
@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_products_equal_those_of_dequantized_matrices(name):
    """Rows and tokens that are no whole tile; more steps of every run than the pipeline has stages."""
    rows, columns, tokens = 64, 64 * 8 // min(WEIGHT_FORMATS[name].planes) * 5, 3
    columns += -columns % 256
    parts, x = drawn(name, rows, columns), activations(tokens, columns)
    matrix = np.asarray(lanes.dequantized(name, parts, rows, columns), np.float64)
    found = gpu_kernel.matmul(WEIGHT_FORMATS[name], x, parts, interpret=plgpu.InterpretGPUParams())
    assert found.shape == (tokens, rows) and found.dtype == jnp.bfloat16
    assert relative(found, np.asarray(x, np.float64) @ matrix.T) < 2.0**-7  # both sides are rounded to 8 bits


@needs_interpreter
def test_copies_and_readers_do_not_race():
    parts, x = drawn("Q4_K", 64, 1024), activations(2, 1024)
    matrix = np.asarray(lanes.dequantized("Q4_K", parts, 64, 1024), np.float64)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    found = gpu_kernel.matmul(WEIGHT_FORMATS["Q4_K"], x, parts, interpret=interpret)
    assert relative(found, np.asarray(x, np.float64) @ matrix.T) < 2.0**-7


@needs_interpreter
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_a_layer_of_a_stack_is_the_matrix_alone(name):
    parts, x = drawn(name, 64, 1024), activations(2, 1024)
    interpret = plgpu.InterpretGPUParams()
    alone = gpu_kernel.matmul(WEIGHT_FORMATS[name], x, parts, interpret=interpret)
    stack = stacked(parts, 2)
    found = gpu_kernel.matmul(WEIGHT_FORMATS[name], x, stack, jnp.int32(2), interpret=interpret)
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(alone, np.float32))


@needs_interpreter
def test_fused_operations(monkeypatch):
    parts, x = drawn("Q8_0", 128, 256), activations(5, 256)
    kernel = gpu_kernel.matmul
    monkeypatch.setattr(
        gpu_kernel, "matmul", lambda *given: kernel(*given, interpret=plgpu.InterpretGPUParams())
    )
    given = {"norm": (jnp.ones(256), 1e-5), "gated": True, "layout": "lanes"}
    gated, wanted = (
        product.product(x, "Q8_0", parts, 64, implementation=how, **given) for how in ("gpu", "xla")
    )
    assert relative(gated, np.asarray(wanted, np.float64)) < 2.0**-6


@pytest.mark.parametrize(
    ("x", "rows", "columns", "complaint"),
    [
        (jnp.float32, 64, 256, "multiplies bfloat16, not float32"),
        (jnp.bfloat16, 72, 256, "needs a multiple of 64 rows, not 72"),
        (jnp.bfloat16, 64, 96, "64 columns in a step, which do not divide 96 of Q8_0"),
        (65, 64, 256, "at most 64 rows of activations, not 65"),
    ],
)
def test_unsupported_products_raise_and_are_left_to_xla(x, rows, columns, complaint):
    tokens, dtype = (x, jnp.bfloat16) if isinstance(x, int) else (2, x)
    parts, x = drawn("Q8_0", rows, columns), jnp.ones((tokens, columns), dtype)
    with pytest.raises(NotImplementedError, match=complaint):
        gpu_kernel.matmul(WEIGHT_FORMATS["Q8_0"], x, parts)
    found = product.product(x, "Q8_0", parts, rows, layout="lanes", implementation="gpu")
    matrix = np.asarray(lanes.dequantized("Q8_0", parts, rows, columns), np.float64)
    assert relative(found, np.ones((tokens, columns)) @ matrix.T) < 2.0**-6
