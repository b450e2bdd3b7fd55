"""Activation functions of gated MLPs, by the names that ``ModelConfig`` has for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
from jax import Array

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}
"""SwiGLU's function, and GeGLU's as Gemma computes it, with a tanh (arXiv:2002.05202)."""
