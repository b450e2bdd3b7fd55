"""The layers of a Llama-family transformer, in Flax NNX."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxpaged.batch import Batch
from jaxpaged.rope import Rope
from model.config import ModelConfig


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, in float32 (arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float, dtype: Any) -> None:
        self.scale = nnx.Param(jnp.ones(dim, dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.scale[...]


class Rotation(NamedTuple):
    """How a step's tokens are rotated; made once for all layers."""

    rope: Rope
    cos: Array
    """f32[T, 1, rotary_dim / 2], times the model's attention factor."""
    sin: Array
    """As ``cos``."""

    @classmethod
    def create(cls, rope: Rope, positions: Array, attention_factor: float) -> Rotation:
        """For tokens at ``positions i32[T]``."""
        cos, sin = rope.cos_sin(positions)
        return cls(rope, cos[:, None] * attention_factor, sin[:, None] * attention_factor)

    def __call__(self, x: Array) -> Array:
        """``x [T, heads, head_dim]``, rotated."""
        return self.rope.turn(x, self.cos, self.sin)


class Attention(nnx.Module):
    """Grouped-query self-attention; keys and values live in the cache, which also does the attending."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        c = config
        self.layer, self.window = layer, c.window(layer)
        self.num_q_heads, self.num_kv_heads, self.head_dim = c.num_q_heads, c.num_kv_heads, c.head_dim

        def linear(dim_in: int, dim_out: int, bias: bool) -> nnx.Linear:
            return nnx.Linear(dim_in, dim_out, use_bias=bias, dtype=dtype, param_dtype=dtype, rngs=rngs)

        self.q = linear(c.hidden_size, c.num_q_heads * c.head_dim, c.qkv_bias)
        self.k = linear(c.hidden_size, c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.v = linear(c.hidden_size, c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.out = linear(c.num_q_heads * c.head_dim, c.hidden_size, c.attention_out_bias)
        self.q_norm = nnx.data(RMSNorm(c.head_dim, c.rms_norm_eps, dtype) if c.qk_norm else None)
        self.k_norm = nnx.data(RMSNorm(c.head_dim, c.rms_norm_eps, dtype) if c.qk_norm else None)

    def __call__(self, x: Array, rotation: Rotation, cache: Any, batch: Batch) -> tuple[Array, Any]:
        tokens = x.shape[0]
        q = self.q(x).reshape(tokens, self.num_q_heads, self.head_dim)
        k = self.k(x).reshape(tokens, self.num_kv_heads, self.head_dim)
        v = self.v(x).reshape(tokens, self.num_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotation(q), rotation(k)
        out, cache = cache.attend(self.layer, q, k, v, batch, window=self.window, rope=rotation.rope)
        return self.out(out.reshape(tokens, -1)), cache


class MLP(nnx.Module):
    """``down(silu(gate(x)) * up(x))`` (SwiGLU, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        def linear(dim_in: int, dim_out: int) -> nnx.Linear:
            return nnx.Linear(
                dim_in, dim_out, use_bias=config.mlp_bias, dtype=dtype, param_dtype=dtype, rngs=rngs
            )

        self.gate = linear(config.hidden_size, config.intermediate_size)
        self.up = linear(config.hidden_size, config.intermediate_size)
        self.down = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Array) -> Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One transformer layer: attention, then MLP, each on a normed residual stream."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.attention = Attention(config, layer, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, rotation: Rotation, cache: Any, batch: Batch) -> tuple[Array, Any]:
        attended, cache = self.attention(self.attention_norm(x), rotation, cache, batch)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache
