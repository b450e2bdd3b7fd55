"""A request gets the text that it would get alone, whatever else runs, waits, is preempted or shared."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_kit import (
    FEW_PAGES,
    N_CTX,
    NUM_PAGES,
    SLOTS,
    alone,
    collect,
    finish,
    greedy,
    make_engine,
    params,
    prompt,
)
from toy_transformer import VOCAB, toy_log_probabilities

from jaxpaged.engine import ContextError, EngineRequest, PoolError, QueueFullError, RefusedError
from jaxpaged.engine.swap import SwapCosts
from jaxpaged.pages import allocator


def test_requests_of_all_lengths_get_the_text_they_would_get_alone(engine):
    requests = [greedy(f"r{i}", prompt(i, 1 + 5 * i), 3 + 4 * (i % 3)) for i in range(8)]
    results = finish(engine, *requests)
    for request in requests:
        result = results[request.request_id, 0]
        assert result.tokens == alone(request.prompt, request.max_new_tokens)
        assert result.finish_reason == "length"
    stats = engine.stats()
    assert stats.compiled_late == 0
    assert stats.running == stats.waiting == stats.pages_used == 0
    assert stats.pages_free + stats.pages_cached == NUM_PAGES


def test_samples_share_the_prompt_and_have_their_own_seeds(engine):
    text = prompt(1, 21)
    before = engine.stats()
    request = EngineRequest(
        "n", text, max_new_tokens=6, n=3, temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=5
    )
    results = finish(engine, request)
    assert len({tuple(results["n", i].tokens) for i in range(3)}) > 1
    after = engine.stats()
    # The first sample computes the prompt, the others its last token.
    assert after.prompt_tokens - before.prompt_tokens == 21 + 2
    for i in range(3):
        one = EngineRequest(
            "one", text, max_new_tokens=6, temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=5 + i
        )
        assert finish(engine, one)["one", 0].tokens == results["n", i].tokens


def test_a_stop_token_ends_the_text_and_is_none_of_it(engine):
    text = prompt(2, 10)
    expected = alone(text, 12)
    stop = expected[5]
    result = finish(engine, greedy("s", text, 12, stop_ids=frozenset({stop, VOCAB - 1})))["s", 0]
    assert result.tokens == expected[: expected.index(stop)]
    assert (result.finish_reason, result.outputs[-1].stop_token) == ("stop", stop)


@pytest.mark.parametrize("count", [0, 1])
def test_a_prompt_alone_may_be_asked_for(engine, count):
    result = finish(engine, greedy("p", prompt(3, 17), count))["p", 0]
    assert result.tokens == alone(prompt(3, 17), count)
    assert result.finish_reason == "length"


def test_the_context_ends_a_text(engine):
    text = prompt(4, N_CTX - 5)
    result = finish(engine, EngineRequest("c", text, temperature=0.0))["c", 0]
    assert result.tokens == alone(text, 5)
    assert result.outputs[-1].truncated
    assert not finish(engine, greedy("d", text, 5))["d", 0].outputs[-1].truncated


def test_log_probabilities_are_those_of_the_model(engine):
    text = prompt(5, 9)
    result = finish(engine, greedy("l", text, 5, num_logprobs=4), greedy("m", prompt(6, 9), 5))["l", 0]
    tokens = list(text)
    for row in [row for output in result.outputs for row in output.logprobs]:
        expected = toy_log_probabilities(params(), tokens)
        order = np.argsort(-expected)[:4]
        assert [token for token, _ in row.top] == order.tolist()
        np.testing.assert_allclose([value for _, value in row.top], expected[order], atol=2e-4)
        assert row.logprob == pytest.approx(expected[row.token], abs=2e-4)
        tokens.append(row.token)
    assert len(tokens) == 14


def test_a_bias_changes_the_choice(engine):
    text = prompt(7, 12)
    first = alone(text, 1)[0]
    assert finish(engine, greedy("b", text, 3, logit_bias={11: 100.0}))["b", 0].tokens == [11, 11, 11]
    assert first not in finish(engine, greedy("c", text, 3, logit_bias={first: -math.inf}))["c", 0].tokens
    assert finish(engine, greedy("d", text, 3))["d", 0].tokens == alone(text, 3)


def test_penalties_see_the_text_so_far(engine):
    text, bias = prompt(8, 12), {11: 40.0, 12: 40.0, 13: 40.0}
    request = greedy(
        "f", text, 12, frequency_penalty=2.0, presence_penalty=1.0, repeat_last_n=9, logit_bias=bias
    )
    tokens = list(text)
    for _ in range(12):
        z = toy_log_probabilities(params(), tokens)
        z[list(bias)] += 40.0
        recent = np.bincount(tokens[-9:], minlength=VOCAB)
        tokens.append(int(np.argmax(z - 2.0 * recent - (recent > 0))))
    assert finish(engine, request)["f", 0].tokens == tokens[12:]
    assert len(set(tokens[12:])) == 3


def test_priorities_go_first_and_equal_ones_in_order(engine):
    requests = [greedy(f"r{i}", prompt(i, 16), 8, priority=i % 2) for i in range(7)]
    results = finish(engine, *requests)
    ended = sorted(requests, key=lambda r: results[r.request_id, 0].outputs[-1].times.finished)
    assert [r.request_id for r in ended[:3]] == ["r0", "r2", "r4"]


def test_a_slot_may_be_asked_for_and_is_waited_for(engine):
    requests = [greedy(f"r{i}", prompt(i, 6), 6 + i, slot=2) for i in range(3)]
    requests += [greedy(f"any{i}", prompt(i, 7), 5) for i in range(3)]
    results = finish(engine, *requests)
    assert all(results[f"r{i}", 0].outputs[0].slot == 2 for i in range(3))
    assert {results[f"any{i}", 0].outputs[0].slot for i in range(3)} == {0, 1, 3}
    assert results["r2", 0].tokens == alone(prompt(2, 6), 8)
    with pytest.raises(RefusedError, match="slots 0 to 3"):
        engine.add_request(greedy("x", (1,), 1, slot=SLOTS))


def test_aborting_releases_pages_within_a_step(engine):
    for i in range(6):
        engine.add_request(greedy(f"r{i}", prompt(i, 20), 40))
    for _ in range(4):
        engine.step()
    assert engine.stats().running == SLOTS
    for i in range(6):
        engine.abort(f"r{i}")
        engine.abort(f"r{i}")  # again is no error
    engine.abort("nobody")
    assert engine.has_work
    assert engine.step() == []
    engine.check_state()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert not engine.has_work


def test_one_sample_of_several_is_aborted_alone(engine):
    text = prompt(9, 14)
    results: dict = {}
    engine.add_request(greedy("n", text, 10, n=3))
    while not {("n", 1)} <= results.keys():
        collect(results, engine.step())
    engine.abort("n", 1)
    length = len(results["n", 1].tokens)
    while engine.has_work:
        collect(results, engine.step())
        engine.check_state()
    assert results["n", 0].tokens == results["n", 2].tokens == alone(text, 10)
    assert len(results["n", 1].tokens) == length


def test_what_can_never_be_served_is_refused_at_once(engine):
    before = engine.stats()
    with pytest.raises(ContextError, match=f"{N_CTX} tokens; the context of {N_CTX}") as error:
        engine.add_request(greedy("a", prompt(0, N_CTX), 1))
    assert (error.value.num_prompt, error.value.n_ctx) == (N_CTX, N_CTX)
    for text in ((VOCAB,), (-1,), ()):
        with pytest.raises(RefusedError):
            engine.add_request(greedy("a", text, 1))
    with pytest.raises(RefusedError, match="4 sequences"):
        engine.add_request(greedy("a", (1,), 1, n=SLOTS + 1))
    engine.add_request(greedy("a", (1,), 1))
    with pytest.raises(RefusedError, match="'a'"):
        engine.add_request(greedy("a", (1,), 1))
    finish(engine)
    assert engine.stats().pages_used == before.pages_used == 0


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": math.nan}, {"temperature": math.inf}, {"top_p": 0.0}, {"min_p": 1.5}, {"n": 0}, {"n": 10**9},
        {"repeat_penalty": -1.0}, {"seed": -1}, {"seed": 2**32}, {"max_new_tokens": -1}, {"num_logprobs": 21},
        {"logit_bias": {1: math.nan}}, {"logit_bias": dict.fromkeys(range(10**4), 0.0)}, {"cache_salt": "x" * 10**6},
        {"stop_ids": frozenset(range(1000))}, {"repeat_last_n": -2}, {"top_k": 2**40}, {"n_discard": -1},
    ],
)  # fmt: skip
def test_parameters_that_mean_nothing_are_refused(change):
    with pytest.raises(RefusedError, match=next(iter(change)).replace("_ids", "").split("_")[0]):
        EngineRequest("x", (1,), **change)


def test_a_full_queue_is_refused(engine):
    for i in range(8):
        engine.add_request(greedy(f"r{i}", prompt(i, 4), 2))
    with pytest.raises(QueueFullError, match="8"):
        engine.add_request(greedy("late", (1,), 1))
    finish(engine)


def test_contiguous_slots_give_the_same_texts():
    engine = make_engine(paged=False)
    for i in range(SLOTS + 1):
        engine.add_request(greedy(f"at once {i}", prompt(i, 2), 8))
    engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (SLOTS, 1)
    finish(engine)
    requests = [greedy(f"r{i}", prompt(i, 1 + 5 * i), 3 + 4 * (i % 3), n=1 + i % 2) for i in range(8)]
    results = finish(engine, *requests)
    for request in requests:
        for index in range(request.n):
            assert results[request.request_id, index].tokens == alone(request.prompt, request.max_new_tokens)
    assert engine.stats().compiled_late == 0


def test_a_pool_smaller_than_a_request_refuses_it():
    with pytest.raises(ValueError, match="n_ctx = 64 tokens: the cache has room for 40"):
        make_engine(num_pages=5)
    engine = make_engine(num_pages=FEW_PAGES)
    # As if pages had gone elsewhere since the engine was made: what it says of a request is said of the pool.
    engine.device.local = dataclasses.replace(engine.device.local, allocator=allocator.create(3))
    with pytest.raises(PoolError, match="4 pages, the whole pool has 3") as error:
        engine.add_request(greedy("a", prompt(0, 20), 10))
    assert (error.value.requested, error.value.total) == (4, 3)
    engine.add_request(greedy("b", prompt(0, 20), 4))


def test_nan_logits_end_their_own_request_and_leave_nothing_behind(engine, monkeypatch):
    """Weights whose keys, values and logits are NaN from token 13 on."""
    monkeypatch.setattr(
        engine.device, "_params", params() | {"embedding": params()["embedding"].at[13].set(jnp.nan)}
    )
    texts = [text for text in (prompt(i, 20) for i in range(99)) if 13 not in (*text, *alone(text, 9))]
    before = engine.stats()
    sick = greedy("sick", (*texts[0], 13, *texts[0][:4]), 9)
    later = greedy("later", texts[1], 9, logit_bias={13: 1e6}, num_logprobs=1)
    results = finish(engine, sick, greedy("healthy", texts[2], 9), later)
    assert (results["sick", 0].tokens, results["sick", 0].finish_reason) == ([], "nan")
    assert (results["later", 0].tokens, results["later", 0].finish_reason) == ([13], "nan")
    assert results["healthy", 0].tokens == alone(texts[2], 9)
    stats = engine.stats()
    assert stats.nan_samples - before.nan_samples == 2
    assert stats.generated_tokens - before.generated_tokens == 10
    assert stats.pages_free + stats.pages_cached == NUM_PAGES
    assert finish(engine, greedy("again", sick.prompt, 9))["again", 0].outputs[0].num_cached == 0
    # Pages that hold NaN serve others as any.
    for i, text in enumerate(texts[:6]):
        assert finish(engine, greedy(f"r{i}", text, 9))[f"r{i}", 0].tokens == alone(text, 9)


@pytest.mark.slow
def test_texts_are_the_same_with_64_bit_types(engine, monkeypatch):
    monkeypatch.setattr(SwapCosts, "swap_is_cheaper", lambda *_: True)
    sampled = {"temperature": 1.2, "top_k": 0, "seed": 2**32 - 2, "num_logprobs": 2}
    requests = [
        greedy("penalty", prompt(1, 12), 25, frequency_penalty=0.5),
        EngineRequest("sampled", prompt(2, 12), max_new_tokens=25, n=2, **sampled),
        greedy("biased", prompt(4, 12), 25, logit_bias={5: 2.0}),
    ]
    expected = finish(engine, *requests)
    with jax.enable_x64(True):
        wide = make_engine(num_pages=FEW_PAGES, max_batch_tokens=SLOTS, context_shift=True, n_ctx=40)
        assert len(finish(wide, greedy("shifted", prompt(3, 30), 60, n_keep=3))["shifted", 0].tokens) == 60
        results = finish(wide, *requests)
    assert wide.stats().swaps
    assert {key: x.tokens for key, x in results.items()} == {key: x.tokens for key, x in expected.items()}
