"""A transformer in plain jax.numpy on the paged cache, with a decode loop written by hand.

    python docs/examples/plain_jax.py

The weights are a dictionary. ``block`` is one layer, and all that it asks of its surroundings is ``attend(q, k, v)``:
in ``forward`` that is causal attention over a whole text, as in training; in ``model`` it is the cache's, which writes
the new keys and values to their pages and attends to all that the sequence holds. Those ten lines are the only ones
that know the cache.

``branches`` is a loop of your own around them, one program: it reads a prompt, forks it, so that all sequences share
its pages, and extends each of them. ``jaxpaged.generate(model, weights, cache, prompts)`` does the same with sampling,
stop tokens and a queue; write your own where you want something else.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from small_model import HEAD_DIM, HEADS, KV_HEADS, LAYERS, ROPE, VOCAB, WIDTH, causal, create_cache

import jaxpaged

SHAPES = {
    "qkv": (WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
    "out": (HEADS * HEAD_DIM, WIDTH),
    "up": (WIDTH, 4 * WIDTH),
    "down": (4 * WIDTH, WIDTH),
}


def init(key):
    """Random weights; those of all layers are stacked along the first axis."""
    keys = iter(jax.random.split(key, 2 + len(SHAPES)))

    def normal(*shape):
        return jax.random.normal(next(keys), shape) * shape[-2] ** -0.5

    layers = {name: normal(LAYERS, *shape) for name, shape in SHAPES.items()}
    return {"embedding": normal(VOCAB, WIDTH), "layers": layers, "head": normal(WIDTH, VOCAB)}


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def block(w, x, positions, attend):
    """One layer: ``x f32[T, WIDTH]``, and what ``attend(q, k, v)`` returns beside its result."""
    qkv = (norm(x) @ w["qkv"]).reshape(len(x), -1, HEAD_DIM)
    q, k, v = jnp.split(qkv, (HEADS, HEADS + KV_HEADS), axis=1)
    out, kept = attend(ROPE.rotate(q, positions), ROPE.rotate(k, positions), v)
    x = x + out.reshape(len(x), -1) @ w["out"]
    return x + jax.nn.gelu(norm(x) @ w["up"]) @ w["down"], kept


def forward(weights, tokens):
    """Logits f32[T, VOCAB] of a text i32[T], without a cache."""

    def layer(x, w):
        return block(w, x, jnp.arange(len(x)), causal)

    x, _ = jax.lax.scan(layer, weights["embedding"][tokens], weights["layers"])
    return norm(x) @ weights["head"]


def model(weights, tokens, cache, batch, rows):
    """Logits f32[R, VOCAB] behind ``rows i32[R]`` of the step's ``tokens i32[T]``, and the cache."""

    def layer(carry, numbered):
        x, cache = carry
        index, w = numbered
        return block(w, x, batch.rope_positions, lambda q, k, v: cache.attend(index, q, k, v, batch)), None

    start = weights["embedding"][tokens], cache  # in the carry, the pages stay where they are
    (x, cache), _ = jax.lax.scan(layer, start, (jnp.arange(LAYERS), weights["layers"]))
    return norm(x[rows]) @ weights["head"], cache


@functools.partial(jax.jit, static_argnames="steps", donate_argnames="cache")
def branches(weights, cache, prompt, steps):
    """Continues a prompt by each of its likeliest next tokens, and those greedily. Donates the cache.

    Args:
      weights: the model's.
      cache: empty, of S sequences.
      prompt: i32[T].
      steps: tokens to add behind the first.

    Returns:
      ``(texts i32[S, steps + 1], cache, ok bool[])``. Not ok: the pool ran out of pages.
    """
    every = jnp.arange(cache.max_seqs)

    # Prefill: all tokens of the prompt go to sequence 0, and only the last one's logits are computed.
    num_new = jnp.where(every == 0, len(prompt), 0)
    cache, batch, ok = jaxpaged.reserve(cache, num_new, num_tokens=len(prompt))
    logits, cache = model(weights, prompt, cache, batch, batch.last_rows[:1])

    # Fork: sequences 1, 2, ... share the pages of the prompt. A page is copied before it is written.
    for other in range(1, cache.max_seqs):
        cache, copied = jaxpaged.seq_copy(cache, 0, other)
        ok &= copied
    texts = jnp.zeros((cache.max_seqs, steps + 1), jnp.int32)
    texts = texts.at[:, 0].set(jax.lax.top_k(logits[0], cache.max_seqs)[1])

    # Decode: one token of every sequence a step; ``num_new`` 0 would leave one out.
    def step(i, carry):
        cache, texts, ok = carry
        cache, batch, served = jaxpaged.reserve(cache, jnp.ones_like(every), num_tokens=cache.max_seqs)
        logits, cache = model(weights, texts[:, i], cache, batch, every)
        return cache, texts.at[:, i + 1].set(jnp.argmax(logits, axis=-1)), ok & served

    cache, texts, ok = jax.lax.fori_loop(0, steps, step, (cache, texts, ok))
    return texts, cache, ok


def main():
    weights = init(jax.random.key(0))
    prompt = jnp.arange(40)
    texts, cache, ok = branches(weights, create_cache(max_seqs=3), prompt, steps=20)
    assert ok
    for text in texts:
        expected = forward(weights, jnp.concatenate([prompt, text]))[len(prompt) : -1]
        assert (jnp.argmax(expected, axis=-1) == text[1:]).all()
        print(*text)

    held = cache.pages_used  # 5 pages of the prompt, once, and 3 of each continuation
    cache, ok = jaxpaged.seq_remove(cache, 1)
    assert ok
    print(f"{held} pages held 3 texts of {jaxpaged.seq_length(cache)[0]} tokens; {cache.pages_used} hold 2")


if __name__ == "__main__":
    main()
