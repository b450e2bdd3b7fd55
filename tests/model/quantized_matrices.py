"""Matrices in the bytes of GGUF's quantized types, with any codes and steps that a file may hold."""

from __future__ import annotations

import math
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
from jaxpaged_model.quantized import lanes, panels
from jaxpaged_model.quantized.formats import SUPER_BLOCK, WEIGHT_FORMATS
from jaxpaged_model.quantized.layouts import empty_parts

HALF_FLOATS = {
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
"""Offsets of the float16 numbers in a block; 0 if not listed."""


def random_raw(name: str, rows: int, columns: int, seed: int = 0, scale: float = 0.01) -> np.ndarray:
    """u8 ``[rows, bytes]``: random bits, with normal scales and minima around ``scale``."""
    fmt, rng = WEIGHT_FORMATS[name], np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, columns // fmt.file_block, fmt.file_bytes), dtype=np.uint8)
    for start in HALF_FLOATS.get(name, (0,)):
        numbers = scale * rng.standard_normal((*raw.shape[:2], 1))
        raw[..., start : start + 2] = numbers.astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


def random_weights_raw(name: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """The same with the magnitude of a model's weights: products are as large as activations."""
    size = numbers(name, random_raw(name, rows, columns, seed)).std()
    return random_raw(name, rows, columns, seed, scale=0.01 * columns**-0.5 / size)


def numbers(name: str, raw: np.ndarray) -> np.ndarray:
    """The values of the bytes by the gguf package, f32 ``[rows, columns]``."""
    return gguf.dequantize(raw, gguf.GGMLQuantizationType[name])


def packed(name: str, raw: np.ndarray, columns: int, layout: Any = panels) -> dict[str, Any]:
    """The same matrix in a memory layout."""
    fmt = WEIGHT_FORMATS[name]
    parts = empty_parts("lanes" if layout is lanes else "panels", fmt, len(raw), columns)
    layout.pack(fmt, raw, parts)
    return {key: jnp.asarray(part) for key, part in parts.items()}


def stacked(parts: dict[str, Any], layer: int, num_layers: int = 3) -> dict[str, Any]:
    """A stack of matrices of which ``layer`` is this one; the others hold NaN and other codes."""

    def joined(part: Any) -> Any:
        other = jnp.full_like(part, jnp.nan) if jnp.issubdtype(part.dtype, jnp.floating) else ~part
        return jnp.stack([part if i == layer else other for i in range(num_layers)])

    return {key: joined(part) for key, part in parts.items()}


def bits_per_weight(name: str, layout: Any = panels) -> float:
    """Bits of a number in memory, without padding."""
    shapes = layout.part_shapes(WEIGHT_FORMATS[name], layout.ROWS, SUPER_BLOCK).values()
    return 8 * sum(math.prod(one.shape) * one.dtype.itemsize for one in shapes) / (layout.ROWS * SUPER_BLOCK)
