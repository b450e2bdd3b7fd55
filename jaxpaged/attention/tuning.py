"""Block sizes that were measured, by device and shape: kernels ask here before they choose their own.

``python -m tpu_scripts.bench.tune_paged_attention`` measures them on the device at hand and writes the part between the
two marks anew; what was measured on other devices stays.
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
    """What block sizes were measured for. All of it is in what a block takes of a chip's memory."""

    device_kind: str
    """As ``jax.Device.device_kind`` has it."""
    num_kv_heads: int
    group: int
    """Query heads that read one KV head."""
    head_dim: int
    page_size: int
    dtype: str
    """Of the pages, by its JAX name."""
    kind: str
    """"decode": no sequence has more than one query; or "prefill"."""


# --- written by tpu_scripts/bench/tune_paged_attention.py ---------------------------------------------------------

MEASURED: dict[str, tuple[str, str]] = {}
"""By device: the date and the version of jax, and the command."""

TABLE: dict[Key, dict[str, int]] = {}
"""The sizes that were faster than the kernel's own choice, under the kernel's names."""

# --- end of what is written ---------------------------------------------------------------------------------


@dataclass
class Trial:
    """Sizes under measurement, and whether a kernel has asked for them."""

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
    """The block sizes that were measured for a call; None where there are none.

    Args:
      num_kv_heads, group, head_dim, page_size, kind: as ``Key`` has them.
      dtype: of the pages.
      device_kind: default: that of the device that JAX computes on when this is traced. A program that is compiled for
        another device finds nothing, and its kernel chooses.
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
    """The kind of the device that JAX computes on unless told otherwise."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    return device.device_kind


def under_trial() -> bool:
    """True inside ``trial``."""
    return _TRIAL.get() is not None


@contextmanager
def trial(sizes: Mapping[str, int] | None) -> Iterator[Trial]:
    """Programs traced inside are given these sizes, whatever the table has; None = the kernel's own choice."""
    running = Trial(sizes)
    token = _TRIAL.set(running)
    try:
        yield running
    finally:
        _TRIAL.reset(token)
