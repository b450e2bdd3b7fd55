"""A product with a quantized matrix, on whatever platform it runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from model.quantized import panels

Implementation = Literal["cpu", "xla"]


def choose(platform: str | None = None) -> Implementation:
    """Who computes products on a platform, by default the one that JAX uses."""
    has_numba = importlib.util.find_spec("numba") is not None
    return "cpu" if (platform or jax.default_backend()) == "cpu" and has_numba else "xla"


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
    implementation: Implementation | None = None,
) -> Array:
    """``x @ W.T``, with what stands around it in a transformer's layer.

    Args:
      x: ``[T, columns]``, any floating dtype.
      name: the format, one of ``WEIGHT_FORMATS``.
      parts: the matrix, see ``panels.Parts``.
      outputs: its rows; where it is ``gated``, half of them.
      norm: ``(scale [columns], eps)``: ``x`` is normed first (RMSNorm).
      add: ``[T, outputs]``, added in the end.
      gated: the matrix holds gate and up, one behind the other, of ``outputs`` rows each, a multiple of 16; what
        leaves is ``silu(gate) * up``.
      exact: activations stay float32; else kernels may take them as whole numbers of 16 bits, with a scale for each
        32 of them, which is off by less than 1e-4 of what a product is.
      implementation: None = as ``choose`` says.

    Returns:
      ``[T, outputs]`` of ``x``'s dtype.
    """
    if (implementation or choose()) == "cpu":
        from model.quantized import cpu

        return cpu.product(
            x.astype(jnp.float32), name, parts, outputs, norm=norm, add=add, gated=gated, exact=exact
        ).astype(x.dtype)
    return _by_xla(x, name, parts, outputs, norm, add, gated)


def _by_xla(
    x: Array,
    name: str,
    parts: Mapping[str, Array],
    outputs: int,
    norm: tuple[Array, float] | None,
    add: Array | None,
    gated: bool,
) -> Array:
    """The same by operations of XLA, which makes numbers of all of the matrix first."""
    dtype: Any = x.dtype
    if norm is not None:
        scale, eps = norm
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
        x = normed.astype(dtype) * scale.astype(dtype)
    matrix = panels.dequantized(name, parts, 2 * outputs if gated else outputs).astype(dtype)
    out = jnp.einsum("tk,ok->to", x, matrix)
    if gated:
        out = jax.nn.silu(out[:, :outputs]) * out[:, outputs:]
    return out if add is None else out + add
