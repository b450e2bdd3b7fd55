"""Measured block sizes by device and shape; kernels prefer them to their own choice.

``python -m tpu_scripts.bench.tune_paged_attention`` measures them on the current device and
rewrites the part between the two marks; entries of other devices stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class Key(NamedTuple):
    """Shape and device that block sizes were measured for; all fields change the memory of a block."""

    device_kind: str
    """``jax.Device.device_kind``."""
    num_kv_heads: int
    group: int
    """Number of query heads per KV head."""
    head_dim: int
    page_size: int
    dtype: str
    """JAX name of the pages' dtype."""
    kind: str
    """"decode": no sequence has more than one query; or "prefill"."""


# --- written by tpu_scripts/bench/tune_paged_attention.py ---------------------------------------------------------

MEASURED: dict[str, tuple[str, str]] = {}
"""Date, version of jax, and command, by device."""

TABLE: dict[Key, dict[str, int]] = {}
"""Sizes that were faster than the kernel's own choice, under the kernel's names."""

# --- end of what is written ---------------------------------------------------------------------------------


@dataclass
class Trial:
    """Block sizes under measurement; ``asked`` is True once a kernel has read them."""

    sizes: Mapping[str, int] | None
    asked: bool = False


_TRIAL: ContextVar[Trial | None] = ContextVar("trial", default=None)


def tuned(
    *,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    page_size: int,
    dtype: DTypeLike,
    kind: str,
    device_kind: str | None = None,
) -> Mapping[str, int] | None:
    """Returns the measured block sizes of a call, or None.

    Args:
      num_kv_heads, group, head_dim, page_size, kind: see ``Key``.
      dtype: dtype of the pages.
      device_kind: default: kind of JAX's default device at trace time. A program for another device
        finds no entry, and its kernel chooses.
    """
    trial = _TRIAL.get()
    if trial is not None:
        trial.asked = True
        return trial.sizes
    if not TABLE:
        return None
    device = current_device_kind() if device_kind is None else device_kind
    return TABLE.get(Key(device, num_kv_heads, group, head_dim, page_size, jnp.dtype(dtype).name, kind))


def current_device_kind() -> str:
    """Kind of JAX's default device."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    return device.device_kind


def under_trial() -> bool:
    """True inside ``trial``."""
    return _TRIAL.get() is not None


@contextmanager
def trial(sizes: Mapping[str, int] | None) -> Iterator[Trial]:
    """Uses these block sizes for programs traced inside; None = the kernel's own choice."""
    running = Trial(sizes)
    token = _TRIAL.set(running)
    try:
        yield running
    finally:
        _TRIAL.reset(token)
