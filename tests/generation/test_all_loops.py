"""Laws of every way to generate: ``generate``, its stream, beam search, prompt lookup and its stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_transformer import VOCAB, paged, toy, toy_params

from jaxpaged import (
    FINISH_LENGTH,
    FINISH_NAN,
    beam_search,
    check_invariants,
    generate,
    generate_lookup,
    generate_stream,
)
from jaxpaged.generation.loop import LimitVocab
from jaxpaged.generation.speculative import lookup_stream

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
    "lookup": lambda *arguments, **options: rows(*generate_lookup(*arguments, **options)),
    "lookup_stream": lambda *arguments, **options: streamed(lookup_stream(*arguments, **options)),
}
every_loop = pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)


@pytest.fixture(scope="module")
def params() -> Any:
    return toy_params()


@every_loop
def test_nan_ends_its_own_sequence_with_a_reason_and_frees_its_pages(loop: Loop, params: Any) -> None:
    def overflowing(params: Any, tokens: Any, cache: Any, batch: Any, rows: Any) -> Any:
        logits, cache = toy(params, tokens, cache, batch, rows)
        # The second prompt has 19 tokens: its fifth logits are those of position 22.
        wrong = (batch.sequence[rows] == second) & (batch.position[rows] >= 22)
        return logits.at[:, 3].set(jnp.where(wrong, jnp.nan, logits[:, 3])), cache

    second = 2 if loop is beams else 1
    arguments = (params, paged(6, 60), PROMPTS)
    healthy, _, _ = loop(toy, *arguments, max_new_tokens=LIMIT)
    texts, reasons, cache = loop(overflowing, params, paged(6, 60), PROMPTS, max_new_tokens=LIMIT)
    assert reasons == [FINISH_LENGTH, FINISH_NAN, FINISH_LENGTH]
    assert [texts[0], texts[2]] == [healthy[0], healthy[2]]
    assert texts[1] == ([] if loop is beams else healthy[1][:4])
    check_invariants(cache)
    assert int(cache.pages_used) == 0


@every_loop
def test_nan_in_the_first_logits_gives_no_token(loop: Loop, params: Any) -> None:
    broken = params | {"head": params["head"] * jnp.nan}
    texts, reasons, cache = loop(toy, broken, paged(6, 60), PROMPTS, max_new_tokens=LIMIT)
    assert (texts, reasons) == ([[]] * 3, [FINISH_NAN] * 3)
    assert int(cache.pages_used) == 0


@pytest.mark.parametrize("loop", [generate, generate_lookup])
def test_a_kept_sequence_with_nan_is_not_kept(loop: Any, params: Any) -> None:
    broken = params | {"head": params["head"] * jnp.nan}
    _, cache = loop(toy, broken, paged(3, 60), PROMPTS, max_new_tokens=LIMIT, keep=True)
    assert int(cache.pages_used) == 0


@every_loop
def test_ids_behind_a_limited_vocabulary_are_never_sampled(loop: Loop, params: Any) -> None:
    padding = jnp.full((params["head"].shape[0], 15), jnp.nan).at[:, 1].set(1e3)
    padded = params | {"head": jnp.concatenate([params["head"], padding], axis=1)}
    expected, _, _ = loop(toy, params, paged(6, 60), PROMPTS, max_new_tokens=LIMIT)
    texts, reasons, _ = loop(LimitVocab(toy, VOCAB), padded, paged(6, 60), PROMPTS, max_new_tokens=LIMIT)
    assert texts == expected
    assert reasons == [FINISH_LENGTH] * 3


def test_a_limit_beyond_the_logits_is_refused(params: Any) -> None:
    with pytest.raises(ValueError, match="vocab_size must be 1 to 97"):
        generate(LimitVocab(toy, VOCAB + 1), params, paged(3, 60), PROMPTS, max_new_tokens=1)
