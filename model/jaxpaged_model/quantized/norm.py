"""RMSNorm and LayerNorm as functions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

Norm = tuple[Array, float]
"""Scale and epsilon of an RMSNorm before a product."""


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, computed in float32, in ``x``'s dtype.

    Reference: arXiv:1910.07467.
    """
    wide = x.astype(jnp.float32)
    factor = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * factor).astype(x.dtype) * scale.astype(x.dtype)


def layer_norm(x: Array, scale: Array, eps: float) -> Array:
    """``(x - mean(x)) / sqrt(var(x) + eps) * scale`` over the last axis, computed in float32, in ``x``'s dtype.

    Reference: arXiv:1607.06450.
    """
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * factor).astype(x.dtype) * scale.astype(x.dtype)
