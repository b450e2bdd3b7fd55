"""A Flax NNX transformer on the paged cache: layers in a Python loop, and in a scan.

    python docs/examples/flax_nnx.py

The modules are those of any NNX model. A block takes ``attend(q, k, v)`` as an argument, so that training gives it
causal attention, and decoding the cache's. ``unrolled`` and ``scanned`` are all that knows the cache; give
``generate`` one of them, and the module as the weights: NNX modules are pytrees.

``unrolled`` serves a model as it is. ``scanned`` wants the blocks stacked, once; its program is as long as one layer,
and is traced and compiled in the same time for 3 layers and for 80.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from small_model import HEAD_DIM, HEADS, KV_HEADS, LAYERS, ROPE, VOCAB, WIDTH, causal, check


class Block(nnx.Module):
    def __init__(self, rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.norm1, self.norm2 = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)
        self.qkv = linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.out = linear(HEADS * HEAD_DIM, WIDTH)
        self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)

    def __call__(self, x, positions, attend):
        """``x f32[T, WIDTH]``, and what ``attend(q, k, v)`` returns beside its result."""
        qkv = self.qkv(self.norm1(x)).reshape(len(x), -1, HEAD_DIM)
        q, k, v = jnp.split(qkv, (HEADS, HEADS + KV_HEADS), axis=1)
        out, kept = attend(ROPE.rotate(q, positions), ROPE.rotate(k, positions), v)
        x = x + self.out(out.reshape(len(x), -1))
        return x + self.down(nnx.gelu(self.up(self.norm2(x)))), kept


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        """Logits f32[T, VOCAB] of a text i32[T], without a cache."""
        x = self.embed(tokens)
        for block in self.blocks:
            x, _ = block(x, jnp.arange(len(tokens)), causal)
        return self.head(self.norm(x))


def unrolled(transformer, tokens, cache, batch, rows):
    """The model with the cache: logits f32[R, VOCAB] behind ``rows i32[R]``, and the cache."""
    x = transformer.embed(tokens)
    for layer, block in enumerate(transformer.blocks):
        x, cache = block(x, batch.rope_positions, functools.partial(cache.attend, layer, batch=batch))
    return transformer.head(transformer.norm(x[rows])), cache


def scanned(transformer, tokens, cache, batch, rows):
    """The same over stacked blocks."""

    def step(carry, numbered):
        x, cache = carry
        layer, block = numbered
        return block(x, batch.rope_positions, functools.partial(cache.attend, layer, batch=batch)), None

    start = transformer.embed(tokens), cache
    (x, cache), _ = jax.lax.scan(step, start, (jnp.arange(LAYERS), transformer.blocks))
    return transformer.head(transformer.norm(x[rows])), cache


def stack(transformer):
    """The same weights with the blocks in one ``Block``, stacked along the first axis of each leaf."""
    stacked = nnx.clone(transformer)
    stacked.blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *transformer.blocks)
    return stacked


def of_state(model, graphdef):
    """The model over ``nnx.State``, for programs that keep ``graphdef, state = nnx.split(transformer)``.

    Make it once: each new function is a new program.
    """
    return lambda state, *step: model(nnx.merge(graphdef, state), *step)


def variants():
    """The model without a cache, and by name ``(model, params)`` with one."""
    transformer = Transformer(nnx.Rngs(0))
    graphdef, state = nnx.split(transformer)
    return transformer, {
        "unrolled": (unrolled, transformer),
        "scanned": (scanned, stack(transformer)),
        "of nnx.State": (of_state(unrolled, graphdef), state),
    }


if __name__ == "__main__":
    check(*variants())
