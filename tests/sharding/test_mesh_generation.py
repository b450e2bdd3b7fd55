"""Generation on meshes gives the tokens of one device, whatever the mesh."""

from __future__ import annotations

import jax
import mesh_kit
import numpy as np
import pytest

from jaxpaged import ContextShift, SamplingParams
from jaxpaged.generation.api import beam_search, generate
from jaxpaged.generation.request import Lookup
from jaxpaged.generation.stream import generate_stream

PROMPTS = [
    [5, 9, 7, 3, 11],
    [8, 8, 2],
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
    [77],
    [40, 41],
    [13, 21, 34, 55, 89],
]
MESHES = [(1, 2), (1, 4), (2, 4), (4, 2), (3, 1)]
NEW = 12


def tokens_of(result) -> list[list[int]]:
    counts = np.asarray(result.num_tokens).reshape(-1)
    rows = np.asarray(result.tokens).reshape(len(counts), -1)
    return [row[:n].tolist() for row, n in zip(rows, counts, strict=True)]


def run(kind, mesh, seqs, pages, function=generate, prompts=PROMPTS, cache=None, **options):
    model = mesh_kit.loaded(kind, mesh)
    cache = mesh_kit.create_cache(model, seqs, pages, **(cache or {}))
    result, cache = function(model.function, model.params, cache, prompts, max_new_tokens=NEW, **options)
    return result, cache


@pytest.mark.parametrize("kind", ["tiny", "gguf", "qwen2", "qwen3", "biased"])
@pytest.mark.parametrize("mesh", [(1, 2), (2, 4)], ids=str)
def test_greedy_tokens_are_those_of_one_device(kind: str, mesh: tuple[int, int]):
    expected, _ = run(kind, None, 6, 64)
    found, cache = run(kind, mesh_kit.mesh_of(*mesh), 6 // mesh[0], 32)
    assert tokens_of(found)[:6] == tokens_of(expected)[:6]
    assert np.asarray(cache.pages_used).tolist() == [0] * mesh[0]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_queue_longer_than_the_sequences_is_served(mesh: tuple[int, int]):
    expected, _ = run("tiny", None, 6, 64)
    found, _ = run("tiny", mesh_kit.mesh_of(*mesh), 1, 12, batch_size=16)
    assert tokens_of(found)[:6] == tokens_of(expected)[:6]


@pytest.mark.parametrize("mesh", [(1, 4), (2, 2), (4, 2)], ids=str)
def test_samples_depend_on_their_seeds_alone(mesh: tuple[int, int]):
    for prompts, n in ((PROMPTS[:1], 4), (PROMPTS[:3], 2)):
        count = len(prompts) * n
        sampling = SamplingParams.create(
            count, temperature=1.0, top_k=40, repeat_penalty=1.3, seed=list(range(count))
        )
        options = {"prompts": prompts, "n": n, "sampling": sampling}
        expected, _ = run("tiny", None, count, 64, **options)
        found, _ = run("tiny", mesh_kit.mesh_of(*mesh), count, 64, **options)
        assert tokens_of(found)[:count] == tokens_of(expected)[:count]
        assert len(set(map(tuple, tokens_of(found)[:n]))) == n


@pytest.mark.parametrize(
    "options",
    [
        {"context_shift": ContextShift(20, n_keep=2)},
        {"cache": {"window": 9}},
        {"cache": {"paged": False}},
        {"cache": {"dtype": "bf16"}},
        {"cache": {"dtype": "q8_0"}},
        {"cache": {"dtype": "kivi4", "page_size": 32}},
    ],
    ids=str,
)
def test_whatever_the_cache_does(options):
    expected, _ = run("tiny", None, 6, 48, **options)
    found, _ = run("tiny", mesh_kit.mesh_of(2, 2), 3, 24, **options)
    assert tokens_of(found)[:6] == tokens_of(expected)[:6]


def test_pages_that_run_out_end_the_same_rows():
    """One prompt a shard, each alone with a pool that is too small for it."""
    prompts = [PROMPTS[0], PROMPTS[2]]
    each = [run("tiny", None, 1, 2, prompts=[one])[0] for one in prompts]
    found, _ = run("tiny", mesh_kit.mesh_of(2, 2), 1, 2, prompts=prompts)
    assert tokens_of(found)[:2] == [tokens_of(one)[0] for one in each]
    reasons = [int(np.asarray(one.finish_reason)[0]) for one in each]
    assert np.asarray(found.finish_reason)[:2].tolist() == reasons


@pytest.mark.parametrize("mesh", [(1, 4), (2, 2)], ids=str)
def test_beams_find_the_same_sequences(mesh: tuple[int, int]):
    prompts, options = PROMPTS[:4], {"num_beams": 3, "num_return_sequences": 2, "stop_ids": [17, 4]}
    expected, _ = run("tiny", None, 12, 64, beam_search, prompts, **options)
    found, _ = run("tiny", mesh_kit.mesh_of(*mesh), 12 // mesh[0], 64, beam_search, prompts, **options)
    assert tokens_of(found)[:8] == tokens_of(expected)[:8]
    np.testing.assert_allclose(
        np.asarray(found.score)[:4], np.asarray(expected.score)[:4], rtol=1e-4, atol=1e-5
    )
    assert np.asarray(found.complete)[:4].all()


@pytest.mark.parametrize("mesh", [(1, 2), (2, 4)], ids=str)
def test_lookup_decoding_accepts_the_same_drafts(mesh: tuple[int, int]):
    prompts = [PROMPTS[0] * 3, PROMPTS[1] * 4, PROMPTS[2]]
    expected, _ = run("tiny", None, 4, 64, generate, prompts, lookup=Lookup(4))
    found, _ = run("tiny", mesh_kit.mesh_of(*mesh), 4 // mesh[0], 64, generate, prompts, lookup=Lookup(4))
    assert tokens_of(found)[:3] == tokens_of(expected)[:3]
    assert np.asarray(found.accepted)[:3].tolist() == np.asarray(expected.accepted)[:3].tolist()


@pytest.mark.parametrize("lookup", [None, Lookup()], ids=str)
def test_a_stream_hands_out_what_a_generation_gives(lookup):
    expected, _ = run("tiny", None, 6, 64)
    model = mesh_kit.loaded("tiny", mesh_kit.mesh_of(2, 2))
    cache = mesh_kit.create_cache(model, 3, 32)
    stream = generate_stream(
        model.function, model.params, cache, PROMPTS, max_new_tokens=NEW, every=5, lookup=lookup
    )
    handed: list[list[int]] = [[] for _ in PROMPTS]
    for chunk in stream:
        for row, tokens in enumerate(chunk.tokens):
            handed[row] += tokens
    assert handed == tokens_of(expected)[:6]
    assert tokens_of(stream.result)[:6] == handed


def test_a_generation_goes_on_where_another_ended():
    """Prompt i continues sequence i, on whichever shard that is."""
    model, single = mesh_kit.loaded("tiny", mesh_kit.mesh_of(2, 2)), mesh_kit.loaded("tiny")
    results = []
    for one, seqs in ((single, 4), (model, 2)):
        cache = mesh_kit.create_cache(one, seqs, 32)
        first, cache = generate(one.function, one.params, cache, PROMPTS[:4], max_new_tokens=4, keep=True)
        more = [[tokens[-1], 50 + i] for i, tokens in enumerate(tokens_of(first)[:4])]
        second, cache = generate(one.function, one.params, cache, more, max_new_tokens=6, keep=True)
        results.append(tokens_of(second)[:4])
    assert results[0] == results[1]


def test_a_generation_is_one_program():
    """Nothing but the dispatch of one program comes back to Python."""
    model = mesh_kit.loaded("tiny", mesh_kit.mesh_of(2, 2))
    caches = [mesh_kit.create_cache(model, 3, 32) for _ in range(2)]
    generate(model.function, model.params, caches[0], PROMPTS, max_new_tokens=NEW)
    with jax.log_compiles(False):
        from jaxpaged.generation.api import run_donating

        before = run_donating("cpu")._cache_size()
        generate(model.function, model.params, caches[1], PROMPTS[::-1], max_new_tokens=NEW - 3)
        assert run_donating("cpu")._cache_size() == before
