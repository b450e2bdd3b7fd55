"""Small models for the tests of this folder: weights by Hugging Face names, as folders and GGUF files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jaxpaged_model.config import ModelConfig
from jaxpaged_model.llama import abstract_params, functional
from safetensors.numpy import save_file

from jaxpaged.pages.batch import Batch

HIDDEN, INTERMEDIATE, LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16

BASE_CONFIG: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": Q_HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def _tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=260,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["ab ab"], trainer)
    return tokenizer


TOKENIZER_JSON: str = _tokenizer().to_str()
VOCAB = 260


def tokenizer_metadata() -> dict[str, Any]:
    """The same tokenizer as GGUF keys."""
    vocabulary = json.loads(TOKENIZER_JSON)["model"]["vocab"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": sorted(vocabulary, key=vocabulary.__getitem__),
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (VOCAB - 3),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 1,
    }


def config_json(model_type: str, **changes: Any) -> dict[str, Any]:
    """A ``config.json``."""
    return {"model_type": model_type, "vocab_size": VOCAB, **BASE_CONFIG, **changes}


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Weights by their Hugging Face names, written out here independently of ``checkpoint.weights``."""
    rng = np.random.default_rng(seed)
    kind = config["model_type"]
    attention_bias = config.get("attention_bias", False)
    weights: dict[str, np.ndarray] = {}

    def linear(name: str, rows: int, columns: int, bias: bool = False) -> None:
        weights[f"{name}.weight"] = (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(
            np.float32
        )
        if bias:
            weights[f"{name}.bias"] = rng.standard_normal(rows).astype(np.float32)

    def norm(name: str, size: int) -> None:
        weights[f"{name}.weight"] = (1 + 0.2 * rng.standard_normal(size)).astype(np.float32)

    linear("model.embed_tokens", VOCAB, HIDDEN)
    for i in range(LAYERS):
        block = f"model.layers.{i}."
        norm(block + "input_layernorm", HIDDEN)
        norm(block + "post_attention_layernorm", HIDDEN)
        qkv_bias = attention_bias or kind == "qwen2"
        linear(block + "self_attn.q_proj", Q_HEADS * HEAD_DIM, HIDDEN, qkv_bias)
        linear(block + "self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN, qkv_bias)
        linear(block + "self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN, qkv_bias)
        linear(block + "self_attn.o_proj", HIDDEN, Q_HEADS * HEAD_DIM, attention_bias)
        if kind == "qwen3":
            norm(block + "self_attn.q_norm", HEAD_DIM)
            norm(block + "self_attn.k_norm", HEAD_DIM)
        mlp_bias = config.get("mlp_bias", False)
        linear(block + "mlp.gate_proj", INTERMEDIATE, HIDDEN, mlp_bias)
        linear(block + "mlp.up_proj", INTERMEDIATE, HIDDEN, mlp_bias)
        linear(block + "mlp.down_proj", HIDDEN, INTERMEDIATE, mlp_bias)
    norm("model.norm", HIDDEN)
    if not config["tie_word_embeddings"]:
        linear("lm_head", VOCAB, HIDDEN)
    return weights


def write_folder(
    path: Path,
    config: dict[str, Any],
    weights: dict[str, np.ndarray],
    *,
    shards: int = 1,
    dtype: Any = np.float32,
) -> Path:
    """Writes a model folder as transformers' ``save_pretrained`` does."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text(TOKENIZER_JSON)
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    cast = {name: value.astype(dtype) for name, value in weights.items()}
    if shards == 1:
        save_file(cast, path / "model.safetensors")
        return path
    names = sorted(cast)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: cast[name] for name in names[i::shards]}, path / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def interleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorders Q and K as llama.cpp's ``convert_hf_to_gguf.py`` does for the architecture "llama"."""
    split = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(weight.shape)


def write_converted_gguf(
    path: Path,
    config: dict[str, Any],
    weights: dict[str, np.ndarray],
    *,
    extra: dict[str, Any] | None = None,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    rope_freqs: np.ndarray | None = None,
    change: Any = None,
) -> Path:
    """Writes a GGUF file as llama.cpp's converter does: names of tensors, row order, keys.

    ``change``: called with {name: array} before writing, to introduce an error.
    """
    architecture = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    name_map = gguf.get_tensor_name_map(arch, LAYERS)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(Q_HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(HEAD_DIM)
    for key, value in {**tokenizer_metadata(), **(extra or {})}.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add.get(type(value), writer.add_array)(key, value)
    tensors = {}
    for name, value in weights.items():
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            value = interleave(value, Q_HEADS if "q_proj" in name else KV_HEADS)
        tensors[name_map.get_name(name, try_suffixes=(".weight", ".bias"))] = value
    if rope_freqs is not None:
        tensors["rope_freqs.weight"] = rope_freqs
    if change is not None:
        change(tensors)
    for name, value in tensors.items():
        if value.ndim == 1:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@jax.tree_util.register_static
@dataclass(frozen=True)
class Dense:
    """Replaces the cache: dense causal attention over one sequence."""

    def attend(
        self, layer: Any, q: Any, k: Any, v: Any, batch: Batch, *, window: int | None, scale: float | None,
        soft_cap: float | None, **_: Any,
    ) -> tuple[Any, Any]:  # fmt: skip
        group = q.shape[1] // k.shape[1]
        k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
        scores = jnp.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if soft_cap is not None:
            scores = jnp.tanh(scores / soft_cap) * soft_cap
        distance = jnp.arange(q.shape[0])[:, None] - jnp.arange(q.shape[0])
        seen = (distance >= 0) & (distance < (q.shape[0] if window is None else window))
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        return jnp.einsum("hqk,khd->qhd", weights, v), self


def logits(config: ModelConfig, params: Any, length: int = 24, function: Any = None) -> np.ndarray:
    """Logits at every position of a fixed text: ``[length, vocab_size]``."""
    position = jnp.arange(length, dtype=jnp.int32)
    zeros = jnp.zeros(length, jnp.int32)
    batch = Batch(zeros, position, position, zeros, position, jnp.array([0, length], jnp.int32))
    tokens = (position * 37 + 11) % config.vocab_size
    model = function or functional(config)
    return np.asarray(jax.jit(lambda *args: model(*args, Dense(), batch, position)[0])(params, tokens))


def random_params(config: ModelConfig, *, seed: int = 0, dtype: Any = jnp.float32) -> Any:
    """Random weights without a compilation: norms near 1, the rest near 0."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Any:
        scale = "scale" in jax.tree_util.keystr(path)
        values = (
            rng.standard_normal(leaf.shape)
            * (0.2 if scale else leaf.shape[-2 if leaf.ndim > 1 else 0] ** -0.5)
            + scale
        )
        return jnp.asarray(values.astype(np.float32), dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))
