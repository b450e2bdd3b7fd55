"""Formats with residual pages under the engine: only full pages are shared, and all invariants hold."""

from __future__ import annotations

import random

import jax
import jax.numpy as jnp
import pytest
from engine_kit import prompt

from jaxpaged import PagedKVCache, Rope
from jaxpaged.engine import Engine, EngineConfig, EngineRequest

VOCAB, HIDDEN = 61, 64


def model(params, tokens, cache, batch, rows):
    """One layer of one head: formats of blocks want heads of 32 and more."""
    x = params[0][tokens]
    heads = (x @ params[1])[:, None]
    out, cache = cache.attend(0, heads, heads, heads, batch)
    return (x + out[:, 0])[rows] @ params[0].T, cache


@pytest.mark.slow
def test_random_requests_leave_no_page_behind():
    keys = jax.random.split(jax.random.key(0), 2)
    params = [jax.random.normal(keys[0], (VOCAB, HIDDEN)), jax.random.normal(keys[1], (HIDDEN, HIDDEN)) / 8]
    sizes = {
        "num_layers": 1,
        "num_kv_heads": 1,
        "head_dim": HIDDEN,
        "rope": Rope.create(()),
        "num_pages": 12,
        "max_seqs": 3,
        "max_seq_len": 8 * 32,
    }
    cache = PagedKVCache.create(**sizes, page_size=32, dtype="kivi4")
    config = EngineConfig(
        n_ctx=160, vocab_size=VOCAB, max_batch_tokens=48, decode_steps=4, context_shift=True
    )
    engine = Engine(model, [jnp.asarray(p) for p in params], cache, config)
    engine.compile()
    rng = random.Random(1)
    generated = 0
    for i in range(24):
        text = tuple(t % VOCAB for t in prompt(rng.randrange(2), 100)[: rng.randrange(1, 100)])
        engine.add_request(
            EngineRequest(
                f"r{i}", text, max_new_tokens=rng.randrange(1, 150), n=rng.choice([1, 1, 2]), seed=i
            )
        )
        for _ in range(rng.randrange(10)):
            generated += sum(len(output.tokens) for output in engine.step())
            engine.check_state()
        if rng.random() < 0.2:
            engine.abort(f"r{i}")
    while engine.has_work:
        generated += sum(len(output.tokens) for output in engine.step())
        engine.check_state()
    stats = engine.stats()
    assert stats.pages_used == stats.running == stats.waiting == stats.compiled_late == 0
    assert stats.prefix_hits > 0
    assert stats.shifts > 0
    assert generated == stats.generated_tokens > 500
    assert stats.prefix_hits % 32 == 0
