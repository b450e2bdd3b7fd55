"""How a quantized matrix lies in memory of an accelerator: rows of the matrix in lanes, its columns below each other.

A plane of ``bits`` bits of the codes is ``bits / 8`` of the matrix's columns high: byte (k, n) has in its bits
``bits * j`` and up the code of column ``k + j * (height of the plane)`` of row n. So whole runs of columns come out of
a tile by one shift and one mask, and nothing moves between lanes. A scale is for 32 or 16 columns of a row, which on
a TPU are registers below each other.

Columns are filled up with zeros to a multiple that makes every run whole tiles of bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpaged_model.quantized.formats import SUPER_BLOCK, WEIGHT_FORMATS, WeightFormat

SUBLANES = 32
"""Rows of a TPU's tile of bytes: what runs of columns are a multiple of."""

ROWS = 1
"""What a matrix that follows another in memory begins at a multiple of."""

Parts = dict[str, Any]
"""``codes`` u8[bits / 8 * columns, rows], plane below plane; ``scales`` f16[groups, rows], or with steps
f16[super-blocks, rows]; ``minima`` like ``scales``; ``steps`` i8[groups, rows]; ``min_steps`` likewise, u8."""


def filled(fmt: WeightFormat, columns: int) -> int:
    """Columns in memory."""
    unit = SUBLANES * 8 // min(fmt.planes)
    return -(-columns // unit) * unit


def run_length(fmt: WeightFormat, columns: int) -> int:
    """Columns of a run."""
    return filled(fmt, columns) * min(fmt.planes) // 8


def num_runs(fmt: WeightFormat) -> int:
    """Runs of a matrix: columns whose codes come out of the planes by one shift of each; run i has the columns from
    ``i * run_length`` on."""
    return 8 // min(fmt.planes)


def places(fmt: WeightFormat, run: Any) -> Iterator[tuple[Any, Any, int, int]]:
    """Where a run's codes are, the run a number or an array.

    Yields:
      Of each plane ``(segment, shift, bits, done)``: which piece of ``codes``, ``run_length`` high; by how many bits
      they are shifted there; their bits; and to which bit of a code they belong.
    """
    first, done = 0, 0
    for bits in fmt.planes:
        segments = bits // min(fmt.planes)  # a power of two
        yield first + (run & (segments - 1)), bits * (run >> (segments.bit_length() - 1)), bits, done
        first, done = first + segments, done + bits


def part_shapes(fmt: WeightFormat, rows: int, columns: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a matrix's parts."""
    full = filled(fmt, columns)

    def lanes(count: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, rows), dtype)

    scales = lanes(full // (SUPER_BLOCK if fmt.has_steps else fmt.group), jnp.float16)
    parts = {"codes": lanes(full * fmt.bits // 8, jnp.uint8), "scales": scales}
    if fmt.has_steps:
        parts["steps"] = lanes(full // fmt.group, jnp.int8)
    if fmt.has_minima:
        parts["minima"] = scales
        if fmt.has_steps:
            parts["min_steps"] = lanes(full // fmt.group, jnp.uint8)
    return parts


def empty_parts(fmt: WeightFormat, rows: int, columns: int) -> Parts:
    """numpy arrays of zeros for a matrix's parts."""
    return {name: np.zeros(one.shape, one.dtype) for name, one in part_shapes(fmt, rows, columns).items()}


def pack(fmt: WeightFormat, raw: np.ndarray, out: Parts, first_row: int = 0) -> None:
    """Writes a matrix of a file, u8 ``[rows, bytes]``, into the parts of a larger one from ``first_row`` on."""
    found = fmt.unpack(raw)
    lanes = slice(first_row, first_row + len(raw))
    for name, part in out.items():
        given = getattr(found, name).T
        if name != "codes":
            part[: len(given), lanes] = given
            continue
        columns = len(given)
        codes = np.zeros((filled(fmt, columns), len(raw)), np.uint8)
        codes[:columns] = given
        length = run_length(fmt, columns)
        for run in range(num_runs(fmt)):
            mine = codes[run * length : (run + 1) * length]
            for segment, shift, bits, done in places(fmt, run):
                plane = mine >> np.uint8(done) & np.uint8((1 << bits) - 1)
                part[segment * length : (segment + 1) * length, lanes] |= plane << np.uint8(shift)


def codes_of(fmt: WeightFormat, load: Callable[[Any], Array], run: Any) -> Array:
    """i32: what a run's codes stand for before ``zero`` is taken; ``load`` gives a segment, or a part of it, as i32."""
    found: Array | None = None
    for segment, shift, bits, done in places(fmt, run):
        part = load(segment)
        if bits < 8:
            part = (part >> shift & ((1 << bits) - 1)) << done
        found = part if found is None else found | part
    assert found is not None
    return found if fmt.table is None else _looked_up(fmt.table, found)


def _looked_up(table: tuple[int, ...], codes: Array) -> Array:
    found = jnp.full_like(codes, table[0])
    for code, value in enumerate(table[1:], 1):  # no kernel has gathers
        found = jnp.where(codes == code, value, found)
    return found


def dequantized(name: str, parts: Mapping[str, Array], rows: int, columns: int) -> Array:
    """f32 ``[rows, columns]`` of a matrix's parts."""
    return _numbers(WEIGHT_FORMATS[name], parts, columns).T[:rows]


def rows_of(name: str, parts: Mapping[str, Array], index: Array, columns: int) -> Array:
    """f32 ``[n, columns]``: the rows at ``index`` i32[n], which is inside the matrix."""
    taken = {key: part[:, index] for key, part in parts.items()}
    return _numbers(WEIGHT_FORMATS[name], taken, columns).T


def _numbers(fmt: WeightFormat, parts: Mapping[str, Array], columns: int) -> Array:
    """f32[columns, n]"""
    length = run_length(fmt, columns)
    segments = parts["codes"].astype(jnp.int32).reshape(-1, length, parts["codes"].shape[1])
    codes = jnp.concatenate([codes_of(fmt, segments.__getitem__, run) for run in range(num_runs(fmt))])
    numbers = (codes - fmt.zero).astype(jnp.float32).reshape(-1, fmt.group, codes.shape[1])
    numbers = numbers * _scale(parts["scales"], parts.get("steps"))
    if fmt.has_minima:
        numbers = numbers - _scale(parts["minima"], parts.get("min_steps"))
    return numbers.reshape(-1, codes.shape[1])[:columns]


def _scale(scales: Array, steps: Array | None) -> Array:
    """f32[groups, 1, n]"""
    wide = scales.astype(jnp.float32)
    if steps is not None:
        wide = jnp.repeat(wide, steps.shape[0] // wide.shape[0], axis=0) * steps.astype(jnp.float32)
    return wide[:, None]
