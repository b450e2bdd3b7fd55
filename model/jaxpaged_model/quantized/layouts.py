"""The two memory layouts of a stored matrix; their modules have the same functions."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from jax import Array, lax

from jaxpaged_model.quantized import lanes, panels
from jaxpaged_model.quantized.formats import StoredFormat

Layout = Literal["panels", "lanes"]
""""panels" for CPUs, "lanes" for accelerators."""
LAYOUTS: dict[Layout, Any] = {"panels": panels, "lanes": lanes}

ALIGNMENT = 64
"""Bytes of a cache line, and XLA's alignment of arrays that it does not copy."""


def aligned_zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A numpy array of zeros that XLA does not copy on a CPU; the system gives it memory when it is
    written."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def empty_parts(
    layout: Layout, fmt: StoredFormat, rows: int, columns: int, stack: tuple[int, ...] = ()
) -> dict[str, np.ndarray]:
    """The parts of a matrix, or of a stack of matrices, all zeros; ``LAYOUTS[layout].pack`` fills them."""
    shapes = LAYOUTS[layout].part_shapes(fmt, rows, columns)
    return {name: aligned_zeros((*stack, *one.shape), one.dtype) for name, one in shapes.items()}


def of_layer(x: Array, layer: Array | int | None) -> Array:
    """``x[layer]`` of a stack of layers; ``x`` itself if ``layer`` is None."""
    return x if layer is None else lax.dynamic_index_in_dim(x, layer, keepdims=False)
