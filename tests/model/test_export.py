"""write_gguf: a written file loads as the same model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxpaged_model.checkpoint.export import write_gguf
from jaxpaged_model.checkpoint.gguf_file import GGUFFile
from jaxpaged_model.checkpoint.loading import load_model
from jaxpaged_model.config import ModelConfig, RopeScaling, rope_frequencies
from jaxpaged_model.metadata import ModelError
from small_models import (
    VOCAB,
    config_json,
    logits,
    random_params,
    random_weights,
    tokenizer_metadata,
    write_converted_gguf,
)


def small(architecture: str, **changes: object) -> ModelConfig:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 2,
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "context_length": 128,
        "rms_norm_eps": 2.0**-17,  # exact in float32, which a file has it in
    }
    return ModelConfig(architecture=architecture, **(sizes | changes))  # type: ignore[arg-type]


CONFIGS = {
    "llama tied": small("llama", tie_embeddings=True, name="small"),
    "llama biases": small("llama", qkv_bias=True, attention_out_bias=True, mlp_bias=True),
    "llama part of a head": small("llama", rope_dim=8, head_dim=32),
    "llama 3": small("llama", rope_scaling=RopeScaling("llama3", 8.0, 32)),
    "mistral": small("mistral", windows=(5, 5)),
    "qwen2": small("qwen2", qkv_bias=True, windows=(None, 5)),
    "qwen2 yarn": small("qwen2", qkv_bias=True, rope_scaling=RopeScaling("yarn", 4.0, 32)),
    "qwen3": small("qwen3", qk_norm="head", rope_scaling=RopeScaling("yarn", 4.0, 32, attention_factor=1.25)),
    "gemma3": small(
        "gemma3", num_layers=7, windows=(5,) * 5 + (None, 5), norms="both", qk_norm="head", activation="gelu_tanh",
        embedding_scale=8.0, rope_theta=1e6, rope_scaling=RopeScaling("linear", 8.0), window_rope_theta=1e4,
        logit_soft_cap=20.0,
    ),
    "gemma2": small(
        "gemma2", windows=(5, None), norms="both", activation="gelu_tanh", embedding_scale=8.0,
        attention_soft_cap=3.0, logit_soft_cap=20.0, tie_embeddings=True,
    ),
    "gemma": small("gemma", activation="gelu_tanh", embedding_scale=8.0, tie_embeddings=True),
    "smollm3": small("smollm3", num_layers=5, rotates=(True, True, True, False, True)),
    "granite": small(
        "granite", embedding_scale=3.0, residual_scale=0.375, attention_scale=0.125, logit_scale=0.5, mlp_bias=True
    ),
    "olmo3": small(
        "olmo2", num_layers=4, windows=(5, 5, 5, None), norms="post", qk_norm="width",
        rope_scaling=RopeScaling("yarn", 4.0, 32), window_rope_theta=10000.0,
    ),
    "phi3": small(
        "phi3", windows=(5, 5), rope_dim=12,
        rope_scaling=RopeScaling(
            "longrope", original_context_length=32, attention_factor=1.25, factors=(1.0,) * 6, long_factors=(2.0,) * 6
        ),
    ),
    "ministral3": small(
        "mistral3", rope_scaling=RopeScaling("yarn", 4.0, 32, attention_factor=1.0), attention_temperature=0.25,
        attention_temperature_length=32,
    ),
    "seed_oss": small("seed_oss", qkv_bias=True),
    "exaone4": small(
        "exaone4", num_layers=4, windows=(5, 5, 5, None), rotates=(True, True, True, False), norms="post",
        qk_norm="head",
    ),
    "cohere2": small(
        "cohere2", num_layers=4, windows=(5, 5, 5, None), rotates=(True, True, True, False), norms="parallel",
        norm_kind="layer", logit_scale=0.25, tie_embeddings=True,
    ),
    "command-r": small("command-r", norms="parallel", norm_kind="layer", logit_scale=0.25),
    "arcee": small("arcee", gated=False, activation="relu2"),
    "ernie4_5": small("ernie4_5"),
    "glm4": small("glm4", norms="both", rope_dim=8, qkv_bias=True),
    "linear": small("qwen3", qk_norm="head", rope_scaling=RopeScaling("linear", 2.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    params = random_params(config, seed=3)
    write_gguf(tmp_path / "m.gguf", config, params, tokenizer_metadata=tokenizer_metadata())
    model = load_model(tmp_path / "m.gguf", weights="dequantized")
    assert replace(model.config, rope_scaling=None, architecture=config.architecture) == replace(
        config, rope_scaling=None
    )
    assert sum(x.size for x in jax.tree.leaves(model.params)) == config.num_parameters()
    np.testing.assert_allclose(rope_frequencies(model.config)[0], rope_frequencies(config)[0], rtol=1e-6)
    assert rope_frequencies(model.config)[1] == pytest.approx(rope_frequencies(config)[1])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), model.params, params))
    np.testing.assert_allclose(logits(model.config, model.params), logits(config, params), rtol=0, atol=1e-4)
    assert model.tokenizer.decode(model.tokenizer.encode("x = 1")) == "x = 1"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "gemma3",
            {"attention_scale": 0.3},
            "attention_scale = 0.3 of a gemma3 model: it would be read as None",
        ),
        ("gemma3", {"windows": (5,) * 6 + (7,)}, r"windows = \(5, 5, 5, 5, 5, 5, 7\) of a gemma3 model"),
        ("gemma2", {"norms": "pre"}, "norms = pre of a gemma2 model: it would be read as both"),
        ("mistral", {"activation": "gelu_tanh"}, "activation = gelu_tanh of a llama model"),
        ("qwen2", {"rotates": (True, False)}, r"rotates = \(True, False\) of a qwen2 model"),
    ],
)
def test_what_a_file_cannot_say_is_not_written(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = replace(CONFIGS[name], **changes)
    with pytest.raises(ModelError, match=f"a GGUF file cannot say {message}"):
        write_gguf(
            tmp_path / "m.gguf", config, random_params(config), tokenizer_metadata=tokenizer_metadata()
        )
    assert not (tmp_path / "m.gguf").exists()


def test_errors_of_quantization_are_bounded(tmp_path: Path) -> None:
    config = CONFIGS["llama tied"]
    params = random_params(config, seed=3)
    exact = logits(config, params)
    sizes, errors = [], []
    for quantization in ("F32", "F16", "Q8_0"):
        path = tmp_path / f"{quantization}.gguf"
        write_gguf(path, config, params, quantization=quantization, tokenizer_metadata=tokenizer_metadata())
        model = load_model(path, weights="dequantized")
        assert model.description == f"llama 78K {quantization}"
        sizes.append(model.size_bytes)
        errors.append(np.abs(logits(model.config, model.params) - exact).max())
    assert sizes == sorted(sizes, reverse=True)
    assert errors[0] == 0 < errors[1] < errors[2] < 0.1 * np.abs(exact).max()


def test_quantized_weights_survive_another_round(tmp_path: Path) -> None:
    config = CONFIGS["qwen3"]
    for name in ("a.gguf", "b.gguf"):
        params = random_params(config, seed=3)
        if name == "b.gguf":
            params = load_model(tmp_path / "a.gguf", weights="dequantized").params
        write_gguf(
            tmp_path / name, config, params, quantization="Q8_0", tokenizer_metadata=tokenizer_metadata()
        )
    first, second = GGUFFile(tmp_path / "a.gguf"), GGUFFile(tmp_path / "b.gguf")
    for tensor in first.tensors:
        np.testing.assert_allclose(first.read(tensor), second.read(tensor), rtol=2e-3, atol=1e-6)


def test_rows_of_other_lengths_than_whole_blocks_are_f16(tmp_path: Path) -> None:
    config = small("llama", intermediate_size=100)
    params = random_params(config, dtype=jnp.bfloat16)
    write_gguf(
        tmp_path / "m.gguf", config, params, quantization="Q8_0", tokenizer_metadata=tokenizer_metadata()
    )
    types = {name: tensor.dtype for name, tensor in GGUFFile(tmp_path / "m.gguf").tensors.items()}
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "Q8_0" and types["blk.0.attn_norm.weight"] == "F32"


def test_the_same_bytes_of_tensors_as_llama_cpps_converter(tmp_path: Path) -> None:
    weights = random_weights(config_json("llama"))
    theirs = GGUFFile(write_converted_gguf(tmp_path / "a.gguf", config_json("llama"), weights))
    model = load_model(tmp_path / "a.gguf", weights="dequantized")
    write_gguf(tmp_path / "b.gguf", model.config, model.params, tokenizer_metadata=tokenizer_metadata())
    ours = GGUFFile(tmp_path / "b.gguf")
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all((ours.read(name) == theirs.read(name)).all() for name in theirs.tensors)
    assert gguf.GGUFReader(tmp_path / "b.gguf").fields["general.architecture"].contents() == "llama"
