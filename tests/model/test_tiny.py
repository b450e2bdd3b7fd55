"""The training of the embedded model."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jaxpaged_model.llama import random_params
from jaxpaged_model.tiny import loops, train


def in_loop(tokens: list[int]) -> bool:
    """True if the last token is in a loop, by the definition's words."""
    for period in range(1, loops.LONGEST_PERIOD + 1):
        length = max(2 * period, loops.SHORTEST_LOOP)
        here, before = tokens[-length:], tokens[-length - period : -period]
        if len(tokens) >= length + period and here == before:
            return True
    return False


@pytest.mark.parametrize("symbols", [1, 2, 3])
def test_loops_are_found_where_the_definition_says(symbols: int) -> None:
    rng = np.random.default_rng(symbols)
    pieces = [rng.integers(symbols, size=rng.integers(1, 9)).tolist() * rng.integers(1, 6) for _ in range(30)]
    text = [token for piece in pieces for token in piece]
    expected = [in_loop(text[: i + 1]) for i in range(len(text))]
    assert loops.loop_tokens(np.asarray(text)).tolist() == expected
    assert any(expected)


def test_training_learns_and_unlearns_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on a text of one loop, the model is sure of it; the phase against loops makes it doubt."""
    config = dataclasses.replace(
        train.CONFIG,
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_layers=2,
        num_q_heads=1,
        num_kv_heads=1,
    )
    monkeypatch.setattr(train, "CONFIG", config)
    text = np.resize(np.asarray([5, 9, 2, 33], np.int32), 2000)
    params = random_params(config)
    optimizer = train.make_optimizer(params)
    state = optimizer.init(params)
    tokens = jnp.asarray(text[: 8 * 33].reshape(8, 33))
    for _ in range(40):
        params, state, loss = train.train_step(optimizer, params, state, tokens, jnp.float32(1.0))
    assert loss < 0.1
    sure = train.token_log_probs(params, tokens).mean()
    params, shares = train.train_out_of_loops(params, text, 30, np.random.default_rng(0), rows=4, num_new=40)
    assert shares[0] == 1.0
    # The text itself still asks for the loop, so that its probability falls no further than to one half.
    assert train.token_log_probs(params, tokens).mean() < sure - 0.1
