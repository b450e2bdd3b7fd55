"""Products with quantized matrices on GPUs: what stands around the kernel of ``gpu_kernel.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from model.quantized import gpu_kernel
from model.quantized.around import finished, normed
from model.quantized.formats import WEIGHT_FORMATS

_CAPABILITY = "9.0"
"""Hopper's: of wgmma."""


def product(
    x: Array,
    name: str,
    parts: Mapping[str, Array],
    outputs: int,
    *,
    norm: tuple[Array, float] | None,
    add: Array | None,
    gated: bool,
    interpret: Any = None,
) -> Array:
    """See ``product.product``, for parts of ``lanes`` and bfloat16; norms, gates and sums are XLA's.

    Raises:
      NotImplementedError: another dtype, another GPU, more rows of activations than the kernel is for, or sizes that it
        cannot cut.
    """
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"the GPU kernel multiplies bfloat16, not {x.dtype}")
    if interpret is None and jax.default_backend() == "gpu":
        capability = str(jax.devices()[0].compute_capability)
        if capability != _CAPABILITY:
            raise NotImplementedError(
                f"the GPU kernel is for compute capability {_CAPABILITY} (Hopper), not {capability}"
            )
    if norm is not None:
        x = normed(x, *norm)
    out = gpu_kernel.matmul(WEIGHT_FORMATS[name], x, dict(parts), interpret=interpret)
    return finished(out, outputs, add, gated)
