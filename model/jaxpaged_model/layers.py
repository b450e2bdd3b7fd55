"""The block of a decoder-only transformer, in Flax NNX: all layers of a model as one module.

A ``ModelConfig`` describes the block: its norms, activation and factors. A parameter has a leading
axis, the layers of the model, and a module is called with the index of its layer, which may be
traced, and with the layer's kind, which is static. So layers run in a ``lax.scan``, and a program is
as long as the kinds' period. Dense matrices on GPUs are an exception, see ``by_layer``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxpaged.pages.batch import Batch
from jaxpaged.pages.rope import Rope
from jaxpaged_model.config import LayerKind, ModelConfig, QKNorm
from jaxpaged_model.quantized import product
from jaxpaged_model.quantized.activations import ACTIVATIONS
from jaxpaged_model.quantized.layouts import of_layer
from jaxpaged_model.quantized.linear import QuantizedLinear, WeightPlan
from jaxpaged_model.quantized.norm import Norm, layer_norm, rms_norm

Layer = Array | int | None
"""Index of a layer in a stack, i32[] or an int; None for a module that is no stack."""


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, in float32 (arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float, dtype: Any, stack: tuple[int, ...] = ()) -> None:
        self.scale = nnx.Param(jnp.ones((*stack, dim), dtype))
        self.eps = eps

    def of(self, layer: Layer = None) -> Norm:
        """``(scale [dim], eps)`` of one layer."""
        return of_layer(self.scale[...], layer), self.eps

    def __call__(self, x: Array, layer: Layer = None) -> Array:
        return rms_norm(x, *self.of(layer))

    def before_product(self, x: Array, layer: Layer = None) -> tuple[Array, Norm | None]:
        """``x`` and ``norm`` for a product with the normalized ``x``, which may be fused with it."""
        return x, self.of(layer)


class LayerNorm(nnx.Module):
    """``(x - mean(x)) / sqrt(var(x) + eps) * scale`` over the last axis, in float32 (arXiv:1607.06450)."""

    def __init__(self, dim: int, eps: float, dtype: Any, stack: tuple[int, ...] = ()) -> None:
        self.scale = nnx.Param(jnp.ones((*stack, dim), dtype))
        self.eps = eps

    def __call__(self, x: Array, layer: Layer = None) -> Array:
        return layer_norm(x, of_layer(self.scale[...], layer), self.eps)

    def before_product(self, x: Array, layer: Layer = None) -> tuple[Array, Norm | None]:
        """``x`` and ``norm`` for a product with the normalized ``x``."""
        return self(x, layer), None


def hidden_norm(config: ModelConfig, dtype: Any, stack: tuple[int, ...] = ()) -> RMSNorm | LayerNorm:
    """Creates a norm of the residual stream, of the model's kind."""
    kind = RMSNorm if config.norm_kind == "rms" else LayerNorm
    return kind(config.hidden_size, config.rms_norm_eps, dtype, stack)


class Linear(nnx.Module):
    """``norm(x) @ kernel + bias + add``, with the interface of ``QuantizedLinear``."""

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        *,
        use_bias: bool,
        dtype: Any,
        rngs: nnx.Rngs,
        stack: tuple[int, ...] = (),
    ) -> None:
        init = nnx.initializers.lecun_normal(batch_axis=tuple(range(len(stack))))
        self.kernel = nnx.Param(init(rngs.params(), (*stack, dim_in, dim_out), dtype))
        self.bias = nnx.data(nnx.Param(jnp.zeros((*stack, dim_out), dtype)) if use_bias else None)
        self.dtype = dtype

    def __call__(
        self,
        x: Array,
        *,
        layer: Layer = None,
        num_rows: Array | None = None,
        norm: Norm | None = None,
        add: Array | None = None,
    ) -> Array:
        del num_rows  # XLA multiplies all rows
        x = x if norm is None else rms_norm(x, *norm)
        kernel = self.kernel.get_value()
        own = kernel[layer] if isinstance(kernel, tuple) else of_layer(kernel, layer)
        out = x.astype(self.dtype) @ own
        out = out if self.bias is None else out + of_layer(self.bias[...], layer)
        return out if add is None else add + out


class Rotation(NamedTuple):
    """Rotary embedding of a step's tokens, shared by all layers that have it."""

    rope: Rope
    cos: Array
    """f32[T, 1, rotary_dim / 2], times the rotary embedding's factor."""
    sin: Array
    """f32[T, 1, rotary_dim / 2], likewise."""

    @classmethod
    def create(cls, rope: Rope, positions: Array, factor: float) -> Rotation:
        """The rotation of tokens at ``positions i32[T]``; cos and sin are multiplied by ``factor``."""
        cos, sin = rope.cos_sin(positions)
        return cls(rope, cos[:, None] * factor, sin[:, None] * factor)

    def __call__(self, x: Array) -> Array:
        """Rotates ``x [T, heads, head_dim]``."""
        return self.rope.rotate_by(x, self.cos, self.sin)


Rotations = Mapping[tuple[Rope, float], Rotation]
"""Each distinct rotary embedding of a model's layers, by ``LayerKind.rope`` and ``rope_factor``."""


def rotations(kinds: Sequence[LayerKind], positions: Array) -> Rotations:
    """The rotations of a step's tokens, at ``positions i32[T]``, for layers of these kinds."""
    distinct = dict.fromkeys((kind.rope, kind.rope_factor) for kind in kinds)
    return {(rope, factor): Rotation.create(rope, positions, factor) for rope, factor in distinct}


# --- matrices of different formats in different layers ----------------------------------------------------------

SLOTS: dict[str, tuple[str, ...]] = {
    "attention.qkv": ("attention.q", "attention.k", "attention.v"),
    "attention.out": ("attention.out",),
    "mlp.gate_up": ("mlp.gate", "mlp.up"),
    "mlp.down": ("mlp.down",),
}
"""The matrices of a block. Those of a slot become one if all have the same quantized format."""

Variant = str | tuple[str | None, ...]
"""The formats of a slot in one layer: that of its joined matrix, or those of its matrices (None =
dense)."""


def variants(plan: WeightPlan, slot: str, num_layers: int) -> tuple[Variant, ...]:
    """The variant of a slot in each layer."""

    def of_one(layer: int) -> Variant:
        joined = plan.of(f"blocks.{layer}.{slot}") if len(SLOTS[slot]) > 1 else None
        return joined or tuple(plan.of(f"blocks.{layer}.{part}") for part in SLOTS[slot])

    return tuple(map(of_one, range(num_layers)))


class ByVariant(nnx.Module):
    """A slot of all layers: a module of stacked parameters for each variant, and which one a layer has.

    Args:
      given: the variant of each layer.
      make: creates the module of a variant; ``stack`` are the leading axes of its parameters.
    """

    def __init__(
        self, given: Sequence[Variant], make: Callable[[Variant, tuple[int, ...]], nnx.Module]
    ) -> None:
        distinct = list(dict.fromkeys(given))
        self.which = tuple(distinct.index(variant) for variant in given)
        self.index = tuple(given[:layer].count(variant) for layer, variant in enumerate(given))
        self.variants = nnx.List([make(variant, (given.count(variant),)) for variant in distinct])

    def __call__(self, layer: Array | int, *args: Any, **options: Any) -> Any:
        run: list[Any] = list(self.variants)
        if len(run) == 1:
            return run[0](*args, **options, layer=layer)
        if isinstance(layer, int):
            return run[self.which[layer]](*args, **options, layer=self.index[layer])
        which, index = (jnp.asarray(table, jnp.int32)[layer] for table in (self.which, self.index))
        return lax.switch(which, [lambda one=one: one(*args, **options, layer=index) for one in run])


def linear(
    kind: str | None,
    dim_in: int,
    dim_out: int,
    stack: tuple[int, ...] = (),
    *,
    plan: WeightPlan,
    dtype: Any,
    rngs: nnx.Rngs,
    use_bias: bool = False,
    gated: bool = False,
    activation: str = "silu",
) -> Linear | QuantizedLinear:
    """Creates a linear layer of a quantized format, or a dense one (``kind`` None)."""
    if kind is None:
        return Linear(dim_in, dim_out, use_bias=use_bias, dtype=dtype, rngs=rngs, stack=stack)
    return QuantizedLinear(
        kind, dim_in, dim_out, use_bias=use_bias, gated=gated, activation=activation, dtype=dtype,
        exact=plan.exact, layout=plan.layout, stack=stack,
    )  # fmt: skip


Make = Callable[..., Linear | QuantizedLinear]
"""``linear`` with the model's plan, dtype and keys."""


class Projections(nnx.Module):
    """Queries, keys and values of ``x``, ``[T, dim]`` each, by one joined matrix or three."""

    def __init__(self, variant: Variant, stack: tuple[int, ...], config: ModelConfig, make: Make) -> None:
        c = config
        self.dims = c.num_q_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.head_dim
        joined = isinstance(variant, str)
        self.joined = nnx.data(
            make(variant, c.hidden_size, sum(self.dims), stack, use_bias=c.qkv_bias)
            if isinstance(variant, str)
            else None
        )
        self.q, self.k, self.v = (
            nnx.data(None if joined else make(kind, c.hidden_size, dim, stack, use_bias=c.qkv_bias))
            for kind, dim in zip((None,) * 3 if joined else variant, self.dims, strict=True)
        )

    def __call__(self, x: Array, *, layer: Layer, norm: Norm | None, num_rows: Array) -> tuple[Array, ...]:
        around: dict[str, Any] = {"layer": layer, "norm": norm, "num_rows": num_rows}
        if self.joined is not None:
            q_dim, k_dim, _ = self.dims
            return tuple(jnp.split(self.joined(x, **around), [q_dim, q_dim + k_dim], axis=-1))
        found = [one(x, **around) for one in (self.q, self.k, self.v) if one is not None]
        # Otherwise XLA multiplies straight to heads, for which it transposes each layer's matrices on a TPU.
        return tuple(lax.optimization_barrier(found))


class InnerProjection(nnx.Module):
    """``activation(gate(x)) * up(x)``, by one joined matrix, which is read in one pass, or two.

    Without a gate ``activation(up(x))``.
    """

    def __init__(self, variant: Variant, stack: tuple[int, ...], config: ModelConfig, make: Make) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        joined = isinstance(variant, str)
        self.activation = config.activation
        self.joined = nnx.data(
            make(variant, hidden, inner, stack, gated=True, activation=config.activation)
            if isinstance(variant, str)
            else None
        )
        self.gate, self.up = (
            nnx.data(make(kind, hidden, inner, stack, use_bias=bias) if present and not joined else None)
            for kind, present in zip((None,) * 2 if joined else variant, (config.gated, True), strict=True)
        )

    def __call__(self, x: Array, *, layer: Layer, norm: Norm | None, num_rows: Array) -> Array:
        around: dict[str, Any] = {"layer": layer, "norm": norm, "num_rows": num_rows}
        if self.joined is not None:
            return self.joined(x, **around)
        *gate, up = (one(x, **around) for one in (self.gate, self.up) if one is not None)
        activation = ACTIVATIONS[self.activation]
        return activation(gate[0]) * up if gate else activation(up)


# --- arrays of single layers ------------------------------------------------------------------------------------


def by_layer(path: Sequence[str | int], stack: Any) -> Any:
    """Splits a stack of dense matrices on GPUs into a tuple, an array for each layer.

    There XLA copies a matrix out of its stack before it multiplies: a step would read the weights
    twice and write them once. With such a tuple among the params, layers do not run in a scan.

    Args:
      path: path of the parameter in the model.
      stack: its value, a numpy or JAX array; any other parameter is returned as it is.
    """
    apart = path[0] == "blocks" and path[-1] == "kernel" and product.choose() == "gpu"
    return tuple(stack) if apart else stack


def is_by_layer(module: nnx.Module) -> bool:
    """True if any parameter of the module is a tuple of ``by_layer``."""
    return any(isinstance(one.get_value(), tuple) for _, one in nnx.to_flat_state(nnx.state(module)))


# --- blocks -----------------------------------------------------------------------------------------------------


class Residual(NamedTuple):
    """The residual stream, and how the output of attention or MLP is added to it."""

    x: Array
    """[T, hidden_size]."""
    norm: RMSNorm | LayerNorm | None
    """Norm of the output."""
    scale: float
    """Factor of the normalized output."""
    axis: str | None
    """Mesh axis over which the inputs of the last matrix are split; partial results are summed."""

    def plus(self, matrix: ByVariant, layer: Array | int, inner: Array, num_rows: Array) -> Array:
        """``x + scale * norm(matrix(inner))``; zero from row ``num_rows`` on, or arbitrary."""
        if self.axis is None and self.norm is None and self.scale == 1.0:
            fused: Array = matrix(layer, inner, add=self.x, num_rows=num_rows)
            return fused
        out: Array = matrix(layer, inner, num_rows=num_rows)
        out = out if self.axis is None else jax.lax.psum(out, self.axis)
        out = out if self.norm is None else self.norm(out, layer)
        return self.x + (out if self.scale == 1.0 else out * self.scale)


class Attention(nnx.Module):
    """Grouped-query self-attention through a cache, which stores keys and values and computes attention."""

    def __init__(self, config: ModelConfig, plan: WeightPlan, make: Make, dtype: Any) -> None:
        c, stack = config, (config.num_layers,)
        self.head_dim, self.rope, self.grouped = c.head_dim, c.rope, len(c.groups) > 1
        self.scale, self.soft_cap, self.qk_norm = c.attention_scale, c.attention_soft_cap, c.qk_norm
        self.qkv = ByVariant(
            variants(plan, "attention.qkv", c.num_layers),
            lambda variant, stack: Projections(variant, stack, c, make),
        )
        self.out = ByVariant(
            variants(plan, "attention.out", c.num_layers),
            lambda kinds, stack: make(
                kinds[0], c.num_q_heads * c.head_dim, c.hidden_size, stack, use_bias=c.attention_out_bias
            ),
        )
        self.temperature = c.attention_temperature, c.attention_temperature_length
        self.q_norm, self.k_norm = (
            nnx.data(
                RMSNorm(c.head_dim * (heads if c.qk_norm == "width" else 1), c.rms_norm_eps, dtype, stack)
                if c.qk_norm
                else None
            )
            for heads in (c.num_q_heads, c.num_kv_heads)
        )

    def __call__(
        self,
        layer: Array | int,
        kind: LayerKind,
        x: tuple[Array, Norm | None],
        residual: Residual,
        rotations: Rotations,
        cache: Any,
        batch: Batch,
    ) -> tuple[Array, Any]:
        """Returns (``residual + out(attend(x))``, cache); ``x`` as from ``before_product``."""
        inputs, norm = x
        q, k, v = self.qkv(layer, inputs, norm=norm, num_rows=batch.num_valid)
        q, k = self._normalized(layer, q, k, "width")
        q, k, v = (part.reshape(part.shape[0], -1, self.head_dim) for part in (q, k, v))
        q, k = self._normalized(layer, q, k, "head")
        rotation = rotations[kind.rope, kind.rope_factor]
        q, k = self._scaled(rotation(q), batch.position), rotation(k)
        out, cache = self._attend(layer, kind, q, k, v, cache, batch)
        out = out.reshape(out.shape[0], -1).astype(residual.x.dtype)
        return residual.plus(self.out, layer, out, batch.num_valid), cache

    def _scaled(self, q: Array, position: Array) -> Array:
        """Queries, times the factor of their ``position i32[T]``."""
        temperature, length = self.temperature
        if temperature == 0.0:
            return q
        factor = 1.0 + temperature * jnp.log1p((position // length).astype(jnp.float32))
        return q * factor[:, None, None].astype(q.dtype)

    def _normalized(self, layer: Array | int, q: Array, k: Array, over: QKNorm) -> tuple[Array, Array]:
        """Queries and keys, normalized if this is what the model normalizes them over."""
        if self.qk_norm != over or self.q_norm is None or self.k_norm is None:
            return q, k
        return self.q_norm(q, layer), self.k_norm(k, layer)

    def _attend(
        self, layer: Array | int, kind: LayerKind, q: Array, k: Array, v: Array, cache: Any, batch: Batch
    ) -> tuple[Array, Any]:
        """The cache's attention of one layer: what a layer's index and kind mean to the cache."""
        # The cache was created with the rotary embedding of most layers.
        other: dict[str, Any] = {} if kind.rope == self.rope else {"rope": kind.rope}
        if self.grouped:
            other["group"] = kind.group
        out: tuple[Array, Any] = cache.attend(
            layer, q, k, v, batch, window=kind.window, scale=self.scale, soft_cap=self.soft_cap, **other
        )
        return out


class MLP(nnx.Module):
    """``down(activation(gate(x)) * up(x))`` (arXiv:2002.05202), or ``down(activation(up(x)))``."""

    def __init__(self, config: ModelConfig, plan: WeightPlan, make: Make) -> None:
        c = config
        self.gate_up = ByVariant(
            variants(plan, "mlp.gate_up", c.num_layers),
            lambda variant, stack: InnerProjection(variant, stack, c, make),
        )
        self.down = ByVariant(
            variants(plan, "mlp.down", c.num_layers),
            lambda kinds, stack: make(
                kinds[0], c.intermediate_size, c.hidden_size, stack, use_bias=c.mlp_bias
            ),
        )

    def __call__(
        self, layer: Array | int, x: tuple[Array, Norm | None], residual: Residual, num_rows: Array
    ) -> Array:
        """``residual + mlp(x)``; zero from row ``num_rows`` on, or arbitrary."""
        inputs, norm = x
        inner = self.gate_up(layer, inputs, norm=norm, num_rows=num_rows)
        return residual.plus(self.down, layer, inner, num_rows)


class Blocks(nnx.Module):
    """All transformer layers: attention and MLP, with norms before them, behind them or both."""

    def __init__(
        self, config: ModelConfig, *, plan: WeightPlan, dtype: Any, rngs: nnx.Rngs, axis: str | None = None
    ) -> None:
        make, stack = partial(linear, plan=plan, dtype=dtype, rngs=rngs), (config.num_layers,)

        def norm(*placements: str) -> Any:
            wanted = config.norms in placements
            return nnx.data(hidden_norm(config, dtype, stack) if wanted else None)

        self.scale, self.axis, self.parallel = config.residual_scale, axis, config.norms == "parallel"
        self.attention_norm = norm("pre", "both", "parallel")
        self.attention = Attention(config, plan, make, dtype)
        self.attention_post_norm = norm("post", "both")
        self.mlp_norm = norm("pre", "both")
        self.mlp = MLP(config, plan, make)
        self.mlp_post_norm = norm("post", "both")

    def __call__(
        self,
        layer: Array | int,
        kind: LayerKind,
        x: Array,
        rotations: Rotations,
        cache: Any,
        batch: Batch,
    ) -> tuple[Array, Any]:
        """Runs layer ``layer``, which is of this kind."""

        def before(norm: RMSNorm | LayerNorm | None, x: Array) -> tuple[Array, Norm | None]:
            return (x, None) if norm is None else norm.before_product(x, layer)

        # One norm of two branches is computed once, not fused with the products of both.
        inputs = (self.attention_norm(x, layer), None) if self.parallel else before(self.attention_norm, x)
        residual = Residual(x, self.attention_post_norm, self.scale, self.axis)
        x, cache = self.attention(layer, kind, inputs, residual, rotations, cache, batch)
        inputs = inputs if self.parallel else before(self.mlp_norm, x)
        residual = Residual(x, self.mlp_post_norm, self.scale, self.axis)
        return self.mlp(layer, inputs, residual, batch.num_valid), cache
