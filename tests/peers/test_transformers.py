"""Logits and greedy tokens of every architecture against Hugging Face transformers (torch, CPU, float32)."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import peer_models as peer
from conftest import Measured
from jaxpaged_model.checkpoint.loading import LoadedModel, load_model
from jaxpaged_model.embedding import Embedder

from jaxpaged import SamplingParams, generate, score

TOLERANCE = 1e-4

paged_everywhere = pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "paged") for name in peer.VARIANTS), *((name, "contiguous") for name in peer.ONE_OF_EACH)],
)


@pytest.fixture
def loaded(name: str, tmp_path: Path) -> LoadedModel:
    """A variant, saved by transformers and loaded by us."""
    return load_model(peer.save_folder(peer.hf_model(name), tmp_path))


@paged_everywhere
def test_logits_equal_those_of_transformers(
    name: str, kind: str, loaded: LoadedModel, measured: Measured
) -> None:
    texts = peer.texts_to_score()
    ours = np.concatenate(peer.our_logits(loaded, kind, texts))
    theirs = np.concatenate(peer.hf_logits(peer.hf_model(name), texts))
    assert theirs.std() > 0.5  # Logits that say something.
    measured(difference=np.abs(ours - theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", peer.ONE_OF_EACH)
def test_hidden_states_are_the_last_ones_of_transformers(
    name: str, loaded: LoadedModel, measured: Measured
) -> None:
    """Those that embeddings are made of."""
    differences = []
    for text in peer.texts_to_score():
        ours = Embedder(loaded, chunk=16).hidden_states(text)
        theirs = peer.hf_hidden_states(peer.hf_model(name), text)
        differences.append(np.abs(ours - theirs).max() / theirs.std())
    measured(difference=max(differences))
    assert max(differences) < TOLERANCE


@paged_everywhere
def test_64_greedy_tokens_are_those_of_transformers(
    name: str, kind: str, loaded: LoadedModel, measured: Measured
) -> None:
    starts = peer.prompts()
    ours = peer.greedy_by_steps(loaded, kind, starts)
    model = peer.hf_model(name)
    theirs = [peer.hf_logits_behind(model, prompt, mine) for prompt, mine in zip(starts, ours, strict=True)]
    measured(margin=peer.margin(theirs))
    assert ours == [logits.argmax(-1).tolist() for logits in theirs]


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "paged") for name in peer.ONE_OF_EACH), ("llama", "contiguous")]
)
def test_generate_gives_what_transformers_generate_gives(name: str, kind: str, loaded: LoadedModel) -> None:
    starts = peer.prompts()
    theirs = [peer.hf_greedy(peer.hf_model(name), prompt) for prompt in starts]
    assert peer.our_greedy(loaded, kind, starts) == theirs


@pytest.mark.parametrize("name", peer.ONE_OF_EACH)
def test_log_probabilities_are_those_of_transformers(
    name: str, loaded: LoadedModel, measured: Measured
) -> None:
    """Of sampled tokens, as ``generate`` returns them and as ``score`` computes them for the same texts."""
    starts, new = peer.prompts(), 24
    options = {"sampling": SamplingParams.unmodified(len(starts)), "max_new_tokens": new, "logprobs": 0}
    cache = peer.empty_cache(loaded.config, "paged", len(starts))
    result, cache = generate(loaded.function, loaded.params, cache, starts, **options)
    texts = [[*start, *result.tokens[i, :new].tolist()] for i, start in enumerate(starts)]
    padded = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    scored, _ = score(loaded.function, loaded.params, cache, padded, [len(text) for text in texts])
    theirs = peer.hf_logits(peer.hf_model(name), texts)
    for i, (text, logits) in enumerate(zip(texts, theirs, strict=True)):
        expected = jax.nn.log_softmax(logits[:-1])[np.arange(len(text) - 1), text[1:]]
        measured(difference=np.abs(scored[i, 1 : len(text)] - expected).max())
        np.testing.assert_allclose(scored[i, 1 : len(text)], expected, atol=TOLERANCE)
        np.testing.assert_allclose(result.logprobs[i, :new], expected[-new:], atol=TOLERANCE)
