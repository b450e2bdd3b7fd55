"""Hadamard transform of rows before quantization, which spreads outliers over all dimensions.

It is orthogonal, so products of transformed queries and keys are unchanged. Outputs of transformed
values are transformed back. Source of the idea: QuaRot, arXiv:2404.00456.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def size(head_dim: int) -> int:
    """Number of dimensions transformed together: the largest power of two that divides ``head_dim``."""
    return head_dim & -head_dim


@functools.cache
def matrix(n: int) -> np.ndarray:
    """f32[n, n]: Sylvester's Hadamard matrix over sqrt(n), n a power of two; its own inverse."""
    bits = np.arange(n)
    signs = 1 - 2 * (np.bitwise_count(bits[:, None] & bits) % 2).astype(np.float32)
    return signs / np.float32(np.sqrt(n))


def transform(x: Array) -> Array:
    """f32[..., head_dim]: transform of ``x``, per ``size(head_dim)`` dimensions; its own inverse."""
    n = size(x.shape[-1])
    blocks = x.astype(jnp.float32).reshape(-1, n)
    return lax.dot(blocks, jnp.asarray(matrix(n)), precision=lax.Precision.HIGHEST).reshape(x.shape)
