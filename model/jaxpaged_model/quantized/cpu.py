"""Products with stored matrices on CPUs: a custom call of ``cpu_kernel.py`` for each format."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpaged.compilation.executable_cache import register_target_loader
from jaxpaged.native.kernels import Kernel, register
from jaxpaged_model.quantized.activations import GATES
from jaxpaged_model.quantized.formats import FLOAT_FORMATS
from jaxpaged_model.quantized.norm import Norm

_PARTS = ("codes", "scales", "steps", "minima", "min_steps")
_FOLDER = Path(__file__).parent


@functools.cache
def _target(name: str, exact: bool) -> str:
    """Name of the custom call of a format, registered on first use."""
    prepare([name], exact=exact)
    return _kernel(name, exact).name


def _kernel(name: str, exact: bool) -> Kernel:
    exact |= name in FLOAT_FORMATS
    variant = f"{name}__{'exact' if exact else 'rounded'}"
    sources = tuple(_FOLDER / file for file in ("cpu_vectors.py", "formats.py", "panels.py"))
    target = f"jaxpaged_product_{name}{'_exact' if exact else ''}"
    return Kernel(target, _FOLDER / "cpu_kernel.py", f"{__package__}.cpu_kernel_{variant}", sources)


def prepare(names: Iterable[str], *, exact: bool) -> None:
    """Registers the custom calls of formats; their kernels are compiled meanwhile, if they have to be."""
    kernels = {name: _kernel(name, exact) for name in names}
    register(*kernels.values())
    for name, kernel in kernels.items():
        register_target_loader(kernel.name, _target, name, exact)


def product(
    x: Array,
    name: str,
    parts: Mapping[str, Array],
    outputs: int,
    *,
    layer: Array | int | None = None,
    num_rows: Array | None = None,
    norm: Norm | None,
    add: Array | None,
    gated: bool,
    activation: str,
    exact: bool,
) -> Array:
    """See ``product.product``, for ``x`` f32[T, columns]."""
    nothing = jnp.zeros(0, jnp.float32)
    scale, eps = (nothing, 0.0) if norm is None else norm
    call = _call(_target(name, exact), outputs)
    return call(
        x,
        nothing if add is None else add.astype(jnp.float32),
        scale.astype(jnp.float32),
        *(parts.get(part, jnp.zeros(0, jnp.uint8)) for part in _PARTS),
        np.asarray([eps], np.float32),
        np.asarray([GATES[activation] if gated else 0], np.int32),
        jnp.asarray(0 if layer is None else layer, jnp.int32),
        jnp.asarray(x.shape[0] if num_rows is None else num_rows, jnp.int32),
    )


@functools.cache
def _call(target: str, outputs: int) -> Callable[..., Array]:
    """The custom call as a function of ``(x, add, scale, *matrix, num_rows)``.

    Under ``vmap``, examples that share a matrix become the rows of one call.
    """

    def one(x: Array, add: Array, scale: Array, *matrix: Array) -> Array:
        out = jax.ShapeDtypeStruct((x.shape[0], outputs), jnp.float32)
        return jax.ffi.ffi_call(target, out, vmap_method="sequential")(x, scale, add, *matrix)

    call = jax.custom_batching.custom_vmap(one)

    @call.def_vmap
    def batched(size: int, is_batched: list[bool], x: Array, add: Array, *rest: Array) -> tuple[Array, bool]:
        if any(is_batched[2:-1]):
            axes = [0 if each else None for each in is_batched]
            return jax.vmap(one, axes)(x, add, *rest), True
        x, add = (
            rows if each or not rows.size else jnp.broadcast_to(rows, (size, *rows.shape))
            for rows, each in zip((x, add), is_batched, strict=False)
        )
        x = x.reshape(-1, x.shape[-1])
        add = add.reshape(-1, add.shape[-1]) if add.size else add
        out = call(x, add, *rest[:-1], jnp.int32(x.shape[0]))  # padding of an example is in the middle
        return out.reshape(size, -1, outputs), True

    return jax.jit(call)
