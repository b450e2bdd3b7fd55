"""The examples run, and their models have the same logits with the cache as without."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import plain_jax
import pytest
import rollout
import small_model

from jaxpaged import check_invariants, reserve
from jaxpaged.generation.api import run_donating

LIBRARIES = "flax_nnx", "flax_linen", "equinox_model"
TEXTS = np.random.default_rng(0).integers(0, small_model.VOCAB, (2, 29))
LENS = np.array([29, 13])


def assert_logits_are_equal(forward: Any, variants: Any) -> None:
    """Logits of every row of two texts, which are read in two steps."""
    expected = [forward(jnp.asarray(text)) for text in TEXTS]
    for model, params in variants.values():

        @jax.jit
        def read(params: Any, cache: Any, tokens: Any, num_new: Any, model: Any = model) -> Any:
            cache, batch, ok = reserve(cache, num_new, num_tokens=40)
            own = tokens[jnp.minimum(batch.sequence, 1), batch.position]
            logits, cache = model(params, own, cache, batch, jnp.arange(40))
            return logits, batch.sequence, batch.position, cache, ok

        cache = small_model.create_cache(max_seqs=2)
        for num_new in ([17, 3], [12, 10]):
            logits, sequence, position, cache, ok = read(params, cache, TEXTS, jnp.array(num_new))
            assert ok
            for row, (s, p) in enumerate(zip(sequence, position, strict=True)):
                if s < 2:
                    np.testing.assert_allclose(logits[row], expected[s][p], atol=1e-4)
        check_invariants(cache)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_model_is_the_same_with_the_cache(library: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``check`` compares what ``generate`` finds."""
    forward, variants = importlib.import_module(library).variants()
    assert_logits_are_equal(forward, variants)
    small_model.check(forward, variants)
    assert capsys.readouterr().out.count("greedy tokens are equal") == len(variants) >= 2


def test_the_loop_written_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    weights = plain_jax.init(jax.random.key(3))
    variants = {"plain": (plain_jax.model, weights)}
    assert_logits_are_equal(functools.partial(plain_jax.forward, weights), variants)
    plain_jax.main()
    assert "14 pages held 3 texts of 60 tokens; 11 hold 2" in capsys.readouterr().out


def test_policy_gradients_raise_the_reward() -> None:
    history, difference = rollout.train(40)
    assert np.mean(history[:5]) < 0.65
    assert np.mean(history[-5:]) > 0.8
    assert difference < 1e-4

    compiled = run_donating("cpu")._cache_size()
    rollout.train(2, seed=1)
    assert run_donating("cpu")._cache_size() == compiled


@pytest.mark.slow  # because matplotlib is not in the extra of the other tests
def test_the_reward_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "reward.svg"
    monkeypatch.setattr(sys, "argv", ["rollout.py", "--steps=2", f"--plot={picture}"])
    rollout.main()
    assert "mean reward" in picture.read_text()
