"""An Equinox transformer on the paged cache: layers in a Python loop, and in a scan.

    python docs/examples/equinox_model.py

The modules are those of any Equinox model. A block takes ``attend(q, k, v)`` as an argument, so that training gives
it causal attention, and decoding the cache's. ``unrolled`` and ``scanned`` are all that knows the cache; give
``generate`` one of them, and the module as the weights: Equinox modules are pytrees.

A module whose leaves are not all arrays (``eqx.nn.MLP`` holds its activation function) is split first, as for any
``jax.jit``: see ``of_arrays``.
"""

from __future__ import annotations

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from small_model import HEAD_DIM, HEADS, KV_HEADS, LAYERS, ROPE, VOCAB, WIDTH, causal, check


class Block(eqx.Module):
    norm1: eqx.nn.RMSNorm
    norm2: eqx.nn.RMSNorm
    qkv: eqx.nn.Linear
    out: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        keys = iter(jax.random.split(key, 4))

        def linear(inputs, outputs):
            return eqx.nn.Linear(inputs, outputs, use_bias=False, key=next(keys))

        self.norm1, self.norm2 = eqx.nn.RMSNorm(WIDTH), eqx.nn.RMSNorm(WIDTH)
        self.qkv = linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.out = linear(HEADS * HEAD_DIM, WIDTH)
        self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)

    def __call__(self, x, positions, attend):
        """``x f32[T, WIDTH]``, and what ``attend(q, k, v)`` returns beside its result."""
        qkv = jax.vmap(lambda one: self.qkv(self.norm1(one)))(x).reshape(len(x), -1, HEAD_DIM)
        q, k, v = jnp.split(qkv, (HEADS, HEADS + KV_HEADS), axis=1)
        out, kept = attend(ROPE.rotate(q, positions), ROPE.rotate(k, positions), v)
        x = x + jax.vmap(self.out)(out.reshape(len(x), -1))
        return x + jax.vmap(lambda one: self.down(jax.nn.gelu(self.up(self.norm2(one)))))(x), kept


class Transformer(eqx.Module):
    embed: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.RMSNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        embed, head, *blocks = jax.random.split(key, 2 + LAYERS)
        self.embed = eqx.nn.Embedding(VOCAB, WIDTH, key=embed)
        self.blocks = [Block(key) for key in blocks]
        self.norm = eqx.nn.RMSNorm(WIDTH)
        self.head = eqx.nn.Linear(WIDTH, VOCAB, use_bias=False, key=head)

    def logits(self, x):
        return jax.vmap(lambda one: self.head(self.norm(one)))(x)

    def __call__(self, tokens):
        """Logits f32[T, VOCAB] of a text i32[T], without a cache."""
        x = jax.vmap(self.embed)(tokens)
        for block in self.blocks:
            x, _ = block(x, jnp.arange(len(tokens)), causal)
        return self.logits(x)


def unrolled(transformer, tokens, cache, batch, rows):
    """The model with the cache: logits f32[R, VOCAB] behind ``rows i32[R]``, and the cache."""
    x = jax.vmap(transformer.embed)(tokens)
    for layer, block in enumerate(transformer.blocks):
        x, cache = block(x, batch.rope_positions, functools.partial(cache.attend, layer, batch=batch))
    return transformer.logits(x[rows]), cache


def scanned(transformer, tokens, cache, batch, rows):
    """The same over stacked blocks."""

    def step(carry, numbered):
        x, cache = carry
        layer, block = numbered
        return block(x, batch.rope_positions, functools.partial(cache.attend, layer, batch=batch)), None

    start = jax.vmap(transformer.embed)(tokens), cache
    (x, cache), _ = jax.lax.scan(step, start, (jnp.arange(LAYERS), transformer.blocks))
    return transformer.logits(x[rows]), cache


def stack(transformer):
    """The same weights with the blocks in one ``Block``, stacked along the first axis of each leaf."""
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *transformer.blocks)
    return eqx.tree_at(lambda one: one.blocks, transformer, blocks)


def of_arrays(model, static):
    """The model over the first half of ``arrays, static = eqx.partition(transformer, eqx.is_array)``.

    Make it once: each new function is a new program.
    """
    return lambda arrays, *step: model(eqx.combine(arrays, static), *step)


def variants():
    """The model without a cache, and by name ``(model, params)`` with one."""
    transformer = Transformer(jax.random.key(0))
    arrays, static = eqx.partition(transformer, eqx.is_array)
    return transformer, {
        "unrolled": (unrolled, transformer),
        "scanned": (scanned, stack(transformer)),
        "partitioned": (of_arrays(unrolled, static), arrays),
    }


if __name__ == "__main__":
    check(*variants())
