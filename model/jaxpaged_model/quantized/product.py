"""A product with a quantized matrix, on whatever platform it runs."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxpaged_model.quantized.formats import WEIGHT_FORMATS
from jaxpaged_model.quantized.layouts import LAYOUTS, Layout
from jaxpaged_model.quantized.norm import rms_norm

Implementation = Literal["cpu", "gpu", "tpu", "xla"]


def choose(platform: str | None = None) -> Implementation:
    """Who computes products on a platform, by default the one that JAX uses."""
    platform = platform or jax.default_backend()
    if platform == "cpu":
        return "cpu" if importlib.util.find_spec("numba") is not None else "xla"
    kernels: dict[str, Implementation] = {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}
    return kernels.get(platform, "xla")


def layout_for(platform: str | None = None) -> Layout:
    """How matrices have to lie for it."""
    return "panels" if choose(platform) == "cpu" else "lanes"


def product(
    x: Array,
    name: str,
    parts: Mapping[str, Array],
    outputs: int,
    *,
    norm: tuple[Array, float] | None = None,
    add: Array | None = None,
    gated: bool = False,
    exact: bool = False,
    layout: Layout = "panels",
    implementation: Implementation | None = None,
) -> Array:
    """``x @ W.T``, with what stands around it in a transformer's layer.

    Args:
      x: ``[T, columns]``, any floating dtype.
      name: the format, one of ``WEIGHT_FORMATS``.
      parts: the matrix, see ``panels.Parts`` and ``lanes.Parts``.
      outputs: its rows; where it is ``gated``, half of them.
      norm: ``(scale [columns], eps)``: ``x`` is normed first (RMSNorm).
      add: ``[T, outputs]``, added in the end.
      gated: the matrix holds gate and up, one behind the other, of ``outputs`` rows each, a multiple of 16; what
        leaves is ``silu(gate) * up``.
      exact: activations stay float32; else kernels may take them as whole numbers of 16 bits, with a scale for each
        32 of them, which is off by less than 1e-4 of what a product is.
      layout: how it lies there.
      implementation: None = as ``choose`` says; what cannot serve a layout or a dtype leaves it to XLA.

    Returns:
      ``[T, outputs]`` of ``x``'s dtype.
    """
    wanted = implementation or choose()
    if wanted == "cpu" and layout == "panels":
        from jaxpaged_model.quantized import cpu

        wide = x.astype(jnp.float32)
        out = cpu.product(wide, name, parts, outputs, norm=norm, add=add, gated=gated, exact=exact)
        return out.astype(x.dtype)
    x = x if norm is None else rms_norm(x, *norm)
    out = _matmul(wanted, x, name, parts, 2 * outputs if gated else outputs, layout)
    if gated:
        out = jax.nn.silu(out[:, :outputs]) * out[:, outputs:]
    return out if add is None else out + add


def _kernel(wanted: Implementation) -> Any:
    """Imported when it is needed: no platform has the libraries of both."""
    if wanted == "tpu":
        from jaxpaged_model.quantized import tpu_kernel

        return tpu_kernel
    from jaxpaged_model.quantized import gpu_kernel

    return gpu_kernel


def _matmul(
    wanted: Implementation, x: Array, name: str, parts: Mapping[str, Array], rows: int, layout: Layout
) -> Array:
    """``x @ W.T`` by a kernel that reads the matrix, or by XLA, which makes numbers of all of it first."""
    if layout == "lanes" and wanted in ("gpu", "tpu"):
        with contextlib.suppress(NotImplementedError):
            return _kernel(wanted).matmul(WEIGHT_FORMATS[name], x, dict(parts))
    matrix = LAYOUTS[layout].dequantized(name, parts, rows, x.shape[1])
    return jnp.einsum("tk,ok->to", x, matrix.astype(x.dtype))
