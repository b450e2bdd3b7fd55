"""The small transformer that the examples write in several libraries: its sizes, its cache, and a check.

Nothing here is part of a model. ``check`` compares ``generate`` on the cache with the same model without one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import jaxpaged

VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 96, 64, 3, 4, 2, 16
ROPE = jaxpaged.Rope.create(100.0 ** -np.linspace(0, 1, HEAD_DIM // 2, endpoint=False))


def create_cache(max_seqs, num_pages=64):
    """An empty cache; f32 pages, because the examples compare to 1e-4 on GPUs and TPUs, too."""
    return jaxpaged.PagedKVCache.create(
        num_layers=LAYERS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_pages=num_pages,
        page_size=8,
        max_seqs=max_seqs,
        rope=ROPE,
        dtype="f32",
    )


def causal(q, k, v):
    """Attention of a whole text to itself, in the form that the examples' blocks ask for; keeps nothing."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True), None


def check(forward, variants, new=24):
    """Generates greedily on the cache, more prompts than sequences, and compares with ``forward``.

    Args:
      forward: the model without a cache, ``tokens i32[T] -> logits f32[T, VOCAB]``.
      variants: by name, ``(model, params)``, the same model with the cache, as ``generate`` takes it.
      new: tokens to generate after each prompt.

    Raises:
      AssertionError: a token that is not the likeliest, or log-probabilities that differ by 1e-4.
    """
    prompts = [[5], list(range(40)), [7, 7, 30, 2], list(range(90, 70, -1))]
    without_cache = jax.jit(lambda tokens: jax.nn.log_softmax(forward(tokens)))
    for name, (model, params) in variants.items():
        cache = create_cache(max_seqs=3)
        result, cache = jaxpaged.generate(model, params, cache, prompts, max_new_tokens=new, logprobs=VOCAB)
        assert cache.pages_used == 0
        worst = 0.0
        for row, prompt in enumerate(prompts):
            tokens, top = result.tokens[row, :new], result.top_tokens[row, :new]
            text = np.zeros(64, np.int32)  # one shape for all; nothing sees the zeros behind the text
            text[: len(prompt) + new] = [*prompt, *tokens]
            expected = without_cache(text)[len(prompt) - 1 :][:new]
            np.testing.assert_array_equal(jnp.argmax(expected, axis=1), tokens)
            expected = jnp.take_along_axis(expected, top, axis=1)
            worst = max(worst, float(jnp.max(jnp.abs(expected - result.top_logprobs[row, :new]))))
        assert worst < 1e-4, worst
        print(f"{name}: greedy tokens are equal, log-probabilities differ by {worst:.0e} at most")
