"""ModelConfig from GGUF keys and from config.json: supported features, and errors for all others."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from jaxpaged_model.checkpoint.gguf_config import config_from_gguf
from jaxpaged_model.checkpoint.huggingface_config import config_from_huggingface
from jaxpaged_model.config import ModelConfig, RopeScaling, rope_frequencies
from jaxpaged_model.metadata import ModelError
from small_models import config_json

SHAPES = {
    "token_embd.weight": (1000, 64),
    "output.weight": (1000, 64),
    **{f"blk.{i}.attn_q.weight": (64, 64) for i in range(4)},
}


def metadata(architecture: str = "llama", **changes: Any) -> dict[str, Any]:
    """Keys of a GGUF file; in ``changes`` a double underscore is a period and None removes a key."""
    keys = {
        "context_length": 2048,
        "embedding_length": 64,
        "block_count": 4,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return {"general.architecture": architecture} | {
        f"{architecture}.{key}": value for key, value in keys.items() if value is not None
    }


def test_gguf_defaults() -> None:
    assert config_from_gguf(metadata(), SHAPES) == ModelConfig(
        architecture="llama",
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=96,
        num_layers=4,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=16,
        context_length=2048,
    )
    assert config_from_gguf(metadata(attention__head_count_kv=None), SHAPES).num_kv_heads == 4


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"attention__key_length": 32, "attention__value_length": 32}, "head_dim", 32),
        ({"rope__freq_base": 5e5}, "rope_theta", 5e5),
        ({"rope__dimension_count": 8}, "rope_dim", 8),
        ({"rope__dimension_count": 16}, "rope_dim", 0),
        ({"attention__sliding_window": 256}, "windows", (256,) * 4),
        ({"attention__sliding_window": 0}, "windows", ()),
        (
            {
                "attention__sliding_window": 256,
                "attention__sliding_window_pattern": [True, False, True, False],
            },
            "windows",
            (256, None, 256, None),
        ),
        ({"attention__head_count_kv": [2, 2, 2, 2]}, "num_kv_heads", 2),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, "rope_scaling", None),
        (
            {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
            "rope_scaling",
            RopeScaling("linear", 4.0),
        ),
        ({"rope__scale_linear": 2.0}, "rope_scaling", RopeScaling("linear", 2.0)),
        ({"rope__scaling__factor": 2.0}, "rope_scaling", RopeScaling("linear", 2.0)),
        ({"expert_count": 0}, "num_layers", 4),
    ],
)
def test_gguf_features(changes: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(config_from_gguf(metadata(**changes), SHAPES), field) == value


def test_gguf_yarn_follows_llama_cpp() -> None:
    yarn = {
        "rope__scaling__type": "yarn",
        "rope__scaling__factor": 4.0,
        "rope__scaling__original_context_length": 512,
    }
    own = 0.1 * math.log(4) + 1
    for changes, attention in (
        ({}, own),
        ({"rope__scaling__attn_factor": 1.5}, 1.5 * own),
        ({"rope__scaling__yarn_log_multiplier": 1.0}, 1.0),
    ):
        scaling = config_from_gguf(metadata(**yarn, **changes), SHAPES).rope_scaling
        assert scaling is not None and scaling.original_context_length == 512
        assert (scaling.beta_fast, scaling.beta_slow) == (32.0, 1.0)
        assert scaling.attention_factor == pytest.approx(attention)
    betas = {"rope__scaling__yarn_beta_fast": 16.0, "rope__scaling__yarn_beta_slow": 2.0}
    scaling = config_from_gguf(metadata(**yarn, **betas), SHAPES).rope_scaling
    assert scaling is not None and (scaling.beta_fast, scaling.beta_slow) == (16.0, 2.0)


def test_gguf_tensors_determine_biases_and_tying() -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if name != "output.weight"}
    assert config_from_gguf(metadata(), shapes).tie_embeddings
    for name, field in (
        ("attn_q.bias", "qkv_bias"),
        ("attn_output.bias", "attention_out_bias"),
        ("ffn_down.bias", "mlp_bias"),
        ("attn_q_norm.weight", "qk_norm"),
    ):
        assert not getattr(config_from_gguf(metadata("qwen3"), SHAPES), field)
        assert getattr(config_from_gguf(metadata("qwen3"), SHAPES | {f"blk.0.{name}": (64,)}), field)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_count": None}, "llama.block_count is missing"),
        ({"block_count": "four"}, "llama.block_count must be an integer, got 'four'"),
        ({"block_count": True}, "llama.block_count must be an integer"),
        ({"block_count": 2**31 - 1}, "block_count is 2147483647, but there are only 6 tensors"),
        ({"embedding_length": 2**40}, "must be from 1 to 2147483647"),
        ({"attention__head_count": 0}, "llama.attention.head_count must be from 1"),
        ({"attention__head_count_kv": 3}, "num_q_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"attention__head_count_kv": [2, 4, 2, 2]}, "head_count_kv differs between layers"),
        ({"attention__value_length": 8}, "value_length must be key_length 16, got 8"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "rms_epsilon must be positive, got nan"),
        (
            {"attention__sliding_window": 8, "attention__sliding_window_pattern": [True]},
            "for each of 4 layers",
        ),
        ({"expert_count": 8}, r"mixture of experts \(llama.expert_count = 8\) is not supported"),
        (
            {"rope__scaling__type": "longrope"},
            "longrope rope scaling needs rope_factors_short.weight and rope_factors_long.weight",
        ),
        (
            {"rope__scaling__type": "dynamic"},
            "'dynamic' is not supported; supported are none, linear, yarn, longrope",
        ),
        ({"rope__dimension_count": 17}, "rope_dim must be even and at most head_dim 16, got 17"),
        ({"rope__freq_base": 1.0}, "must be above 1"),
    ],
)
def test_gguf_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        config_from_gguf(metadata(**changes), SHAPES)


def test_architectures_are_refused_by_name() -> None:
    supported = "supported are llama, mistral, qwen2, qwen3"
    with pytest.raises(ModelError, match=f"architecture 'gemma4' is not supported; {supported}"):
        config_from_gguf(metadata("gemma4"), SHAPES)
    with pytest.raises(ModelError, match=f"architecture 'qwen2_moe' is not supported; {supported}"):
        config_from_huggingface(config_json("qwen2_moe"))
    with pytest.raises(ModelError, match=r"general\.architecture is missing"):
        config_from_gguf({}, SHAPES)
    with pytest.raises(ModelError, match="model_type is missing"):
        config_from_huggingface({})


@pytest.mark.parametrize(
    ("kind", "changes", "field", "value"),
    [
        ("llama", {"head_dim": None}, "head_dim", 16),
        ("qwen3", {"head_dim": None}, "head_dim", 128),
        ("llama", {"head_dim": 32}, "head_dim", 32),
        ("llama", {"num_key_value_heads": None}, "num_kv_heads", 4),
        ("llama", {"attention_bias": True}, "attention_out_bias", True),
        ("qwen2", {}, "qkv_bias", True),
        ("qwen2", {}, "attention_out_bias", False),
        ("qwen3", {}, "qk_norm", "head"),
        ("mistral", {"sliding_window": 64}, "windows", (64, 64)),
        ("mistral", {"sliding_window": None}, "windows", ()),
        ("mistral", {}, "windows", (4096, 4096)),
        ("llama", {"sliding_window": 64}, "windows", ()),
        ("qwen2", {"sliding_window": 64}, "windows", ()),
        (
            "qwen2",
            {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1},
            "windows",
            (None, 64),
        ),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, "windows", ()),
        (
            "qwen3",
            {
                "sliding_window": 64,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "windows",
            (64, None),
        ),
        (
            "llama",
            {"rope_theta": None, "rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}},
            "rope_theta",
            7e4,
        ),
        ("llama", {"rope_scaling": None}, "rope_scaling", None),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2}},
            "rope_scaling",
            RopeScaling("linear", 2.0),
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope_scaling",
            RopeScaling("linear", 2.0),
        ),
        (
            "qwen3",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
            "rope_scaling",
            RopeScaling("yarn", 4.0, 32),
        ),
        (
            "qwen3",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25, "beta_fast": 16}},
            "rope_scaling",
            RopeScaling("yarn", 4.0, 128, beta_fast=16.0, attention_factor=1.25),
        ),
        (
            "llama",
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "rope_scaling",
            RopeScaling("llama3", 8.0, 64),
        ),
    ],
)
def test_huggingface_features(kind: str, changes: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(config_from_huggingface(config_json(kind, **changes)), field) == value


def test_yarn_mscale() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "mscale": 2.0, "mscale_all_dim": 1.0}
    config = config_from_huggingface(config_json("llama", rope_scaling=scaling))
    expected = (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)
    assert rope_frequencies(config)[1] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 64.5}, "hidden_size must be an integer"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "'dynamic' is not supported; supported are default, linear",
        ),
        ({"rope_scaling": {"rope_type": "longrope"}}, "short_factor is missing"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": [2.0]}, "rope_scaling must be a JSON object"),
        (
            {"hidden_act": "gelu"},
            "hidden_act 'gelu' is not supported; supported are silu, swish, gelu_pytorch_tanh",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized with 'gptq' are not supported"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    ],
)
def test_huggingface_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        config_from_huggingface(config_json("llama", **changes))


def test_llama3_factors_and_numbers_agree() -> None:
    """GGUF stores Llama 3's scaling as one factor per frequency; both give the same frequencies."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    by_rule = config_from_huggingface(config_json("llama", rope_scaling=scaling))
    plain, _ = rope_frequencies(config_from_huggingface(config_json("llama")))
    scaled, _ = rope_frequencies(by_rule)
    by_number = config_from_gguf(metadata(), SHAPES, {"rope_freqs.weight": np.asarray(plain / scaled)})
    np.testing.assert_allclose(rope_frequencies(by_number)[0], scaled, rtol=1e-6)


# --- families whose blocks differ from Llama's ---------------------------------------------------------------------


def test_gemma3_of_a_file() -> None:
    gemma3 = {"block_count": 7, "attention__key_length": 16, "attention__value_length": 16}
    shapes = {f"blk.{i}.attn_q.weight": (64, 64) for i in range(7)} | {"token_embd.weight": (1000, 64)}
    config = config_from_gguf(
        metadata("gemma3", attention__sliding_window=512, rope__freq_base=1e6, **gemma3), shapes
    )
    assert config.windows == (512,) * 5 + (None, 512)
    assert (config.norms, config.qk_norm, config.activation) == ("both", "head", "gelu_tanh")
    assert (config.embedding_scale, config.attention_scale, config.logit_soft_cap) == (8.0, None, None)
    assert (config.rope_theta, config.window_rope_theta) == (1e6, 1e4)
    assert config.tie_embeddings
    for pattern, windows in (
        (3, (512, 512, None) * 2 + (512,)),
        (1, ()),
        ([True] + [False] * 6, (512,) + (None,) * 6),
    ):
        changes = {"attention__sliding_window": 512, "attention__sliding_window_pattern": pattern}
        assert config_from_gguf(metadata("gemma3", **gemma3, **changes), shapes).windows == windows
    # A file without windows has one rotary embedding.
    assert config_from_gguf(metadata("gemma3", **gemma3), shapes).window_rope_theta is None


@pytest.mark.parametrize(("architecture", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_gemmas_of_27b_scale_attention_by_the_width_of_their_heads(architecture: str, layers: int) -> None:
    shapes = {f"blk.{i}.attn_q.weight": (64, 64) for i in range(layers)} | SHAPES
    keys = metadata(architecture, block_count=layers, attention__key_length=128, attention__value_length=128)
    assert config_from_gguf(keys, shapes).attention_scale == 0.25


def test_gemma2_of_a_file_has_llama_cpps_defaults() -> None:
    config = config_from_gguf(metadata("gemma2"), SHAPES)
    assert config.windows == (4096, None) * 2
    assert (config.attention_soft_cap, config.logit_soft_cap) == (50.0, 30.0)
    assert config.window_rope_theta is None


GEMMA3 = {"model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18}


def test_gemma3_of_a_folder_has_transformers_defaults() -> None:
    """Published files leave out what is default."""
    config = config_from_huggingface(GEMMA3 | {"sliding_window": 512, "rope_scaling": None})
    assert (config.num_q_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.context_length, config.tie_embeddings) == (262208, 131072, True)
    assert (config.rope_theta, config.window_rope_theta) == (1e6, 1e4)
    assert config.windows == ((512,) * 5 + (None,)) * 3
    assert config.attention_scale is None and config.activation == "gelu_tanh"
    old = {
        "rope_theta": 5e5,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    config = config_from_huggingface(GEMMA3 | old | {"query_pre_attn_scalar": 64})
    assert (config.rope_theta, config.rope_scaling) == (5e5, RopeScaling("linear", 8.0))
    assert (config.window_rope_theta, config.window_rope_scaling) == (2e4, None)
    assert config.attention_scale == 0.125


def test_a_model_with_a_vision_tower_is_its_language_model() -> None:
    alone = config_from_huggingface(GEMMA3)
    inside = {key: value for key, value in GEMMA3.items() if key != "model_type"}
    folder = {"model_type": "gemma3", "text_config": inside, "vision_config": {"hidden_size": 1152}}
    assert config_from_huggingface(folder) == alone
    with pytest.raises(ModelError, match="quantized with 'fp8' are not supported"):
        config_from_huggingface(folder | {"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(ModelError, match="architecture 'gemma4_text' is not supported"):
        config_from_huggingface(folder | {"text_config": inside | {"model_type": "gemma4_text"}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"] * 17}, "layer_types must name each of 18 layers, got 17"),
        (
            {"layer_types": ["chunked_attention"] * 18},
            "layer_types has 'chunked_attention'; supported are full_attention and sliding_attention",
        ),
        ({"sliding_window": 0}, "sliding_window must be from 1"),
        ({"sliding_window": None}, "sliding_window is missing"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern must be from 1"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supported"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
        ({"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported"),
        (
            {"rope_parameters": {"rope_type": "default"}},
            "rope_parameters must have a JSON object for full_attention",
        ),
        (
            {"rope_parameters": {"full_attention": {}, "chunked_attention": {}}},
            "rope_parameters has 'chunked_attention'; known layer types are full_attention",
        ),
        ({"num_local_experts": 8}, "num_local_experts = 8 is not supported"),
    ],
)
def test_refusals_of_layers_in_folders(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        config_from_huggingface(GEMMA3 | changes)
    assert "\n" not in str(error.value)


def test_model_types_that_read_no_layer_types_are_not_contradicted() -> None:
    full = ["full_attention", "full_attention"]
    assert config_from_huggingface(config_json("llama", layer_types=full)).windows == ()
    with pytest.raises(ModelError, match="layer_types with sliding_attention"):
        config_from_huggingface(config_json("llama", layer_types=["sliding_attention"] * 2))
    with pytest.raises(
        ModelError, match="layer_types has sliding_attention, but use_sliding_window is false"
    ):
        config_from_huggingface(config_json("qwen3", layer_types=["sliding_attention"] * 2))


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        (
            "gemma2",
            {"attention__sliding_window": 0},
            "sliding_window must be positive: there are layers with",
        ),
        ("llama", {"attention__sliding_window_pattern": [True] * 4}, "sliding_window must be positive"),
        ("gemma3", {"attention__sliding_window_pattern": [True] * 3}, "true or false for each of 4 layers"),
        ("gemma3", {"attention__sliding_window_pattern": ["L"] * 4}, "must be a list of booleans"),
        ("gemma3", {"attention__key_length_swa": 8}, "key_length_swa must be key_length 16, got 8"),
        ("llama", {"attention__causal": False}, "llama.attention.causal = False is not supported"),
        ("llama", {"rope__dimension_sections": [0, 2, 2, 0]}, r"sections = \[0, 2, 2, 0\] is not supported"),
        ("llama", {"nextn_predict_layers": 1}, "nextn_predict_layers = 1 is not supported"),
    ],
)
def test_refusals_of_layers_in_files(architecture: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        config_from_gguf(metadata(architecture, **changes), SHAPES)
    assert "\n" not in str(error.value)


def test_kinds_of_layers() -> None:
    config = config_from_huggingface(GEMMA3 | {"sliding_window": 512, "num_hidden_layers": 6})
    local, full = config.kinds[0], config.kinds[5]
    assert config.kinds == (local,) * 5 + (full,)
    assert (local.window, full.window) == (512, None) and full.rope == config.rope != local.rope
    rotates = replace(config, rotates=(False,) * 5 + (True,))
    assert rotates.kinds[0].rope.steps == () and rotates.kinds[5] == full
    for changes, message in (
        ({"windows": (0,) * 6}, "a layer's window must be positive, got 0"),
        ({"windows": (8,)}, "windows must name every layer: 1 given for 6"),
        ({"rotates": (True,)}, "rotates must name every layer: 1 given for 6"),
        ({"norms": "sandwich"}, "norms must be one of 'pre', 'post', 'both', 'parallel', got 'sandwich'"),
    ):
        with pytest.raises(ModelError, match=message):
            replace(config, **changes)


@pytest.mark.parametrize(
    ("model_type", "changes", "field", "value"),
    [
        ("smollm3", {"num_hidden_layers": 5}, "rotates", (True, True, True, False, True)),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}, "rotates", (True, False)),
        ("smollm3", {"no_rope_layers": [1, 1]}, "rotates", ()),
        ("smollm3", {"sliding_window": 8}, "windows", ()),
        (
            "smollm3",
            {"sliding_window": 8, "use_sliding_window": True, "no_rope_layers": [1, 0]},
            "windows",
            (None, 8),
        ),
        ("granite", {"logits_scaling": 8.0}, "logit_scale", 0.125),
        ("granite", {}, "attention_scale", 1.0),
        ("granite", {"residual_multiplier": 0.22}, "residual_scale", 0.22),
        ("granite", {"embedding_multiplier": 12}, "embedding_scale", 12.0),
        ("olmo2", {"sliding_window": 8}, "windows", ()),
        ("olmo3", {"num_hidden_layers": 5, "sliding_window": 8}, "windows", (8, 8, 8, None, 8)),
        ("olmo3", {"rope_theta": None}, "rope_theta", 5e5),
        ("olmo3", {}, "window_rope_theta", None),
        ("phi3", {"sliding_window": 8}, "windows", (8, 8)),
        ("phi3", {"sliding_window": 128}, "windows", ()),  # as long as the context
        ("phi3", {"partial_rotary_factor": 0.75}, "rope_dim", 12),
        ("seed_oss", {}, "qkv_bias", True),
        ("seed_oss", {}, "attention_out_bias", False),
        ("exaone4", {"num_hidden_layers": 5, "sliding_window": 8}, "windows", (8, 8, 8, None, 8)),
        (
            "exaone4",
            {"num_hidden_layers": 5, "sliding_window": 8, "sliding_window_pattern": "LG"},
            "windows",
            (8, None, 8, None, 8),
        ),
        ("exaone4", {"num_hidden_layers": 4}, "rotates", (True, True, True, False)),
        ("exaone4", {"sliding_window": None}, "windows", ()),
        ("exaone4", {"sliding_window": None}, "rotates", ()),
        ("cohere2", {"layer_types": ["full_attention"] * 2}, "rotates", (False, False)),
        ("cohere2", {"layer_norm_eps": 1e-3}, "rms_norm_eps", 1e-3),
        ("cohere2", {"tie_word_embeddings": None}, "tie_embeddings", True),
        ("cohere", {}, "logit_scale", 0.0625),
        ("gemma", {"hidden_act": "gelu"}, "activation", "gelu_tanh"),
        ("arcee", {}, "gated", False),
        ("ernie4_5", {"use_bias": True}, "mlp_bias", True),
        ("glm4", {}, "rope_dim", 8),
        ("ministral3", {"rope_theta": None}, "attention_temperature", 0.1),
        ("ministral3", {}, "attention_temperature_length", 16384),
    ],
)
def test_families_of_folders(model_type: str, changes: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(config_from_huggingface(config_json(model_type, **changes)), field) == value


def test_olmo3_scales_rotary_frequencies_of_full_layers_alone() -> None:
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    nested = {
        "full_attention": yarn | {"rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
    }
    new = config_from_huggingface(config_json("olmo3", rope_theta=None, rope_parameters=nested))
    old = config_from_huggingface(config_json("olmo3", rope_theta=5e5, rope_scaling=yarn))
    assert new == old and new.window_rope_theta == 5e5 and new.window_rope_scaling is None
    # llama.cpp's converter writes the whole factor of attention, which replaces YaRN's own.
    keys = {"scaling__type": "yarn", "scaling__factor": 8.0, "scaling__original_context_length": 64}
    keys |= {"freq_base": 5e5, "scaling__yarn_attn_factor": 0.1 * math.log(8) + 1}
    file = config_from_gguf(
        metadata(
            "olmo2", attention__sliding_window=4096, **{f"rope__{key}": value for key, value in keys.items()}
        ),
        SHAPES,
    )
    assert file.window_rope_theta == 5e5 and file.windows == (4096, 4096, 4096, None)
    for config in (file, new):
        assert rope_frequencies(config)[1] == pytest.approx(0.1 * math.log(8) + 1)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must be 0 or 1 for each of 2 layers"),
        ("smollm3", {"no_rope_layers": [1, 2]}, "no_rope_layers must be 0 or 1 for each of 2 layers"),
        ("granite", {"residual_multiplier": 0.0}, "residual_multiplier must be positive"),
        ("granite", {"layer_types": ["sliding_attention"] * 2}, "layer_types with sliding_attention"),
        (
            "exaone4",
            {"sliding_window_pattern": "LLX"},
            "sliding_window_pattern must be a number, or letters L and G",
        ),
        ("exaone4", {"sliding_window_pattern": 0}, "sliding_window_pattern must be from 1"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm = True is not supported"),
        ("cohere2", {"sliding_window": 0}, "sliding_window must be from 1"),
        ("phi3", {"sliding_window": 0}, "sliding_window must be from 1"),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0]}}, "long_factor is missing"),
        ("olmo3", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters must have a JSON object for"),
    ],
)
def test_refusals_of_families_in_folders(model_type: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        config_from_huggingface(config_json(model_type, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        (
            "cohere2",
            {"logit_scale": 0.25, "attention__layer_norm_epsilon": 1e-5},
            "sliding_window must be positive",
        ),
        ("cohere2", {"attention__sliding_window": 8}, "cohere2.attention.layer_norm_epsilon is missing"),
        (
            "cohere2",
            {"attention__sliding_window": 8, "attention__layer_norm_epsilon": 1e-5},
            "cohere2.logit_scale is missing",
        ),
        ("granite", {}, "granite.logit_scale is missing"),
        ("exaone4", {"attention__sliding_window_pattern": [True] * 4}, "sliding_window must be positive"),
        (
            "phi3",
            {"rope__scaling__type": "longrope", "rope__scaling__factor": 2.0},
            "longrope rope scaling needs rope_factors_short.weight",
        ),
    ],
)
def test_refusals_of_families_in_files(architecture: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        config_from_gguf(metadata(architecture, **changes), SHAPES)


def test_factors_of_a_file_that_do_not_fit_are_refused() -> None:
    good, wrong = np.ones(8, np.float32), np.ones(3, np.float32)
    both = {"rope_factors_short.weight": good, "rope_factors_long.weight": good * 2}
    scaling = config_from_gguf(metadata("phi3", rope__scaling__attn_factor=1.5), SHAPES, both).rope_scaling
    assert scaling == RopeScaling(
        "longrope",
        original_context_length=2048,
        attention_factor=1.5,
        factors=(1.0,) * 8,
        long_factors=(2.0,) * 8,
    )
    with pytest.raises(ModelError, match=r"rope_factors_long\.weight must hold 8 positive numbers"):
        config_from_gguf(metadata("phi3"), SHAPES, both | {"rope_factors_long.weight": wrong})
    with pytest.raises(ModelError, match="longrope rope scaling needs"):
        config_from_gguf(metadata("phi3"), SHAPES, {"rope_factors_long.weight": good})
