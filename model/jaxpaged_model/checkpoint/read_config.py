"""ModelConfig from GGUF metadata or a Hugging Face ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpaged_model.config import ARCHITECTURES, ModelConfig, RopeScaling
from jaxpaged_model.metadata import REQUIRED, Metadata, ModelError

HF_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
GGUF_ROPE_TYPES = ("none", "linear", "yarn")


def _check_one_of(what: str, value: str | None, supported: tuple[str, ...]) -> None:
    if value not in supported:
        raise ModelError(f"{what} {value!r} is not supported; supported are {', '.join(supported)}")


def config_from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: np.ndarray | None = None,
) -> ModelConfig:
    """The configuration of a GGUF file's model.

    Args:
      metadata: plain values by key.
      shapes: every tensor's shape, rows first; which tensors there are tells biases and tied embeddings.
      rope_factors: the tensor ``rope_freqs.weight``, None if the file has none.

    Raises:
      ModelError: the architecture or a feature is not supported, or a key is missing or invalid.
    """
    architecture = Metadata(metadata).text("general.architecture")
    _check_one_of("architecture", architecture, ARCHITECTURES)
    v = Metadata(metadata, architecture + ".")
    if v.integer("expert_count", 0, least=0):
        raise ModelError(
            f"mixture of experts ({v.prefix}expert_count = {v.get('expert_count')}) is not supported; "
            "dense models are"
        )
    num_layers = v.integer("block_count")
    if num_layers > len(shapes):
        raise v.error("block_count", f"is {num_layers}, but there are only {len(shapes)} tensors")
    hidden_size = v.integer("embedding_length")
    num_q_heads = _same_in_all_layers(v, "attention.head_count", REQUIRED)
    num_kv_heads = _same_in_all_layers(v, "attention.head_count_kv", num_q_heads)
    head_dim = v.integer("attention.key_length", max(1, hidden_size // num_q_heads))
    if v.integer("attention.value_length", head_dim) != head_dim:
        raise v.wrong("attention.value_length", f"key_length {head_dim}")
    context_length = v.integer("context_length")
    rope_dim = v.integer("rope.dimension_count", head_dim)
    return ModelConfig(
        architecture=architecture,
        name=Metadata(metadata).text("general.name", ""),
        vocab_size=_gguf_vocab_size(metadata, v, shapes),
        hidden_size=hidden_size,
        intermediate_size=_same_in_all_layers(v, "feed_forward_length", REQUIRED),
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        context_length=context_length,
        rms_norm_eps=v.number("attention.layer_norm_rms_epsilon"),
        rope_theta=v.number("rope.freq_base", 10000.0, above=1.0),
        rope_dim=0 if rope_dim == head_dim else rope_dim,
        rope_scaling=_gguf_rope(v, shapes, context_length, rope_dim, rope_factors),
        windows=_gguf_windows(v, num_layers),
        tie_embeddings="output.weight" not in shapes,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        attention_out_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_down.bias" in shapes,
        qk_norm="blk.0.attn_q_norm.weight" in shapes,
    )


def _same_in_all_layers(v: Metadata, key: str, default: Any) -> int:
    """A number that may be given for each layer; different ones are not supported."""
    value = v.get(key)
    if not isinstance(value, list):
        return v.integer(key, default)
    if len({str(x) for x in value}) != 1:
        raise v.error(key, f"differs between layers, which is not supported: {str(value)[:60]}")
    return Metadata({v.prefix + key: value[0]}, v.prefix).integer(key)


def _gguf_vocab_size(metadata: Mapping[str, Any], v: Metadata, shapes: Mapping[str, tuple[int, ...]]) -> int:
    if tokens := Metadata(metadata).array("tokenizer.ggml.tokens", str, None):
        return len(tokens)
    embedding = shapes.get("token_embd.weight", ())
    return v.integer("vocab_size", embedding[0] if embedding else REQUIRED)


def _gguf_windows(v: Metadata, num_layers: int) -> tuple[int | None, ...]:
    window = v.integer("attention.sliding_window", 0, least=0)
    if not window:
        return ()
    pattern = v.array("attention.sliding_window_pattern", bool, [True] * num_layers)
    if len(pattern) != num_layers:
        raise v.wrong("attention.sliding_window_pattern", f"true or false for each of {num_layers} layers")
    return tuple(window if slides else None for slides in pattern)


def _gguf_rope(
    v: Metadata,
    shapes: Mapping[str, tuple[int, ...]],
    context_length: int,
    rope_dim: int,
    factors: np.ndarray | None,
) -> RopeScaling | None:
    kind = v.text("rope.scaling.type", None)
    if any(name.startswith("rope_factors_") for name in shapes):
        kind = "longrope"
    if kind is not None:
        _check_one_of("rope scaling", kind, GGUF_ROPE_TYPES)
    # Files of 2023 have scale_linear; llama.cpp reads it as linear scaling if there is no factor.
    factor = (
        v.number("rope.scaling.factor", v.number("rope.scale_linear", 1.0, above=-math.inf), above=-math.inf)
        or 1.0
    )
    if factor < 0:
        raise v.wrong("rope.scaling.factor", "positive")
    if factors is not None:
        if kind not in (None, "none") and factor != 1.0:
            raise ModelError(f"rope scaling {kind!r} together with rope_freqs.weight is not supported")
        if factors.size != rope_dim // 2 or not (np.isfinite(factors).all() and (factors > 0).all()):
            raise ModelError(
                f"rope_freqs.weight must hold {rope_dim // 2} positive numbers, half of "
                f"rope.dimension_count, got {factors.size} from {factors.min()} to {factors.max()}"
            )
        return RopeScaling("factors", factors=tuple(float(x) for x in factors.reshape(-1)))
    if kind == "none" or factor == 1.0:
        return None
    if kind != "yarn":
        return RopeScaling("linear", factor=factor)
    if v.number("rope.scaling.yarn_ext_factor", 1.0, above=-math.inf) not in (1.0, -1.0):
        raise v.wrong("rope.scaling.yarn_ext_factor", "1")
    # As llama.cpp: (0.1 ln factor + 1) * attn_factor, divided by 0.1 multiplier ln factor + 1 if there is one.
    attention = _mscale(factor, 1.0)
    if multiplier := v.number("rope.scaling.yarn_log_multiplier", 0.0, above=-math.inf):
        attention /= _mscale(factor, multiplier)
    return RopeScaling(
        "yarn",
        factor=factor,
        original_context_length=v.integer("rope.scaling.original_context_length", context_length),
        beta_fast=v.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=v.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=attention
        * v.number("rope.scaling.yarn_attn_factor", v.number("rope.scaling.attn_factor", 1.0)),
    )


def _mscale(factor: float, multiplier: float) -> float:
    return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0


def config_from_huggingface(config: Mapping[str, Any]) -> ModelConfig:
    """The configuration in a ``config.json``, as transformers reads it.

    Raises:
      ModelError: the architecture or a feature is not supported, or a key is missing or invalid.
    """
    v = Metadata(config)
    architecture = v.text("model_type")
    _check_one_of("architecture", architecture, ARCHITECTURES)
    if quantization := v.get("quantization_config"):
        method = (
            quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        )
        raise ModelError(
            f"weights quantized with {method!r} are not supported; use the unquantized weights or a GGUF file"
        )
    activation = v.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"hidden_act {activation!r} is not supported; supported is silu")
    hidden_size, num_layers = v.integer("hidden_size"), v.integer("num_hidden_layers")
    num_q_heads = v.integer("num_attention_heads")
    head_dim = v.integer("head_dim", 128 if architecture == "qwen3" else max(1, hidden_size // num_q_heads))
    context_length = v.integer("max_position_embeddings")
    theta, scaling, rotary_part = _hf_rope(v, context_length)
    rope_dim = int(head_dim * rotary_part)
    attention_bias = v.boolean("attention_bias", False) if architecture in ("llama", "qwen3") else False
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
        rms_norm_eps=v.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_dim=0 if rope_dim == head_dim else rope_dim,
        rope_scaling=scaling,
        windows=_hf_windows(v, architecture, num_layers),
        tie_embeddings=v.boolean("tie_word_embeddings", False),
        qkv_bias=attention_bias or architecture == "qwen2",
        attention_out_bias=attention_bias,
        mlp_bias=v.boolean("mlp_bias", False) if architecture == "llama" else False,
        qk_norm=architecture == "qwen3",
    )


def _hf_rope(v: Metadata, context_length: int) -> tuple[float, RopeScaling | None, float]:
    """(theta, scaling, rotated share of a head); transformers 5 has them all in ``rope_parameters``."""
    key = "rope_parameters" if v.get("rope_parameters") is not None else "rope_scaling"
    given = v.get(key, {})
    if not isinstance(given, dict):
        raise v.wrong(key, "a JSON object")
    if given and all(isinstance(x, dict) for x in given.values()):
        if any(x != next(iter(given.values())) for x in given.values()):
            raise ModelError("rope_parameters that differ between layer types are not supported")
        given = next(iter(given.values()))
    r = Metadata(given)
    theta = r.number("rope_theta", v.number("rope_theta", 10000.0, above=1.0), above=1.0)
    share = r.number("partial_rotary_factor", v.number("partial_rotary_factor", 1.0))
    kind = r.text("rope_type", r.text("type", "default"))
    _check_one_of("rope scaling", kind, HF_ROPE_TYPES)
    return theta, _hf_rope_scaling(r, kind, context_length), share


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
        attention = _mscale(factor, mscale) / _mscale(factor, mscale_all)
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=r.number("beta_fast", 32.0),
        beta_slow=r.number("beta_slow", 1.0),
        attention_factor=attention,
    )


def _hf_windows(v: Metadata, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    """Mistral has the window in all layers; Qwen only with ``use_sliding_window``, in the layers it names."""
    # An absent key means transformers' default, null no window.
    window = v.integer("sliding_window", 0, least=0) if "sliding_window" in v.values else 4096
    if architecture == "llama" or not window:
        return ()
    if architecture != "mistral" and not v.boolean("use_sliding_window", False):
        return ()
    if architecture == "mistral":
        return (window,) * num_layers
    first = v.integer("max_window_layers", 28, least=0)
    known = ("full_attention", "sliding_attention")
    types = v.array("layer_types", str, [known[i >= first] for i in range(num_layers)])
    if len(types) != num_layers or not set(types) <= set(known):
        raise v.wrong("layer_types", f"{' or '.join(known)} for each of {num_layers} layers")
    windows = tuple(window if t == "sliding_attention" else None for t in types)
    return windows if any(windows) else ()
