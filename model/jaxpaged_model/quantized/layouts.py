"""The two memory layouts of a quantized matrix; their modules have the same functions."""

from __future__ import annotations

from typing import Any, Literal

from jaxpaged_model.quantized import lanes, panels

Layout = Literal["panels", "lanes"]
""""panels" for CPUs, "lanes" for accelerators."""
LAYOUTS: dict[Layout, Any] = {"panels": panels, "lanes": lanes}
