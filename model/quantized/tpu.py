"""Products with quantized matrices on TPUs: what stands around the kernel of ``tpu_kernel.py``."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from model.quantized import tpu_kernel
from model.quantized.around import finished, normed
from model.quantized.formats import WEIGHT_FORMATS


def product(
    x: Array,
    name: str,
    parts: Mapping[str, Array],
    outputs: int,
    *,
    norm: tuple[Array, float] | None,
    add: Array | None,
    gated: bool,
    interpret: bool = False,
) -> Array:
    """See ``product.product``, for parts of ``lanes``; always as exact as numbers of ``x``'s dtype are.

    Norms, gates and sums are XLA's, which fuses them with what comes before and behind.

    Raises:
      NotImplementedError: ``x`` is neither float32 nor bfloat16.
    """
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"the TPU kernel multiplies float32 and bfloat16, not {x.dtype}")
    if norm is not None:
        x = normed(x, *norm)
    out = tpu_kernel.matmul(WEIGHT_FORMATS[name], x, dict(parts), interpret=interpret)
    return finished(out, outputs, add, gated)
