"""Activation functions of MLPs, by the names that ``ModelConfig`` has for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
"""SwiGLU's function, GeGLU's as Gemma computes it, with a tanh (arXiv:2002.05202), and the square of a
ReLU (arXiv:2109.08668)."""

GATES = {"silu": 1, "gelu_tanh": 2}
"""Activations that products with a joined matrix of gate and up apply, and their numbers in the CPU
kernel's options; 0 is no gate."""
