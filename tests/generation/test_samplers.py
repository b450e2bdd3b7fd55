"""Laws of typical, top-n-sigma, XTC, dynamic temperature, DRY and Mirostat: equal to llama.cpp's loops in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged.generation import repetition
from jaxpaged.generation.sampling import sample, sample_next
from jaxpaged.generation.sampling_params import SamplingParams, first_mu

jitted, jitted_next = jax.jit(sample), jax.jit(sample_next)

CHOICES: Mapping[str, list[Any]] = {
    "temperature": [-1.0, 0.0, 0.25, 1.0, 1.5],
    "top_k": [0, 1, 7, 40, 128, 129, 2500],
    "top_p": [0.5, 0.9, 1.0],
    "min_p": [0.0, 0.0, 0.05, 0.3],
    "typical_p": [1.0, 1.0, 0.0, 0.2, 0.7, 0.99],
    "top_n_sigma": [-1.0, 0.0, 0.5, 1.0, 3.0],
    "xtc_probability": [0.0, 0.5, 1.0],
    "xtc_threshold": [0.0, 0.05, 0.1, 0.5, 0.6],
    "dynatemp_range": [0.0, 0.5, 1.25],
    "dynatemp_exponent": [1.0, 0.5, 2.0, 0.0],
    "dry_multiplier": [0.0, 0.75, 3.0],
    "dry_base": [0.5, 1.0, 1.75, 4.0],
    "dry_allowed_length": [0, 1, 2, 5],
    "dry_penalty_last_n": [-1, 0, 3, 20],
    "seed": [0, 1, 12345, 2**32 - 1],
}


def dry_penalties(recent: list[int], row: Mapping[str, Any], breakers: set[int]) -> dict[int, float]:
    """DRY by its definition: for each earlier place, the longest suffix that ends there."""
    last_n, allowed = row["dry_penalty_last_n"], row["dry_allowed_length"]
    text = recent if last_n < 0 else recent[len(recent) - min(last_n, len(recent)) :]
    if not row["dry_multiplier"] or row["dry_base"] < 1 or len(text) <= allowed:
        return {}
    longest = len(text)
    for back in range(len(text)):
        if text[len(text) - 1 - back] in breakers:
            longest = back
            break
    if longest < allowed:
        return {}
    repeats: dict[int, int] = {}
    for end in range(1, len(text)):
        n = 0
        while n < min(end, longest) and text[end - 1 - n] == text[len(text) - 1 - n]:
            n += 1
        if n >= allowed and text[end] not in breakers:
            repeats[text[end]] = max(repeats.get(text[end], 0), n)
    return {token: row["dry_multiplier"] * row["dry_base"] ** (n - allowed) for token, n in repeats.items()}


def softmax(z: np.ndarray) -> np.ndarray:
    weight = np.exp(z - z.max())
    return weight / weight.sum()


def chain(
    logits: np.ndarray, row: Mapping[str, Any], recent: list[int], breakers: set[int], xtc_uniform: float
) -> tuple[np.ndarray, np.ndarray, bool]:
    """``(tokens, probabilities, close)`` of the tokens kept, by descending logit; close: rounding decides."""
    z = np.asarray(logits, np.float64).copy()
    for token, penalty in dry_penalties(recent, row, breakers).items():
        z[token] -= penalty
    close = False

    def meets(values: np.ndarray, limit: float) -> None:
        nonlocal close
        close |= bool(np.any(np.abs(values - limit) < 3e-5))

    if row["top_n_sigma"] > 0:
        finite = z[z > -np.inf]
        limit = finite.max() - row["top_n_sigma"] * finite.std()
        meets(z, limit)
        z[z < limit] = -np.inf
    order = np.argsort(-z, kind="stable")
    order = order[: row["top_k"] or None]
    order = order[z[order] > -np.inf]
    if row["typical_p"] < 1:
        p = softmax(z[order])
        score = np.abs(-np.log(p) - np.sum(-p * np.log(p)))
        by_score = np.argsort(score, kind="stable")
        close |= bool(np.any(np.diff(np.unique(score)) < 1e-5))
        cumulative = np.cumsum(p[by_score])
        meets(cumulative, row["typical_p"])
        above = cumulative > row["typical_p"]
        order = order[np.sort(by_score[: int(np.argmax(above)) + 1 if above.any() else None])]
    if row["top_p"] < 1:
        cumulative = np.cumsum(softmax(z[order]))
        meets(cumulative, row["top_p"])
        order = order[: int(np.argmax(cumulative >= row["top_p"])) + 1]
    if row["min_p"] > 0:
        limit = z[order[0]] + np.log(row["min_p"])
        meets(z[order], limit)
        order = order[z[order] >= limit]
    if row["xtc_probability"] > 0 and row["xtc_threshold"] <= 0.5 and len(order) >= 2:
        p = softmax(z[order])
        meets(p, row["xtc_threshold"] or -1)
        last = int(np.sum(p >= row["xtc_threshold"])) - 1
        if xtc_uniform <= row["xtc_probability"] and last > 0:
            order = order[last:]
    temperature = row["temperature"]
    if row["dynatemp_range"] > 0 and len(order) > 1:
        p = softmax(z[order])
        low, high = max(0.0, temperature - row["dynatemp_range"]), temperature + row["dynatemp_range"]
        relative = np.sum(-p * np.log(p)) / np.log(len(p))
        temperature = low + (high - low) * relative ** row["dynatemp_exponent"]
    if temperature <= 0:
        return order[:1], np.ones(1), close
    return order, softmax((z[order] - z[order[0]]) / temperature), close


@jax.jit
def documented_uniforms(seed: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    key = jax.random.key(seed, impl="threefry2x32")
    keys = (
        jax.random.fold_in(key, position),
        jax.random.fold_in(key, jnp.uint32(position) + jnp.uint32(2**31)),
    )
    return tuple(jax.random.uniform(k, dtype=jnp.float32) for k in keys)


def random_case(seed: int, num_seqs: int, vocab_size: int) -> tuple[Any, dict[str, list[Any]], Any, Any]:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(num_seqs, vocab_size)) * rng.choice([0.01, 1.0, 4.0], size=(num_seqs, 1))
    z[rng.random(z.shape) < rng.choice([0.0, 0.3], size=(num_seqs, 1))] = -np.inf
    z[:, 0] = 0.0
    rows = {
        name: [values[i] for i in rng.integers(len(values), size=num_seqs)]
        for name, values in CHOICES.items()
    }
    # Few different tokens, so that there are repetitions; some rows are padded.
    recent = rng.integers(0, min(3, vocab_size), size=(num_seqs, 24))
    for s in range(num_seqs):
        recent[s, : rng.choice([0, 0, 5, 23, 24])] = -1
    return z.astype(np.float32), rows, rng.integers(0, 9999, num_seqs).astype(np.int32), recent


@pytest.mark.parametrize("vocab_size", [1, 7, 300, 3001])
def test_equals_llama_cpps_chain_in_numpy(vocab_size: int) -> None:
    num_seqs, compared, breakers = 48, 0, {2}
    for seed in range(6):
        logits, rows, position, recent = random_case(seed, num_seqs, vocab_size)
        params = SamplingParams.create(num_seqs, **rows, dry_breakers=sorted(breakers))
        tokens = np.asarray(jitted(logits, params, position, recent.astype(np.int32)))
        for s in range(num_seqs):
            row = {name: values[s] for name, values in rows.items()}
            uniform, xtc_uniform = map(float, documented_uniforms(np.uint32(row["seed"]), position[s]))
            text = [int(t) for t in recent[s] if t >= 0]
            kept, p, close = chain(logits[s], row, text, breakers, xtc_uniform)
            cumulative = np.cumsum(p)
            if not close and np.abs(cumulative - uniform).min() > 1e-5:
                expected = kept[min(int(np.argmax(cumulative > uniform)), len(kept) - 1)]
                assert tokens[s] == expected, (seed, s, row)
                compared += 1
    assert compared > (0.3 if vocab_size == 1 else 0.7) * 6 * num_seqs


def test_a_row_gives_the_same_token_alone_and_in_any_batch() -> None:
    num_seqs, vocab_size = 48, 3001
    logits, rows, position, recent = random_case(3, num_seqs, vocab_size)
    rows["mirostat"] = [s % 3 for s in range(num_seqs)]
    params = SamplingParams.create(num_seqs, **rows, dry_breakers=[1])
    mu = first_mu(params)
    recent = recent.astype(np.int32)
    everything = (logits, params, position, recent, mu)
    tokens, after = jitted_next(*everything)
    for take in [*np.arange(num_seqs)[:, None], np.random.default_rng(0).permutation(num_seqs)]:
        some = jitted_next(*jax.tree.map(lambda x, t=take: x[t], everything))
        np.testing.assert_array_equal(some[0], tokens[take])
        np.testing.assert_array_equal(some[1], after[take])


def test_new_values_do_not_retrace() -> None:
    traces = []

    @jax.jit
    def counted(*args: Any) -> jax.Array:
        traces.append(1)
        return sample(*args)

    for seed in range(3):
        logits, rows, position, recent = random_case(seed, 8, 40)
        params = SamplingParams.create(8, **rows, dry_breakers=[seed], mirostat=[seed] * 8)
        counted(logits, params, position, recent.astype(np.int32))
    assert len(traces) == 1


def test_rows_without_these_samplers_are_not_changed_by_rows_with_them() -> None:
    num_seqs, vocab_size = 24, 3001
    logits, rows, position, recent = random_case(4, num_seqs, vocab_size)
    plain = {name: rows[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed")}
    before = jitted(logits, SamplingParams.create(num_seqs, **plain), position, recent.astype(np.int32))
    mixed = {name: list(values) for name, values in rows.items()}
    neutral = {
        "typical_p": 1.0, "top_n_sigma": -1.0, "xtc_probability": 0.0, "dynatemp_range": 0.0, "dry_multiplier": 0.0
    }  # fmt: skip
    for name, value in neutral.items():
        mixed[name][::2] = [value] * (num_seqs // 2)
    after = jitted(logits, SamplingParams.create(num_seqs, **mixed), position, recent.astype(np.int32))
    np.testing.assert_array_equal(before[::2], after[::2])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), max_size=16),
    st.sets(st.integers(0, 4), max_size=2),
    st.integers(0, 4),
    st.integers(-1, 16),
    st.sampled_from([1.0, 1.5, 2.0]),
)
def test_dry_penalties_are_those_of_the_definition(
    text: list[int], breakers: set[int], allowed: int, last_n: int, base: float
) -> None:
    row = {
        "dry_multiplier": 0.5, "dry_base": base, "dry_allowed_length": allowed, "dry_penalty_last_n": last_n
    }  # fmt: skip
    params = SamplingParams.create(1, **row, dry_breakers=sorted(breakers))
    recent = np.full((1, 16), -1, np.int32)
    recent[0, 16 - len(text) :] = text
    changed = jitted_dry(jnp.zeros((1, 8)), params, recent)[0]
    expected = np.zeros(8)
    for token, penalty in dry_penalties(text, row, breakers).items():
        expected[token] = -penalty
    np.testing.assert_allclose(changed, expected, rtol=1e-6)


jitted_dry = jax.jit(repetition.penalize_repeats)


def test_a_dry_penalty_stays_finite() -> None:
    params = SamplingParams.create(1, dry_multiplier=1.0, dry_base=4.0, dry_penalty_last_n=-1)
    changed = jitted_dry(jnp.zeros((1, 3)), params, jnp.ones((1, 256), jnp.int32))
    assert np.isfinite(changed).all() and changed[0, 1] < -1e37


def mirostat(
    logits: np.ndarray, version: int, temperature: float, tau: float, eta: float, mu: float, uniform: float
) -> tuple[int, float, bool]:
    """One token of Mirostat as llama.cpp's loops compute it."""
    order = np.argsort(-logits, kind="stable")
    z = logits[order].astype(np.float64) / temperature
    p = softmax(z)
    if version == 2:
        surprise = -np.log2(p)
        close = bool(np.abs(surprise - mu).min() < 1e-5)
        n = max(1, int(np.argmax(surprise > mu)) if (surprise > mu).any() else len(p))
    else:
        m = min(100, len(p))
        t = np.log(np.arange(2, m + 1) / np.arange(1, m))
        b = np.log(p[: m - 1] / p[1:m])
        s_hat = np.sum(t * b) / np.sum(t * t)
        epsilon = s_hat - 1
        k = (epsilon * 2.0**mu / (1 - float(len(p)) ** -epsilon)) ** (1 / s_hat)
        close = abs(k - round(k)) < 1e-3 * k
        n = int(np.clip(int(min(k, 1e9)), 1, len(p)))
    p = softmax(z[:n])
    cumulative = np.cumsum(p)
    close |= bool(np.abs(cumulative - uniform).min() < 1e-5)
    i = min(int(np.argmax(cumulative > uniform)), n - 1)
    return int(order[i]), mu - eta * (-np.log2(p[i]) - tau), close


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("vocab_size", [50, 3001])
def test_mirostat_equals_llama_cpps_loop_in_numpy(version: int, vocab_size: int) -> None:
    num_seqs, compared = 12, 0
    rng = np.random.default_rng(version)
    logits = (rng.normal(size=(num_seqs, vocab_size)) * rng.choice([1.0, 3.0], (num_seqs, 1))).astype(
        np.float32
    )
    rows = {
        "temperature": rng.choice([0.5, 1.0, 1.25], num_seqs).tolist(),
        "mirostat_tau": rng.choice([1.0, 3.0, 5.0], num_seqs).tolist(),
        "mirostat_eta": rng.choice([0.0, 0.1, 0.5], num_seqs).tolist(),
        "seed": list(range(num_seqs)),
    }
    params = SamplingParams.create(num_seqs, mirostat=version, **rows, dry_multiplier=2.0, repeat_penalty=3.0)
    mu, recent = first_mu(params), jnp.zeros((num_seqs, 4), jnp.int32)
    for position in range(6):
        before = np.asarray(mu)
        tokens, mu = jitted_next(logits, params, jnp.full(num_seqs, position), recent, mu)
        for s in range(num_seqs):
            row = {name: values[s] for name, values in rows.items()}
            uniform = float(documented_uniforms(np.uint32(row["seed"]), position)[0])
            token, after, close = mirostat(
                logits[s],
                version,
                row["temperature"],
                row["mirostat_tau"],
                row["mirostat_eta"],
                before[s],
                uniform,
            )
            if not close:
                assert tokens[s] == token, (position, s, row)
                assert mu[s] == pytest.approx(after, abs=1e-4)
                compared += 1
    assert compared > 0.8 * 6 * num_seqs


def test_mirostat_is_greedy_at_temperature_0_and_finds_no_token_in_nan() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 300)).astype(np.float32)
    logits[1, 5] = np.nan
    logits[2] = -np.inf
    params = SamplingParams.create(4, mirostat=[1, 2, 1, 2], temperature=[0.0, 1.0, 1.0, 0.0])
    mu, recent = first_mu(params), jnp.zeros((4, 0), jnp.int32)
    tokens, after = jitted_next(logits, params, jnp.zeros(4, jnp.int32), recent, mu)
    assert tokens.tolist() == [int(logits[0].argmax()), -1, 0, int(logits[3].argmax())]
    assert np.isfinite(after).all() and after[1] == mu[1]


def test_xtc_can_drop_the_likeliest_token_of_greedy_decoding() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]] * 3))
    params = SamplingParams.create(
        3, temperature=0.0, top_p=1.0, xtc_probability=[0.0, 1.0, 1.0], xtc_threshold=[0.1, 0.1, 0.51]
    )
    assert jitted(logits, params, jnp.arange(3), jnp.zeros((3, 0), jnp.int32)).tolist() == [0, 2, 0]


# 99.9th percentiles of chi-square. The seeds are fixed: this passes or fails once and for all.
@pytest.mark.parametrize(
    "params",
    [
        {"typical_p": 0.6},
        {"xtc_probability": 0.4, "xtc_threshold": 0.15},
        {"xtc_probability": 1.0, "xtc_threshold": 0.1, "typical_p": 0.9, "dynatemp_range": 0.75},
        {"dynatemp_range": 0.5, "dynatemp_exponent": 2.0},
        {"top_n_sigma": 1.0, "top_k": 0},
    ],
)
@pytest.mark.parametrize("over", ["position", "seed"])
def test_draws_follow_the_distribution(params: dict[str, Any], over: str) -> None:
    num_draws, vocab_size = 6000, 9
    logits = np.random.default_rng(1).normal(size=vocab_size).astype(np.float32)
    index = np.arange(num_draws)
    values = SamplingParams.create(num_draws, **params, seed=index if over == "seed" else 7 + 0 * index)
    position = index if over == "position" else np.full(num_draws, 7)
    tokens = jitted(
        jnp.broadcast_to(logits, (num_draws, vocab_size)),
        values,
        jnp.asarray(position, jnp.int32),
        jnp.zeros((num_draws, 0), jnp.int32),
    )
    row = {name: np.asarray(getattr(values, name))[0].item() for name in CHOICES}
    expected = np.zeros(vocab_size)
    chance = row["xtc_probability"]
    for share, xtc_uniform in ((chance, 0.0), (1 - chance, 2.0)):
        kept, p, _ = chain(logits, row, [], set(), xtc_uniform)
        expected[kept] += num_draws * share * p
    counts = np.bincount(np.asarray(tokens), minlength=vocab_size)
    assert np.all(counts[expected == 0] == 0)
    some = expected > 0
    assert np.sum((counts - expected)[some] ** 2 / expected[some]) < 26.1


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("typical_p", -0.1, "typical_p = -0.1: must be at least 0"),
        ("top_n_sigma", np.inf, "top_n_sigma = inf: must be finite"),
        ("xtc_probability", 1.5, "xtc_probability = 1.5: must be from 0 to 1"),
        ("xtc_threshold", -1.0, "xtc_threshold = -1.0: must be at least 0"),
        ("dynatemp_range", np.nan, "dynatemp_range = nan: must be finite"),
        ("dry_allowed_length", -1, "dry_allowed_length = -1: must be at least 0"),
        ("dry_penalty_last_n", -2, "dry_penalty_last_n = -2: must be at least -1"),
        ("dry_breakers", [-4], "dry_breakers: -4 is not a token"),
        ("mirostat", 3, r"mirostat = 3: must be 0 \(off\), 1 or 2"),
        ("mirostat", [0, 1.0], "must be an integer"),
        ("mirostat_tau", -1.0, "mirostat_tau = -1.0: must be at least 0"),
        ("mirostat_eta", np.inf, "mirostat_eta = inf: must be at least 0 and finite"),
    ],
)
def test_a_value_that_means_nothing_is_refused_by_name(name: str, value: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        SamplingParams.create(2, **{name: value})
