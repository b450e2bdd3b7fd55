"""What stands around a product in a transformer's layer, by operations of XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def normed(x: Array, scale: Array, eps: float) -> Array:
    """RMSNorm over the last axis, in float32, of ``x``'s dtype."""
    wide = x.astype(jnp.float32)
    factor = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * factor).astype(x.dtype) * scale.astype(x.dtype)


def finished(out: Array, outputs: int, add: Array | None, gated: bool) -> Array:
    """What becomes of a product: a gate, or a sum."""
    if gated:
        out = jax.nn.silu(out[:, :outputs]) * out[:, outputs:]
    return out if add is None else out + add
