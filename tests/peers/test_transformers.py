"""Logits and greedy tokens of every architecture against Hugging Face transformers (torch, CPU, float32)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import peer_models as peer

from model.loading import LoadedModel, load_model

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=list(peer.VARIANTS))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, LoadedModel]:
    """A variant, saved by transformers and loaded by us."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    return request.param, load_model(peer.save_folder(peer.hf_model(request.param), folder))


@pytest.mark.parametrize("kind", ["paged", "contiguous"])
def test_logits_equal_those_of_transformers(loaded: tuple[str, LoadedModel], kind: str) -> None:
    name, model = loaded
    texts = peer.texts_to_score()
    for ours, theirs in zip(
        peer.our_logits(model, kind, texts), peer.hf_logits(peer.hf_model(name), texts), strict=True
    ):
        assert theirs.std() > 0.5  # Logits that say something.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["paged", "contiguous"])
def test_greedy_tokens_are_those_of_transformers(loaded: tuple[str, LoadedModel], kind: str) -> None:
    name, model = loaded
    starts = peer.prompts()
    assert peer.our_greedy(model, kind, starts) == [peer.hf_greedy(peer.hf_model(name), p) for p in starts]
