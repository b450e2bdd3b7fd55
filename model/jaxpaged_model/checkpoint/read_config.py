"""ModelConfig from what files say of a model: GGUF metadata, or a Hugging Face ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpaged_model.config import ARCHITECTURES, ModelConfig, ModelError, RopeScaling

HF_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
GGUF_ROPE_TYPES = ("none", "linear", "yarn")
LARGEST = 2**31 - 1

_REQUIRED: Any = object()


class _Values:
    """Typed look-ups in a mapping; what is missing or of the wrong type is named with its key."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self.values, self.prefix = values, prefix

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(self.prefix + key)
        return default if value is None else value

    def _typed(self, key: str, default: Any, allowed: type | tuple[type, ...], noun: str) -> Any:
        value = self.get(key, default)
        if value is _REQUIRED:
            raise ModelError(f"{self.prefix}{key} is missing")
        if value is not default and (
            not isinstance(value, allowed) or isinstance(value, bool) != (allowed is bool)
        ):
            raise ModelError(f"{self.prefix}{key} must be {noun}, got {str(value)[:40]!r}")
        return value

    def integer(self, key: str, default: Any = _REQUIRED, *, least: int = 1) -> Any:
        value = self._typed(key, default, int, "a whole number")
        if value is not default and not least <= value <= LARGEST:
            raise ModelError(f"{self.prefix}{key} must be from {least} to {LARGEST}, got {value}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, *, positive: bool = True) -> Any:
        value = self._typed(key, default, (int, float), "a number")
        if value is default:
            return value
        if not math.isfinite(value) or (positive and value <= 0):
            raise ModelError(
                f"{self.prefix}{key} must be {'positive' if positive else 'finite'}, got {value}"
            )
        return float(value)

    def switch(self, key: str, default: bool) -> bool:
        return self._typed(key, default, bool, "true or false")

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._typed(key, default, str, "a text")


def _supported(architecture: str) -> None:
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"architecture {architecture!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )


def _theta(value: float) -> float:
    if value <= 1:
        raise ModelError(f"the base of the rotary frequencies must be above 1, got {value}")
    return value


def config_from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: np.ndarray | None = None,
) -> ModelConfig:
    """The model that a GGUF file's metadata describes.

    Args:
      metadata: keys with plain values.
      shapes: every tensor's shape, rows first; biases and tied embeddings show in which tensors there are.
      rope_factors: the tensor ``rope_freqs.weight``, where the file has one.

    Raises:
      ModelError: the architecture or a feature is not supported, or a key is missing or makes no sense.
    """
    architecture = _Values(metadata).text("general.architecture")
    _supported(architecture)
    v = _Values(metadata, architecture + ".")
    if v.integer("expert_count", 0, least=0):
        raise ModelError(
            f"mixture of experts ({v.prefix}expert_count = {v.get('expert_count')}) is not supported; "
            "dense models are"
        )
    num_layers = v.integer("block_count")
    if num_layers > len(shapes):
        raise ModelError(f"{v.prefix}block_count is {num_layers}, but there are only {len(shapes)} tensors")
    hidden_size = v.integer("embedding_length")
    num_q_heads = _same_everywhere(v, "attention.head_count", _REQUIRED)
    num_kv_heads = _same_everywhere(v, "attention.head_count_kv", num_q_heads)
    head_dim = v.integer("attention.key_length", max(1, hidden_size // num_q_heads))
    if v.integer("attention.value_length", head_dim) != head_dim:
        raise ModelError(
            f"{v.prefix}attention.value_length must equal key_length {head_dim}, "
            f"got {v.get('attention.value_length')}"
        )
    context_length = v.integer("context_length")
    rope_dim = v.integer("rope.dimension_count", head_dim)
    return ModelConfig(
        architecture=architecture,
        name=_Values(metadata).text("general.name", ""),
        vocab_size=_gguf_vocab_size(metadata, v, shapes),
        hidden_size=hidden_size,
        intermediate_size=_same_everywhere(v, "feed_forward_length", _REQUIRED),
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        context_length=context_length,
        rms_norm_eps=v.number("attention.layer_norm_rms_epsilon"),
        rope_theta=_theta(v.number("rope.freq_base", 10000.0)),
        rope_dim=0 if rope_dim == head_dim else rope_dim,
        rope_scaling=_gguf_rope(v, shapes, context_length, rope_dim, rope_factors),
        windows=_gguf_windows(v, num_layers),
        tie_embeddings="output.weight" not in shapes,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        attention_out_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_down.bias" in shapes,
        qk_norm="blk.0.attn_q_norm.weight" in shapes,
    )


def _same_everywhere(v: _Values, key: str, default: Any) -> int:
    """A number that may be given for each layer; other than the same for all is not supported."""
    value = v.get(key)
    if not isinstance(value, list):
        return v.integer(key, default)
    if len({str(x) for x in value}) != 1:
        raise ModelError(f"{v.prefix}{key} differs between layers, which is not supported: {str(value)[:60]}")
    return _Values({v.prefix + key: value[0]}, v.prefix).integer(key, default)


def _gguf_vocab_size(metadata: Mapping[str, Any], v: _Values, shapes: Mapping[str, tuple[int, ...]]) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and tokens:
        return len(tokens)
    embedding = shapes.get("token_embd.weight", ())
    return v.integer("vocab_size", embedding[0] if embedding else _REQUIRED)


def _gguf_windows(v: _Values, num_layers: int) -> tuple[int | None, ...]:
    window = v.integer("attention.sliding_window", 0, least=0)
    if not window:
        return ()
    pattern = v.get("attention.sliding_window_pattern", [True] * num_layers)
    if not isinstance(pattern, list) or len(pattern) != num_layers:
        raise ModelError(
            f"{v.prefix}attention.sliding_window_pattern must say true or false for each of {num_layers} "
            f"layers, got {str(pattern)[:60]}"
        )
    return tuple(window if slides else None for slides in pattern)


def _gguf_rope(
    v: _Values,
    shapes: Mapping[str, tuple[int, ...]],
    context_length: int,
    rope_dim: int,
    factors: np.ndarray | None,
) -> RopeScaling | None:
    kind = v.text("rope.scaling.type", None)
    if kind == "longrope" or any(name.startswith("rope_factors_") for name in shapes):
        raise ModelError(
            f"rope scaling 'longrope' is not supported; supported are {', '.join(GGUF_ROPE_TYPES)}"
        )
    if kind not in (None, *GGUF_ROPE_TYPES):
        raise ModelError(
            f"rope scaling {kind!r} is not supported; supported are {', '.join(GGUF_ROPE_TYPES)}"
        )
    # Files of 2023 say scale_linear; llama.cpp reads it as linear scaling where no factor stands.
    factor = (
        v.number("rope.scaling.factor", v.number("rope.scale_linear", 1.0, positive=False), positive=False)
        or 1.0
    )
    if factor < 0:
        raise ModelError(f"{v.prefix}rope.scaling.factor must be positive, got {factor}")
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
    if v.number("rope.scaling.yarn_ext_factor", 1.0, positive=False) not in (1.0, -1.0):
        raise ModelError(
            f"{v.prefix}rope.scaling.yarn_ext_factor must be 1, got {v.get('rope.scaling.yarn_ext_factor')}"
        )
    # As llama.cpp: 0.1 ln factor + 1, over the same with the multiplier where one stands, times attn_factor.
    attention = _mscale(factor, 1.0)
    if multiplier := v.number("rope.scaling.yarn_log_multiplier", 0.0, positive=False):
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
    """The model that a ``config.json`` describes, as transformers understands it.

    Raises:
      ModelError: the architecture or a feature is not supported, or a key is missing or makes no sense.
    """
    v = _Values(config)
    architecture = v.text("model_type")
    _supported(architecture)
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
    attention_bias = v.switch("attention_bias", False) if architecture in ("llama", "qwen3") else False
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
        tie_embeddings=v.switch("tie_word_embeddings", False),
        qkv_bias=attention_bias or architecture == "qwen2",
        attention_out_bias=attention_bias,
        mlp_bias=v.switch("mlp_bias", False) if architecture == "llama" else False,
        qk_norm=architecture == "qwen3",
    )


def _hf_rope(v: _Values, context_length: int) -> tuple[float, RopeScaling | None, float]:
    """(theta, scaling, rotated part of a head); transformers 5 keeps them all in ``rope_parameters``."""
    given = v.get("rope_parameters", v.get("rope_scaling", {}))
    if not isinstance(given, dict):
        raise ModelError(f"rope_scaling must be a JSON object, got {str(given)[:40]!r}")
    if given and all(isinstance(x, dict) for x in given.values()):
        if any(x != next(iter(given.values())) for x in given.values()):
            raise ModelError("rope_parameters that differ between layer types are not supported")
        given = next(iter(given.values()))
    r = _Values(given)
    theta = _theta(r.number("rope_theta", v.number("rope_theta", 10000.0)))
    part = r.number("partial_rotary_factor", v.number("partial_rotary_factor", 1.0))
    kind = r.text("rope_type", r.text("type", "default"))
    if kind not in HF_ROPE_TYPES:
        raise ModelError(f"rope scaling {kind!r} is not supported; supported are {', '.join(HF_ROPE_TYPES)}")
    if kind == "default":
        return theta, None, part
    original = r.integer("original_max_position_embeddings", context_length)
    factor = r.number("factor", context_length / original if kind == "yarn" else _REQUIRED)
    if kind == "linear":
        return theta, RopeScaling("linear", factor=factor), part
    if kind == "llama3":
        low, high = r.number("low_freq_factor"), r.number("high_freq_factor")
        if high <= low:
            raise ModelError(f"high_freq_factor must be above low_freq_factor {low}, got {high}")
        return (
            theta,
            RopeScaling(
                "llama3",
                factor=factor,
                original_context_length=original,
                low_freq_factor=low,
                high_freq_factor=high,
            ),
            part,
        )
    if not r.switch("truncate", True):
        raise ModelError("yarn rope scaling with truncate = false is not supported; true is")
    attention = r.number("attention_factor", None)
    mscale, mscale_all = (
        r.number("mscale", 0.0, positive=False),
        r.number("mscale_all_dim", 0.0, positive=False),
    )
    if attention is None and mscale and mscale_all:
        attention = _mscale(factor, mscale) / _mscale(factor, mscale_all)
    return (
        theta,
        RopeScaling(
            "yarn",
            factor=factor,
            original_context_length=original,
            beta_fast=r.number("beta_fast", 32.0),
            beta_slow=r.number("beta_slow", 1.0),
            attention_factor=attention,
        ),
        part,
    )


def _hf_windows(v: _Values, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    """Mistral slides wherever a window is given; Qwen only when told to, in the layers that it names."""
    # A key that is absent takes transformers' default; null says that there is no window.
    window = v.integer("sliding_window", 0, least=0) if "sliding_window" in v.values else 4096
    if architecture == "llama" or not window:
        return ()
    if architecture != "mistral" and not v.switch("use_sliding_window", False):
        return ()
    if architecture == "mistral":
        return (window,) * num_layers
    types = v.get("layer_types")
    if types is None:
        first = v.integer("max_window_layers", 28, least=0)
        types = ["full_attention"] * min(first, num_layers) + ["sliding_attention"] * max(
            0, num_layers - first
        )
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != num_layers or any(t not in known for t in types):
        raise ModelError(
            f"layer_types must name {' or '.join(known)} for each of {num_layers} layers, "
            f"got {str(types)[:80]}"
        )
    windows = tuple(window if t == "sliding_attention" else None for t in types)
    return windows if any(windows) else ()
