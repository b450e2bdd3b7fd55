"""ModelConfig from the ``config.json`` of a Hugging Face folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxpaged_model.checkpoint.families import (
    BLOCKS,
    PATTERNS,
    all_but_every,
    check_one_of,
    phi3_windows,
    refuse,
    window_rope,
    windows_of,
    yarn_factor,
)
from jaxpaged_model.config import ModelConfig, RopeScaling
from jaxpaged_model.metadata import REQUIRED, Metadata, ModelError

HF_ROPE_TYPES = ("default", "linear", "yarn", "llama3", "longrope")
HF_ARCHITECTURES: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "smollm3": "smollm3",
    "granite": "granite",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "phi3": "phi3",
    "ministral3": "mistral3",
    "seed_oss": "seed_oss",
    "exaone4": "exaone4",
    "cohere2": "cohere2",
    "gemma": "gemma",
    "cohere": "command-r",
    "arcee": "arcee",
    "ernie4_5": "ernie4_5",
    "glm4": "glm4",
}
"""Architecture of each ``model_type``."""
_TEXT_PARTS = {"gemma3": "gemma3_text", "mistral3": "mistral"}
"""Model types whose ``text_config`` is a language model of one of the above, and its default type."""

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}
_FULL, _SLIDING = "full_attention", "sliding_attention"

# transformers' defaults of keys that published files leave out, where those of Llama do not apply.
_GEMMA: dict[str, Any] = {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_HF_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "qwen3": {"head_dim": 128},
    "mistral": {"sliding_window": 4096},
    "qwen2": {"sliding_window": 4096},
    "gemma2": _GEMMA
    | {
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": _GEMMA
    | {
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
    "smollm3": {"tie_word_embeddings": True, "rope_theta": 2e6, "no_rope_layer_interval": 4},
    "granite": {
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    "olmo2": {"rms_norm_eps": 1e-5},
    "olmo3": {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "sliding_window": 4096},
    "phi3": {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    "ministral3": {
        "rms_norm_eps": 1e-5,
        "head_dim": 128,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "seed_oss": {"attention_bias": True, "head_dim": 128},
    "exaone4": {"rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4},
    "cohere2": {
        "tie_word_embeddings": True,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "sliding_window": 4096,
    },
    "gemma": {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "head_dim": 256},
    "cohere": {"tie_word_embeddings": True, "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "rope_theta": 5e5},
    "arcee": {"rms_norm_eps": 1e-5, "hidden_act": "relu2"},
    "ernie4_5": {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "head_dim": 128},
    "glm4": {
        "attention_bias": True,
        "head_dim": 128,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1.5625e-7,
    },
}
_WITHOUT_ATTENTION_BIAS = ("mistral", "qwen2", "phi3", "ministral3", "exaone4", "ernie4_5")
"""Model types for which transformers does not read ``attention_bias``."""
_WITH_MLP_BIAS = ("llama", "smollm3", "granite", "seed_oss", "arcee")
"""Model types for which it reads ``mlp_bias``."""
_WITHOUT_WINDOW = (
    "llama", "granite", "olmo2", "seed_oss", "gemma", "cohere", "arcee", "ernie4_5", "glm4",
)  # fmt: skip
"""Model types for which it reads no ``sliding_window``."""
# Features that change what a model computes and that are not supported, with their neutral values.
_HF_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0, 1),
    "moe_num_experts": (0, 1),
    "use_bidirectional_attention": (False,),
    "use_qk_norm": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "alibi": (False,),
    "clip_qkv": (),
}


def config_from_huggingface(config: Mapping[str, Any]) -> ModelConfig:
    """The configuration in a ``config.json``, as transformers reads it.

    Of a model with a vision tower it is that of the language model.

    Raises:
      ModelError: the architecture or a feature is not supported, or a key is missing or invalid.
    """
    model_type, config = _text_part(config)
    v = Metadata(config)
    if quantization := v.get("quantization_config"):
        method = (
            quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        )
        raise ModelError(
            f"weights quantized with {method!r} are not supported; use the unquantized weights or a GGUF file"
        )
    for key, neutral in _HF_REFUSED.items():
        refuse(v, key, neutral)
    given = {key: value for key, value in config.items() if value is not None or key == "sliding_window"}
    v = Metadata({**_HF_DEFAULTS.get(model_type, {}), **given})
    architecture = HF_ARCHITECTURES[model_type]
    hidden_size, num_layers = v.integer("hidden_size"), v.integer("num_hidden_layers")
    num_q_heads = v.integer("num_attention_heads")
    head_dim = v.integer("head_dim", max(1, hidden_size // num_q_heads))
    context_length = v.integer("max_position_embeddings")
    rope_of = _hf_rope(v, model_type, context_length)
    rope_dim = int(head_dim * rope_of.pop("share"))
    bias = v.boolean("attention_bias", False) and model_type not in _WITHOUT_ATTENTION_BIAS
    windows = _hf_windows(v, model_type, num_layers)
    found: dict[str, Any] = {
        "rms_norm_eps": v.number(
            "layer_norm_eps" if model_type in ("cohere", "cohere2") else "rms_norm_eps", 1e-6
        ),
        "windows": windows,
        "qk_norm": "head" if model_type == "qwen3" else "",
        "qkv_bias": bias or model_type == "qwen2",
        "attention_out_bias": bias,
        "mlp_bias": v.boolean("mlp_bias", False) and model_type in _WITH_MLP_BIAS,
        **rope_of,
        **BLOCKS.get(architecture, {}),
        "activation": _hf_activation(v, model_type),
    }
    found |= _hf_of_type(v, model_type, found, num_layers, hidden_size, head_dim)
    return ModelConfig(
        architecture=architecture,
        name=v.text("_name_or_path", ""),
        vocab_size=v.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=v.integer("intermediate_size"),
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=v.integer("num_key_value_heads", num_q_heads),
        head_dim=head_dim,
        context_length=context_length,
        rope_dim=0 if rope_dim == head_dim else rope_dim,
        tie_embeddings=v.boolean("tie_word_embeddings", False),
        **found,
    )


def _text_part(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """``model_type`` and configuration of the language model in a ``config.json``."""
    v = Metadata(config)
    model_type = v.text("model_type")
    if model_type in _TEXT_PARTS:
        inside = v.get("text_config", {})
        if not isinstance(inside, dict):
            raise v.wrong("text_config", "a JSON object")
        of_both = ("quantization_config", "tie_word_embeddings", "_name_or_path")
        config = {**inside, **{key: config[key] for key in of_both if config.get(key) is not None}}
        model_type = Metadata(inside).text("model_type", _TEXT_PARTS[model_type])
    if model_type not in HF_ARCHITECTURES:
        check_one_of("architecture", model_type, (*HF_ARCHITECTURES, *_TEXT_PARTS))
    return model_type, config


def _hf_activation(v: Metadata, model_type: str) -> str:
    key = "hidden_activation" if v.get("hidden_activation") is not None else "hidden_act"
    name = v.text(key, "silu")
    if model_type == "gemma" and name == "gelu":
        name = "gelu_pytorch_tanh"  # a legacy name, which transformers takes for this function
    check_one_of(key, name, tuple(_ACTIVATIONS))
    return _ACTIVATIONS[name]


def _hf_of_type(
    v: Metadata, model_type: str, found: Mapping[str, Any], num_layers: int, hidden_size: int, head_dim: int
) -> dict[str, Any]:
    """Fields that transformers reads or computes for one model type alone."""
    match model_type:
        case "gemma2" | "gemma3_text":
            scalar = v.number("query_pre_attn_scalar")
            if model_type == "gemma3_text":
                refuse(v, "attn_logit_softcapping", ())
            return {
                "embedding_scale": math.sqrt(hidden_size),
                "attention_scale": None if scalar == head_dim else scalar**-0.5,
                "attention_soft_cap": v.number("attn_logit_softcapping", None),
                "logit_soft_cap": v.number("final_logit_softcapping", None),
            }
        case "smollm3":
            rotates = _smollm3_rotates(v, num_layers)
            return {"rotates": () if all(rotates) else rotates}
        case "granite":
            return {
                "embedding_scale": v.number("embedding_multiplier"),
                "residual_scale": v.number("residual_multiplier"),
                "attention_scale": v.number("attention_multiplier"),
                "logit_scale": 1.0 / v.number("logits_scaling"),
            }
        case "gemma":
            return {"embedding_scale": math.sqrt(hidden_size)}
        case "cohere":
            return {"logit_scale": v.number("logit_scale")}
        case "ernie4_5":
            bias = v.boolean("use_bias", False)
            return {"qkv_bias": bias, "attention_out_bias": bias, "mlp_bias": bias}
        case "glm4":
            return {"attention_out_bias": False}
        case "phi3":
            return phi3_windows(found["windows"], v.integer("max_position_embeddings"))
        case "seed_oss":
            return {"attention_out_bias": v.boolean("attention_out_bias", False)}
        case "ministral3":
            r = Metadata(v.get("rope_parameters", {}))
            if not (temperature := r.number("llama_4_scaling_beta", 0.0, above=-math.inf)):
                return {}
            return {
                "attention_temperature": temperature,
                "attention_temperature_length": r.integer("original_max_position_embeddings"),
            }
        case "exaone4" if v.get("sliding_window") is not None:
            return {
                "rotates": tuple(window is not None for window in found["windows"]) or (False,) * num_layers
            }
        case "cohere2":
            rotates = tuple(window is not None for window in found["windows"]) or (False,) * num_layers
            return {"rotates": rotates, "logit_scale": v.number("logit_scale")}
    return {}


def _smollm3_rotates(v: Metadata, num_layers: int) -> tuple[bool, ...]:
    """``no_rope_layers``, 1 for a layer that rotates, or all layers but every n-th."""
    given = v.array("no_rope_layers", int, None)
    if given is None:
        return tuple(all_but_every(v.integer("no_rope_layer_interval"), num_layers))
    if len(given) < num_layers or not set(given) <= {0, 1}:
        raise v.wrong("no_rope_layers", f"0 or 1 for each of {num_layers} layers")
    return tuple(one == 1 for one in given[:num_layers])


def _hf_rope(v: Metadata, model_type: str, context_length: int) -> dict[str, Any]:
    """Fields of the rotary embedding; transformers 5 has them all in ``rope_parameters``.

    Returns:
      Fields of ``ModelConfig``, and ``"share"``, the rotated share of a head.
    """
    key = "rope_parameters" if v.get("rope_parameters") is not None else "rope_scaling"
    given = v.get(key, {})
    if not isinstance(given, dict):
        raise v.wrong(key, "a JSON object")
    by_type = model_type in ("gemma3_text", "olmo3")
    theta = v.number("rope_theta", 10000.0, above=1.0)
    local: Mapping[str, Any] = {}
    if any(isinstance(x, dict) for x in given.values()):
        if unknown := sorted(given.keys() - {_FULL, _SLIDING}):
            raise v.error(key, f"has {unknown[0]!r}; known layer types are {_FULL} and {_SLIDING}")
        full, local = (given.get(name) or {} for name in (_FULL, _SLIDING))
        if not by_type and local and full and local != full:
            raise ModelError("rope_parameters that differ between layer types are not supported")
        given = full or ({} if by_type else local)
    elif by_type and key == "rope_parameters" and given:
        raise v.error(key, f"must have a JSON object for {_FULL} and one for {_SLIDING}")
    r = Metadata(given)
    theta, scaling = _hf_rope_of(v, r, theta, context_length)
    found = {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "share": r.number("partial_rotary_factor", v.number("partial_rotary_factor", 1.0)),
    }
    if by_type:
        local_theta = v.number("rope_local_base_freq", theta, above=1.0)
        of_local = _hf_rope_of(v, Metadata(local), local_theta, context_length)
        found |= window_rope(*of_local, (theta, scaling))
    return found


def _hf_rope_of(
    v: Metadata, r: Metadata, theta: float, context_length: int
) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of ``rope_parameters`` of one type of layers."""
    kind = r.text("rope_type", r.text("type", "default"))
    if kind == "su" or (kind == "yarn" and r.get("long_factor") is not None):
        kind = "longrope"  # the names that Phi-3's first files have for it
    check_one_of("rope scaling", kind, HF_ROPE_TYPES)
    theta = r.number("rope_theta", theta, above=1.0)
    if kind != "longrope":
        return theta, _hf_rope_scaling(r, kind, context_length)
    original = v.integer(
        "original_max_position_embeddings", r.integer("original_max_position_embeddings", context_length)
    )
    factor = r.number("factor", context_length / original)
    own = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (tuple(r.array(f"{name}_factor", float)) for name in ("short", "long"))
    return theta, RopeScaling(
        "longrope",
        original_context_length=original,
        attention_factor=r.number("attention_factor", own),
        factors=short,
        long_factors=long,
    )


def _hf_rope_scaling(r: Metadata, kind: str, context_length: int) -> RopeScaling | None:
    if kind == "default":
        return None
    original = r.integer("original_max_position_embeddings", context_length)
    factor = r.number("factor", context_length / original if kind == "yarn" else REQUIRED)
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind == "llama3":
        low, high = r.number("low_freq_factor"), r.number("high_freq_factor")
        if high <= low:
            raise r.wrong("high_freq_factor", f"above low_freq_factor {low}")
        return RopeScaling("llama3", factor, original, low_freq_factor=low, high_freq_factor=high)
    if not r.boolean("truncate", True):
        raise ModelError("yarn rope scaling with truncate = false is not supported; true is")
    attention = r.number("attention_factor", None)
    mscale, mscale_all = (r.number(key, 0.0, above=-math.inf) for key in ("mscale", "mscale_all_dim"))
    if attention is None and mscale and mscale_all:
        attention = yarn_factor(factor, mscale) / yarn_factor(factor, mscale_all)
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=r.number("beta_fast", 32.0),
        beta_slow=r.number("beta_slow", 1.0),
        attention_factor=attention,
    )


def _hf_windows(v: Metadata, model_type: str, num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer, by the rule of the model type and ``layer_types``."""
    if model_type in _WITHOUT_WINDOW:
        return _uniform(v, num_layers, [False] * num_layers)
    if model_type in ("mistral", "ministral3", "phi3"):
        slides = [v.get("sliding_window") is not None] * num_layers
        return _uniform(v, num_layers, slides)
    wanted = True
    if model_type in ("qwen2", "qwen3", "smollm3"):
        wanted = v.boolean("use_sliding_window", False)
    if model_type == "exaone4" and v.get("sliding_window") is None:
        slides = [False] * num_layers
    elif model_type == "smollm3":
        slides = [wanted and not rotates for rotates in _smollm3_rotates(v, num_layers)]
    elif model_type in ("qwen2", "qwen3"):
        first = v.integer("max_window_layers", 28, least=0)
        slides = [wanted and i >= first for i in range(num_layers)]
    else:
        slides = _hf_pattern(v, PATTERNS[HF_ARCHITECTURES[model_type]], num_layers)
    types = _layer_types(v, num_layers, slides)
    if _SLIDING in types and not wanted:
        raise v.error("layer_types", f"has {_SLIDING}, but use_sliding_window is false")
    return _sliding(v, types)


def _hf_pattern(v: Metadata, default: int, num_layers: int) -> list[bool]:
    """``sliding_window_pattern``: n for all layers but every n-th, or letters L and G, repeated (EXAONE 4)."""
    key = "sliding_window_pattern"
    pattern = v.get(key)
    if not isinstance(pattern, str):
        return all_but_every(v.integer(key, default), num_layers)
    if not pattern or not set(pattern) <= {"L", "G"}:
        raise v.wrong(key, "a number, or letters L and G")
    return [pattern[i % len(pattern)] == "L" for i in range(num_layers)]


def _layer_types(v: Metadata, num_layers: int, slides: list[bool]) -> list[str]:
    """``layer_types``, or what stands for it if there is none."""
    types = v.array("layer_types", str, [_SLIDING if one else _FULL for one in slides])
    if unknown := [one for one in types if one not in (_FULL, _SLIDING)]:
        raise v.error("layer_types", f"has {unknown[0]!r}; supported are {_FULL} and {_SLIDING}")
    if len(types) != num_layers:
        raise v.error("layer_types", f"must name each of {num_layers} layers, got {len(types)}")
    return types


def _uniform(v: Metadata, num_layers: int, slides: list[bool]) -> tuple[int | None, ...]:
    """Windows of a model type that does not read ``layer_types``, which must not contradict it."""
    types = _layer_types(v, num_layers, slides)
    if types != [_SLIDING if one else _FULL for one in slides]:
        raise v.error("layer_types", f"with {types[0]} and others is not supported for this model_type")
    return _sliding(v, types)


def _sliding(v: Metadata, types: list[str]) -> tuple[int | None, ...]:
    if _SLIDING not in types:
        return ()
    return windows_of(v.integer("sliding_window"), [one == _SLIDING for one in types])
