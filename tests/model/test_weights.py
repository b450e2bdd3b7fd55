"""Weights: a GGUF file and a Hugging Face folder of the same weights are the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxpaged_model.checkpoint.loading import load_model
from jaxpaged_model.config import RopeScaling
from jaxpaged_model.llama import abstract_params
from jaxpaged_model.metadata import ModelError
from safetensors.numpy import save_file
from small_models import (
    HEAD_DIM,
    VOCAB,
    config_json,
    logits,
    random_weights,
    write_converted_gguf,
    write_folder,
)

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def llama3_factors() -> np.ndarray:
    """``rope_freqs.weight`` as llama.cpp's converter computes it."""
    factors = []
    for frequency in 1.0 / 10000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM):
        wavelength = 2 * np.pi / frequency
        if wavelength < 32 / 4.0:
            factors.append(1.0)
        elif wavelength > 32 / 1.0:
            factors.append(8.0)
        else:
            smooth = (32 / wavelength - 1.0) / (4.0 - 1.0)
            factors.append(1 / ((1 - smooth) / 8.0 + smooth))
    return np.array(factors, np.float32)


# name -> (config.json, further GGUF keys, rope_freqs)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], np.ndarray | None]] = {
    "llama": (config_json("llama"), {}, None),
    "llama tied": (config_json("llama", tie_word_embeddings=True), {}, None),
    "llama biases": (config_json("llama", attention_bias=True, mlp_bias=True), {}, None),
    "llama 3 scaling": (config_json("llama", rope_scaling=LLAMA3), {}, llama3_factors()),
    "llama linear": (
        config_json("llama", rope_scaling={"type": "linear", "factor": 2.0}),
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
        None,
    ),
    "mistral": (config_json("mistral", sliding_window=5), {"llama.attention.sliding_window": 5}, None),
    "qwen2": (config_json("qwen2", tie_word_embeddings=True), {}, None),
    "qwen2 yarn": (
        config_json("qwen2", rope_scaling=YARN),
        {
            "qwen2.rope.scaling.type": "yarn",
            "qwen2.rope.scaling.factor": 4.0,
            "qwen2.rope.scaling.original_context_length": 32,
        },
        None,
    ),
    "qwen3": (
        config_json("qwen3"),
        {"qwen3.attention.key_length": HEAD_DIM, "qwen3.attention.value_length": HEAD_DIM},
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gguf_and_folder_are_the_same_model(name: str, tmp_path: Path) -> None:
    config, extra, rope_freqs = CASES[name]
    weights = random_weights(config)
    folder = load_model(write_folder(tmp_path / "folder", config, weights))
    file = load_model(
        write_converted_gguf(tmp_path / "m.gguf", config, weights, extra=extra, rope_freqs=rope_freqs)
    )
    # Equal unless something is computed; GGUF has eps and scaling factors in float32.
    exact = rope_freqs is None
    np.testing.assert_allclose(
        logits(file.config, file.params, function=file.function),
        logits(folder.config, folder.params, function=folder.function),
        rtol=0,
        atol=0 if exact else 1e-4,
    )
    text = "def f(x): return é"
    assert file.tokenizer.encode(text) == folder.tokenizer.encode(text)


def test_features_change_logits(tmp_path: Path) -> None:
    """A feature that both loaders ignore would pass the test above."""
    weights = random_weights(config_json("llama"))
    plain = logits(*_load(tmp_path / "plain", config_json("llama"), weights))
    for changes in (
        {"rope_scaling": LLAMA3},
        {"rope_scaling": YARN},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ):
        other = logits(*_load(tmp_path / "other", config_json("llama", **changes), weights))
        assert np.abs(other - plain).max() > 0.01, changes
    window = logits(*_load(tmp_path / "window", config_json("mistral", sliding_window=5), weights))
    assert np.abs(window - plain)[:5].max() < 1e-5
    assert np.abs(window - plain)[5:].max() > 0.01


def _load(path: Path, config: dict[str, Any], weights: dict[str, np.ndarray]) -> tuple[Any, Any]:
    model = load_model(write_folder(path, config, weights), weights="dequantized")
    return model.config, model.params


def test_loaded_params_have_the_models_structure(tmp_path: Path) -> None:
    for kind in ("llama", "qwen2", "qwen3"):
        config = config_json(kind)
        path = write_folder(tmp_path / kind, config, random_weights(config))
        model = load_model(path, dtype=jnp.bfloat16, weights="dequantized")
        expected = abstract_params(model.config, jnp.bfloat16)
        assert jax.tree.structure(model.params) == jax.tree.structure(expected)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), model.params) == jax.tree.map(
            lambda x: (x.shape, x.dtype), expected
        )
        assert sum(x.size for x in jax.tree.leaves(model.params)) == model.config.num_parameters()


def test_sharded_bfloat16_folder(tmp_path: Path) -> None:
    config = config_json("qwen3")
    weights = random_weights(config)
    model = load_model(write_folder(tmp_path / "m", config, weights, shards=3, dtype=jnp.bfloat16))
    assert model.description == "qwen3 95K BF16"
    rounded = {name: value.astype(jnp.bfloat16).astype(np.float32) for name, value in weights.items()}
    whole = load_model(write_folder(tmp_path / "whole", config, rounded))
    found, wanted = (logits(one.config, one.params, function=one.function) for one in (model, whole))
    assert (found == wanted).all()
    assert model.size_bytes == sum(p.stat().st_size for p in (tmp_path / "m").glob("*.safetensors"))


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    config = config_json("llama")
    path = write_converted_gguf(
        tmp_path / "m.gguf", config, random_weights(config), kind=gguf.GGMLQuantizationType.Q8_0
    )
    seen: list[tuple[int, int]] = []
    model = load_model(path, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and len({total for _, total in seen}) == 1 and seen[-1][0] == seen[-1][1]
    assert model.description == "llama 95K Q8_0"
    assert model.size_bytes == path.stat().st_size


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda t: t.update({"blk.1.attn_k.weight": np.zeros((16, 64), np.float32)}),
            r"wrong shape: blk\.1\.attn_k\.weight is \[16, 64\], needed is \[32, 64\]",
        ),
        (
            lambda t: t.update({"token_embd.weight": np.zeros((VOCAB - 1, 64), np.float32)}),
            r"token_embd\.weight is \[259, 64\], needed is \[260, 64\]",
        ),
        (lambda t: t.pop("blk.0.ffn_up.weight"), r"tensor blk\.0\.ffn_up\.weight is missing"),
        (
            lambda t: t.update({"blk.0.ffn_gate_inp.weight": np.zeros((4, 64), np.float32)}),
            r"tensor blk\.0\.ffn_gate_inp\.weight is unknown",
        ),
        (
            lambda t: t.update({"rope_freqs.weight": np.ones(5, np.float32)}),
            r"rope_freqs\.weight must hold 8 positive numbers, half of rope.dimension_count, got 5",
        ),
    ],
)
def test_a_gguf_that_does_not_fit_is_refused(spoil: Any, message: str, tmp_path: Path) -> None:
    config = config_json("llama")
    path = write_converted_gguf(tmp_path / "m.gguf", config, random_weights(config), change=spoil)
    with pytest.raises(ModelError, match=message) as error:
        load_model(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_folders_that_cannot_be_loaded_say_why(tmp_path: Path) -> None:
    config = config_json("llama")
    weights = random_weights(config)

    def refused(path: Path, message: str) -> None:
        with pytest.raises(ModelError, match=message) as error:
            load_model(path)
        assert "\n" not in str(error.value)

    refused(tmp_path / "none", "no such file or folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "has no config.json; a model folder or a GGUF file is needed")
    (empty / "a.gguf").touch()
    refused(empty, "name the GGUF file: .*a.gguf")
    (empty / "config.json").write_text("{")
    refused(empty, "is not valid JSON")
    (empty / "config.json").write_text(json.dumps(config))
    refused(empty, "no weights: neither model.safetensors nor")
    (empty / "pytorch_model.bin").touch()
    refused(empty, "holds pytorch_model.bin only; weights are needed as safetensors")

    folder = write_folder(tmp_path / "m", config, weights, shards=2)
    refused(folder / "model-00001-of-00002.safetensors", "name a GGUF file, or the folder")
    (folder / "model-00002-of-00002.safetensors").rename(tmp_path / "moved")
    refused(folder, "names files that are missing: model-00002-of-00002.safetensors")
    whole = (tmp_path / "moved").read_bytes()
    (folder / "model-00002-of-00002.safetensors").write_bytes(whole[:-10])
    refused(folder, "truncated or no safetensors file")

    del weights["model.layers.1.mlp.up_proj.weight"]
    refused(
        write_folder(tmp_path / "missing", config, weights),
        r"model\.layers\.1\.mlp\.up_proj\.weight is missing",
    )
    save_file({"a": np.zeros(3, np.int64)}, tmp_path / "missing" / "model.safetensors")
    refused(
        tmp_path / "missing", "type I64 of tensor 'a' is not supported; supported are F64, F32, F16, BF16"
    )


def test_rope_factors_of_a_file(tmp_path: Path) -> None:
    config = config_json("llama")
    factors = llama3_factors()
    path = write_converted_gguf(tmp_path / "m.gguf", config, random_weights(config), rope_freqs=factors)
    assert load_model(path).config.rope_scaling == RopeScaling("factors", factors=tuple(map(float, factors)))


def _resized(config: dict[str, Any], rows: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A model whose embedding has ``rows`` rows, of which padding is the likeliest by far."""
    weights = random_weights(config)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = np.resize(weights[name], (rows, weights[name].shape[1]))
        weights[name][VOCAB:] *= 100
    return {**config, "vocab_size": rows}, weights


def test_padding_of_the_vocabulary_is_never_sampled_and_decodes_to_nothing(tmp_path: Path) -> None:
    config = config_json("llama")
    plain = load_model(write_folder(tmp_path / "plain", config, random_weights(config)))
    padded = load_model(write_folder(tmp_path / "padded", *_resized(config, VOCAB + 60)))
    assert (padded.vocab_size, padded.config.vocab_size) == (VOCAB, VOCAB + 60)
    assert (plain.vocab_size, plain.config.vocab_size) == (VOCAB, VOCAB)
    for function in (padded.function, padded.exact_function):
        found = logits(plain.config, padded.params, function=function)
        wanted = logits(plain.config, plain.params, function=plain.function)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    ids = [VOCAB + 59, *padded.tokenizer.encode("ab"), VOCAB]
    assert padded.tokenizer.decode(ids) == padded.tokenizer.decode(ids, skip_special=False) == "ab"
    assert padded.tokenizer.token_bytes(VOCAB) == b"" == padded.tokenizer.stream().push(VOCAB).encode()
    with pytest.raises(ValueError, match=f"token id {VOCAB + 60} is outside"):
        padded.tokenizer.decode([VOCAB + 60])


def test_a_tokenizer_wider_than_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", *_resized(config_json("llama"), VOCAB - 2))
    needed = f"{folder}: the tokenizer has {VOCAB} tokens, the model's embedding only {VOCAB - 2} rows"
    with pytest.raises(ModelError, match=f"^{needed}$"):
        load_model(folder)
