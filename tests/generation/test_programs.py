"""Laws of generation inside other programs: ``run``, ``score``, log-probabilities, processors and keys."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_transformer import VOCAB, contiguous, paged, rows_of, toy, toy_log_probabilities, toy_params

from jaxpaged import Lookup, Request, SamplingParams, check_invariants, generate, generate_stream, run, score
from jaxpaged.generation.api import run_donating

RNG = np.random.default_rng(3)
TEXTS = RNG.integers(0, VOCAB, (3, 21)).astype(np.int32)
LENS = np.asarray([5, 21, 11], np.int32)
PROMPTS = [row[:n].tolist() for row, n in zip(TEXTS, LENS, strict=True)]
NEW = 9


@pytest.fixture(scope="module")
def params() -> Any:
    return toy_params()


def sampling(temperature: float = 0.7, seed: int = 1) -> SamplingParams:
    return SamplingParams.create(3, temperature=temperature, seed=seed)


def test_run_under_jit_has_the_tokens_of_generate(params: Any) -> None:
    """Prompts, lengths and sampling are traced."""
    expected, _ = generate(toy, params, paged(3, 40), PROMPTS, max_new_tokens=NEW, sampling=sampling())

    @jax.jit
    def inside(params: Any, cache: Any, texts: Any, lens: Any, sampling: Any) -> Any:
        request = Request.create(cache, texts, prompt_lens=lens, max_new_tokens=NEW, sampling=sampling)
        return run(toy, params, cache, request)

    result, cache = inside(params, paged(3, 40), TEXTS, LENS, sampling())
    assert rows_of(result) == rows_of(expected)
    check_invariants(cache)
    assert int(cache.pages_used) == 0


def test_penalties_see_recent_tokens_where_they_are_traced(params: Any) -> None:
    penalized = SamplingParams.create(3, temperature=0, repeat_penalty=1.5, repeat_last_n=20)
    expected, _ = generate(toy, params, paged(3, 40), PROMPTS, max_new_tokens=NEW, sampling=penalized)
    plain, _ = generate(toy, params, paged(3, 40), PROMPTS, max_new_tokens=NEW)

    @jax.jit
    def inside(cache: Any, sampling: Any) -> Any:
        request = Request.create(cache, TEXTS, prompt_lens=LENS, max_new_tokens=NEW, sampling=sampling)
        return run(toy, params, cache, request)[0]

    assert rows_of(inside(paged(3, 40), penalized)) == rows_of(expected) != rows_of(plain)


@pytest.mark.parametrize("lookup", [None, Lookup(3)], ids=str)
def test_run_over_seeds_is_a_call_for_each(params: Any, lookup: Lookup | None) -> None:
    """``jit(vmap(run))`` over four seeds."""
    cache = paged(3, 40)
    request = Request.create(
        cache, PROMPTS, max_new_tokens=NEW, sampling=sampling(1.0), logprobs=2, lookup=lookup
    )
    seeds = jnp.arange(4, dtype=jnp.uint32)[:, None] * 10 + jnp.arange(
        request.sampling.num_seqs, dtype=jnp.uint32
    )

    def with_seeds(seeds: Any) -> Any:
        return run(toy, params, cache, replace(request, sampling=replace(request.sampling, seed=seeds)))[0]

    batched = jax.jit(jax.vmap(with_seeds))(seeds)
    each = jax.jit(with_seeds)
    for i in range(4):
        single = each(seeds[i])
        np.testing.assert_array_equal(batched.tokens[i], single.tokens)
        np.testing.assert_allclose(batched.logprobs[i], single.logprobs, atol=1e-5)
    assert len({str(rows_of(each(row))) for row in seeds}) == 4


def test_weights_change_without_compiling(params: Any) -> None:
    generate(toy, params, paged(3, 40), PROMPTS, max_new_tokens=NEW)
    size = run_donating("cpu")._cache_size()
    generate(toy, toy_params(1), paged(3, 40), PROMPTS, max_new_tokens=NEW)
    assert run_donating("cpu")._cache_size() == size


# --- log-probabilities ------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_model_and_of_score(params: Any) -> None:
    result, _ = generate(
        toy, params, paged(3, 40), PROMPTS, max_new_tokens=NEW, sampling=sampling(1.3), logprobs=3
    )
    rows = rows_of(result)
    texts = np.zeros((3, 32), np.int32)
    for i, (prompt, row) in enumerate(zip(PROMPTS, rows, strict=True)):
        texts[i, : len(prompt) + len(row)] = [*prompt, *row]
    for batch_size in (512, 17):  # one step, and steps of five tokens
        scored, cache = jax.jit(functools.partial(score, toy, batch_size=batch_size))(
            params, paged(3, 40), texts, LENS + NEW
        )
        check_invariants(cache)
        assert int(cache.pages_used) == 0
        for i, (prompt, row) in enumerate(zip(PROMPTS, rows, strict=True)):
            mine = np.asarray(result.logprobs)[i, : len(row)]
            np.testing.assert_allclose(scored[i, len(prompt) : len(prompt) + len(row)], mine, atol=1e-5)
            assert scored[i, 0] == 0 and not scored[i, len(prompt) + len(row) :].any()
    behind = toy_log_probabilities(params, PROMPTS[1])
    np.testing.assert_allclose(result.logprobs[1, 0], behind[rows[1][0]], atol=1e-4)
    best = np.argsort(-behind)[:3]
    assert result.top_tokens[1, 0].tolist() == best.tolist()
    np.testing.assert_allclose(result.top_logprobs[1, 0], behind[best], atol=1e-4)
    assert (np.asarray(result.top_tokens)[:3, NEW:] == -1).all()


def test_logprobs_with_drafts_and_in_a_stream_are_the_same(params: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 30, "sampling": sampling(0.3), "logprobs": 1}
    prompts = [PROMPTS[0] * 4, PROMPTS[1], PROMPTS[2] * 2]
    plain, _ = generate(toy, params, paged(3, 40), prompts, **options)
    drafted, _ = generate(toy, params, paged(3, 40), prompts, lookup=Lookup(4), **options)
    stream = generate_stream(toy, params, paged(3, 40), prompts, every=4, **options)
    for _ in stream:
        pass
    assert int(drafted.accepted.sum()) > 0
    for other in (drafted, stream.result):
        np.testing.assert_array_equal(other.tokens, plain.tokens)
        np.testing.assert_allclose(other.logprobs, plain.logprobs, atol=1e-5)
        np.testing.assert_array_equal(other.top_tokens, plain.top_tokens)


def test_score_continues_what_a_sequence_holds(params: Any) -> None:
    whole, _ = score(toy, params, paged(3, 40), jnp.asarray(TEXTS))
    first, cache = score(toy, params, paged(3, 40), jnp.asarray(TEXTS[:, :8]), keep=True)
    np.testing.assert_allclose(first, whole[:, :8], atol=1e-5)
    rest, cache = score(toy, params, cache, jnp.asarray(TEXTS[:, 8:]))
    np.testing.assert_allclose(rest[:, 1:], whole[:, 9:], atol=1e-5)
    assert int(cache.pages_used) == 0
    other, _ = score(toy, params, contiguous(3, 32), jnp.asarray(TEXTS))
    np.testing.assert_allclose(other, whole, atol=1e-5)


def test_score_without_pages_is_nan(params: Any) -> None:
    found, _ = score(toy, params, paged(3, 2), jnp.asarray(TEXTS))
    assert np.isnan(found[:, 1:]).all()


# --- processors and keys ----------------------------------------------------------------------------------


def only_even(logits: jax.Array, tokens: jax.Array, num_tokens: jax.Array) -> jax.Array:
    """Even ids only, and none that was generated before."""
    ids = jnp.arange(logits.shape[1])
    seen = jnp.any(
        (tokens[:, :, None] == ids) & (jnp.arange(tokens.shape[1])[:, None] < num_tokens[:, None, None]), 1
    )
    return jnp.where((ids % 2 == 1) | seen, -jnp.inf, logits)


def test_a_logits_processor_decides_what_may_be_sampled(params: Any) -> None:
    result, _ = generate(
        toy, params, paged(3, 40), PROMPTS, max_new_tokens=NEW, logits_processor=only_even, logprobs=0
    )
    for row in rows_of(result):
        assert len(set(row)) == NEW and all(token % 2 == 0 for token in row)
    plain, _ = generate(toy, params, paged(3, 40), PROMPTS, max_new_tokens=1, logprobs=0)
    first = int(result.tokens[0, 0])
    behind = toy_log_probabilities(params, PROMPTS[0])
    np.testing.assert_allclose(result.logprobs[0, 0], behind[first], atol=1e-4)
    assert float(plain.logprobs[0, 0]) >= float(result.logprobs[0, 0])


def test_a_logits_processor_sees_the_draft_before_each_token(params: Any) -> None:
    """``only_even`` forbids tokens that were generated before, those of the draft included."""
    prompts = [[2, 4, 6, 8] * 4, PROMPTS[1], PROMPTS[2] * 2]
    options: dict[str, Any] = {"max_new_tokens": 20, "logits_processor": only_even}
    plain, _ = generate(toy, params, paged(3, 40), prompts, **options)
    drafted, _ = generate(toy, params, paged(3, 40), prompts, lookup=Lookup(3, ngram=1), **options)
    assert int(drafted.drafted.sum()) > 0
    assert rows_of(drafted) == rows_of(plain)


def test_a_key_gives_every_sample_a_seed(params: Any) -> None:
    def texts(key: Any, **options: Any) -> list[list[int]]:
        result, _ = generate(
            toy, params, paged(3, 40), [PROMPTS[0]], n=3, max_new_tokens=NEW, key=key, **options
        )
        return rows_of(result)[:3]

    hot = {"sampling": sampling(1.5)}
    once = texts(jax.random.key(0), **hot)
    assert once == texts(jax.random.key(0), **hot) == texts(jax.random.PRNGKey(0), **hot)
    assert once != texts(jax.random.key(1), **hot)
    assert len({str(row) for row in once}) == 3
    assert texts(jax.random.key(0)), "the defaults of SamplingParams.create"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": 3}, r"key must be a key of jax.random .* got 3"),
        ({"key": jnp.zeros(3)}, r"key must be a key of jax.random .* got float32\[3\]"),
        ({"logprobs": -1}, "logprobs must not be negative, got -1"),
        ({"logits_processor": lambda z, *_: z[:, :5]}, r"must return logits \[3, 97\], got \[3, 5\]"),
    ],
)
def test_bad_arguments_are_named(params: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(toy, params, paged(3, 40), PROMPTS, max_new_tokens=NEW, **options)


def test_the_stop_token_has_a_log_probability(params: Any) -> None:
    plain, _ = generate(toy, params, paged(3, 40), PROMPTS, max_new_tokens=NEW, logprobs=0)
    stop = rows_of(plain)[0][4]
    result, _ = generate(toy, params, paged(3, 40), PROMPTS, max_new_tokens=NEW, logprobs=0, stop_ids=[stop])
    count = int(result.num_tokens[0])
    np.testing.assert_allclose(result.stop_logprob[0], plain.logprobs[0, count], atol=1e-5)
    assert (np.asarray(result.stop_logprob != 0) == (np.asarray(result.num_tokens) < NEW))[:3].all()


def test_unmodified_sampling_draws_from_the_models_distribution(params: Any) -> None:
    """Frequencies of the first token of many samples."""
    sampling = SamplingParams.unmodified(400, seed=3)
    result, _ = generate(toy, params, paged(16, 120), [PROMPTS[0]] * 400, max_new_tokens=1, sampling=sampling)
    expected = np.exp(toy_log_probabilities(params, PROMPTS[0]))
    found = np.bincount(np.asarray(result.tokens)[:400, 0], minlength=VOCAB) / 400
    assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / 400)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda *a: toy(*a)[::-1], r"\(logits \[R, V\], cache\), .* got \(PagedKVCache, "),
        (lambda *a: toy(*a)[0], "R = 3, got ShapeDtypeStruct"),
        (lambda p, t, c, b, r: (toy(p, t, c, b, r)[0][:1], c), r"R = 3, got logits float32\[1, 97\]"),
    ],
)
def test_a_model_that_returns_something_else_is_named(params: Any, model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, params, paged(3, 40), PROMPTS, max_new_tokens=NEW)


def test_generate_under_jit_names_run(params: Any) -> None:
    with pytest.raises(ValueError, match=r"under jit, call run\(model, params, cache, Request.create"):
        jax.jit(lambda p: generate(toy, p, paged(3, 40), PROMPTS, max_new_tokens=NEW)[0])(params)


@pytest.mark.parametrize(
    ("texts", "lens", "message"),
    [
        (TEXTS[0], None, r"traced prompts must be one integer array \[B, T\] .* got int32\[21\]"),
        (TEXTS.astype(np.float32), None, r"got float32\[3, 21\]"),
        (TEXTS, LENS[:2], r"prompt_lens must be \[3\], one for each prompt, got \[2\]"),
    ],
)
def test_traced_prompts_of_another_form_are_named(texts: Any, lens: Any, message: str) -> None:
    def create(texts: Any) -> Any:
        return Request.create(paged(3, 40), texts, prompt_lens=lens, max_new_tokens=NEW)

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(create, texts)


@pytest.mark.parametrize(
    ("texts", "lens", "message"),
    [
        (TEXTS[0], None, r"tokens must be integers \[B, T\] with B from 1 to 3 .* got int32\[21\]"),
        (np.zeros((4, 2), np.int32), None, r"got int32\[4, 2\]"),
        (TEXTS, LENS[:2], r"lens must be \[3\], one for each text, got \[2\]"),
    ],
)
def test_texts_of_another_form_are_named(params: Any, texts: Any, lens: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(toy, params, paged(3, 40), jnp.asarray(texts), lens)
