"""The layers of a Llama-family transformer, in Flax NNX."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxpaged.pages.batch import Batch
from jaxpaged.pages.rope import Rope
from jaxpaged_model.config import ModelConfig
from jaxpaged_model.quantized.linear import QuantizedLinear, WeightPlan
from jaxpaged_model.quantized.norm import rms_norm


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, in float32 (arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float, dtype: Any) -> None:
        self.scale = nnx.Param(jnp.ones(dim, dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return rms_norm(x, self.scale[...], self.eps)


class Rotation(NamedTuple):
    """Rotary embedding of a step's tokens, shared by all layers."""

    rope: Rope
    cos: Array
    """f32[T, 1, rotary_dim / 2], times the model's attention factor."""
    sin: Array
    """f32[T, 1, rotary_dim / 2], likewise."""

    @classmethod
    def create(cls, rope: Rope, positions: Array, attention_factor: float) -> Rotation:
        """The rotation of tokens at ``positions i32[T]``."""
        cos, sin = rope.cos_sin(positions)
        return cls(rope, cos[:, None] * attention_factor, sin[:, None] * attention_factor)

    def __call__(self, x: Array) -> Array:
        """Rotates ``x [T, heads, head_dim]``."""
        return self.rope.rotate_by(x, self.cos, self.sin)


class Layers:
    """Creates the linear layers of one block, dense or quantized according to a plan."""

    def __init__(
        self, path: str, plan: WeightPlan, dtype: Any, rngs: nnx.Rngs, axis: str | None = None
    ) -> None:
        self.path, self.plan, self.dtype, self.rngs, self.axis = path, plan, dtype, rngs, axis

    def linear(
        self, name: str, dim_in: int, dim_out: int, bias: bool = False
    ) -> nnx.Linear | QuantizedLinear:
        made = self.quantized(name, dim_in, dim_out, use_bias=bias)
        return made or nnx.Linear(
            dim_in, dim_out, use_bias=bias, dtype=self.dtype, param_dtype=self.dtype, rngs=self.rngs
        )

    def quantized(self, name: str, dim_in: int, dim_out: int, **options: Any) -> QuantizedLinear | None:
        """The quantized layer of that name, None if the plan has no such layer."""
        kind = self.plan.of(self.path + name)
        if kind is None:
            return None
        plan = self.plan
        return QuantizedLinear(
            kind, dim_in, dim_out, dtype=self.dtype, exact=plan.exact, layout=plan.layout, **options
        )


def norm_linear(layer: nnx.Linear | QuantizedLinear, norm: RMSNorm, x: Array) -> Array:
    """``layer(norm(x))``, which is one operation of a quantized layer."""
    if isinstance(layer, QuantizedLinear):
        return layer(x, norm=(norm.scale[...], norm.eps))
    return layer(norm(x))


def linear_residual(
    layer: nnx.Linear | QuantizedLinear, x: Array, residual: Array, axis: str | None = None
) -> Array:
    """``residual + layer(x)``, which is one operation of a quantized layer.

    With ``axis`` the layer's inputs are split over that mesh axis, and its partial results are summed.
    """
    if axis is not None:
        return residual + jax.lax.psum(layer(x), axis)
    return layer(x, add=residual) if isinstance(layer, QuantizedLinear) else residual + layer(x)


class Attention(nnx.Module):
    """Grouped-query self-attention through a cache, which stores keys and values and computes attention."""

    def __init__(self, config: ModelConfig, layer: int, layers: Layers) -> None:
        c = config
        self.layer, self.window, self.axis = layer, c.window(layer), layers.axis
        self.num_q_heads, self.num_kv_heads, self.head_dim = c.num_q_heads, c.num_kv_heads, c.head_dim
        q_dim, kv_dim = c.num_q_heads * c.head_dim, c.num_kv_heads * c.head_dim
        # Of the same quantized type, the three are one matrix.
        self.qkv = nnx.data(
            layers.quantized("attention.qkv", c.hidden_size, q_dim + 2 * kv_dim, use_bias=c.qkv_bias)
        )
        self.q, self.k, self.v = (
            nnx.data(
                None
                if self.qkv is not None
                else layers.linear(f"attention.{name}", c.hidden_size, dim, c.qkv_bias)
            )
            for name, dim in (("q", q_dim), ("k", kv_dim), ("v", kv_dim))
        )
        self.out = layers.linear("attention.out", q_dim, c.hidden_size, c.attention_out_bias)
        self.q_norm = nnx.data(RMSNorm(c.head_dim, c.rms_norm_eps, layers.dtype) if c.qk_norm else None)
        self.k_norm = nnx.data(RMSNorm(c.head_dim, c.rms_norm_eps, layers.dtype) if c.qk_norm else None)

    def _projections(self, x: Array, norm: RMSNorm) -> tuple[Array, Array, Array]:
        if self.qkv is None:
            parts = (self.q, self.k, self.v)
            q, k, v = (norm_linear(layer, norm, x) for layer in parts if layer is not None)
            return q, k, v
        q_dim, kv_dim = self.num_q_heads * self.head_dim, self.num_kv_heads * self.head_dim
        q, k, v = jnp.split(norm_linear(self.qkv, norm, x), [q_dim, q_dim + kv_dim], axis=-1)
        return q, k, v

    def __call__(
        self, x: Array, norm: RMSNorm, rotation: Rotation, cache: Any, batch: Batch
    ) -> tuple[Array, Any]:
        """Returns (``x + out(attend(norm(x)))``, cache)."""
        tokens = x.shape[0]
        q, k, v = (part.reshape(tokens, -1, self.head_dim) for part in self._projections(x, norm))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotation(q), rotation(k)
        out, cache = cache.attend(self.layer, q, k, v, batch, window=self.window)
        return linear_residual(self.out, out.reshape(tokens, -1).astype(x.dtype), x, self.axis), cache


class MLP(nnx.Module):
    """``down(silu(gate(x)) * up(x))`` (SwiGLU, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.axis = layers.axis
        # Of the same quantized type, gate and up are one matrix, which is read in one pass.
        self.gate_up = nnx.data(layers.quantized("mlp.gate_up", hidden, inner, gated=True))
        self.gate, self.up = (
            nnx.data(None if self.gate_up is not None else layers.linear(f"mlp.{name}", hidden, inner, bias))
            for name in ("gate", "up")
        )
        self.down = layers.linear("mlp.down", inner, hidden, bias)

    def __call__(self, x: Array, norm: RMSNorm) -> Array:
        """``x + mlp(norm(x))``."""
        if self.gate_up is not None:
            inner = norm_linear(self.gate_up, norm, x)
        else:
            parts = (self.gate, self.up)
            gate, up = (norm_linear(layer, norm, x) for layer in parts if layer is not None)
            inner = jax.nn.silu(gate) * up
        return linear_residual(self.down, inner, x, self.axis)


class Block(nnx.Module):
    """Pre-norm transformer layer: attention, then MLP."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        *,
        plan: WeightPlan,
        dtype: Any,
        rngs: nnx.Rngs,
        axis: str | None = None,
    ) -> None:
        layers = Layers(f"blocks.{layer}.", plan, dtype, rngs, axis)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.attention = Attention(config, layer, layers)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, layers)

    def __call__(self, x: Array, rotation: Rotation, cache: Any, batch: Batch) -> tuple[Array, Any]:
        x, cache = self.attention(x, self.attention_norm, rotation, cache, batch)
        return self.mlp(x, self.mlp_norm), cache
