"""Segments of layers: they are all layers in order, as few bodies as possible, and compute the same."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxpaged_model import llama
from jaxpaged_model.config import ModelConfig, RopeScaling
from jaxpaged_model.segments import Segment, segments
from small_models import VOCAB, logits, random_params


@given(st.lists(st.sampled_from("LG"), max_size=30))
def test_segments_are_all_layers_and_repeat(kinds: list[str]) -> None:
    found = segments(kinds)
    layers = [
        (one.first + turn * one.period + i, kinds[one.first + i])
        for one in found
        for turn in range(one.repeats)
        for i in range(one.period)
    ]
    assert layers == list(enumerate(kinds))
    runs = len(list(groupby(kinds)))
    assert sum(one.period for one in found) <= runs


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        ("LLLL", [(0, 1, 4)]),
        ("LLLLLG" * 4 + "LL", [(0, 6, 4), (24, 1, 2)]),
        ("LG" * 13, [(0, 2, 13)]),
        ("GGLLLL", [(0, 1, 2), (2, 1, 4)]),
        ("LGGL", [(0, 1, 1), (1, 1, 2), (3, 1, 1)]),
        ("", []),
    ],
)
def test_segments_of_known_patterns(kinds: str, found: list[tuple[int, int, int]]) -> None:
    assert segments(kinds) == tuple(Segment(*one) for one in found)


def config(**changes: Any) -> ModelConfig:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_q_heads": 2}
    sizes |= {"num_kv_heads": 1, "head_dim": 16, "context_length": 64}
    return ModelConfig("gemma3", **(sizes | changes))


@pytest.mark.parametrize(
    "pattern", ["LLLLLGLLLLLGLL", "LGLGLGL", "GGLLL", "LLLL"], ids=["gemma3", "gemma2", "qwen2", "mistral"]
)
def test_layers_in_scans_compute_what_layers_one_by_one_compute(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = config(
        num_layers=len(pattern),
        windows=tuple(5 if one == "L" else None for one in pattern),
        rotates=tuple(i % 3 != 2 for i in range(len(pattern))) if pattern == "LLLL" else (),
        window_rope_theta=100.0,
        rope_scaling=RopeScaling("linear", 4.0),
        norms="both",
        qk_norm="head",
    )
    params = random_params(model)
    in_scans = logits(model, params)

    def one_by_one(kinds: Any) -> tuple[Segment, ...]:
        return tuple(Segment(i, 1, 1) for i in range(len(kinds)))

    monkeypatch.setattr(llama, "segments", one_by_one)
    np.testing.assert_allclose(in_scans, logits(model, params), rtol=0, atol=2e-5)
