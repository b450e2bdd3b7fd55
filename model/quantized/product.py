"""A product with a quantized matrix, on whatever platform it runs."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from model.quantized.around import finished, normed
from model.quantized.layouts import LAYOUTS, Layout

Implementation = Literal["cpu", "gpu", "tpu", "xla"]


def choose(platform: str | None = None) -> Implementation:
    """Who computes products on a platform, by default the one that JAX uses."""
    platform = platform or jax.default_backend()
    if platform == "cpu":
        return "cpu" if importlib.util.find_spec("numba") is not None else "xla"
    return "tpu" if platform == "tpu" else "gpu" if platform in ("gpu", "cuda") else "xla"


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
        from model.quantized import cpu

        wide = x.astype(jnp.float32)
        return cpu.product(wide, name, parts, outputs, norm=norm, add=add, gated=gated, exact=exact).astype(
            x.dtype
        )
    if wanted == "tpu" and layout == "lanes":
        from model.quantized import tpu

        with contextlib.suppress(NotImplementedError):
            return tpu.product(x, name, parts, outputs, norm=norm, add=add, gated=gated)
    if wanted == "gpu" and layout == "lanes":
        from model.quantized import gpu

        with contextlib.suppress(NotImplementedError):
            return gpu.product(x, name, parts, outputs, norm=norm, add=add, gated=gated)
    # XLA makes numbers of all of the matrix first.
    rows, columns = (2 * outputs if gated else outputs), x.shape[1]
    matrix = LAYOUTS[layout].dequantized(name, parts, rows, columns).astype(x.dtype)
    x = x if norm is None else normed(x, *norm)
    return finished(jnp.einsum("tk,ok->to", x, matrix), outputs, add, gated)
