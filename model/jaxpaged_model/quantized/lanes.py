"""Memory layout of a quantized matrix for accelerators: transposed, rows of the matrix along a TPU's lanes.

A plane of ``bits`` bits of the codes has ``bits / 8`` times as many rows as the matrix has columns: byte
(k, n) has the code of column ``k + j * (height of the plane)`` of row n in its bits from ``bits * j`` on. So a
run of consecutive columns is one shift and one mask of a tile, without movement between lanes. A scale
belongs to 32 or 16 columns of a row, which are consecutive registers of a TPU.

Columns are padded with zeros to a multiple for which each run is whole tiles of bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxpaged.pages.formats import LANES
from jaxpaged_model.quantized.formats import WEIGHT_FORMATS, WeightFormat

SUBLANES = 32
"""Rows of a TPU's tile of bytes; the length of a run is a multiple of it."""

FORMATS = WEIGHT_FORMATS
"""Formats of matrices that have this layout."""
ROWS = 1
"""Concatenated matrices begin at multiples of it."""

Parts = dict[str, Any]
"""``codes`` u8[bits / 8 * columns, rows], one plane after the other; ``scales`` f16[groups, rows], or with steps
f16[super-blocks, rows]; ``minima`` like ``scales``; ``steps`` i8[groups, rows]; ``min_steps`` likewise, u8."""


def padded(fmt: WeightFormat, columns: int) -> int:
    """Number of columns in memory, with padding."""
    unit = SUBLANES * 8 // min(fmt.planes)
    return -(-columns // unit) * unit


def run_length(fmt: WeightFormat, columns: int) -> int:
    """Number of columns of a run."""
    return padded(fmt, columns) * min(fmt.planes) // 8


def num_runs(fmt: WeightFormat) -> int:
    """Number of runs of columns that are unpacked by one shift of each plane; run i begins at ``i * run_length``."""
    return 8 // min(fmt.planes)


def places(fmt: WeightFormat, run: Any) -> Iterator[tuple[Any, Any, int, int]]:
    """Location of a run's codes; the run is an int or an array.

    Yields:
      For each plane ``(segment, shift, bits, done)``: index of the segment of ``codes``, of ``run_length``
      rows; position of the bits in a byte; their number; and their position in a code.
    """
    first, done = 0, 0
    for bits in fmt.planes:
        segments = bits // min(fmt.planes)  # a power of two
        yield first + (run & (segments - 1)), bits * (run >> (segments.bit_length() - 1)), bits, done
        first, done = first + segments, done + bits


def part_shapes(fmt: WeightFormat, rows: int, columns: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a matrix's parts."""
    full = padded(fmt, columns)
    return {"codes": jax.ShapeDtypeStruct((full * fmt.bits // 8, rows), jnp.uint8)} | {
        name: jax.ShapeDtypeStruct((full // shared, rows), dtype)
        for name, (shared, dtype) in fmt.factors.items()
    }


def pack(fmt: WeightFormat, raw: np.ndarray, out: Parts, first_row: int = 0) -> None:
    """Writes a matrix of a file, u8 ``[rows, bytes]``, to rows ``first_row`` and up of a matrix's parts."""
    found = fmt.unpack(raw)
    target = slice(first_row, first_row + len(raw))
    for name, part in out.items():
        given = getattr(found, name).T
        if name != "codes":
            part[: len(given), target] = given
            continue
        columns = len(given)
        codes = np.zeros((padded(fmt, columns), len(raw)), np.uint8)
        codes[:columns] = given
        length = run_length(fmt, columns)
        for run in range(num_runs(fmt)):
            mine = codes[run * length : (run + 1) * length]
            for segment, shift, bits, done in places(fmt, run):
                plane = mine >> np.uint8(done) & np.uint8((1 << bits) - 1)
                part[segment * length : (segment + 1) * length, target] |= plane << np.uint8(shift)


def codes_of(fmt: WeightFormat, load: Callable[[Any], Array], run: Any) -> Array:
    """Values of a run's codes, plus ``zero``: i32. ``load`` returns a segment, or a part of it, as i32."""
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
    for code, value in enumerate(table[1:], 1):  # kernels have no gather
        found = jnp.where(codes == code, value, found)
    return found


def dequantized(name: str, parts: Mapping[str, Array], rows: int, columns: int) -> Array:
    """Dequantizes a matrix: f32 ``[rows, columns]``."""
    return _numbers(WEIGHT_FORMATS[name], parts, columns).T[:rows]


def rows_of(name: str, parts: Mapping[str, Array], index: Array, columns: int) -> Array:
    """Dequantizes the rows at ``index`` i32[n], which must be inside the matrix: f32 ``[n, columns]``."""
    taken = {key: _take(part, index) for key, part in parts.items()}
    return _numbers(WEIGHT_FORMATS[name], taken, columns).T


def _take(part: Array, index: Array) -> Array:
    """``part[:, index]``; on TPUs, where XLA would copy the whole part for it, by blocks of lanes."""
    return lax.platform_dependent(part, index, tpu=take_by_lanes, default=lambda part, index: part[:, index])


def take_by_lanes(part: Array, index: Array) -> Array:
    """``part[:, index]``, one block of lanes for each index i32[n]."""
    width = min(part.shape[1], LANES)

    def one(i: Array) -> Array:
        start = jnp.minimum(i // LANES * LANES, part.shape[1] - width)
        block = lax.dynamic_slice_in_dim(part, start, width, axis=1)
        return jnp.sum(jnp.where(jnp.arange(width) == i - start, block, 0), axis=1, dtype=part.dtype)

    return lax.map(one, index).T


def _numbers(fmt: WeightFormat, parts: Mapping[str, Array], columns: int) -> Array:
    """Dequantizes parts: f32[columns, n]."""
    length = run_length(fmt, columns)
    segments = parts["codes"].astype(jnp.int32).reshape(-1, length, parts["codes"].shape[1])
    codes = jnp.concatenate([codes_of(fmt, segments.__getitem__, run) for run in range(num_runs(fmt))])
    numbers = (codes - fmt.zero).astype(jnp.float32).reshape(-1, fmt.group, codes.shape[1])
    numbers = numbers * _scale(parts["scales"], parts.get("steps"))
    if fmt.has_minima:
        numbers = numbers - _scale(parts["minima"], parts.get("min_steps"))
    return numbers.reshape(-1, codes.shape[1])[:columns]


def _scale(scales: Array, steps: Array | None) -> Array:
    """Scale of each group: f32[groups, 1, n]."""
    wide = scales.astype(jnp.float32)
    if steps is not None:
        wide = jnp.repeat(wide, steps.shape[0] // wide.shape[0], axis=0) * steps.astype(jnp.float32)
    return wide[:, None]
