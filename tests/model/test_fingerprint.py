"""A fingerprint depends on the weights and the settings that change results, and on nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from jaxpaged_model.checkpoint.fingerprint import fingerprint
from jaxpaged_model.checkpoint.gguf_file import GGUFFile
from jaxpaged_model.checkpoint.loading import config_of, load_model
from small_models import config_json, random_weights, write_converted_gguf, write_folder

CONFIG = config_json("llama")
WEIGHTS = random_weights(CONFIG)


def of_gguf(path: Path) -> str:
    file = GGUFFile(path)
    return fingerprint(config_of(file), file)


def test_copies_and_other_shards_have_the_same(tmp_path: Path) -> None:
    whole = load_model(write_folder(tmp_path / "a", CONFIG, WEIGHTS))
    sharded = load_model(write_folder(tmp_path / "b", CONFIG, WEIGHTS, shards=3), dtype=jnp.bfloat16)
    assert whole.fingerprint == sharded.fingerprint
    assert len(whole.fingerprint) == 64
    first = load_model(write_converted_gguf(tmp_path / "a.gguf", CONFIG, WEIGHTS))
    named = {"general.name": "another name"}
    assert first.fingerprint == of_gguf(
        write_converted_gguf(tmp_path / "b.gguf", CONFIG, WEIGHTS, extra=named)
    )


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_training_any_tensor_changes_it(tmp_path: Path, name: str) -> None:
    trained = WEIGHTS | {name: WEIGHTS[name] * np.float32(1.001)}
    before, after = (
        of_gguf(write_converted_gguf(tmp_path / "model.gguf", CONFIG, weights))
        for weights in (WEIGHTS, trained)
    )
    assert before != after


def test_settings_and_types_change_it(tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = [
        {}, {"rope_theta": 500000.0}, {"rms_norm_eps": 1e-6}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ]  # fmt: skip
    found = {
        load_model(write_folder(tmp_path / str(i), CONFIG | changes, WEIGHTS)).fingerprint
        for i, changes in enumerate(variants)
    }
    found.add(load_model(write_folder(tmp_path / "half", CONFIG, WEIGHTS, dtype=jnp.bfloat16)).fingerprint)
    for kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0):
        found.add(of_gguf(write_converted_gguf(tmp_path / "kind.gguf", CONFIG, WEIGHTS, kind=kind)))
    assert len(found) == len(variants) + 3
