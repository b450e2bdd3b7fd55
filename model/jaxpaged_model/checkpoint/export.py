"""``write_gguf``: writes a model as a GGUF file for llama.cpp and ``load_model``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from flax import nnx
from gguf import GGMLQuantizationType as GGMLType

from jaxpaged_model.checkpoint.gguf_config import ROPE_FACTORS, config_from_gguf
from jaxpaged_model.checkpoint.weights import param_place, placements, to_file
from jaxpaged_model.config import ModelConfig, RopeScaling, rope_frequencies
from jaxpaged_model.llama import Params
from jaxpaged_model.metadata import ModelError
from jaxpaged_model.quantized.linear import WeightPlan

Quantization = Literal["F32", "F16", "Q8_0"]

_FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


def write_gguf(
    path: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    quantization: Quantization = "F32",
    tokenizer_metadata: Mapping[str, Any],
) -> None:
    """Writes a model as one GGUF file.

    Norms and biases stay F32; with ``"Q8_0"``, matrices with rows of a length that is no multiple of 32
    are written as F16, as llama.cpp does. The architecture of a mistral is "llama", as in llama.cpp.

    Args:
      path: the file, overwritten.
      config: the model.
      params: its weights, any floating dtype.
      quantization: type of the matrices.
      tokenizer_metadata: keys ``tokenizer.*`` with plain values: texts, booleans, numbers (integers are
        written as uint32), lists of one of these (integers as int32).

    Raises:
      ModelError: files of this architecture cannot say what this model computes; nothing is written.
      ValueError: matrices are stored in a file's format; nothing is written.
    """
    weights = {".".join(str(key) for key in where): leaf for where, leaf in nnx.to_flat_state(params)}
    places = placements(config, "gguf")

    def found(path: str) -> tuple[str, Any]:
        """Path of the params that have a weight, and its index there."""
        place = param_place(path, WeightPlan(), config.num_layers)
        return f"{place.path}.{path.rpartition('.')[2]}", place.index

    if missing := [place.path for place in places.values() if found(place.path)[0] not in weights]:
        raise ValueError(
            f"{missing[0]} is not in the params, or it is stored in a file's format; dense weights are needed: "
            'load_model(path, weights="dequantized")'
        )
    architecture = "llama" if config.architecture == "mistral" else config.architecture
    writer = gguf.GGUFWriter(path, architecture)
    try:
        _add_config(writer, architecture, config)
        _check_readable(writer, config, {name: place.shape for name, place in places.items()})
        writer.add_file_type(_FILE_TYPES[quantization])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in tokenizer_metadata.items():
            _add(writer, key, value)
        for name, placement in places.items():
            path, index = found(placement.path)
            value = to_file(np.asarray(weights[path][index], np.float32), placement)
            kind = _type_of(value, quantization)
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
        for name, factors in _rope_factors(config).items():
            writer.add_tensor(name, factors)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _type_of(value: np.ndarray, quantization: Quantization) -> GGMLType:
    if value.ndim == 1 or quantization == "F32":
        return GGMLType.F32
    block, _ = gguf.GGML_QUANT_SIZES[GGMLType[quantization]]
    return GGMLType[quantization] if value.shape[-1] % block == 0 else GGMLType.F16


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)


def _add_config(writer: gguf.GGUFWriter, architecture: str, c: ModelConfig) -> None:
    if c.name:
        writer.add_name(c.name)
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.context_length)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_q_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    add_eps = writer.add_layer_norm_rms_eps if c.norm_kind == "rms" else writer.add_layer_norm_eps
    add_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(c.rotary_dim)
    if any(c.windows):
        writer.add_sliding_window(next(window for window in c.windows if window))
        writer.add_sliding_window_pattern([window is not None for window in c.windows])
        if c.window_rope_theta is not None:
            writer.add_rope_freq_base_swa(c.window_rope_theta)
    if c.attention_soft_cap is not None:
        writer.add_attn_logit_softcapping(c.attention_soft_cap)
    if c.logit_soft_cap is not None:
        writer.add_final_logit_softcapping(c.logit_soft_cap)
    if c.attention_temperature:
        writer.add_attn_temperature_scale(c.attention_temperature)
    _add_scales(writer, c)
    if c.rope_scaling is not None:
        _add_rope_scaling(writer, architecture, c.rope_scaling)


def _add_scales(writer: gguf.GGUFWriter, c: ModelConfig) -> None:
    """Factors that only some architectures have; that of logits is a divisor in some."""
    if c.architecture == "granite":
        writer.add_embedding_scale(c.embedding_scale)
        writer.add_residual_scale(c.residual_scale)
        writer.add_logit_scale(1.0 / c.logit_scale)
        if c.attention_scale is not None:
            writer.add_attention_scale(c.attention_scale)
    elif c.logit_scale != 1.0:
        writer.add_logit_scale(c.logit_scale)


def _check_readable(
    writer: gguf.GGUFWriter, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Reads the written keys: what an architecture does not say must be what its models have.

    Raises:
      ModelError: the configuration would be read as another one.
    """
    metadata = {key: value.value for part in writer.kv_data for key, value in part.items()}
    read = config_from_gguf(metadata, shapes, _rope_factors(config))
    for field in fields(config):
        # A mistral is a llama there, and factors of frequencies become a tensor.
        if field.name in ("architecture", "name", "rope_scaling"):
            continue
        wanted, found = getattr(config, field.name), getattr(read, field.name)
        same = (
            math.isclose(wanted, found, rel_tol=1e-6)
            if isinstance(wanted, float) and isinstance(found, float)
            else wanted == found
        )
        if not same:
            raise ModelError(
                f"a GGUF file cannot say {field.name} = {str(wanted)[:60]} of a {read.architecture} model: "
                f"it would be read as {str(found)[:60]}"
            )


def _add_rope_scaling(writer: gguf.GGUFWriter, architecture: str, scaling: RopeScaling) -> None:
    if scaling.kind == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(scaling.original_context_length)
        writer.add_rope_scaling_attn_factors(scaling.attention_factor or 1.0)
    if scaling.kind not in ("linear", "yarn"):
        return  # in tensors
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.kind))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.kind == "linear":
        return
    writer.add_rope_scaling_orig_ctx_len(scaling.original_context_length)
    prefix = f"{architecture}.rope.scaling."
    writer.add_float32(prefix + "yarn_beta_fast", scaling.beta_fast)
    writer.add_float32(prefix + "yarn_beta_slow", scaling.beta_slow)
    if scaling.attention_factor is not None:
        # A reader multiplies the factor in the file by YaRN's own.
        own = 0.1 * np.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
        writer.add_rope_scaling_attn_factors(scaling.attention_factor / float(own))


def _rope_factors(config: ModelConfig) -> dict[str, np.ndarray]:
    """Divisors of the frequencies, for the kinds of scaling that GGUF stores as tensors, by name."""
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "longrope":
        of_both = zip(ROPE_FACTORS[1:], (scaling.factors, scaling.long_factors), strict=True)
        return {name: np.asarray(factors, np.float32) for name, factors in of_both}
    if scaling is None or scaling.kind not in ("llama3", "factors"):
        return {}
    exponents = np.arange(0, config.rotary_dim, 2, dtype=np.float64) / config.rotary_dim
    scaled, _ = rope_frequencies(config)
    return {ROPE_FACTORS[0]: (config.rope_theta**-exponents / scaled).astype(np.float32)}
