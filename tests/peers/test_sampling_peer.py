"""Candidates and probabilities of our sampler chain against llama.cpp's samplers, which need no model."""

from __future__ import annotations

import ctypes
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.generation.sampling import sample
from jaxpaged.generation.sampling_params import SamplingParams

llama_cpp = pytest.importorskip("llama_cpp")


def llama_distribution(logits: np.ndarray, row: dict[str, Any], recent: list[int]) -> np.ndarray:
    """Probability of every token under llama.cpp's default order."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for sampler in (
        llama_cpp.llama_sampler_init_penalties(
            len(logits),
            row["repeat_last_n"],
            row["repeat_penalty"],
            row["frequency_penalty"],
            row["presence_penalty"],
        ),
        llama_cpp.llama_sampler_init_top_k(row["top_k"]),
        llama_cpp.llama_sampler_init_top_p(row["top_p"], 0),
        llama_cpp.llama_sampler_init_min_p(row["min_p"], 0),
        llama_cpp.llama_sampler_init_temp(row["temperature"]),
        llama_cpp.llama_sampler_init_dist(1),
    ):
        llama_cpp.llama_sampler_chain_add(chain, sampler)
    for token in recent:
        llama_cpp.llama_sampler_accept(chain, token)
    data = (llama_cpp.llama_token_data * len(logits))(
        *(llama_cpp.llama_token_data(i, float(z), 0.0) for i, z in enumerate(logits))
    )
    candidates = llama_cpp.llama_token_data_array(data, len(logits), -1, False)
    llama_cpp.llama_sampler_apply(chain, ctypes.byref(candidates))
    probabilities = np.zeros(len(logits))
    for i in range(candidates.size):
        probabilities[candidates.data[i].id] = max(candidates.data[i].p, 0.0)
    llama_cpp.llama_sampler_free(chain)
    return probabilities


@pytest.mark.parametrize("seed", range(12))
def test_draws_follow_llama_cpps_distribution(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocab_size, num_draws = 400, 4000
    logits = (rng.normal(size=vocab_size) * rng.choice([0.5, 1.5, 3.0])).astype(np.float32)
    recent = rng.choice(np.argsort(-logits)[:20], size=30).tolist()
    row = {
        "temperature": float(rng.choice([0.0, 0.3, 0.8, 1.0, 1.6])),
        "top_k": int(rng.choice([0, 1, 10, 40, 200, 500])),
        "top_p": float(rng.choice([0.4, 0.95, 1.0])),
        "min_p": float(rng.choice([0.0, 0.05, 0.2])),
        "repeat_penalty": float(rng.choice([1.0, 1.1, 1.5])),
        "repeat_last_n": int(rng.choice([0, 8, 64])),
        "frequency_penalty": float(rng.choice([0.0, 0.3])),
        "presence_penalty": float(rng.choice([0.0, 0.6])),
    }
    expected = num_draws * llama_distribution(logits, row, recent)
    tokens = jax.jit(sample)(
        jnp.broadcast_to(logits, (num_draws, vocab_size)),
        SamplingParams.create(num_draws, **row, seed=seed),
        jnp.arange(num_draws),
        jnp.broadcast_to(jnp.asarray(recent, jnp.int32), (num_draws, len(recent))),
    )
    counts = np.bincount(np.asarray(tokens), minlength=vocab_size)
    kept = expected > 0
    assert np.all(counts[~kept] == 0)
    # Chi-square with k - 1 degrees of freedom has mean k - 1 and variance 2 (k - 1); five sigmas.
    statistic = np.sum((counts - expected)[kept] ** 2 / expected[kept])
    degrees = int(kept.sum()) - 1
    assert statistic <= degrees + 5 * np.sqrt(2 * degrees) + 1e-3
