"""Products with stored matrices on any platform."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxpaged_model.quantized.activations import ACTIVATIONS
from jaxpaged_model.quantized.formats import WEIGHT_FORMATS
from jaxpaged_model.quantized.layouts import LAYOUTS, Layout, of_layer
from jaxpaged_model.quantized.norm import Norm, rms_norm

Implementation = Literal["cpu", "gpu", "tpu", "xla"]


def choose(platform: str | None = None) -> Implementation:
    """The implementation for a platform; None = JAX's default backend."""
    platform = platform or jax.default_backend()
    if platform == "cpu":
        return "cpu" if importlib.util.find_spec("numba") is not None else "xla"
    kernels: dict[str, Implementation] = {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}
    return kernels.get(platform, "xla")


def layout_for(platform: str | None = None) -> Layout:
    """The memory layout of matrices for that implementation."""
    return "panels" if choose(platform) == "cpu" else "lanes"


def prepare(formats: Iterable[str], *, exact: bool) -> None:
    """Starts to compile what products with matrices of these formats need beside XLA's programs; it
    may be called as soon as the formats are known, and need not be."""
    if choose() == "cpu":
        from jaxpaged_model.quantized import cpu

        cpu.prepare(sorted({*formats}), exact=exact)


def product(
    x: Array,
    name: str,
    parts: Mapping[str, Array],
    outputs: int,
    *,
    layer: Array | int | None = None,
    num_rows: Array | None = None,
    norm: Norm | None = None,
    add: Array | None = None,
    gated: bool = False,
    activation: str = "silu",
    exact: bool = False,
    layout: Layout = "panels",
    implementation: Implementation | None = None,
) -> Array:
    """``x @ W.T``, fused with the operations before and after it in a transformer layer.

    Args:
      x: ``[T, columns]``, any floating dtype.
      name: the format, one of the layout's ``FORMATS``.
      parts: the matrix, see ``panels.Parts`` and ``lanes.Parts``; or a stack of them, with the layer as
        first axis of each part.
      layer: i32[], index of the matrix in the stack, which is read where it lies; None: no stack.
      outputs: rows of the matrix, or half of them if ``gated``.
      num_rows: i32[], rows of ``x`` that count, the first ones; the others of the result are arbitrary.
        The CPU kernel skips them. None: all.
      norm: ``(scale [columns], eps)`` of an RMSNorm of ``x`` before the product.
      add: ``[T, outputs]``, added to the product.
      gated: True if the matrix is the concatenation of gate and up, of ``outputs`` rows each, a multiple
        of 16; the result is ``activation(gate) * up``.
      activation: one of ``GATES``.
      exact: True for float32 activations; otherwise kernels may round them to 16-bit integers with a
        scale for each 32, a relative error below 1e-4. Products with floating-point formats are exact.
      layout: memory layout of the matrix.
      implementation: None = ``choose()``; XLA computes what it does not support.

    Returns:
      ``[T, outputs]`` of ``x``'s dtype.
    """
    wanted = implementation or choose()
    if wanted == "cpu" and layout == "panels":
        from jaxpaged_model.quantized import cpu

        wide = x.astype(jnp.float32)
        out = cpu.product(
            wide,
            name,
            parts,
            outputs,
            layer=layer,
            num_rows=num_rows,
            norm=norm,
            add=add,
            gated=gated,
            activation=activation,
            exact=exact,
        )
        return out.astype(x.dtype)
    x = x if norm is None else rms_norm(x, *norm)
    out = _matmul(wanted, x, name, parts, layer, 2 * outputs if gated else outputs, layout)
    if gated:
        out = ACTIVATIONS[activation](out[:, :outputs]) * out[:, outputs:]
    return out if add is None else out + add


def _kernel(wanted: Implementation) -> Any:
    """Imports a kernel when it is used: no platform has the libraries of both."""
    if wanted == "tpu":
        from jaxpaged_model.quantized import tpu_kernel

        return tpu_kernel
    from jaxpaged_model.quantized import gpu_kernel

    return gpu_kernel


def _matmul(
    wanted: Implementation,
    x: Array,
    name: str,
    parts: Mapping[str, Array],
    layer: Array | int | None,
    rows: int,
    layout: Layout,
) -> Array:
    """``x @ W.T`` by a kernel that reads the quantized matrix, or by XLA, which dequantizes all of it first."""
    if layout == "lanes" and wanted in ("gpu", "tpu"):
        with contextlib.suppress(NotImplementedError):
            return _kernel(wanted).matmul(WEIGHT_FORMATS[name], x, dict(parts), layer)
    own = {key: of_layer(part, layer) for key, part in parts.items()}
    matrix = LAYOUTS[layout].dequantized(name, own, rows, x.shape[1])
    return jnp.einsum("tk,ok->to", x, matrix.astype(x.dtype))
