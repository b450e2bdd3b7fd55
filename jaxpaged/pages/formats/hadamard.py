"""The Hadamard turn: what spreads an outlier of one dimension over all before a row is quantized.

Turned queries meet turned keys with the same product, because the turn is orthogonal; turned values give turned
outputs, which are turned back. Source of the idea: QuaRot, arXiv:2404.00456.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def size(head_dim: int) -> int:
    """Dimensions that are turned together: the largest power of two that divides ``head_dim``."""
    return head_dim & -head_dim


@functools.cache
def matrix(n: int) -> np.ndarray:
    """f32[n, n], n a power of two: Sylvester's matrix over the root of n; symmetric, and its own inverse."""
    bits = np.arange(n)
    signs = 1 - 2 * (np.bitwise_count(bits[:, None] & bits) % 2).astype(np.float32)
    return signs / np.float32(np.sqrt(n))


def transform(x: Array) -> Array:
    """f32: ``x [..., head_dim]`` turned, each ``size(head_dim)`` dimensions by themselves; turned again it is x."""
    n = size(x.shape[-1])
    blocks = x.astype(jnp.float32).reshape(-1, n)
    turned = lax.dot(blocks, jnp.asarray(matrix(n)), precision=lax.Precision.HIGHEST)
    return turned.reshape(x.shape)
