"""ModelConfig from the metadata of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

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
from jaxpaged_model.config import ARCHITECTURES, ModelConfig, RopeScaling
from jaxpaged_model.metadata import REQUIRED, Metadata, ModelError

GGUF_ROPE_TYPES = ("none", "linear", "yarn", "longrope")
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""Tensors of a GGUF file that its configuration depends on."""

# Features that change what a model computes and that no architecture here has, with their neutral values.
_GGUF_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.shared_kv_layers": (0,),
    "attention.recurrent_layers": (0,),
    "embedding_length_per_layer_input": (0,),
    "nextn_predict_layers": (0,),
    "rope.dimension_sections": (0,),
    "rope.scaling.alpha": (0.0,),
}


def config_from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: Mapping[str, np.ndarray] | None = None,
) -> ModelConfig:
    """The configuration of a GGUF file's model.

    Args:
      metadata: plain values by key.
      shapes: every tensor's shape, rows first; which tensors there are tells biases and tied embeddings.
      rope_factors: those of the tensors ``ROPE_FACTORS`` that the file has, f32 each.

    Raises:
      ModelError: the architecture or a feature is not supported, or a key is missing or invalid.
    """
    architecture = Metadata(metadata).text("general.architecture")
    check_one_of("architecture", architecture, ARCHITECTURES)
    v = Metadata(metadata, architecture + ".")
    if v.integer("expert_count", 0, least=0):
        raise ModelError(
            f"mixture of experts ({v.prefix}expert_count = {v.get('expert_count')}) is not supported; "
            "dense models are"
        )
    for key, neutral in _GGUF_REFUSED.items():
        refuse(v, key, neutral)
    num_layers = v.integer("block_count")
    if num_layers > len(shapes):
        raise v.error("block_count", f"is {num_layers}, but there are only {len(shapes)} tensors")
    hidden_size = v.integer("embedding_length")
    num_q_heads = _same_in_all_layers(v, "attention.head_count", REQUIRED)
    num_kv_heads = _same_in_all_layers(v, "attention.head_count_kv", num_q_heads)
    head_dim = v.integer("attention.key_length", max(1, hidden_size // num_q_heads))
    for key in ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"):
        if v.integer(key, head_dim) != head_dim:
            raise v.wrong(key, f"key_length {head_dim}")
    context_length = v.integer("context_length")
    rope_dim = v.integer("rope.dimension_count", head_dim)
    if v.integer("rope.dimension_count_swa", rope_dim) != rope_dim:
        raise v.wrong("rope.dimension_count_swa", f"dimension_count {rope_dim}")
    found: dict[str, Any] = {
        "rms_norm_eps": v.number(
            "attention.layer_norm_epsilon"
            if BLOCKS.get(architecture, {}).get("norm_kind") == "layer"
            else "attention.layer_norm_rms_epsilon"
        ),
        "rope_theta": v.number("rope.freq_base", 10000.0, above=1.0),
        "rope_scaling": _gguf_rope(v, context_length, rope_dim, rope_factors or {}),
        "windows": _gguf_windows(v, architecture, num_layers),
        "qk_norm": "head" if "blk.0.attn_q_norm.weight" in shapes else "",
    }
    found |= BLOCKS.get(architecture, {})
    found |= _gguf_of_architecture(v, architecture, found, num_layers, hidden_size, num_q_heads)
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
        rope_dim=0 if rope_dim == head_dim else rope_dim,
        tie_embeddings="output.weight" not in shapes,
        qkv_bias="blk.0.attn_q.bias" in shapes or "blk.0.attn_qkv.bias" in shapes,
        attention_out_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_down.bias" in shapes,
        **found,
    )


def _gguf_of_architecture(
    v: Metadata, architecture: str, found: Mapping[str, Any], num_layers: int, hidden_size: int, heads: int
) -> dict[str, Any]:
    """Fields that llama.cpp reads or computes for one architecture alone (its ``load_arch_hparams``)."""
    rope = found["rope_theta"], found["rope_scaling"]
    match architecture:
        case "gemma2" | "gemma3":
            changes: dict[str, Any] = {"embedding_scale": math.sqrt(hidden_size)}
            # The models of 27B are known by their number of layers.
            if num_layers == {"gemma2": 46, "gemma3": 62}[architecture]:
                changes["attention_scale"] = (hidden_size // heads) ** -0.5
            if architecture == "gemma2":
                changes["attention_soft_cap"] = v.number("attn_logit_softcapping", 50.0)
                changes["logit_soft_cap"] = v.number("final_logit_softcapping", 30.0)
                local = v.number("rope.freq_base_swa", rope[0], above=1.0), rope[1]
            else:
                changes["logit_soft_cap"] = _unless_zero(v, "final_logit_softcapping")
                local = v.number("rope.freq_base_swa", 10000.0, above=1.0), None
            return changes | (window_rope(*local, rope) if found["windows"] else {})
        case "olmo2":
            return window_rope(rope[0], None, rope) if found["windows"] else {}
        case "exaone4" | "cohere2":
            changes = {"rotates": tuple(window is not None for window in found["windows"])}
            if architecture == "cohere2":
                changes["logit_scale"] = v.number("logit_scale")
            return changes
        case "gemma":
            return {"embedding_scale": math.sqrt(hidden_size)}
        case "command-r":
            return {"logit_scale": _unless_zero(v, "logit_scale") or 1.0}
        case "phi3":
            return phi3_windows(found["windows"], v.integer("context_length"))
        case "smollm3":
            return {"rotates": tuple(all_but_every(4, num_layers))}
        case "granite":
            rotates = v.boolean("rope.scaling.finetuned", True)
            return {
                "embedding_scale": _unless_zero(v, "embedding_scale") or 1.0,
                "residual_scale": _unless_zero(v, "residual_scale") or 1.0,
                "attention_scale": _unless_zero(v, "attention.scale"),
                "logit_scale": 1.0 / v.number("logit_scale"),
                "rotates": () if rotates else (False,) * num_layers,
            }
        case "mistral3" if v.get("attention.temperature_scale"):
            return {
                "attention_temperature": v.number("attention.temperature_scale"),
                "attention_temperature_length": v.integer(
                    "rope.scaling.original_context_length", v.integer("context_length")
                ),
            }
    return {}


def _unless_zero(v: Metadata, key: str) -> float | None:
    """A positive number, None if it is absent or 0."""
    return v.number(key) if v.get(key) not in (None, 0, 0.0) else None


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


def _gguf_windows(v: Metadata, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    """As llama.cpp: the pattern is true or false for each layer, or n for all layers but every n-th."""
    key = "attention.sliding_window_pattern"
    if isinstance(v.get(key), list):
        slides = v.array(key, bool)
        if len(slides) != num_layers:
            raise v.wrong(key, f"true or false for each of {num_layers} layers")
        must_slide = any(slides)
    else:
        slides = all_but_every(v.integer(key, PATTERNS.get(architecture, 0), least=0), num_layers)
        must_slide = architecture in ("gemma2", "cohere2")
    default = 4096 if architecture == "gemma2" else 0
    window = v.integer("attention.sliding_window", default, least=0)
    if not window and must_slide:
        raise v.error("attention.sliding_window", "must be positive: there are layers with a window")
    return windows_of(window, slides) if window else ()


def _gguf_rope(
    v: Metadata, context_length: int, rope_dim: int, factors: Mapping[str, np.ndarray]
) -> RopeScaling | None:
    freqs, short, long = (_factors(name, factors.get(name), rope_dim) for name in ROPE_FACTORS)
    kind = v.text("rope.scaling.type", None)
    if kind is not None:
        check_one_of("rope scaling", kind, GGUF_ROPE_TYPES)
    if kind == "longrope" or short or long:
        if not (short and long):
            raise ModelError(
                "longrope rope scaling needs rope_factors_short.weight and rope_factors_long.weight"
            )
        if v.number("rope.scaling.factor", 1.0, above=-math.inf) not in (0.0, 1.0):
            raise v.wrong("rope.scaling.factor", "1 with longrope rope scaling")
        return RopeScaling(
            "longrope",
            original_context_length=v.integer("rope.scaling.original_context_length", context_length),
            attention_factor=v.number("rope.scaling.attn_factor", 1.0),
            factors=short,
            long_factors=long,
        )
    # Files of 2023 have scale_linear; llama.cpp reads it as linear scaling if there is no factor.
    factor = (
        v.number("rope.scaling.factor", v.number("rope.scale_linear", 1.0, above=-math.inf), above=-math.inf)
        or 1.0
    )
    if factor < 0:
        raise v.wrong("rope.scaling.factor", "positive")
    if freqs:
        if kind not in (None, "none") and factor != 1.0:
            raise ModelError(f"rope scaling {kind!r} together with rope_freqs.weight is not supported")
        return RopeScaling("factors", factors=freqs)
    if kind == "none" or factor == 1.0:
        return None
    if kind != "yarn":
        return RopeScaling("linear", factor=factor)
    if v.number("rope.scaling.yarn_ext_factor", 1.0, above=-math.inf) not in (1.0, -1.0):
        raise v.wrong("rope.scaling.yarn_ext_factor", "1")
    # As llama.cpp: (0.1 ln factor + 1) * attn_factor, divided by 0.1 multiplier ln factor + 1 if there is one.
    attention = yarn_factor(factor, 1.0)
    if multiplier := v.number("rope.scaling.yarn_log_multiplier", 0.0, above=-math.inf):
        attention /= yarn_factor(factor, multiplier)
    # Its converter writes config.json's attention_factor, which replaces this, as yarn_attn_factor.
    attention = v.number("rope.scaling.yarn_attn_factor", attention)
    return RopeScaling(
        "yarn",
        factor=factor,
        original_context_length=v.integer("rope.scaling.original_context_length", context_length),
        beta_fast=v.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=v.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=attention * v.number("rope.scaling.attn_factor", 1.0),
    )


def _factors(name: str, given: np.ndarray | None, rope_dim: int) -> tuple[float, ...]:
    """A tensor of divisors of frequencies; empty if there is none."""
    if given is None:
        return ()
    if given.size != rope_dim // 2 or not (np.isfinite(given).all() and (given > 0).all()):
        raise ModelError(
            f"{name} must hold {rope_dim // 2} positive numbers, half of rope.dimension_count, "
            f"got {given.size} from {given.min()} to {given.max()}"
        )
    return tuple(float(x) for x in given.reshape(-1))
