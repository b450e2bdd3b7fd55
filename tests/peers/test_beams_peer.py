"""Beam search compared with Hugging Face transformers (torch, CPU, float32): sequences and scores."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import peer_models as peer
import torch
from conftest import Measured
from jaxpaged_model.checkpoint.loading import load_model

from jaxpaged.cache.invariants import check_invariants
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.generation.api import beam_search

LIMIT = 24
# (length_penalty, early_stopping, how many stop tokens); many stop tokens end hypotheses all the time.
SETTINGS = [
    *itertools.product((1.0, 0.0, 2.0, -1.0), (False, True, "never"), (8,)),
    *itertools.product((1.0,), (False, True, "never"), (0, 1, 3)),
]


def prompts(seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, peer.VOCAB_SIZE, n).tolist() for n in peer.PROMPT_LENS]


def theirs(
    model: Any, prompt: list[int], stops: list[int], **settings: Any
) -> tuple[list[list[int]], np.ndarray]:
    """The new tokens of each sequence, without the stop token, and the scores."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=LIMIT,
        eos_token_id=stops or None,
        pad_token_id=peer.VOCAB_SIZE - 1,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    rows = [
        list(itertools.takewhile(lambda t: t not in stops, row))
        for row in out.sequences[:, len(prompt) :].tolist()
    ]
    return rows, out.sequences_scores.numpy()


@pytest.mark.parametrize(
    ("name", "num_beams", "num_return", "chosen"),
    [
        ("llama", 4, 4, slice(None)),
        ("llama", 2, 1, slice(0, None, 3)),
        ("mistral-window", 5, 3, slice(0, None, 4)),
        ("qwen2", 3, 3, slice(1, None, 4)),
        ("qwen3-window", 4, 2, slice(2, None, 4)),
    ],
)
def test_sequences_and_scores_are_those_of_transformers(
    name: str, num_beams: int, num_return: int, chosen: slice, tmp_path: Path, measured: Measured
) -> None:
    model = peer.hf_model(name)
    loaded = load_model(peer.save_folder(model, tmp_path))
    config, difference, compared = loaded.config, 0.0, 0
    for i, (length_penalty, early_stopping, count) in list(enumerate(SETTINGS))[chosen]:
        starts = prompts(seed=i)
        stops = np.random.default_rng(100 + i).permutation(peer.VOCAB_SIZE - 1)[:count].tolist()
        cache = PagedKVCache.create(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_pages=200,
            max_seqs=num_beams * len(starts),
            page_size=8,
        )
        settings: dict[str, Any] = {
            "num_beams": num_beams,
            "num_return_sequences": num_return,
            "length_penalty": length_penalty,
            "early_stopping": early_stopping,
        }
        result, cache = beam_search(
            loaded.function,
            loaded.params,
            cache,
            starts,
            max_new_tokens=LIMIT,
            stop_ids=stops,
            batch_size=peer.PREFILL_CHUNK,
            **settings,
        )
        check_invariants(cache)
        assert int(cache.pages_used) == 0
        for row, prompt in enumerate(starts):
            rows, scores = theirs(model, prompt, stops, **settings)
            counts = np.asarray(result.num_tokens)[row]
            ours = [
                tokens[:n].tolist() for tokens, n in zip(np.asarray(result.tokens)[row], counts, strict=True)
            ]
            assert ours == rows, (i, row)
            # A length penalty of -1 multiplies by the length: float32 has no precision of 1e-4 for such scores.
            np.testing.assert_allclose(np.asarray(result.score)[row], scores, rtol=1e-6, atol=1e-4)
            if length_penalty >= 0:
                difference = max(difference, float(np.abs(np.asarray(result.score)[row] - scores).max()))
            compared += len(rows)
    measured(difference=difference, sequences=compared)
