"""Vectors of texts are the hidden states behind the logits, and depend on no other text."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from jaxpaged_model import load_model, tiny
from jaxpaged_model.checkpoint.gguf_file import GGUFFile
from jaxpaged_model.checkpoint.pooling import pooling_of
from jaxpaged_model.checkpoint.safetensors_folder import SafetensorsFolder
from jaxpaged_model.embedding import Embedder

from jaxpaged import PagedKVCache, reserve

TOKENS = list(range(5, 75))


@pytest.fixture(scope="module")
def loaded():
    return load_model(tiny.PATH, weights="dequantized")


def test_hidden_states_are_those_behind_the_logits(loaded):
    hidden = Embedder(loaded).hidden_states(TOKENS)
    cache = PagedKVCache.create(**loaded.config.cache_spec, num_pages=8, max_seqs=1, page_size=32)
    cache, batch, _ = reserve(cache, jnp.array([len(TOKENS)]), num_tokens=len(TOKENS))
    rows = jnp.arange(len(TOKENS))
    logits, _ = loaded.exact_function(loaded.params, jnp.array(TOKENS), cache, batch, rows)
    head = loaded.params["embedding"]["embedding"].get_value()[: loaded.vocab_size]
    np.testing.assert_allclose(hidden @ np.asarray(head).T, logits, rtol=1e-3, atol=1e-3)


def test_chunks_and_longer_texts_change_nothing(loaded):
    whole = Embedder(loaded).hidden_states(TOKENS)
    np.testing.assert_allclose(Embedder(loaded, chunk=16).hidden_states(TOKENS), whole, atol=1e-4)
    np.testing.assert_allclose(Embedder(loaded).hidden_states(TOKENS[:20]), whole[:20], atol=1e-4)


def test_poolings_and_no_tokens(loaded):
    embedder = Embedder(loaded)
    hidden = embedder.hidden_states(TOKENS)
    for pooling, expected in (("cls", hidden[0]), ("last", hidden[-1]), ("mean", hidden.mean(axis=0))):
        np.testing.assert_allclose(embedder(TOKENS, pooling=pooling), expected, atol=1e-5)
    with pytest.raises(ValueError, match="no tokens"):
        embedder([], pooling="last")


def test_the_pooling_of_a_file_and_of_a_folder(tmp_path):
    assert pooling_of(GGUFFile(tiny.PATH)) is None
    folder = tmp_path / "1_Pooling"
    folder.mkdir()
    source = object.__new__(SafetensorsFolder)
    object.__setattr__(source, "path", tmp_path)
    assert pooling_of(source) is None
    for text, expected in (
        (json.dumps({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}), "last"),
        (json.dumps({"pooling_mode_mean_tokens": True}), "mean"),
        (json.dumps({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}), None),
        ("no JSON", None),
    ):
        (folder / "config.json").write_text(text)
        assert pooling_of(source) == expected
