"""How a quantized matrix lies in memory: panels of 16 rows, whose codes a CPU multiplies without rearranging them.

Of each block of 32 columns a panel has eight quads, 16 rows times 4 columns, which are the 64 bytes of a vector: a
product of pairs or fours sums up columns, and each lane keeps a row of its own. Codes of fewer bits share vectors:
a plane of ``bits`` bits takes ``bits`` vectors, and quad q has bits ``bits * (q // bits)`` and up of vector
``q % bits``. The planes of a block follow one another, so that a panel is read from its begin to its end.

Source of the idea: the packed operands of matrix products (GotoBLAS, doi:10.1145/1356052.1356053) and ggml's
repacked types (``ggml-cpu/repack.cpp``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpaged_model.quantized.formats import BLOCK, SUPER_BLOCK, WEIGHT_FORMATS, WeightFormat

ROWS = 16
"""Rows of a panel: a matrix that follows another in memory begins at a multiple of it."""
QUADS = 8
"""Of a block: four columns each."""
_QUAD = 4
ALIGNMENT = 64
"""Bytes: a line of the cache, and what XLA wants of memory that it is to use without copying it."""

Parts = dict[str, Any]
"""``codes`` u8[panels, blocks, 64 * bits]; ``scales`` f16[panels, groups, 16], or with steps f16[panels,
super-blocks, 16]; ``minima`` like ``scales``; ``steps`` i8[panels, groups, 16]; ``min_steps`` likewise, u8."""


def num_panels(rows: int) -> int:
    """Panels of a matrix of ``rows`` rows; the last one is filled up with zeros."""
    return -(-rows // ROWS)


def part_shapes(fmt: WeightFormat, rows: int, columns: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a matrix's parts."""
    panels = num_panels(rows)

    def lanes(count: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((panels, count, ROWS), dtype)

    groups = columns // fmt.group
    scales = lanes(columns // SUPER_BLOCK if fmt.has_steps else groups, jnp.float16)
    codes = jax.ShapeDtypeStruct((panels, columns // BLOCK, ROWS * _QUAD * fmt.bits), jnp.uint8)
    parts = {"codes": codes, "scales": scales}
    if fmt.has_steps:
        parts["steps"] = lanes(groups, jnp.int8)
    if fmt.has_minima:
        parts["minima"] = scales
        if fmt.has_steps:
            parts["min_steps"] = lanes(groups, jnp.uint8)
    return parts


def empty_parts(fmt: WeightFormat, rows: int, columns: int) -> Parts:
    """numpy arrays for a matrix's parts, nothing written into them, aligned so that XLA takes them as they are."""
    return {
        name: _aligned(one.shape, np.dtype(one.dtype))
        for name, one in part_shapes(fmt, rows, columns).items()
    }


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def pack(fmt: WeightFormat, raw: np.ndarray, out: Parts, first_row: int = 0) -> None:
    """Writes a matrix of a file, u8 ``[rows, bytes]``, into the parts of a larger one from ``first_row`` on.

    Raises:
      ValueError: ``first_row`` is not the first of a panel.
    """
    first_panel, inside = divmod(first_row, ROWS)
    if inside:
        raise ValueError(f"first_row must be a multiple of {ROWS}, got {first_row}")
    found = fmt.unpack(raw)
    for name in out:
        part = getattr(found, name)
        lanes = _filled(part)
        panels = slice(first_panel, first_panel + len(lanes) // ROWS)
        lanes = lanes.reshape(-1, ROWS, part.shape[1])
        if name == "codes":
            _pack_codes(fmt, lanes, out[name][panels])
        else:
            out[name][panels] = lanes.swapaxes(1, 2)


def _filled(part: np.ndarray) -> np.ndarray:
    missing = -len(part) % ROWS
    return np.pad(part, ((0, missing), (0, 0))) if missing else part


def _pack_codes(fmt: WeightFormat, codes: np.ndarray, out: np.ndarray) -> None:
    """``codes`` u8[panels, 16, columns] into ``out`` u8[panels, blocks, 64 * bits]."""
    panels, _, columns = codes.shape
    # Four columns at a time are moved as one number: [panels, 16, blocks, quads] -> [panels, blocks, quads, 16].
    words = np.ascontiguousarray(codes).view(np.uint32).reshape(panels, ROWS, columns // BLOCK, QUADS)
    quads = words.transpose(0, 2, 3, 1)
    into = out.view(np.uint32).reshape(panels, columns // BLOCK, fmt.bits, ROWS)
    if fmt.planes == (8,):
        into[...] = quads
        return
    done = 0
    for bits in fmt.planes:
        mask = np.uint32(((1 << bits) - 1) * 0x01010101)
        plane = quads >> np.uint32(done) & mask
        vectors = into[:, :, done : done + bits]
        vectors[...] = plane[:, :, :bits]
        for part in range(1, 8 // bits):
            vectors |= plane[:, :, part * bits : (part + 1) * bits] << np.uint32(part * bits)
        done += bits


# --- back to numbers, on any platform ---------------------------------------------------------------------------


def dequantized(name: str, parts: Mapping[str, Array], rows: int, columns: int) -> Array:
    """f32 ``[rows, columns]`` of a matrix's parts."""
    fmt = WEIGHT_FORMATS[name]
    numbers = _numbers(fmt, parts)
    return numbers.swapaxes(1, 2).reshape(-1, numbers.shape[1])[:rows, :columns]


def rows_of(name: str, parts: Mapping[str, Array], index: Array, columns: int) -> Array:
    """f32 ``[n, columns]``: the rows at ``index`` i32[n], which is inside the matrix."""
    fmt = WEIGHT_FORMATS[name]
    panel, lane = index // ROWS, index % ROWS
    taken = {}
    for key, part in parts.items():
        if key == "codes":
            quads = part.reshape(*part.shape[:2], fmt.bits, ROWS, _QUAD)
            taken[key] = quads[panel, :, :, lane].reshape(len(index), part.shape[1], -1)
        else:
            taken[key] = part[panel, :, lane][..., None]
    return _numbers(fmt, taken)[:, :columns, 0]


def _numbers(fmt: WeightFormat, parts: Mapping[str, Array]) -> Array:
    """f32[panels, columns, lanes] of parts with any number of lanes."""
    codes = parts["codes"]
    panels, blocks, _ = codes.shape
    vectors = codes.reshape(panels, blocks, fmt.bits, -1, _QUAD)
    quads, done = jnp.uint8(0), 0
    for bits in fmt.planes:
        plane = vectors[:, :, done : done + bits]
        shifted = [plane >> np.uint8(shift) for shift in range(0, 8, bits)]
        quads |= (jnp.concatenate(shifted, axis=2) & np.uint8((1 << bits) - 1)) << np.uint8(done)
        done += bits
    # [panels, blocks, quads, lanes, 4] -> [panels, columns, lanes]
    by_column = quads.swapaxes(3, 4).reshape(panels, blocks * BLOCK, -1)
    if fmt.table is not None:
        by_column = jnp.asarray(fmt.table, jnp.uint8)[by_column]
    numbers = (by_column.astype(jnp.int32) - fmt.zero).astype(jnp.float32)
    numbers = numbers.reshape(panels, -1, fmt.group, numbers.shape[-1])
    numbers = numbers * _scale(parts["scales"], parts.get("steps"))
    if fmt.has_minima:
        numbers = numbers - _scale(parts["minima"], parts.get("min_steps"))
    return numbers.reshape(panels, -1, numbers.shape[-1])


def _scale(scales: Array, steps: Array | None) -> Array:
    """f32[panels, groups, 1, lanes]"""
    wide = scales.astype(jnp.float32)
    if steps is not None:
        wide = jnp.repeat(wide, steps.shape[1] // wide.shape[1], axis=1) * steps.astype(jnp.float32)
    return wide[:, :, None]
