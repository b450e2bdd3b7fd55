"""Memory layout of a matrix for CPUs: panels of 16 rows, in the order in which they are multiplied.

Floating-point numbers are columns of a panel, one after the other: 16 numbers, which are one vector of a
multiply-add instruction. Quantized numbers are more tightly packed.

Each block of 32 columns of a panel is eight quads of 16 rows and 4 columns, which are the 64 bytes of a
vector: multiply-add instructions sum over columns, and each element of the vector belongs to one row.
Codes of fewer bits share vectors: a plane of ``bits`` bits takes ``bits`` vectors, and quad q has the bits
from ``bits * (q // bits)`` on of vector ``q % bits``. The planes of a block are consecutive, so that a
panel is read sequentially.

References: the packed operands of matrix products (GotoBLAS, doi:10.1145/1356052.1356053) and ggml's
repacked types (``ggml-cpu/repack.cpp``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpaged_model.quantized.formats import (
    BLOCK,
    QUADS,
    ROWS,
    STORED_FORMATS,
    FloatFormat,
    StoredFormat,
    WeightFormat,
)

FORMATS = STORED_FORMATS
"""Formats of matrices that have this layout; columns are a multiple of 32."""
_QUAD = 4
Parts = dict[str, Any]
"""``codes`` u8[panels, blocks, 64 * bits], or the numbers [panels, columns, 16] if they are floating point, and
nothing else; ``scales`` f16[panels, groups, 16], or with steps f16[panels,
super-blocks, 16]; ``minima`` like ``scales``; ``steps`` i8[panels, groups, 16]; ``min_steps`` likewise, u8."""


def num_panels(rows: int) -> int:
    """Panels of a matrix of ``rows`` rows; the last one is padded with zeros."""
    return -(-rows // ROWS)


def part_shapes(fmt: StoredFormat, rows: int, columns: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a matrix's parts."""
    panels = num_panels(rows)
    if isinstance(fmt, FloatFormat):
        return {"codes": jax.ShapeDtypeStruct((panels, columns, ROWS), fmt.dtype)}
    codes = jax.ShapeDtypeStruct((panels, columns // BLOCK, ROWS * _QUAD * fmt.bits), jnp.uint8)
    return {"codes": codes} | {
        name: jax.ShapeDtypeStruct((panels, columns // shared, ROWS), dtype)
        for name, (shared, dtype) in fmt.factors.items()
    }


def pack(fmt: StoredFormat, raw: np.ndarray, out: Parts, first_row: int = 0) -> None:
    """Writes a matrix of a file, u8 ``[rows, bytes]``, to rows ``first_row`` and up of a matrix's parts.

    Raises:
      ValueError: ``first_row`` is not the first of a panel.
    """
    first_panel, inside = divmod(first_row, ROWS)
    if inside:
        raise ValueError(f"first_row must be a multiple of {ROWS}, got {first_row}")
    found = fmt.unpack(raw)
    for name in out:
        part = getattr(found, name)
        if missing := -len(part) % ROWS:
            part = np.pad(part, ((0, missing), (0, 0)))
        by_panel = part.reshape(-1, ROWS, part.shape[1])
        target = out[name][first_panel : first_panel + len(by_panel)]
        if name == "codes" and isinstance(fmt, WeightFormat):
            _pack_codes(fmt, by_panel, target)
        else:
            target[...] = by_panel.swapaxes(1, 2)


def _pack_codes(fmt: WeightFormat, codes: np.ndarray, out: np.ndarray) -> None:
    """Packs ``codes`` u8[panels, 16, columns] into ``out`` u8[panels, blocks, 64 * bits]."""
    panels, _, columns = codes.shape
    # Four columns are moved as one 32-bit number: [panels, 16, blocks, quads] -> [panels, blocks, quads, 16].
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


# --- dequantization, on any platform ----------------------------------------------------------------------------


def dequantized(name: str, parts: Mapping[str, Array], rows: int, columns: int) -> Array:
    """Dequantizes a matrix: f32 ``[rows, columns]``."""
    fmt = FORMATS[name]
    numbers = _numbers(fmt, parts)
    return numbers.swapaxes(1, 2).reshape(-1, numbers.shape[1])[:rows, :columns]


def rows_of(name: str, parts: Mapping[str, Array], index: Array, columns: int) -> Array:
    """Dequantizes the rows at ``index`` i32[n], which must be inside the matrix: f32 ``[n, columns]``."""
    fmt = FORMATS[name]
    panel, lane = index // ROWS, index % ROWS
    taken = {}
    for key, part in parts.items():
        if key == "codes" and isinstance(fmt, WeightFormat):
            quads = part.reshape(*part.shape[:2], fmt.bits, ROWS, _QUAD)
            taken[key] = quads[panel, :, :, lane].reshape(len(index), part.shape[1], -1)
        else:
            taken[key] = part[panel, :, lane][..., None]
    return _numbers(fmt, taken)[:, :columns, 0]


def _numbers(fmt: StoredFormat, parts: Mapping[str, Array]) -> Array:
    """Dequantizes parts with any number of rows in a panel: f32[panels, columns, rows of a panel]."""
    codes = parts["codes"]
    if isinstance(fmt, FloatFormat):
        return codes.astype(jnp.float32)
    panels, blocks, _ = codes.shape
    vectors = codes.reshape(panels, blocks, fmt.bits, -1, _QUAD)
    quads, done = jnp.uint8(0), 0
    for bits in fmt.planes:
        plane = vectors[:, :, done : done + bits]
        shifted = [plane >> np.uint8(shift) for shift in range(0, 8, bits)]
        quads |= (jnp.concatenate(shifted, axis=2) & np.uint8((1 << bits) - 1)) << np.uint8(done)
        done += bits
    # [panels, blocks, quads, rows, 4] -> [panels, columns, rows]
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
    """Scale of each group: f32[panels, groups, 1, rows of a panel]."""
    wide = scales.astype(jnp.float32)
    if steps is not None:
        wide = jnp.repeat(wide, steps.shape[1] // wide.shape[1], axis=1) * steps.astype(jnp.float32)
    return wide[:, :, None]
