"""Laws of beam search, against one written in plain Python with lists."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from toy_transformer import (
    VOCAB,
    contiguous,
    paged,
    rows_of,
    toy,
    toy_log_probabilities,
    toy_params,
    traces,
)

from jaxpaged import (
    FINISH_LENGTH,
    FINISH_OUT_OF_PAGES,
    FINISH_STOP,
    PagedKVCache,
    check_invariants,
    generate,
    reserve,
    seq_copy,
    seq_reorder,
)
from jaxpaged.generation import beams as rooms
from jaxpaged.generation.api import beam_request, beam_search, run_donating
from jaxpaged.generation.request import EarlyStopping
from jaxpaged.generation.result import BeamResult
from jaxpaged.generation.stream import GenerateStream


@pytest.fixture(scope="module")
def params() -> Any:
    return toy_params()


PROMPTS = [np.random.default_rng(i).integers(0, VOCAB, n).tolist() for i, n in enumerate((1, 19, 33))]
WIDTH, LIMIT = 3, 12
# So many that hypotheses end all the time.
STOPS = tuple(range(0, VOCAB, 13))
Found = list[tuple[float, list[int], int]]


def search(
    params: Any,
    prompt: Sequence[int],
    width: int,
    limit: int,
    length_penalty: float,
    early_stopping: EarlyStopping,
    stops: Sequence[int],
) -> Found:
    """Beam search with lists: (score, tokens without the stop token, reason), the best first."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: Found = []
    for length in range(1, limit + 1):
        continued = []
        for score, tokens in beams:
            behind = toy_log_probabilities(params, [*prompt, *tokens])
            continued += [(score + behind[t], [*tokens, t]) for t in range(VOCAB)]
        continued.sort(reverse=True)
        for score, tokens in continued[:width]:
            if tokens[-1] in stops:
                finished.append((score / length**length_penalty, tokens[:-1], FINISH_STOP))
            elif length == limit:
                finished.append((score / length**length_penalty, tokens, FINISH_LENGTH))
        finished = sorted(finished, reverse=True)[:width]
        beams = [beam for beam in continued if beam[1][-1] not in stops][:width]
        if len(finished) == width:
            reach = limit if early_stopping == "never" and length_penalty > 0 else length
            if early_stopping is True or beams[0][0] / reach**length_penalty <= finished[-1][0]:
                break
    return finished


def found(result: BeamResult, prompt: int) -> Found:
    """The sequences of one prompt, as ``search`` gives them."""
    columns = (np.asarray(x)[prompt] for x in (result.score, result.tokens, result.num_tokens))
    reasons = np.asarray(result.finish_reason)[prompt].tolist()
    return [
        (score.item(), tokens[:n].tolist(), reason)
        for score, tokens, n, reason in zip(*columns, reasons, strict=True)
    ]


def assert_same(ours: Found, theirs: Found) -> None:
    assert [x[1:] for x in ours] == [x[1:] for x in theirs]
    np.testing.assert_allclose([x[0] for x in ours], [x[0] for x in theirs], atol=1e-4)


# Every test that can runs this one program: the shapes of the cache and of the prompts are the same.
run = functools.partial(
    beam_search, toy, num_beams=WIDTH, num_return_sequences=WIDTH, max_new_tokens=LIMIT, batch_size=16
)


def pool(free: int = 60) -> PagedKVCache:
    """Ten sequences; the last one, which no search uses, holds all pages but those."""
    cache = paged(10, 60)
    if free == 60:
        return cache
    return reserve(cache, jnp.zeros(10, jnp.int32).at[9].set((60 - free) * 8))[0]


def assert_all_given_back(cache: Any, held: int = 0) -> None:
    check_invariants(cache)
    assert int(cache.pages_used) == held
    assert (np.asarray(cache.lengths)[:9] == 0).all()


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5, -0.5])
def test_sequences_and_scores_are_those_of_a_search_with_lists(
    params: Any, length_penalty: float, early_stopping: EarlyStopping
) -> None:
    result, cache = run(
        params,
        pool(),
        PROMPTS,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        stop_ids=STOPS,
    )
    for i, prompt in enumerate(PROMPTS):
        expected = search(params, prompt, WIDTH, LIMIT, length_penalty, early_stopping, STOPS)
        assert_same(found(result, i), expected)
    assert np.asarray(result.complete).all()
    assert_all_given_back(cache)


def test_the_searches_above_end_in_every_way(params: Any) -> None:
    """Else they would say little: by a stop token, at the limit, before the limit, and with different winners."""
    ways = list(itertools.product((0.0, 1.0, 2.5, -0.5), (False, True, "never")))
    all_found = [search(params, PROMPTS[1], WIDTH, LIMIT, *way, STOPS) for way in ways]
    assert {reason for found in all_found for _, _, reason in found} == {FINISH_STOP, FINISH_LENGTH}
    assert len({str(found) for found in all_found}) > 5
    assert len({str(found[0][1]) for found in all_found}) > 1


def test_without_stop_tokens_and_for_each_prompt_its_own_limit(params: Any) -> None:
    limits = [12, 1, 7]
    result, _ = run(params, pool(), PROMPTS, max_new_tokens=limits)
    for i, (prompt, limit) in enumerate(zip(PROMPTS, limits, strict=True)):
        assert_same(found(result, i), search(params, prompt, WIDTH, limit, 1.0, False, ()))


def test_paged_and_contiguous_find_the_same(params: Any) -> None:
    result, _ = run(params, pool(), PROMPTS, stop_ids=STOPS)
    other, cache = run(params, contiguous(10, 64), PROMPTS, stop_ids=STOPS)
    for i in range(len(PROMPTS)):
        assert_same(found(result, i), found(other, i))
    assert int(cache.pages_used) == 0


def test_in_several_programs_it_finds_the_same(params: Any) -> None:
    result, _ = run(params, pool(), PROMPTS, stop_ids=STOPS)
    cache = pool()
    request = beam_request(
        cache,
        PROMPTS,
        num_beams=WIDTH,
        num_return_sequences=WIDTH,
        max_new_tokens=LIMIT,
        stop_ids=STOPS,
        batch_size=16,
    )
    stream = GenerateStream(toy, params, cache, request, num_samples=3 * WIDTH, every=3)
    chunks = iter(stream)
    next(chunks)
    lengths = np.asarray(stream.cache.lengths)[: 3 * WIDTH]
    assert lengths[-WIDTH:].tolist() == [len(PROMPTS[2])] * WIDTH, "the last prompt has just been prefilled"
    for _ in chunks:
        pass
    other = stream.result
    for i in range(len(PROMPTS)):
        assert_same(found(other, i), found(result, i))
    assert_all_given_back(stream.cache)


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0)])
def test_a_prompt_finds_the_same_at_any_place(params: Any, order: Sequence[int]) -> None:
    result, _ = run(params, pool(), PROMPTS, stop_ids=STOPS)
    turned, _ = run(params, pool(), [PROMPTS[i] for i in order], stop_ids=STOPS)
    for place, i in enumerate(order):
        assert_same(found(turned, place), found(result, i))


def test_one_beam_is_greedy(params: Any) -> None:
    greedy, _ = generate(toy, params, paged(3, 40), PROMPTS, max_new_tokens=LIMIT)
    result, _ = run(params, paged(3, 40), PROMPTS, num_beams=1, num_return_sequences=1)
    assert [found(result, i)[0][1] for i in range(3)] == rows_of(greedy)


def test_a_beam_wide_enough_finds_the_best_of_all_continuations(params: Any) -> None:
    first = toy_log_probabilities(params, PROMPTS[0])
    second = np.stack([toy_log_probabilities(params, [*PROMPTS[0], t]) for t in range(VOCAB)])
    best = np.sort((first[:, None] + second).reshape(-1))[::-1] / 2
    cache = paged(VOCAB, VOCAB)
    result, _ = run(params, cache, PROMPTS[:1], num_beams=VOCAB, num_return_sequences=VOCAB, max_new_tokens=2)
    np.testing.assert_allclose(np.asarray(result.score)[0], best[:VOCAB], atol=1e-4)


def test_beams_share_the_prompt_and_what_they_have_in_common(params: Any) -> None:
    prompt = PROMPTS[1]
    result, _ = run(params, pool(), [prompt])
    alone = -(-(len(prompt) + LIMIT - 1) // 8)  # the newest token is never fed back
    assert int(result.unshared_peak) == WIDTH * alone
    # What is left when the prompt's whole pages are shared and nothing else is.
    prompts_shared = len(prompt) // 8 + WIDTH * (alone - len(prompt) // 8)
    assert alone <= int(result.pages_peak) <= prompts_shared
    assert float(result.pages_mean) < float(result.unshared_mean) <= int(result.unshared_peak)


@pytest.mark.parametrize("free", [4, 8, 9])
def test_out_of_pages_ends_prompts_with_the_best_they_have_and_serves_the_others(
    params: Any, free: int
) -> None:
    roomy, _ = run(params, pool(), PROMPTS, stop_ids=STOPS)
    result, cache = run(params, pool(free), PROMPTS, stop_ids=STOPS)
    assert_all_given_back(cache, held=60 - free)
    complete = np.asarray(result.complete)
    assert not complete[:3].all()
    for i, prompt in enumerate(PROMPTS):
        if complete[i]:
            assert_same(found(result, i), found(roomy, i))
            continue
        for score, tokens, reason in found(result, i):
            assert reason in (FINISH_STOP, FINISH_OUT_OF_PAGES)
            if score == -np.inf:
                assert (tokens, reason) == ([], FINISH_OUT_OF_PAGES)
            elif reason == FINISH_OUT_OF_PAGES:  # not finished, so no stop token's probability is in it
                behind = [toy_log_probabilities(params, [*prompt, *tokens[:j]]) for j in range(len(tokens))]
                mean = np.mean([row[t] for row, t in zip(behind, tokens, strict=True)])
                np.testing.assert_allclose(score, mean, atol=1e-4)


def test_a_prompt_out_of_pages_leaves_them_to_those_behind_it(params: Any) -> None:
    """The first prompt's beams wait for pages while those behind it run, and end where nobody has any."""
    prompts, limits = [PROMPTS[2][1:], PROMPTS[0], PROMPTS[1]], [12, 12, 2]
    roomy, _ = run(params, pool(), prompts, max_new_tokens=limits)
    result, _ = run(params, pool(10), prompts, max_new_tokens=limits)
    assert np.asarray(result.complete).tolist() == [False, True, True]
    assert np.asarray(result.finish_reason)[0].tolist() == [FINISH_OUT_OF_PAGES] * 3
    assert np.asarray(result.num_tokens)[0].tolist() == [9, 9, 9]
    for i in (1, 2):
        assert_same(found(result, i), found(roomy, i))


def test_a_search_continues_what_a_sequence_holds_and_leaves_others_alone(params: Any) -> None:
    """The prefix of a kept sequence, shared: neither the search nor its end touches the keeper."""
    whole, _ = run(params, pool(), PROMPTS, stop_ids=STOPS)
    prefix, rest = PROMPTS[2][:20], PROMPTS[2][20:]
    _, cache = generate(toy, params, pool(), [prefix], max_new_tokens=1, keep=True)
    kept = seq_reorder(cache, jnp.full(10, 10).at[9].set(0))
    assert np.asarray(kept.lengths).tolist() == [0] * 9 + [20]
    for _ in range(2):
        cache, _ = seq_copy(kept, 9, 0)
        result, kept = run(params, cache, [rest, PROMPTS[2], PROMPTS[1][:8]], stop_ids=STOPS)
        assert_same(found(result, 0), found(whole, 2))
        assert_same(found(result, 1), found(whole, 2))
        assert_all_given_back(kept, held=3)


def test_other_prompts_limits_and_parameters_do_not_retrace(params: Any) -> None:
    run(params, pool(), PROMPTS)
    before = next(traces)
    run(
        params,
        pool(),
        [PROMPTS[2] + [5], PROMPTS[0] * 2, PROMPTS[1]],
        max_new_tokens=[9, 12, 10],
        length_penalty=0.3,
        early_stopping="never",
        stop_ids=[3, 4],
    )
    assert next(traces) == before + 1


def test_the_program_writes_the_pool_in_place(params: Any) -> None:
    cache = paged(9, 4096, max_pages_per_seq=8)
    request = beam_request(cache, PROMPTS, num_beams=WIDTH, max_new_tokens=8, batch_size=64)
    program = run_donating("cpu").lower(toy, params, cache, request).compile()
    memory = program.memory_analysis()
    pool = cache.k_pages.nbytes + cache.v_pages.nbytes
    assert memory.alias_size_in_bytes >= pool
    assert memory.temp_size_in_bytes < pool // 8


def test_candidates_without_numbers_are_no_candidates() -> None:
    """NaN in the row of a beam that is not there, and a row that is nothing but -inf."""
    logits = jnp.stack([jnp.arange(5.0), jnp.full(5, jnp.nan), jnp.full(5, -jnp.inf)])
    going, either, invalid = rooms._candidates(logits, jnp.array([[0.0, -jnp.inf, -1.0]]), jnp.array([4, -1]))
    assert invalid.tolist() == [False]
    assert going.parent.tolist() == either.parent.tolist() == [[0, 0, 0]]
    assert going.token.tolist() == [[3, 2, 1]]
    assert either.token.tolist() == [[4, 3, 2]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": []}, "prompts must be 1 to 3"),
        ({"prompts": [[1]] * 4}, "prompts must be 1 to 3"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[-2]]}, "negative token id"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"num_beams": 11}, "num_beams must be 1 to 10"),
        ({"num_return_sequences": 4}, "num_return_sequences must be 1 to 3"),
        ({"length_penalty": float("inf")}, "length_penalty must be finite"),
        ({"early_stopping": "sometimes"}, 'False, True or "never"'),
    ],
)
def test_bad_arguments_are_named(params: Any, changed: dict[str, Any], message: str) -> None:
    arguments = {"prompts": PROMPTS, **changed}
    with pytest.raises(ValueError, match=message):
        run(params, pool(), arguments.pop("prompts"), **arguments)
