"""Layers whose weights are stored as in a file, in Flax NNX, and the plan of a model's stored layers."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxpaged_model.quantized.formats import STORED_FORMATS, WEIGHT_FORMATS
from jaxpaged_model.quantized.layouts import LAYOUTS, Layout, of_layer
from jaxpaged_model.quantized.norm import Norm
from jaxpaged_model.quantized.product import product


@dataclass(frozen=True)
class WeightPlan:
    """The stored layers of a model and their formats; all others are dense.

    Attributes:
      formats: pairs of a layer's path in the model, such as ``"blocks.0.attention.qkv"``, and its format.
      exact: see ``product.product``.
      layout: memory layout of the matrices.
    """

    formats: tuple[tuple[str, str], ...] = ()
    exact: bool = False
    layout: Layout = "panels"

    @functools.cached_property
    def _by_path(self) -> dict[str, str]:
        return dict(self.formats)

    def exactly(self) -> WeightPlan:
        """The same layers, with exact products; those of floating-point formats always are."""
        return replace(self, exact=True) if any(kind in WEIGHT_FORMATS for _, kind in self.formats) else self

    def of(self, path: str) -> str | None:
        """The format of a layer, None if it is dense."""
        return self._by_path.get(path)


class _Quantized(nnx.Module):
    """A stored matrix, or a stack of them; each part is a parameter of that name."""

    def __init__(
        self, name: str, rows: int, columns: int, *, exact: bool, layout: Layout, stack: tuple[int, ...] = ()
    ) -> None:
        self.format, self.rows, self.columns, self.exact, self.layout = name, rows, columns, exact, layout
        shapes = LAYOUTS[layout].part_shapes(STORED_FORMATS[name], rows, columns)
        self.part_names = tuple(shapes)
        for part, shape in shapes.items():
            setattr(self, part, nnx.Param(jnp.zeros((*stack, *shape.shape), shape.dtype)))

    def parts(self) -> dict[str, Array]:
        """The matrix's parts, see ``panels.Parts`` and ``lanes.Parts``."""
        return {name: getattr(self, name)[...] for name in self.part_names}

    def _product(self, x: Array, outputs: int, **around: Any) -> Array:
        return product(x, self.format, self.parts(), outputs, exact=self.exact, layout=self.layout, **around)


class QuantizedLinear(_Quantized):
    """``norm(x) @ W.T + bias + add``, or, if gated, ``activation(gate) * up``.

    Args:
      name: format of the weights.
      dim_in, dim_out: columns and rows; of a gated layer, rows of each of its two matrices.
      use_bias: True to add a bias.
      gated, activation: see ``product.product``.
      dtype: dtype of the bias.
      exact, layout: see ``product.product``.
      stack: leading axes of the parameters: the number of layers, or none.
    """

    def __init__(
        self,
        name: str,
        dim_in: int,
        dim_out: int,
        *,
        use_bias: bool = False,
        gated: bool = False,
        activation: str = "silu",
        dtype: Any = jnp.float32,
        exact: bool = False,
        layout: Layout = "panels",
        stack: tuple[int, ...] = (),
    ) -> None:
        rows = 2 * dim_out if gated else dim_out
        super().__init__(name, rows, dim_in, exact=exact, layout=layout, stack=stack)
        self.outputs, self.gated, self.activation = dim_out, gated, activation
        self.bias = nnx.data(nnx.Param(jnp.zeros((*stack, dim_out), dtype)) if use_bias else None)

    def __call__(
        self,
        x: Array,
        *,
        layer: Array | int | None = None,
        num_rows: Array | None = None,
        norm: Norm | None = None,
        add: Array | None = None,
    ) -> Array:
        out = self._product(
            x, self.outputs, layer=layer, num_rows=num_rows, norm=norm, add=add, gated=self.gated,
            activation=self.activation,
        )  # fmt: skip
        return out if self.bias is None else out + of_layer(self.bias[...], layer)


class QuantizedEmbedding(_Quantized):
    """Token embedding; with tied embeddings also the output layer."""

    def __init__(
        self, name: str, num_tokens: int, dim: int, *, dtype: Any, exact: bool, layout: Layout
    ) -> None:
        super().__init__(name, num_tokens, dim, exact=exact, layout=layout)
        self.dtype = dtype

    def __call__(self, tokens: Array) -> Array:
        rows = LAYOUTS[self.layout].rows_of(self.format, self.parts(), tokens, self.columns)
        return rows.astype(self.dtype)

    def attend(self, x: Array, *, norm: Norm | None = None) -> Array:
        """Logits ``norm(x) @ W.T``."""
        return self._product(x, self.rows, norm=norm)
