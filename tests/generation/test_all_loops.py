"""Laws of every way to generate: ``generate``, its stream, beam search, prompt lookup and its stream."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_transformer import VOCAB, paged, toy, toy_params, traces

from jaxpaged import (
    FINISH_LENGTH,
    FINISH_NAN,
    beam_search,
    check_invariants,
    generate,
    generate_stream,
)
from jaxpaged.generation.loop import LimitVocab
from jaxpaged.generation.request import Lookup
from jaxpaged.generation.sampling_params import SamplingParams

PROMPTS = [np.random.default_rng(i).integers(0, VOCAB, n).tolist() for i, n in enumerate((5, 19, 11))]
LIMIT = 12
Loop = Callable[..., tuple[list[list[int]], list[int], Any]]
"""Returns the tokens of each prompt, the best first where there are several, the finish reasons, and the cache."""


def rows(result: Any, cache: Any) -> tuple[list[list[int]], list[int], Any]:
    tokens, counts, reasons = map(np.asarray, (result.tokens, result.num_tokens, result.finish_reason))
    texts = [row[:n].tolist() for row, n in zip(tokens, counts, strict=True)]
    return texts[: len(PROMPTS)], reasons[: len(PROMPTS)].tolist(), cache


def streamed(stream: Any) -> tuple[list[list[int]], list[int], Any]:
    chunks = list(stream)
    texts = [[token for chunk in chunks for token in chunk.tokens[i]] for i in range(len(PROMPTS))]
    return texts, chunks[-1].finish_reason, stream.cache


def beams(*arguments: Any, **options: Any) -> tuple[list[list[int]], list[int], Any]:
    result, cache = beam_search(*arguments, num_beams=2, **options)
    return rows(jax.tree.map(lambda x: x[:, 0] if x.ndim > 1 else x, result), cache)


LOOPS: dict[str, Loop] = {
    "generate": lambda *arguments, **options: rows(*generate(*arguments, **options)),
    "stream": lambda *arguments, **options: streamed(generate_stream(*arguments, **options)),
    "beams": beams,
    "lookup": lambda *arguments, **options: rows(*generate(*arguments, lookup=Lookup(), **options)),
    "lookup_stream": lambda *arguments, **options: streamed(
        generate_stream(*arguments, lookup=Lookup(), **options)
    ),
}
every_loop = pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)


NEVER = 2**30


@pytest.fixture(scope="module")
def params() -> Any:
    """Weights with 15 columns of padding in the vocabulary, which would win or be NaN, and no NaN elsewhere."""
    weights = toy_params()
    padding = jnp.full((weights["head"].shape[0], 15), jnp.nan).at[:, 1].set(1e3)
    return weights | {
        "head": jnp.concatenate([weights["head"], padding], axis=1),
        "nan_from": jnp.full(6, NEVER, jnp.int32),
    }


def padded(params: Any, tokens: Any, cache: Any, batch: Any, rows: Any) -> Any:
    """The toy, with a NaN in the logits of sequence s from position ``nan_from[s]`` on."""
    logits, cache = toy(params, tokens, cache, batch, rows)
    wrong = batch.position[rows] >= params["nan_from"][jnp.minimum(batch.sequence[rows], 5)]
    return logits.at[:, 3].set(jnp.where(wrong, jnp.nan, logits[:, 3])), cache


MODEL = LimitVocab(padded, VOCAB)


def run(
    loop: Loop, params: Any, prompts: Any = PROMPTS, **options: Any
) -> tuple[list[list[int]], list[int], Any]:
    """Runs one model with one size of everything, so that a loop is compiled once for most tests."""
    return loop(MODEL, params, paged(6, 60), prompts, max_new_tokens=LIMIT, **options)


@every_loop
def test_ids_behind_a_limited_vocabulary_are_never_sampled(loop: Loop, params: Any) -> None:
    texts, reasons, _ = run(loop, params)
    assert reasons == [FINISH_LENGTH] * 3
    assert {len(text) for text in texts} == {LIMIT}
    assert all(0 <= token < VOCAB for text in texts for token in text)


@every_loop
def test_nan_ends_its_own_sequence_with_a_reason_and_frees_its_pages(loop: Loop, params: Any) -> None:
    healthy, _, _ = run(loop, params)
    # The second prompt has 19 tokens: position 22 gives its fifth logits.
    sequence = 2 if loop is beams else 1
    broken = params | {"nan_from": params["nan_from"].at[sequence].set(22)}
    texts, reasons, cache = run(loop, broken)
    assert reasons == [FINISH_LENGTH, FINISH_NAN, FINISH_LENGTH]
    assert [texts[0], texts[2]] == [healthy[0], healthy[2]]
    assert texts[1] == ([] if loop is beams else healthy[1][:4])
    check_invariants(cache)
    assert int(cache.pages_used) == 0


@every_loop
def test_nan_in_the_first_logits_gives_no_token(loop: Loop, params: Any) -> None:
    texts, reasons, cache = run(loop, params | {"nan_from": jnp.zeros(6, jnp.int32)})
    assert (texts, reasons) == ([[]] * 3, [FINISH_NAN] * 3)
    assert int(cache.pages_used) == 0


@pytest.mark.parametrize("name", ["generate", "lookup"])
def test_a_kept_sequence_with_nan_is_not_kept(name: str, params: Any) -> None:
    broken = params | {"nan_from": params["nan_from"].at[1].set(22)}
    _, reasons, cache = run(LOOPS[name], broken, keep=True)
    assert reasons == [FINISH_LENGTH, FINISH_NAN, FINISH_LENGTH]
    assert [bool(n) for n in cache.lengths[:3]] == [True, False, True]


def test_a_limit_beyond_the_logits_is_refused(params: Any) -> None:
    with pytest.raises(ValueError, match="vocab_size must be 1 to 112"):
        generate(LimitVocab(toy, 113), params, paged(6, 60), PROMPTS, max_new_tokens=1)


LENS = [len(prompt) for prompt in PROMPTS]
ARRAY = np.full((3, max(LENS) + 2), 96)
for row, prompt in zip(ARRAY, PROMPTS, strict=True):
    row[: len(prompt)] = prompt


@every_loop
@pytest.mark.parametrize(
    ("prompts", "lens"),
    [
        (ARRAY, LENS),
        (jnp.asarray(ARRAY), jnp.asarray(LENS)),
        (ARRAY.astype(np.uint8), np.asarray(LENS, np.int64)),
        ([np.asarray(prompt) for prompt in PROMPTS], None),
        ([jnp.asarray(prompt) for prompt in PROMPTS], None),
        (ARRAY.tolist(), LENS),
    ],
    ids=["numpy", "jax", "other dtypes", "list of numpy", "list of jax", "padded lists"],
)
def test_prompts_may_be_arrays(loop: Loop, params: Any, prompts: Any, lens: Any) -> None:
    assert run(loop, params, prompts, prompt_lens=lens)[:2] == run(loop, params)[:2]


@every_loop
@pytest.mark.parametrize(
    ("prompts", "lens", "message"),
    [
        (
            ARRAY.astype(float),
            None,
            "prompt 0 must be a list or 1-D array of integer token ids, got float64[21]",
        ),
        (
            jnp.zeros((3, 4), bool),
            None,
            "prompt 0 must be a list or 1-D array of integer token ids, got bool[4]",
        ),
        (np.arange(5), None, "prompts must be lists of token ids or an array [B, T], got int64[5]"),
        (jnp.zeros((2, 3, 4), jnp.int32), None, "an array [B, T], got int32[2, 3, 4]"),
        ([1, 2, 3], None, "prompt 0 must be a list or 1-D array of integer token ids, got 1"),
        (
            [[1, 2], [3, [4, 5]]],
            None,
            "prompt 1 must be a list or 1-D array of integer token ids, got [3, [4, 5]]",
        ),
        ([[1, 2], "text"], None, "prompt 1 must be a list or 1-D array of integer token ids, got 'text'"),
        ([[1, 2], []], None, "prompt 1 is empty"),
        ([[1, 2], [3, -4]], None, "prompt 1 holds a negative token id, -4"),
        ([[1, 2**31]], None, "prompt 0 holds a token id that does not fit 32 bits, 2147483648"),
        (ARRAY, [5, 19], "prompt_lens must be 3 integers, one for each prompt, got [5, 19]"),
        (ARRAY, [5.0, 19.0, 11.0], "prompt_lens must be 3 integers"),
        (ARRAY, [5, 22, 11], "prompt_lens[1] must be 1 to 21, got 22"),
        (ARRAY, [0, 19, 11], "prompt_lens[0] must be 1 to 21, got 0"),
    ],
)
def test_other_prompts_are_refused_in_a_line(
    loop: Loop, params: Any, prompts: Any, lens: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        run(loop, params, prompts, prompt_lens=lens)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["generate", "stream", "beams", "lookup"])
def test_x64_changes_no_token(name: str, params: Any) -> None:
    loop = LOOPS[name]
    expected = run(loop, params)
    with jax.enable_x64(True):
        texts, reasons, cache = run(loop, params)
        assert (texts, reasons) == expected[:2]
        assert {leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)} == {4}


def test_the_repr_of_a_result_shows_shapes_and_fetches_nothing(params: Any) -> None:
    result, _ = generate(MODEL, params, paged(6, 60), PROMPTS, max_new_tokens=LIMIT)
    for array in jax.tree.leaves(result):
        array.delete()
    assert repr(result) == (
        "GenerateResult(tokens=int32[6, 4096], num_tokens=int32[6], finish_reason=int32[6], "
        "logprobs=float32[6, 0], stop_logprob=float32[0], top_tokens=int32[6, 0, 0], "
        "top_logprobs=float32[6, 0, 0], drafted=int32[6], "
        "accepted=int32[6], pages_peak=int32[], num_steps=int32[])"
    )
    stream = generate_stream(MODEL, params, paged(6, 60), PROMPTS, max_new_tokens=LIMIT)
    assert "Array" not in repr(stream) and "\n" not in repr(stream)


def test_requests_share_a_program() -> None:
    """Prompts in steps of one size and any limit; with ``fixed_steps`` prompts of any length, too."""
    weights = toy_params()

    def programs(length: int, new: int, temperature: float = 0.0, **options: Any) -> int:
        before = next(traces)
        prompts, sampling = [np.arange(length) % 50], SamplingParams.create(1, temperature=temperature)
        run = generate_stream if options else generate
        out = run(toy, weights, paged(1, 1100), prompts, max_new_tokens=new, sampling=sampling, **options)
        for _ in out if options else ():
            break
        return next(traces) - before - 1

    assert programs(5, LIMIT) > 0
    assert [programs(length, 1 + 300 * length) for length in range(5, 14)] == [0] * 9
    fixed: dict[str, Any] = {"batch_size": 64, "fixed_steps": True}
    assert programs(5, LIMIT, **fixed) > 0
    for length, new, temperature in ((1, 4096, 1.0), (42, 60, 0.0), (700, 1, 0.7), (4096, 4000, 0.0)):
        assert programs(length, new, temperature, **fixed) == 0
