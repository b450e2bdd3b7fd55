"""A Flax Linen transformer on the paged cache: layers in a Python loop, and in a scan.

    python docs/examples/flax_linen.py

The modules are those of any Linen model. A block takes ``attend(q, k, v)`` as an argument, so that training gives it
causal attention, and decoding the cache's. ``unrolled`` and ``scanned`` are all that knows the cache; give
``generate`` one of them, and the "params" collection as the weights.

The cache is an argument and a result, not a variable collection: Linen then has nothing to lift, and a plain
``lax.scan`` over stacked weights takes the place of ``nn.scan``. Weights that ``nn.scan`` made are stacked already.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from small_model import HEAD_DIM, HEADS, KV_HEADS, LAYERS, ROPE, VOCAB, WIDTH, causal, check


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, positions, attend):
        """``x f32[T, WIDTH]``, and what ``attend(q, k, v)`` returns beside its result."""
        linear = functools.partial(nn.Dense, use_bias=False)
        qkv = linear((HEADS + 2 * KV_HEADS) * HEAD_DIM, name="qkv")(nn.RMSNorm()(x))
        q, k, v = jnp.split(qkv.reshape(len(x), -1, HEAD_DIM), (HEADS, HEADS + KV_HEADS), axis=1)
        out, kept = attend(ROPE.rotate(q, positions), ROPE.rotate(k, positions), v)
        x = x + linear(WIDTH, name="out")(out.reshape(len(x), -1))
        up = nn.gelu(linear(4 * WIDTH, name="up")(nn.RMSNorm()(x)))
        return x + linear(WIDTH, name="down")(up), kept


class Transformer(nn.Module):
    def setup(self):
        self.embed = nn.Embed(VOCAB, WIDTH)
        self.blocks = [Block() for _ in range(LAYERS)]
        self.norm = nn.RMSNorm()
        self.head = nn.Dense(VOCAB, use_bias=False)

    def __call__(self, tokens):
        """Logits f32[T, VOCAB] of a text i32[T], without a cache."""
        x = self.embed(tokens)
        for block in self.blocks:
            x, _ = block(x, jnp.arange(len(tokens)), causal)
        return self.head(self.norm(x))


def unrolled(params, tokens, cache, batch, rows):
    """The model with the cache: logits f32[R, VOCAB] behind ``rows i32[R]``, and the cache."""
    transformer = Transformer().bind({"params": params})
    x = transformer.embed(tokens)
    for layer, block in enumerate(transformer.blocks):
        x, cache = block(x, batch.rope_positions, functools.partial(cache.attend, layer, batch=batch))
    return transformer.head(transformer.norm(x[rows])), cache


def scanned(params, tokens, cache, batch, rows):
    """The same over stacked weights, ``params["blocks"]``."""
    transformer = Transformer().bind({"params": params})

    def step(carry, numbered):
        x, cache = carry
        layer, weights = numbered
        attend = functools.partial(cache.attend, layer, batch=batch)
        return Block().apply({"params": weights}, x, batch.rope_positions, attend), None

    start = transformer.embed(tokens), cache
    (x, cache), _ = jax.lax.scan(step, start, (jnp.arange(LAYERS), params["blocks"]))
    return transformer.head(transformer.norm(x[rows])), cache


def stack(params):
    """The same weights, with those of all blocks stacked along the first axis of each leaf."""
    blocks = [params[f"blocks_{layer}"] for layer in range(LAYERS)]
    others = {name: params[name] for name in ("embed", "norm", "head")}
    return {**others, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def variants():
    """The model without a cache, and by name ``(model, params)`` with one."""
    params = Transformer().init(jax.random.key(0), jnp.arange(4))["params"]
    forward = functools.partial(Transformer().apply, {"params": params})
    return forward, {"unrolled": (unrolled, params), "scanned": (scanned, stack(params))}


if __name__ == "__main__":
    check(*variants())
