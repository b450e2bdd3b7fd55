"""Laws of generation, on a toy transformer of pure jax.numpy: nothing here needs flax or a file."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged import (
    FINISH_LENGTH,
    FINISH_OUT_OF_PAGES,
    FINISH_STOP,
    ContextShift,
    ContiguousKVCache,
    GroupedKVCache,
    LayerGroup,
    Lookup,
    PagedKVCache,
    Rope,
    SamplingParams,
    check_invariants,
    generate,
    generate_stream,
    read_snapshot,
    restore,
    snapshot,
)
from jaxpaged.generation.loop import begin
from jaxpaged.generation.request import Request
from jaxpaged.generation.stream import advance_donating

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 97, 32, 4, 2, 8, 2
FREQUENCIES = 100.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
ROPE = Rope.create(FREQUENCIES)
traces = itertools.count()


def toy(params: Any, tokens: jax.Array, cache: Any, batch: Any, rows: jax.Array) -> tuple[jax.Array, Any]:
    next(traces)
    x = params["embedding"][tokens]
    for layer in range(LAYERS):
        q, k, v = (
            jnp.reshape(x @ params[name][layer], (x.shape[0], -1, HEAD_DIM)) for name in ("q", "k", "v")
        )
        q, k = ROPE.rotate(q, batch.rope_positions), ROPE.rotate(k, batch.rope_positions)
        out, cache = cache.attend(layer, q, k, v, batch)
        x = x + out.reshape(x.shape[0], -1) @ params["out"][layer]
    return x[rows] @ params["embedding"].T, cache


@pytest.fixture(scope="module")
def params() -> Any:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * 0.4, jnp.float32)

    return {
        "embedding": normal(VOCAB, HIDDEN),
        "q": normal(LAYERS, HIDDEN, HEADS * HEAD_DIM),
        "k": normal(LAYERS, HIDDEN, KV_HEADS * HEAD_DIM),
        "v": normal(LAYERS, HIDDEN, KV_HEADS * HEAD_DIM),
        "out": normal(LAYERS, HEADS * HEAD_DIM, HIDDEN),
    }


def paged(
    max_seqs: int = 3, num_pages: int = 40, page_size: int = 8, window: int | None = None
) -> PagedKVCache:
    return PagedKVCache.create(
        num_layers=LAYERS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_pages=num_pages,
        max_seqs=max_seqs,
        page_size=page_size,
        window=window,
        rope=ROPE,
    )


def contiguous(max_seqs: int = 3) -> ContiguousKVCache:
    return ContiguousKVCache.create(
        num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, max_seqs=max_seqs, max_length=128
    )


PROMPTS = [np.random.default_rng(i).integers(0, VOCAB, n).tolist() for i, n in enumerate((5, 19, 33))]
SAMPLING = SamplingParams.create(3, temperature=0.9, seed=[1, 2, 3])


def run(params: Any, cache: Any, prompts: Any, count: Any, **options: Any) -> Any:
    """Mostly one program: prefill in steps of 16 tokens, up to 16 new tokens, and prompts of 33 to 48 among three."""
    return generate(toy, params, cache, prompts, max_new_tokens=count, **{"batch_size": 16} | options)


def in_threes(
    params: Any, make: Any, prompts: list[list[int]], count: int, **sampling: Any
) -> list[list[int]]:
    """The text of each prompt with its number as seed, three in a cache at a time, so that one program serves all."""
    texts: dict[int, list[int]] = {}
    for first in range(0, len(prompts), 3):
        rows = range(min(first, len(prompts) - 3), min(first + 3, len(prompts)))
        own = SamplingParams.create(3, seed=list(rows), **sampling)
        result, _ = run(params, make(), [prompts[i] for i in rows], count, sampling=own)
        texts |= dict(zip(rows, rows_of(result), strict=True))
    return [texts[i] for i in range(len(prompts))]


def rows_of(result: Any) -> list[list[int]]:
    return [
        row[:n].tolist() for row, n in zip(np.array(result.tokens), np.array(result.num_tokens), strict=True)
    ]


def test_paged_contiguous_and_the_whole_prompt_computed_anew_give_the_same_greedy_tokens(params: Any) -> None:
    result, _ = run(params, paged(), PROMPTS, 12)
    other, _ = run(params, contiguous(), PROMPTS, 12)
    assert rows_of(result) == rows_of(other)
    # No cache reused: every token from a prefill of all that stands before it.
    history = list(PROMPTS[2])
    for expected in rows_of(result)[2][:5]:
        once, _ = run(params, paged(), [history], 1)
        assert rows_of(once)[0] == [expected]
        history.append(expected)


@pytest.mark.parametrize(
    "penalized",
    [
        {"temperature": 0.9, "repeat_penalty": 1.2},
        {"temperature": 1.2, "mirostat": 2, "mirostat_tau": 2.0, "mirostat_eta": 0.4},
        {"dry_multiplier": 2.0, "dry_allowed_length": 1, "dry_breakers": [3, 11], "xtc_probability": 0.5},
    ],
    ids=["penalties", "mirostat", "dry and xtc"],
)
def test_a_sequence_gives_the_same_text_alone_in_any_batch_and_for_any_prefill_chunk(
    params: Any, penalized: dict[str, Any]
) -> None:
    sampling = SamplingParams.create(3, seed=[1, 2, 3], **penalized)
    together, _ = run(params, paged(), PROMPTS, 16, sampling=sampling)
    own = SamplingParams.create(1, seed=3, **penalized)
    alone, _ = run(params, paged(1), PROMPTS[2:], 16, sampling=own, batch_size=64)
    assert rows_of(alone)[0] == rows_of(together)[2]
    rotated = SamplingParams.create(3, seed=[3, 1, 2], **penalized)
    shuffled, _ = run(params, paged(), [PROMPTS[2], PROMPTS[0], PROMPTS[1]], 16, sampling=rotated)
    assert rows_of(shuffled) == [rows_of(together)[i] for i in (2, 0, 1)]


def test_a_stream_hands_out_the_tokens_of_generate(params: Any) -> None:
    whole, _ = run(params, paged(), PROMPTS, 16, sampling=SAMPLING)
    stream = generate_stream(
        toy, params, paged(), PROMPTS, max_new_tokens=16, sampling=SAMPLING, batch_size=64, every=3
    )
    chunks = list(stream)
    joined = [[token for c in chunks for token in c.tokens[i]] for i in range(3)]
    assert joined == rows_of(whole)
    assert [len(t) for t in chunks[0].tokens] == [1, 1, 1]
    assert all(len(t) <= 3 for c in chunks for t in c.tokens)
    assert chunks[-1].finish_reason == [FINISH_LENGTH] * 3
    check_invariants(stream.cache)
    assert int(stream.cache.pages_used) == 0


def test_a_stop_token_ends_a_sequence_and_is_not_part_of_it(params: Any) -> None:
    free, _ = run(params, paged(), PROMPTS, 16, sampling=SAMPLING)
    stop = rows_of(free)[1][7]
    cut, _ = run(params, paged(), PROMPTS, 16, sampling=SAMPLING, stop_ids=[stop])
    for whole, short, reason in zip(rows_of(free), rows_of(cut), np.array(cut.finish_reason), strict=True):
        expected = whole[: whole.index(stop)] if stop in whole else whole
        assert short == expected
        assert reason == (FINISH_STOP if stop in whole else FINISH_LENGTH)


def test_limits_are_per_sequence_and_may_be_zero(params: Any) -> None:
    result, cache = run(params, paged(), PROMPTS, [0, 3, 9])
    assert np.array(result.num_tokens).tolist() == [0, 3, 9]
    assert np.array(result.finish_reason).tolist() == [FINISH_LENGTH] * 3
    assert int(cache.pages_used) == 0


def test_pages_are_given_back_and_the_peak_is_what_live_tokens_need(params: Any) -> None:
    result, cache = run(params, paged(), PROMPTS, 8)
    check_invariants(cache)
    assert int(cache.pages_used) == 0
    # The last token of each is never fed back.
    assert int(result.pages_peak) == sum(-(-(len(p) + 8 - 1) // 8) for p in PROMPTS)


def test_prompts_wait_for_pages_instead_of_failing(params: Any) -> None:
    roomy, _ = run(params, paged(), PROMPTS, 16, sampling=SAMPLING)
    tight, cache = run(params, paged(num_pages=9), PROMPTS, 16, sampling=SAMPLING)
    check_invariants(cache)
    assert rows_of(tight) == rows_of(roomy)
    assert np.array(tight.finish_reason).tolist() == [FINISH_LENGTH] * 3
    assert int(tight.pages_peak) <= 9 and int(cache.pages_used) == 0


def test_out_of_pages_ends_a_sequence_that_is_alone_with_what_it_has(params: Any) -> None:
    roomy, _ = run(params, paged(), PROMPTS, 16, sampling=SAMPLING)
    tight, cache = run(params, paged(num_pages=5), PROMPTS, 16, sampling=SAMPLING)
    check_invariants(cache)
    assert np.array(tight.finish_reason).tolist() == [FINISH_LENGTH, FINISH_LENGTH, FINISH_OUT_OF_PAGES]
    # 40 slots hold 33 tokens of the prompt and 7 of those generated; one more was sampled.
    whole, got = rows_of(roomy), rows_of(tight)
    assert got == [*whole[:2], whole[2][:8]]
    assert int(cache.pages_used) == 0


def test_kept_sequences_run_out_of_pages_without_waiting(params: Any) -> None:
    roomy, _ = run(params, paged(), PROMPTS, 16, sampling=SAMPLING)
    tight, cache = run(params, paged(num_pages=9), PROMPTS, 16, sampling=SAMPLING, keep=True)
    check_invariants(cache)
    reasons = np.array(tight.finish_reason).tolist()
    assert FINISH_OUT_OF_PAGES in reasons
    for whole, got, reason in zip(rows_of(roomy), rows_of(tight), reasons, strict=True):
        assert got == whole[: len(got)]
        assert (len(got) < 16) == (reason == FINISH_OUT_OF_PAGES)


MANY = [
    np.random.default_rng(i).integers(0, VOCAB, n).tolist() for i, n in enumerate((5, 19, 33, 2, 35, 9, 1))
]


@pytest.mark.parametrize(
    ("make", "options"),
    [(paged, {"repeat_penalty": 1.2}), (contiguous, {"repeat_penalty": 1.2}), (paged, {"mirostat": 2})],
)
def test_more_prompts_than_sequences_give_what_each_gives_alone(
    params: Any, make: Any, options: dict[str, Any]
) -> None:
    limits = [3, 16, 1, 14, 0, 9, 15]
    sampling = SamplingParams.create(7, temperature=0.9, seed=list(range(7)), **options)
    result, cache = run(params, make(), MANY, limits, sampling=sampling)
    assert np.array(result.finish_reason)[:7].tolist() == [FINISH_LENGTH] * 7
    alone = in_threes(params, make, MANY, 16, temperature=0.9, **options)
    assert rows_of(result)[:7] == [text[:limit] for text, limit in zip(alone, limits, strict=True)]
    assert int(cache.pages_used) == 0


def test_a_queue_passes_over_what_never_fits_and_waits_for_pages(params: Any) -> None:
    roomy = in_threes(params, paged, MANY, 10, temperature=0.0)
    prompts = [*MANY[:3], list(range(60)), *MANY[3:]]
    tight, cache = run(params, paged(num_pages=6), prompts, 10)
    check_invariants(cache)
    reasons = np.array(tight.finish_reason)[:8].tolist()
    assert reasons == [FINISH_OUT_OF_PAGES if i == 3 else FINISH_LENGTH for i in range(8)]
    got = rows_of(tight)[:8]
    assert got.pop(3) == []
    assert got == roomy
    assert int(tight.pages_peak) <= 6 and int(cache.pages_used) == 0


def test_a_stream_of_a_queue_hands_out_the_tokens_of_generate(params: Any) -> None:
    whole = in_threes(params, paged, MANY, 10, temperature=0.0)
    stream = generate_stream(toy, params, paged(), MANY, max_new_tokens=10, batch_size=16, every=4)
    chunks = list(stream)
    assert [[t for c in chunks for t in c.tokens[i]] for i in range(7)] == whole


@pytest.mark.parametrize("make", [paged, contiguous])
def test_samples_of_a_prompt_are_what_their_seeds_give_alone(params: Any, make: Any) -> None:
    prompts = [MANY[1], MANY[2], MANY[3]]
    sampling = SamplingParams.create(6, temperature=0.9, seed=list(range(6)))
    result, cache = run(params, make(4), prompts, 12, n=2, sampling=sampling)
    each = [prompt for prompt in prompts for _ in range(2)]
    assert rows_of(result)[:6] == in_threes(params, make, each, 12, temperature=0.9)
    assert int(cache.pages_used) == 0


def test_samples_of_one_seed_differ_and_equal_seeds_give_equal_samples(params: Any) -> None:
    def texts(**options: Any) -> list[list[int]]:
        sampling = SamplingParams.create(4, temperature=9.0, min_p=0.0, top_p=1.0, **options)
        result, _ = generate(
            toy, params, paged(4), PROMPTS[:1], n=4, max_new_tokens=16, sampling=sampling, batch_size=16
        )
        return rows_of(result)

    for options in ({}, {"seed": 7}, {"seed": jax.random.key(7)}, {"seed": jax.random.PRNGKey(7)}):
        assert len(set(map(tuple, texts(**options)))) == 4
    assert texts(seed=7) == texts(seed=[7, 8, 9, 10])
    same = texts(seed=[5, 6, 5, 6])
    assert same[:2] == same[2:] and same[0] != same[1]


def test_samples_share_the_whole_pages_of_their_prompt(params: Any) -> None:
    result, cache = run(params, paged(), [PROMPTS[2]], 8, n=3, sampling=SAMPLING, keep=True)
    check_invariants(cache)
    # 33 tokens fill 4 pages, which are shared; the fifth is copied twice.
    assert int(result.pages_peak) == 4 + 3
    assert np.array(cache.lengths).tolist() == [40] * 3


def slow_greedy(params: Any, prompt: list[int], count: int, n_ctx: int, keep: int) -> list[int]:
    """The toy in float64, one token at a time; keys are kept as they were before rotation, and rotated each time."""
    weights = {name: np.asarray(value, np.float64) for name, value in params.items()}

    def rotated(x: np.ndarray, position: np.ndarray) -> np.ndarray:
        angle = position[:, None, None] * FREQUENCIES
        pairs = (x[..., : HEAD_DIM // 2] + 1j * x[..., HEAD_DIM // 2 :]) * np.exp(1j * angle)
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    held: list[list[tuple[np.ndarray, np.ndarray]]] = []
    tokens = list(prompt)
    for at in range(len(prompt) + count - 1):
        if len(held) + 1 > n_ctx:
            del held[keep : keep + (len(held) - keep) // 2]
        x = weights["embedding"][tokens[at]]
        held.append([])
        for layer in range(LAYERS):
            q, k, v = (np.reshape(x @ weights[name][layer], (-1, HEAD_DIM)) for name in "qkv")
            held[-1].append((k, v))
            keys = rotated(np.stack([token[layer][0] for token in held]), np.arange(len(held)))
            values = np.stack([token[layer][1] for token in held])
            q = rotated(q[None], np.array([len(held) - 1]))[0].reshape(KV_HEADS, -1, HEAD_DIM)
            scores = np.einsum("kgd,nkd->kgn", q, keys) * HEAD_DIM**-0.5
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            out = np.einsum("kgn,nkd->kgd", scores / scores.sum(-1, keepdims=True), values)
            x = x + out.reshape(-1) @ weights["out"][layer]
        if at >= len(prompt) - 1:
            tokens.append(int(np.argmax(x @ weights["embedding"].T)))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("keep", [0, 5, -1])
def test_generation_goes_on_beyond_the_context_and_the_pool_does_not_grow(params: Any, keep: int) -> None:
    n_ctx, count = 37, 90
    shift = ContextShift(n_ctx, n_keep=keep)
    pool = paged(num_pages=3 * (-(-n_ctx // 8) + 2))
    result, cache = run(params, pool, PROMPTS, count, context_shift=shift)
    check_invariants(cache)
    assert np.array(result.finish_reason).tolist() == [FINISH_LENGTH] * 3
    for prompt, got in zip(PROMPTS, rows_of(result), strict=True):
        kept = min(len(prompt) if keep < 0 else keep, n_ctx - 4)
        assert got == slow_greedy(params, prompt, count, n_ctx, kept)


class Windowed:
    """A cache whose layers see windows, though it keeps everything."""

    def __init__(self, cache: Any, windows: tuple[int | None, ...]) -> None:
        self.cache, self.windows = cache, windows

    def attend(self, layer: int, *args: Any) -> Any:
        out, cache = self.cache.attend(layer, *args, window=self.windows[layer])
        return out, Windowed(cache, self.windows)


def all_windowed(params: Any, tokens: Any, cache: Any, batch: Any, rows: Any) -> Any:
    logits, inner = toy(params, tokens, Windowed(cache, (12, 12)), batch, rows)
    return logits, inner.cache


def half_windowed(params: Any, tokens: Any, cache: Any, batch: Any, rows: Any) -> Any:
    logits, inner = toy(params, tokens, Windowed(cache, (None, 12)), batch, rows)
    return logits, inner.cache


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n": 3, "sampling": SamplingParams.create(18, temperature=0.9, seed=3)},
        {"lookup": Lookup(ngram=1, num_draft=3), "logprobs": 2},
        {"context_shift": ContextShift(n_ctx=40, n_keep=3)},
    ],
    ids=["queue", "samples", "drafts", "shift"],
)
def test_layer_groups_generate_what_one_pool_does(params: Any, options: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 48, "batch_size": 16} | options
    groups = [LayerGroup((0,), KV_HEADS, HEAD_DIM), LayerGroup((1,), KV_HEADS, HEAD_DIM, window=12)]
    sizes: dict[str, Any] = {"max_seqs": 3, "page_size": 8, "step_tokens": 16}
    grouped = GroupedKVCache.create(groups, num_pages=(80, 20), rope=ROPE, **sizes)
    everything, _ = generate(half_windowed, params, paged(num_pages=80), PROMPTS * 2, **arguments)
    result, after = generate(toy, params, grouped, PROMPTS * 2, **arguments)
    assert rows_of(result) == rows_of(everything)
    assert after.pages_used.tolist() == [0, 0]
    assert int(result.pages_peak[1]) < 20 and int(result.pages_peak[0]) <= int(everything.pages_peak)
    for part in after.parts:
        check_invariants(part)


def test_pages_behind_the_window_go_back_while_it_generates(params: Any) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 48, "batch_size": 16}
    everything, _ = generate(all_windowed, params, paged(num_pages=80), PROMPTS, **arguments)
    result, cache = generate(toy, params, paged(num_pages=14, window=12), PROMPTS, **arguments)
    check_invariants(cache)
    assert rows_of(result) == rows_of(everything)
    # 12 tokens lie on 3 pages at most, and a page is given back one step after its last token was seen.
    assert int(result.pages_peak) <= 14


def test_a_prompt_that_never_fits_ends_without_tokens(params: Any) -> None:
    result, cache = run(params, paged(num_pages=5), [*PROMPTS[:2], list(range(41))], 2)
    assert np.array(result.finish_reason).tolist() == [FINISH_LENGTH, FINISH_LENGTH, FINISH_OUT_OF_PAGES]
    assert int(result.num_tokens[2]) == 0
    assert int(cache.pages_used) == 0


@pytest.mark.parametrize("make", [paged, contiguous])
def test_kept_sequences_continue_where_they_stopped(params: Any, make: Any) -> None:
    whole, _ = run(params, make(), PROMPTS, 16)
    first, cache = run(params, make(), PROMPTS, 6, keep=True)
    newest = [[tokens[-1]] for tokens in rows_of(first)]
    rest, cache = run(params, cache, newest, 10, keep=True)
    assert [a + b for a, b in zip(rows_of(first), rows_of(rest), strict=True)] == rows_of(whole)
    assert np.array(cache.lengths).tolist() == [len(p) + 15 for p in PROMPTS]


def test_history_is_what_penalties_look_at_and_a_shift_keeps(params: Any) -> None:
    """A prompt whose beginning is in the cache already gives what the whole prompt gives."""
    shift = ContextShift(40, n_keep=12)
    sampling = SamplingParams.create(1, temperature=0.0, presence_penalty=30.0, repeat_last_n=48)
    settings: dict[str, Any] = {"max_new_tokens": 16, "sampling": sampling, "context_shift": shift}
    whole, _ = generate(toy, params, paged(1), [PROMPTS[2]], **settings)
    settings["keep"] = True
    begun, cache = generate(toy, params, paged(1), [PROMPTS[2][:-3]], **(settings | {"max_new_tokens": 0}))
    assert int(begun.num_tokens[0]) == 0
    rest, _ = generate(toy, params, cache, [PROMPTS[2][-3:]], **settings, history=[PROMPTS[2][:-3]])
    assert rows_of(rest) == rows_of(whole)


def test_other_prompts_lengths_and_parameters_do_not_retrace(params: Any) -> None:
    def sampling(**options: Any) -> SamplingParams:
        return SamplingParams.create(3, seed=[9, 8, 7], **options)

    run(params, paged(), PROMPTS, 16, sampling=sampling(temperature=0.9, repeat_penalty=1.2))
    before = next(traces)
    other = sampling(temperature=[0.0, 1.0, 0.5], repeat_penalty=1.1, top_k=5)
    prompts = [PROMPTS[2] + [1], PROMPTS[1] + [2, 3], PROMPTS[2][:3]]
    run(params, paged(), prompts, [11, 12, 16], sampling=other, stop_ids=[3, 4])
    assert next(traces) == before + 1


@pytest.mark.parametrize(("heads", "seqs"), [(2, 3), (1, 1)])  # one row of one head is a special case of XLA
def test_the_decode_step_writes_the_pool_in_place(params: Any, heads: int, seqs: int) -> None:
    """The compiled loop aliases every page array to its input, and needs no memory of the pool's size beside it."""
    width = heads * HEAD_DIM
    own = params | {"k": params["k"][..., :width], "v": params["v"][..., :width]}
    cache = PagedKVCache.create(
        num_layers=LAYERS, num_kv_heads=heads, head_dim=HEAD_DIM, num_pages=4096, max_seqs=seqs, page_size=8
    )
    request = Request.create(cache, PROMPTS[:seqs], max_new_tokens=8, batch_size=64)
    state = begin(cache, request)
    memory = advance_donating.lower(toy, own, cache, state, request, jnp.int32(4)).compile().memory_analysis()
    pool = cache.k_pages.nbytes + cache.v_pages.nbytes
    assert memory.alias_size_in_bytes >= pool
    assert memory.temp_size_in_bytes < pool // 8


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": []}, "prompts must be at least 1"),
        ({"prompts": [[1]] * 4, "keep": True}, "keep needs a sequence for each of 4"),
        ({"n": 4}, "n must be 1 to 3"),
        ({"n": 0}, "n must be 1 to 3"),
        ({"history": [[1]]}, "history must be of each of 3 prompts"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[-2]]}, "negative token id"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0"),
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"sampling": SamplingParams.greedy(2)}, "sampling must have one row"),
    ],
)
def test_bad_arguments_are_named(params: Any, changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"prompts": PROMPTS, "max_new_tokens": 4, **changed}
    with pytest.raises(ValueError, match=message):
        generate(toy, params, paged(), arguments.pop("prompts"), **arguments)


def test_generation_goes_on_as_if_it_had_not_been_interrupted(tmp_path: Path, params: Any) -> None:
    # Limits of one size are one program; sequences 0 and 1 end early, and go on elsewhere.
    prompts = PROMPTS
    whole, _ = run(params, paged(), prompts, 16, keep=True)
    half, cache = run(params, paged(), prompts, [6, 6, 16], keep=True)
    expected, tokens = rows_of(whole), rows_of(half)
    held = [[*prompt, *new[:-1]] for prompt, new in zip(prompts, tokens, strict=True)]
    snapshot(cache, tmp_path / "half", token_ids=held, fingerprint="a model")
    saved = read_snapshot(tmp_path / "half", fingerprint="a model")
    assert list(saved.token_ids.values()) == held
    cache = restore(paged(num_pages=30, page_size=32), saved)
    newest = [new[-1:] for new in tokens[:2]]
    rest, _ = generate(toy, params, cache, newest, max_new_tokens=10, keep=True)
    joined = [a + b for a, b in zip(tokens, rows_of(rest), strict=True)]
    assert joined == expected


def test_token_lists_are_the_rows_without_padding(params: Any) -> None:
    result, _ = run(params, paged(), PROMPTS[:2], [3, 7])
    assert len(result.tokens) > 2  # rows of padding
    assert result.token_lists() == rows_of(result)[:2]
    assert list(map(len, result.token_lists())) == [3, 7]


def test_a_model_that_no_program_can_be_kept_for_is_named(params: Any) -> None:
    class Weights(dict):
        def __call__(self, *_: Any) -> None: ...

    for call in (generate, generate_stream):
        with pytest.raises(
            ValueError, match="model must be hashable, since a program is compiled for it, got Weights"
        ):
            call(Weights(), params, paged(), PROMPTS, max_new_tokens=2)
        with pytest.raises(ValueError, match="model must be a function, got str"):
            call("toy", params, paged(), PROMPTS, max_new_tokens=2)
