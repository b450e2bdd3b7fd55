"""Facts about families of models that neither kind of file says, and what reading both kinds has in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxpaged_model.config import RopeScaling
from jaxpaged_model.metadata import Metadata, ModelError

BLOCKS: Mapping[str, Mapping[str, Any]] = {
    "gemma2": {"norms": "both", "activation": "gelu_tanh"},
    "gemma3": {"norms": "both", "activation": "gelu_tanh", "qk_norm": "head"},
    "olmo2": {"norms": "post", "qk_norm": "width"},
    "exaone4": {"norms": "post", "qk_norm": "head"},
    "cohere2": {"norms": "parallel", "norm_kind": "layer"},
    "gemma": {"activation": "gelu_tanh"},
    "command-r": {"norms": "parallel", "norm_kind": "layer"},
    "arcee": {"gated": False, "activation": "relu2"},
    "glm4": {"norms": "both"},
}
"""Fields of ``ModelConfig`` that all models of an architecture have in common, and no file says."""
PATTERNS = {"gemma2": 2, "gemma3": 6, "olmo2": 4, "exaone4": 4, "cohere2": 4}
"""Every n-th layer of these architectures has full attention, the others have a window."""


def check_one_of(what: str, value: str | None, supported: tuple[str, ...]) -> None:
    """Raises a ModelError that names the supported values, unless ``value`` is one of them."""
    if value not in supported:
        raise ModelError(f"{what} {value!r} is not supported; supported are {', '.join(supported)}")


def all_but_every(pattern: int, num_layers: int) -> list[bool]:
    """True for each layer with a window: all but every n-th; 0 = all."""
    return [pattern == 0 or (i + 1) % pattern != 0 for i in range(num_layers)]


def windows_of(window: int, slides: list[bool]) -> tuple[int | None, ...]:
    """``ModelConfig.windows`` for layers of which some slide; empty if none does."""
    return tuple(window if one else None for one in slides) if any(slides) else ()


def window_rope(
    theta: float, scaling: RopeScaling | None, of_others: tuple[float, RopeScaling | None]
) -> dict[str, Any]:
    """The rotary embedding of layers with a window, if it differs from that of the others."""
    if (theta, scaling) == of_others:
        return {}
    return {"window_rope_theta": theta, "window_rope_scaling": scaling}


def refuse(v: Metadata, key: str, neutral: tuple[Any, ...]) -> None:
    """Raises a ModelError if the key has a value, or an element of a list, that is not neutral."""
    value = v.get(key)
    for one in value if isinstance(value, list) else [value]:
        if one is not None and one not in neutral:
            raise v.error(key, f"= {str(value)[:60]} is not supported")


def phi3_windows(windows: tuple[int | None, ...], context_length: int) -> dict[str, Any]:
    """No windows where they are as long as the context: Phi's files of long contexts have such ones."""
    return {"windows": ()} if windows and (windows[0] or 0) >= context_length else {}


def yarn_factor(factor: float, multiplier: float) -> float:
    """YaRN's factor of attention: ``0.1 multiplier ln(factor) + 1``, 1 if nothing is scaled."""
    return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0
