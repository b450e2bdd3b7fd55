"""Typical, top-n-sigma, XTC, dynamic temperature, DRY and Mirostat against llama.cpp, which needs no model for them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.generation.sampling import sample, sample_next
from jaxpaged.generation.sampling_params import SamplingParams, first_mu

llama_cpp = pytest.importorskip("llama_cpp")
VOCAB, DRAWS = 400, 4000
jitted, jitted_next = jax.jit(sample), jax.jit(sample_next)


class Chain:
    """A chain of llama.cpp's samplers."""

    def __init__(self, samplers: Sequence[Any], recent: Sequence[int] = ()) -> None:
        self._chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        for sampler in samplers:
            llama_cpp.llama_sampler_chain_add(self._chain, sampler)
        for token in recent:
            llama_cpp.llama_sampler_accept(self._chain, token)

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """Probability of every token; samples one of them."""
        data = (llama_cpp.llama_token_data * len(logits))(
            *(llama_cpp.llama_token_data(i, float(z), 0.0) for i, z in enumerate(logits))
        )
        candidates = llama_cpp.llama_token_data_array(data, len(logits), -1, False)
        llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(candidates))
        probabilities = np.zeros(len(logits))
        for i in range(candidates.size):
            probabilities[candidates.data[i].id] = max(candidates.data[i].p, 0.0)
        return probabilities


def check_draws(tokens: jax.Array, probabilities: np.ndarray) -> None:
    expected = len(tokens) * probabilities
    counts = np.bincount(np.asarray(tokens), minlength=len(probabilities))
    # A token of a probability near 0 is one that rounding may drop.
    assert np.all(counts[expected < 1e-3] == 0)
    kept = expected >= 1e-3
    # Chi-square with k - 1 degrees of freedom has mean k - 1 and variance 2 (k - 1); six sigmas.
    statistic = np.sum((counts - expected)[kept] ** 2 / expected[kept])
    degrees = int(kept.sum()) - 1
    assert statistic <= degrees + 6 * np.sqrt(2 * degrees) + 1e-3


def random_logits(rng: np.random.Generator) -> np.ndarray:
    return (rng.normal(size=VOCAB) * rng.choice([0.5, 1.5, 3.0])).astype(np.float32)


@pytest.mark.parametrize("seed", range(30))
def test_draws_follow_llama_cpps_chain(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(rng)
    recent = rng.choice(np.argsort(-logits)[:3], size=40).tolist()

    def one_of(*values: float) -> Any:
        return rng.choice(np.asarray(values)).item()

    row = {
        "temperature": one_of(0.0, 0.3, 0.8, 1.5),
        "top_k": one_of(0, 10, 40, 200),
        "top_p": one_of(0.6, 0.95, 1.0),
        "min_p": one_of(0.01, 0.05),
        "typical_p": one_of(0.2, 0.7, 1.0),
        "top_n_sigma": one_of(-1.0, 1.0, 2.0),
        "xtc_probability": one_of(0.0, 1.0),
        "xtc_threshold": one_of(0.05, 0.1),
        "dynatemp_range": one_of(0.0, 0.5, 1.0),
        "dynatemp_exponent": one_of(0.5, 1.0, 2.0),
        "dry_multiplier": one_of(0.0, 0.8),
        "dry_base": one_of(1.0, 1.75),
        "dry_allowed_length": one_of(1, 2, 3),
        "dry_penalty_last_n": one_of(8, 64),
    }
    # llama.cpp's typical sampling of tokens without probability is NaN.
    if row["top_n_sigma"] > 0:
        row["typical_p"] = 1.0
    chain = Chain(
        [
            llama_cpp.llama_sampler_init_dry(
                None,
                *(row[f"dry_{x}"] for x in ("multiplier", "base", "allowed_length", "penalty_last_n")),
                None,
                0,
            ),
            llama_cpp.llama_sampler_init_top_n_sigma(row["top_n_sigma"]),
            llama_cpp.llama_sampler_init_top_k(row["top_k"]),
            llama_cpp.llama_sampler_init_typical(row["typical_p"], 0),
            llama_cpp.llama_sampler_init_top_p(row["top_p"], 0),
            llama_cpp.llama_sampler_init_min_p(row["min_p"], 0),
            llama_cpp.llama_sampler_init_xtc(row["xtc_probability"], row["xtc_threshold"], 0, 1),
            llama_cpp.llama_sampler_init_temp_ext(
                row["temperature"], row["dynatemp_range"], row["dynatemp_exponent"]
            ),
            llama_cpp.llama_sampler_init_dist(1),
        ],
        recent,
    )
    tokens = jitted(
        jnp.broadcast_to(logits, (DRAWS, VOCAB)),
        SamplingParams.create(DRAWS, **row, seed=seed),
        jnp.arange(DRAWS),
        jnp.broadcast_to(jnp.asarray(recent, jnp.int32), (DRAWS, len(recent))),
    )
    check_draws(tokens, chain.apply(logits))


def mirostat_sampler(version: int, tau: float, eta: float) -> Any:
    if version == 1:
        return llama_cpp.llama_sampler_init_mirostat(VOCAB, 1, tau, eta, 100)
    return llama_cpp.llama_sampler_init_mirostat_v2(1, tau, eta)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_first_draws_follow_llama_cpps_mirostat(version: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, tau, temperature = (
        random_logits(rng),
        rng.choice([1.0, 2.0, 3.0]).item(),
        rng.choice([0.7, 1.0]).item(),
    )
    chain = Chain([llama_cpp.llama_sampler_init_temp(temperature), mirostat_sampler(version, tau, 0.1)])
    params = SamplingParams.create(
        DRAWS, mirostat=version, mirostat_tau=tau, temperature=temperature, seed=seed
    )
    position, recent = jnp.arange(DRAWS), jnp.zeros((DRAWS, 0), jnp.int32)
    tokens = jitted(jnp.broadcast_to(logits, (DRAWS, VOCAB)), params, position, recent)
    check_draws(tokens, chain.apply(logits))


@pytest.mark.parametrize("eta", [0.1, 0.5])
def test_mirostats_state_moves_as_llama_cpps(eta: float) -> None:
    """Rows of equally likely tokens: whichever is sampled, the surprise is the same."""
    last = random_logits(np.random.default_rng(3))
    chain = Chain([llama_cpp.llama_sampler_init_temp(1.0), mirostat_sampler(2, 3.0, eta)])
    params = SamplingParams.create(DRAWS, mirostat=2, mirostat_tau=3.0, mirostat_eta=eta, temperature=1.0)
    mu, recent = first_mu(params), jnp.zeros((DRAWS, 0), jnp.int32)
    for size in (4, 32, 2, 32, 8):
        flat = np.where(np.arange(VOCAB) < size, 0.0, -50.0).astype(np.float32)
        chain.apply(flat)
        rows = jnp.broadcast_to(flat, (DRAWS, VOCAB))
        _, mu = jitted_next(rows, params, jnp.arange(DRAWS), recent, mu)
    rows = jnp.broadcast_to(last, (DRAWS, VOCAB))
    tokens, _ = jitted_next(rows, params, jnp.arange(DRAWS), recent, mu)
    check_draws(tokens, chain.apply(last))
