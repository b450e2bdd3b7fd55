"""Communication of host values between the processes of a mesh. All processes call each function,
in the same order."""

from __future__ import annotations

import pickle
from typing import Any, TypeVar

import jax
import numpy as np

T = TypeVar("T")


def allgather_objects(value: T) -> list[T]:
    """Gathers the picklable values of all processes, in the order of their numbers."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    rows = multihost_utils.process_allgather(_padded(data, int(sizes.max())))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def broadcast_object(value: T) -> T:
    """Returns process 0's picklable value."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    data = np.frombuffer(pickle.dumps(value) if jax.process_index() == 0 else b"", np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    received = np.asarray(multihost_utils.broadcast_one_to_all(_padded(data, size)))
    result: T = pickle.loads(received[:size].tobytes())
    return result


def _padded(data: np.ndarray, size: int) -> np.ndarray:
    """``data`` with zeros behind it up to a power of two of at least ``size``: few sizes, few
    programs."""
    padded = np.zeros(1 << max(8, (size - 1).bit_length()), np.uint8)
    padded[: len(data)] = data
    return padded


def fetch(value: Any) -> Any:
    """Copies arrays to numpy, whichever processes hold them."""
    if all(getattr(x, "is_fully_addressable", True) for x in jax.tree.leaves(value)):
        return jax.tree.map(np.array, value)  # copied, as the arrays may be donated later
    from jax.experimental import multihost_utils

    return jax.tree.map(np.asarray, multihost_utils.process_allgather(value, tiled=True))
