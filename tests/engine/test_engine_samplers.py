"""Samplers with a state or a history of their own: a request gets what one sequence gives, step by step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_kit import FEW_PAGES, finish, make_engine, params, prompt
from toy_transformer import VOCAB, toy_log_probabilities

from jaxpaged.engine import EngineRequest
from jaxpaged.generation.sampling import sample_next
from jaxpaged.generation.sampling_params import SamplingParams, first_mu

HOT = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
KINDS: list[dict[str, Any]] = [
    HOT | {"mirostat": 1, "mirostat_tau": 2.0, "mirostat_eta": 0.5},
    HOT | {"mirostat": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.3},
    {
        "dry_multiplier": 3.0,
        "dry_allowed_length": 1,
        "dry_penalty_last_n": -1,
        "dry_breakers": frozenset({3, 40}),
    },
    {"typical_p": 0.6, "top_n_sigma": 2.0, "dynatemp_range": 0.5},
    HOT | {"xtc_probability": 0.5, "xtc_threshold": 0.02},
]
next_token = jax.jit(sample_next)


def step_by_step(request: EngineRequest) -> list[int]:
    """The text of a request, one token after the other from the logits of the whole text."""
    kind = {name: value for name, value in vars(request).items() if name in SamplingParams.__annotations__}
    sampling = SamplingParams.create(1, **kind | {"dry_breakers": sorted(request.dry_breakers)})
    tokens, mu = list(request.prompt), first_mu(sampling)
    for _ in range(request.max_new_tokens):
        z = jnp.asarray(toy_log_probabilities(params(), tokens), jnp.float32)[None]
        recent = np.full((1, 64), -1, np.int32)
        recent[0, -len(tokens) :] = tokens
        token, mu = next_token(z, sampling, jnp.array([len(tokens)]), recent, mu)
        tokens.append(int(token[0]))
    return tokens[len(request.prompt) :]


def requests_of(count: int, new: int) -> list[EngineRequest]:
    # A text that repeats itself, so that there is something to penalize.
    return [
        EngineRequest(f"r{i}", prompt(i, 4) * 4, max_new_tokens=new, seed=i, **KINDS[i % len(KINDS)])
        for i in range(count)
    ]


def test_requests_get_the_text_of_one_sequence_whatever_runs_beside_them(engine) -> None:
    requests = requests_of(8, 12)
    results = finish(engine, *requests)
    for request in requests:
        assert results[request.request_id, 0].tokens == step_by_step(request), request
    assert engine.stats().compiled_late == 0


def test_a_slot_forgets_the_samplers_of_the_request_before(engine) -> None:
    plain = EngineRequest("plain", prompt(1, 9), max_new_tokens=8, slot=0, seed=3)
    before = finish(engine, plain)["plain", 0].tokens
    for i, kind in enumerate(KINDS):
        finish(engine, EngineRequest(f"k{i}", prompt(i, 9), max_new_tokens=4, slot=0, **kind))
        assert finish(engine, plain)["plain", 0].tokens == before


def test_samples_of_a_request_have_a_state_each(engine) -> None:
    request = EngineRequest("n", prompt(2, 8), max_new_tokens=10, n=3, seed=7, **KINDS[1])
    results = finish(engine, request)
    for i in range(3):
        one = EngineRequest("one", prompt(2, 8), max_new_tokens=10, seed=7 + i, **KINDS[1])
        assert results["n", i].tokens == step_by_step(one)


@pytest.mark.slow
def test_mirostats_state_survives_preemption() -> None:
    tight = make_engine(num_pages=FEW_PAGES)
    requests = [
        EngineRequest(f"r{i}", prompt(i, 12), max_new_tokens=30, seed=i, **KINDS[i % 2]) for i in range(4)
    ]
    results = finish(tight, *requests)
    assert tight.stats().preemptions
    for request in requests:
        assert results[request.request_id, 0].tokens == step_by_step(request)


@pytest.mark.parametrize(
    "change",
    [
        {"typical_p": -0.5}, {"top_n_sigma": np.inf}, {"xtc_probability": 2.0}, {"xtc_threshold": -1.0},
        {"dynatemp_range": np.nan}, {"dry_base": np.inf}, {"dry_allowed_length": -1}, {"dry_penalty_last_n": -2},
        {"mirostat": 3}, {"mirostat_tau": np.nan}, {"mirostat_eta": -0.1},
    ],
)  # fmt: skip
def test_parameters_that_mean_nothing_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        EngineRequest("x", (1,), **change)


def test_tokens_outside_the_vocabulary_break_nothing(engine) -> None:
    kind = KINDS[2] | {"dry_breakers": frozenset({3, VOCAB + 5000})}
    request = EngineRequest("x", prompt(3, 4) * 3, max_new_tokens=4, **kind)
    assert finish(engine, request)["x", 0].tokens == step_by_step(request)
