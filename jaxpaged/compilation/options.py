"""Options of XLA for our programs."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    # Older code generation, in two thirds of the time; programs are as fast, since our kernels do
    # the work. Later versions have it no more.
    "cpu": {"xla_cpu_use_fusion_emitters": False} if version("jaxlib").startswith("0.10.") else {},
    # Otherwise a step copies all stacks of dense weights to another tiling on tpu7x.
    "tpu": {"xla_tpu_control_large_2nd_minor_layout_for_x16": False},
}


def compiler_options(platform: str) -> dict[str, Any] | None:
    """``compiler_options`` of ``jax.jit`` for a platform; None if there are none."""
    return dict(_OPTIONS.get(platform, {})) or None
