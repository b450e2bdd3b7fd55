"""TPU kernel of products with quantized matrices, which dequantizes tiles in VMEM.

A program computes ``bn`` rows of the matrix and loops over its columns. One byte holds codes of several runs
of columns (see ``lanes``), so a step has the same columns of every run; activations are reordered accordingly.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxpaged.pages.formats.lane_blocks import half_to_float
from jaxpaged_model.quantized import lanes
from jaxpaged_model.quantized.formats import WeightFormat

_ALIGNED = 256
"""Columns for which the scales of groups of 32 fill whole registers."""
_MAX_BK = 1024
"""Half a megabyte of dequantized numbers, with 128 rows of the matrix."""
_MAX_BT = 512


class TileConfig(NamedTuple):
    """Block sizes of a product; static."""

    bk: int
    """Columns of each run in a step."""
    steps: int
    """Steps of a program."""
    bn: int
    """Rows of the matrix in a program."""
    bt: int
    """Rows of activations in a program."""

    @classmethod
    def create(cls, fmt: WeightFormat, rows: int, columns: int, tokens: int, dtype: Any) -> TileConfig:
        """Block sizes for a matrix and ``tokens`` rows of activations of ``dtype``."""
        length = lanes.run_length(fmt, columns)
        bk = max((k for k in range(_ALIGNED, _MAX_BK + 1, _ALIGNED) if length % k == 0), default=length)
        smallest = 8 * 4 // jnp.dtype(dtype).itemsize
        bt = min(-(-tokens // smallest) * smallest, _MAX_BT)
        bn = rows if rows < 128 else (256 if rows % 256 == 0 and bt <= 64 else 128)
        return cls(bk, length // bk, bn, bt)


def _spread(super_scales: Array, groups: int) -> Array:
    """Repeats f32[super-blocks, n] for each group: f32[groups, n]."""
    each = groups // super_scales.shape[0]
    shape = (super_scales.shape[0], each, super_scales.shape[1])
    return jnp.broadcast_to(super_scales[:, None], shape).reshape(groups, -1)


def _kernel(
    fmt: WeightFormat, config: TileConfig, columns: int, num_segments: int, layer: Any, *refs: Any
) -> None:
    del layer  # for the index maps alone
    x_ref, segments, others = refs[0], refs[1 : 1 + num_segments], refs[1 + num_segments :]
    given = dict(zip(fmt.factors, others, strict=False))
    out_ref, sums_ref, *factors = others[len(fmt.factors) :]
    length, groups = lanes.run_length(fmt, columns), config.bk // fmt.group
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        sums_ref[...] = jnp.zeros_like(sums_ref)
        for factor, (scales, steps) in zip(
            factors, (("scales", "steps"), ("minima", "min_steps")), strict=False
        ):
            wide = half_to_float(given[scales][...].astype(jnp.int32))
            if fmt.has_steps:
                small = given[steps][...].astype(jnp.int32)
                small = small & 255 if steps == "min_steps" else small
                wide = _spread(wide, factor.shape[0]) * small.astype(jnp.float32)
            factor[...] = wide

    total = sums_ref[...]
    codes = [segment[...].astype(jnp.int32) & 255 for segment in segments]
    for i in range(lanes.num_runs(fmt)):
        first = i * length // fmt.group
        here = pl.ds(first, groups)
        if config.steps > 1:
            here = pl.ds(pl.multiple_of(first + step * groups, 8), groups)
        whole = lanes.codes_of(fmt, codes.__getitem__, i) - fmt.zero
        numbers = whole.astype(jnp.float32).reshape(groups, fmt.group, -1)
        numbers = numbers * factors[0][here][:, None]
        if fmt.has_minima:
            numbers = numbers - factors[1][here][:, None]
        x = x_ref[:, i * config.bk : (i + 1) * config.bk]
        exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        total += jnp.dot(
            x,
            numbers.reshape(config.bk, -1).astype(x.dtype),
            precision=exact,
            preferred_element_type=jnp.float32,
        )
    sums_ref[...] = total

    @pl.when(step == config.steps - 1)
    def _() -> None:
        out_ref[...] = sums_ref[...].astype(out_ref.dtype)


def _ordered(fmt: WeightFormat, config: TileConfig, x: Array, columns: int) -> Array:
    """Reorders activations ``[T, columns]`` so that those of a step are contiguous; pads them with zeros."""
    full = lanes.padded(fmt, columns)
    x = jnp.pad(x, ((0, -x.shape[0] % config.bt), (0, full - columns)))
    runs = lanes.num_runs(fmt)
    if runs == 1 or config.steps == 1:
        return x
    return x.reshape(x.shape[0], runs, config.steps, config.bk).swapaxes(1, 2).reshape(x.shape)


@functools.partial(jax.jit, static_argnames=("fmt", "interpret"))
def matmul(
    fmt: WeightFormat,
    x: Array,
    parts: dict[str, Array],
    layer: Array | int | None = None,
    *,
    interpret: bool = False,
) -> Array:
    """``x @ W.T``: ``[T, rows]`` from ``x [T, columns]``, float32 or bfloat16, and a matrix's parts.

    With ``layer`` the parts are those of a stack of matrices; blocks are read from that layer's.

    Raises:
      NotImplementedError: another dtype.
    """
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"the TPU kernel multiplies float32 and bfloat16, not {x.dtype}")
    tokens, columns = x.shape
    if layer is None:
        layer, parts = 0, {name: part[None] for name, part in parts.items()}
    height, rows = parts["codes"].shape[1:]
    config = TileConfig.create(fmt, rows, columns, tokens, x.dtype)
    ordered, length = _ordered(fmt, config, x, columns), lanes.run_length(fmt, columns)
    num_segments = height // length
    grid = (-(-rows // config.bn), ordered.shape[0] // config.bt, config.steps)

    def segment(i: int) -> Any:
        return pl.BlockSpec(
            (None, config.bk, config.bn), lambda n, t, c, layer, i=i: (layer[0], i * config.steps + c, n)
        )

    def whole(part: Array) -> Any:
        stacked = len(part) == len(parts["codes"])
        return pl.BlockSpec(
            (None, part.shape[1], config.bn), lambda n, t, c, layer: (layer[0] if stacked else 0, 0, n)
        )

    def readable(part: Array) -> Array:
        """Mosaic has no float16, and XLA copies an array to show its bits as integers: so one layer's."""
        if part.dtype != jnp.float16:
            return part
        return lax.bitcast_convert_type(lax.dynamic_index_in_dim(part, layer), jnp.int16)

    others = [readable(parts[name]) for name in fmt.factors]
    groups = lanes.padded(fmt, columns) // fmt.group
    factors = [pltpu.VMEM((groups, config.bn), jnp.float32)] * (2 if fmt.has_minima else 1)
    out = pl.pallas_call(
        functools.partial(_kernel, fmt, config, columns, num_segments),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[
                pl.BlockSpec((config.bt, lanes.num_runs(fmt) * config.bk), lambda n, t, c, _: (t, c)),
                *map(segment, range(num_segments)),
                *map(whole, others),
            ],
            out_specs=pl.BlockSpec((config.bt, config.bn), lambda n, t, c, _: (t, n)),
            scratch_shapes=[pltpu.VMEM((config.bt, config.bn), jnp.float32), *factors],
        ),
        out_shape=jax.ShapeDtypeStruct((ordered.shape[0], rows), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=64 << 20
        ),
        interpret=interpret,
        name=f"quantized_product_{fmt.name}",
    )(jnp.asarray(layer, jnp.int32).reshape(1), ordered, *[parts["codes"]] * num_segments, *others)
    return out[:tokens]
