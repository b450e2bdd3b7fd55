"""``jaxpaged devices``: the devices that JAX computes on."""

from __future__ import annotations

import jax


def describe() -> list[str]:
    """One line per device, after one for jax and its backend."""
    lines = [f"jax {jax.__version__}, backend {jax.default_backend()}"]
    for device in jax.devices():
        limit = (device.memory_stats() or {}).get("bytes_limit")
        memory = f", {limit / 2**30:.1f} GiB" if limit else ""
        lines.append(f"  {device.platform}:{device.id}  {device.device_kind}{memory}")
    return lines
