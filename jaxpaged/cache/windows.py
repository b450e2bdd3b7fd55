"""Attention of layers with different windows, in a program that does not know which layer runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax.numpy as jnp
from jax import Array, lax

Windows = int | None | tuple[int | None, ...]
"""Tokens that a query sees, None = all: of every layer, or of each."""

Out = TypeVar("Out")


def by_window(
    windows: Windows, layer: Array | int, num_layers: int, attend: Callable[[int | None], Out]
) -> Out:
    """``attend(window of the layer)``. Kernels know their window when they are compiled, so each
    distinct one is a branch of a switch; ``attend`` only reads the pool, which is not copied.

    Raises:
      ValueError: another number of windows than of layers.
    """
    if not isinstance(windows, tuple):
        return attend(windows)
    if len(windows) != num_layers:
        raise ValueError(f"window must have one entry for each of {num_layers} layers, got {len(windows)}")
    distinct = list(dict.fromkeys(windows))
    if len(distinct) == 1:
        return attend(distinct[0])
    if isinstance(layer, int):
        return attend(windows[layer])
    which = jnp.asarray([distinct.index(window) for window in windows], jnp.int32)[layer]
    chosen: Out = lax.switch(which, [partial(attend, window) for window in distinct])
    return chosen
