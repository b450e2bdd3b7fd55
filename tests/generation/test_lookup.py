"""Laws of prompt-lookup decoding: the tokens of generation without drafts, whatever the drafts."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from toy_transformer import PAGE_SIZE, VOCAB, contiguous, paged, rows_of, toy, toy_params, traces

from jaxpaged import (
    FINISH_LENGTH,
    FINISH_OUT_OF_PAGES,
    FINISH_STOP,
    ContextShift,
    Lookup,
    PagedKVCache,
    Request,
    SamplingParams,
    check_invariants,
    generate,
    generate_stream,
    reserve,
)
from jaxpaged.generation.api import run_donating
from jaxpaged.generation.lookup import find_drafts


@pytest.fixture(scope="module")
def params() -> Any:
    return toy_params()


RNG = np.random.default_rng(5)
PATTERN = RNG.integers(0, VOCAB, 7).tolist()
# One token; a text that repeats itself; one that does not.
PROMPTS = [[3], PATTERN * 3, RNG.permutation(VOCAB)[:33].tolist()]
LIMITS = [40, 33, 48]
NUM_DRAFT = 5


def pool(free: int = 60) -> PagedKVCache:
    """Four sequences; the last one, which holds no prompt, holds all pages but those."""
    cache = paged(4, 60)
    if free == 60:
        return cache
    return reserve(cache, jnp.zeros(4, jnp.int32).at[3].set((60 - free) * PAGE_SIZE))[0]


# Every test that can runs these two programs: the shapes of the cache and of the prompts are the same.
greedy = functools.partial(generate, toy, max_new_tokens=LIMITS, batch_size=16)
lookup = functools.partial(greedy, lookup=Lookup(NUM_DRAFT))


def reasons(result: Any) -> list[int]:
    return np.asarray(result.finish_reason)[:3].tolist()


def assert_counts_add_up(result: Any) -> None:
    """A sequence's steps are its tokens less those it accepts; the last step may give a stop token instead."""
    accepted, drafted, count = (
        np.asarray(x)[:3] for x in (result.accepted, result.drafted, result.num_tokens)
    )
    stopped = np.array(reasons(result)) == FINISH_STOP
    steps = count - accepted + stopped
    assert (accepted <= drafted).all() and (drafted <= NUM_DRAFT * steps).all()
    assert int(result.num_steps) >= steps.max()


def test_the_tokens_are_those_of_greedy_decoding_in_fewer_steps(params: Any) -> None:
    plain, _ = greedy(params, pool(), PROMPTS)
    result, cache = lookup(params, pool(), PROMPTS)
    assert rows_of(result) == rows_of(plain)
    assert reasons(result) == [FINISH_LENGTH] * 3
    assert_counts_add_up(result)
    drafted, accepted = int(result.drafted.sum()), int(result.accepted.sum())
    assert 0 < accepted < drafted  # the laws here are about both
    check_invariants(cache)
    assert int(cache.pages_used) == 0


def test_the_peak_is_that_of_greedy_decoding_and_its_draft(params: Any) -> None:
    result, _ = lookup(params, pool(), PROMPTS)
    fed = [len(p) + n - 1 for p, n in zip(PROMPTS, LIMITS, strict=True)]
    most = sum(-(-(n + NUM_DRAFT) // PAGE_SIZE) for n in fed)
    assert int(result.pages_peak) <= most


def test_sampled_tokens_are_those_without_drafts(params: Any) -> None:
    """Also with penalties, which see the tokens of the draft before each; so the distribution is unchanged."""
    sampling = SamplingParams.create(
        3,
        temperature=[0.3, 0.6, 1.0],
        repeat_penalty=[1.0, 1.1, 1.2],
        top_k=8,
        dry_multiplier=[0.0, 0.0, 0.1],
        xtc_probability=[0.0, 0.1, 0.0],
        typical_p=[1.0, 0.9, 1.0],
        seed=4,
    )
    plain, _ = greedy(params, pool(), PROMPTS, sampling=sampling)
    result, _ = lookup(params, pool(), PROMPTS, sampling=sampling)
    assert rows_of(result) == rows_of(plain)
    assert_counts_add_up(result)
    assert int(result.accepted.sum()) > 0


def test_samples_and_a_queue_have_the_tokens_without_drafts(params: Any) -> None:
    """Nine prompts of two samples each, for four sequences."""
    prompts = [p[i:] for p in (PROMPTS[1], PROMPTS[2], PATTERN * 2) for i in range(3)]
    options: dict[str, Any] = {
        "n": 2, "max_new_tokens": 20, "sampling": SamplingParams.create(18, temperature=0.5, seed=2)
    }  # fmt: skip
    plain, _ = greedy(params, pool(), prompts, **options)
    result, cache = lookup(params, pool(), prompts, **options)
    assert rows_of(result) == rows_of(plain)
    assert int(result.accepted.sum()) > 0
    assert int(cache.pages_used) == 0


def test_a_shifted_context_has_the_tokens_without_drafts(params: Any) -> None:
    shift = ContextShift(n_ctx=40, n_keep=3)
    options: dict[str, Any] = {"max_new_tokens": 60, "context_shift": shift}
    plain, _ = greedy(params, pool(), PROMPTS, **options)
    result, _ = lookup(params, pool(), PROMPTS, **options)
    assert rows_of(result) == rows_of(plain)
    assert int(result.accepted.sum()) > 0


@pytest.mark.parametrize("num_draft", [1, 12])
def test_longer_drafts_change_nothing_but_the_number_of_steps(params: Any, num_draft: int) -> None:
    """12 tokens: drafts that cross a page's border, and ends that cut a draft."""
    plain, _ = greedy(params, pool(), PROMPTS)
    result, _ = lookup(params, pool(), PROMPTS, lookup=Lookup(num_draft, ngram=1))
    assert rows_of(result) == rows_of(plain)


def test_any_limit_cuts_where_greedy_decoding_stops(params: Any) -> None:
    plain, _ = greedy(params, pool(), PROMPTS)
    for limit in range(33, 44):  # one compiled shape
        result, _ = lookup(params, pool(), PROMPTS, max_new_tokens=limit)
        whole, _ = greedy(params, pool(), PROMPTS, max_new_tokens=limit)
        assert rows_of(result) == rows_of(whole)
        assert_counts_add_up(result)
    assert rows_of(plain)[0] == rows_of(result)[0][:40]


def test_any_stop_token_cuts_where_greedy_decoding_stops(params: Any) -> None:
    plain, _ = greedy(params, pool(), PROMPTS)
    stopped = 0
    for token in sorted({token for row in rows_of(plain) for token in row})[:24]:
        whole, _ = greedy(params, pool(), PROMPTS, stop_ids=[token])
        result, _ = lookup(params, pool(), PROMPTS, stop_ids=[token])
        assert rows_of(result) == rows_of(whole)
        assert reasons(result) == reasons(whole)
        assert_counts_add_up(result)
        stopped += reasons(result).count(FINISH_STOP)
    assert stopped > 24


def test_kept_sequences_hold_what_greedy_decoding_keeps(params: Any) -> None:
    for stop_ids in ([], rows_of(greedy(params, pool(), PROMPTS)[0])[1][20:22]):
        whole, whole_cache = greedy(params, pool(), PROMPTS, stop_ids=stop_ids, keep=True)
        _, cache = lookup(params, pool(), PROMPTS, stop_ids=stop_ids, keep=True)
        check_invariants(cache)
        assert cache.lengths.tolist() == whole_cache.lengths.tolist()
        newest = [row[-1:] or [0] for row in rows_of(whole)]
        more, _ = generate(toy, params, whole_cache, newest, max_new_tokens=9)
        again, _ = generate(toy, params, cache, newest, max_new_tokens=9)
        assert rows_of(again) == rows_of(more)


def test_a_stream_hands_out_the_same_tokens(params: Any) -> None:
    whole, _ = lookup(params, pool(), PROMPTS)
    stream = generate_stream(
        toy, params, pool(), PROMPTS, max_new_tokens=LIMITS, lookup=Lookup(NUM_DRAFT), batch_size=16, every=3
    )
    chunks = list(stream)
    joined = [[token for chunk in chunks for token in chunk.tokens[i]] for i in range(3)]
    assert joined == rows_of(whole)[:3]
    assert all(len(t) <= 3 * (NUM_DRAFT + 1) for chunk in chunks for t in chunk.tokens)
    assert chunks[-1].finish_reason == [FINISH_LENGTH] * 3
    assert stream.result is not None and stream.result.accepted.tolist() == whole.accepted.tolist()
    assert int(stream.cache.pages_used) == 0


def test_the_contiguous_cache_gives_the_same(params: Any) -> None:
    result, _ = lookup(params, pool(), PROMPTS)
    other, cache = lookup(params, contiguous(4, 96), PROMPTS)
    assert rows_of(other) == rows_of(result)
    assert other.accepted.tolist() == result.accepted.tolist()
    assert int(cache.pages_used) == 0


@pytest.mark.parametrize("free", [3, 7, 9, 11, 13, 15])
def test_few_pages_end_sequences_as_without_drafts(params: Any, free: int) -> None:
    plain, _ = greedy(params, pool(free), PROMPTS)
    result, cache = lookup(params, pool(free), PROMPTS)
    check_invariants(cache)
    assert int(cache.pages_used) == 60 - free
    assert rows_of(result) == rows_of(plain)
    assert reasons(result) == reasons(plain)
    assert_counts_add_up(result)


@pytest.mark.parametrize("free", [5, 6, 7])
def test_a_draft_never_ends_its_own_sequence(params: Any, free: int) -> None:
    """Alone (the others end after a token), a sequence gets as far as greedy decoding with the same pages."""
    prompts, limits = [PROMPTS[1], [1], [2]], [40, 1, 1]
    plain, _ = greedy(params, pool(free), prompts, max_new_tokens=limits)
    result, _ = lookup(params, pool(free), prompts, max_new_tokens=limits)
    assert reasons(result)[0] == FINISH_OUT_OF_PAGES
    assert rows_of(result) == rows_of(plain)
    assert int(result.accepted[0]) > 0


def test_other_prompts_and_limits_do_not_retrace(params: Any) -> None:
    lookup(params, pool(), PROMPTS)
    before = next(traces)
    lookup(params, pool(), [PROMPTS[2] + [1], PROMPTS[1][:20]], max_new_tokens=45, stop_ids=[1, 2])
    assert next(traces) == before + 1


def test_the_program_writes_the_pool_in_place(params: Any) -> None:
    cache = paged(3, 4096, max_pages_per_seq=16)
    request = Request.create(cache, PROMPTS, max_new_tokens=LIMITS, batch_size=16, lookup=Lookup(NUM_DRAFT))
    memory = run_donating("cpu").lower(toy, params, cache, request).compile().memory_analysis()
    pool = cache.k_pages.nbytes + cache.v_pages.nbytes
    assert memory.alias_size_in_bytes >= pool
    assert memory.temp_size_in_bytes < pool // 8


def drafts_with_lists(text: list[int], ngram: int, num_draft: int) -> list[int] | None:
    """``find_drafts`` of one text, written plainly: None where there is nothing to copy."""
    for count in range(min(ngram, len(text) - 1), 0, -1):
        for end in range(len(text) - 1, count - 1, -1):
            if text[end - count : end] == text[-count:]:
                grown = list(text)
                for i in range(num_draft):
                    grown.append(grown[end + i])
                return grown[len(text) :]
    return None


def test_a_draft_is_what_followed_the_longest_and_latest_match() -> None:
    rng = np.random.default_rng(0)
    for ngram, num_draft in ((1, 3), (3, 5)):
        lengths = [*range(1, 17), *range(1, 17)]
        texts = rng.integers(0, 3, (32, 20))  # what stands behind a text must not matter
        draft, found = find_drafts(jnp.asarray(texts), jnp.asarray(lengths), ngram=ngram, num_draft=num_draft)
        for i, length in enumerate(lengths):
            expected = drafts_with_lists(texts[i, :length].tolist(), ngram, num_draft)
            assert bool(found[i]) == (expected is not None)
            if expected is not None:
                assert draft[i].tolist() == expected


def test_mirostat_is_refused(params: Any) -> None:
    with pytest.raises(ValueError, match="lookup cannot be used with mirostat"):
        lookup(params, pool(), PROMPTS, sampling=SamplingParams.create(3, mirostat=[0, 2, 0]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_draft": 0}, "num_draft must be positive"),
        ({"ngram": 0}, "ngram must be positive"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lookup(**changed)
