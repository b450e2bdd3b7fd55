"""The TPU kernel of products with quantized matrices: a tile of codes becomes numbers in VMEM, where they are used.

A program takes ``bn`` rows of the matrix and, step by step, the codes of all its columns. Of every run of columns
(see ``lanes``) a step has the same piece, because one byte holds codes of several runs; activations come ordered so.
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
"""Columns whose groups of 32 have scales in whole registers."""
_MOST_COLUMNS = 1024
"""Of a piece of a run: half a megabyte of numbers, with 128 rows of the matrix."""
_MOST_TOKENS = 512


class Cut(NamedTuple):
    """How a product is cut; static."""

    piece: int
    """Columns of a run that a step takes."""
    steps: int
    """Of a program: pieces of a run."""
    bn: int
    """Rows of the matrix that a program takes."""
    bt: int
    """Rows of activations."""

    @classmethod
    def of(cls, fmt: WeightFormat, rows: int, columns: int, tokens: int, dtype: Any) -> Cut:
        """For a matrix and ``tokens`` rows of activations of ``dtype``."""
        length = lanes.run_length(fmt, columns)
        fits = [p for p in range(_ALIGNED, _MOST_COLUMNS + 1, _ALIGNED) if length % p == 0]
        piece = fits[-1] if fits else length
        smallest = 8 * 4 // jnp.dtype(dtype).itemsize
        bt = min(-(-tokens // smallest) * smallest, _MOST_TOKENS)
        bn = rows if rows < 128 else (256 if rows % 256 == 0 and bt <= 64 else 128)
        return cls(piece, length // piece, bn, bt)


def _spread(super_scales: Array, groups: int) -> Array:
    """f32[groups, n] of f32[super-blocks, n]."""
    each = groups // super_scales.shape[0]
    shape = (super_scales.shape[0], each, super_scales.shape[1])
    return jnp.broadcast_to(super_scales[:, None], shape).reshape(groups, -1)


def _other_parts(fmt: WeightFormat, columns: int) -> list[str]:
    return [name for name in lanes.part_shapes(fmt, 1, columns) if name != "codes"]


def _kernel(fmt: WeightFormat, cut: Cut, columns: int, num_segments: int, *refs: Any) -> None:
    names = _other_parts(fmt, columns)
    x_ref, segments, others = refs[0], refs[1 : 1 + num_segments], refs[1 + num_segments :]
    given = dict(zip(names, others, strict=False))
    out_ref, sums_ref, *factors = others[len(names) :]
    length, groups = lanes.run_length(fmt, columns), cut.piece // fmt.group
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
        if cut.steps > 1:
            here = pl.ds(pl.multiple_of(first + step * groups, 8), groups)
        whole = lanes.codes_of(fmt, codes.__getitem__, i) - fmt.zero
        numbers = whole.astype(jnp.float32).reshape(groups, fmt.group, -1)
        numbers = numbers * factors[0][here][:, None]
        if fmt.has_minima:
            numbers = numbers - factors[1][here][:, None]
        x = x_ref[:, i * cut.piece : (i + 1) * cut.piece]
        exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        total += jnp.dot(
            x,
            numbers.reshape(cut.piece, -1).astype(x.dtype),
            precision=exact,
            preferred_element_type=jnp.float32,
        )
    sums_ref[...] = total

    @pl.when(step == cut.steps - 1)
    def _() -> None:
        out_ref[...] = sums_ref[...].astype(out_ref.dtype)


def _ordered(fmt: WeightFormat, cut: Cut, x: Array, columns: int) -> Array:
    """Activations ``[T, columns]`` with those of a step side by side, filled up with zeros."""
    full = lanes.filled(fmt, columns)
    x = jnp.pad(x, ((0, -x.shape[0] % cut.bt), (0, full - columns)))
    runs = lanes.num_runs(fmt)
    if runs == 1 or cut.steps == 1:
        return x
    return x.reshape(x.shape[0], runs, cut.steps, cut.piece).swapaxes(1, 2).reshape(x.shape)


@functools.partial(jax.jit, static_argnames=("fmt", "interpret"))
def matmul(fmt: WeightFormat, x: Array, parts: dict[str, Array], *, interpret: bool = False) -> Array:
    """``x @ W.T``: ``[T, rows]`` of ``x [T, columns]``, float32 or bfloat16, and the parts of ``lanes``.

    Raises:
      NotImplementedError: ``x`` is of another dtype.
    """
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"the TPU kernel multiplies float32 and bfloat16, not {x.dtype}")
    tokens, columns = x.shape
    rows = parts["codes"].shape[1]
    cut = Cut.of(fmt, rows, columns, tokens, x.dtype)
    ordered, length = _ordered(fmt, cut, x, columns), lanes.run_length(fmt, columns)
    num_segments = parts["codes"].shape[0] // length
    grid = (-(-rows // cut.bn), ordered.shape[0] // cut.bt, cut.steps)

    def segment(i: int) -> Any:
        return pl.BlockSpec((cut.piece, cut.bn), lambda n, t, c, i=i: (i * cut.steps + c, n))

    others = [parts[name] for name in _other_parts(fmt, columns)]
    others = [lax.bitcast_convert_type(p, jnp.int16) if p.dtype == jnp.float16 else p for p in others]
    groups = lanes.filled(fmt, columns) // fmt.group
    factors = [pltpu.VMEM((groups, cut.bn), jnp.float32)] * (2 if fmt.has_minima else 1)
    out = pl.pallas_call(
        functools.partial(_kernel, fmt, cut, columns, num_segments),
        grid=grid,
        in_specs=[
            pl.BlockSpec((cut.bt, lanes.num_runs(fmt) * cut.piece), lambda n, t, c: (t, c)),
            *map(segment, range(num_segments)),
            *(pl.BlockSpec((part.shape[0], cut.bn), lambda n, t, c: (0, n)) for part in others),
        ],
        out_specs=pl.BlockSpec((cut.bt, cut.bn), lambda n, t, c: (t, n)),
        out_shape=jax.ShapeDtypeStruct((ordered.shape[0], rows), x.dtype),
        scratch_shapes=[pltpu.VMEM((cut.bt, cut.bn), jnp.float32), *factors],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=64 << 20
        ),
        interpret=interpret,
        name=f"quantized_product_{fmt.name}",
    )(ordered, *[parts["codes"]] * num_segments, *others)
    return out[:tokens]
