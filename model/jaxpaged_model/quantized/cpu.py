"""Products with quantized matrices on CPUs: the custom calls of ``cpu_kernel.py``, one for each format."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpaged.compilation.executable_cache import register_target_loader
from jaxpaged.native.ffi import register
from jaxpaged_model.quantized import cpu_kernel, cpu_vectors, formats, panels

_PARTS = ("codes", "scales", "steps", "minima", "min_steps")


@functools.cache
def _target(name: str, exact: bool) -> str:
    """The name of the custom call."""
    variant = f"{cpu_kernel.__name__}_{name}__{'exact' if exact else 'whole'}"
    spec = importlib.util.spec_from_file_location(variant, cpu_kernel.__file__)
    assert spec is not None
    assert spec.loader is not None
    kernel = sys.modules[variant] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
    sources = [Path(str(room.__file__)) for room in (cpu_kernel, cpu_vectors, formats, panels)]
    register(kernel.NAME, kernel.handler, kernel.task, sources)
    register_target_loader(kernel.NAME, _target, name, exact)
    return kernel.NAME


def product(
    x: Array,
    name: str,
    parts: Mapping[str, Array],
    outputs: int,
    *,
    norm: tuple[Array, float] | None,
    add: Array | None,
    gated: bool,
    exact: bool,
) -> Array:
    """See ``product.product``, for ``x`` f32[T, columns]."""
    nothing = jnp.zeros(0, jnp.float32)
    scale, eps = (nothing, 0.0) if norm is None else norm
    out = jax.ShapeDtypeStruct((x.shape[0], outputs), jnp.float32)
    return jax.ffi.ffi_call(_target(name, exact), out)(
        x,
        scale.astype(jnp.float32),
        nothing if add is None else add.astype(jnp.float32),
        *(parts.get(part, jnp.zeros(0, jnp.uint8)) for part in _PARTS),
        np.asarray([eps], np.float32),
        np.asarray([gated], np.int32),
    )
