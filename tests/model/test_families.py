"""Families whose files or blocks differ from Llama's: joined tensors, vision towers, factors, devices."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxpaged_model.checkpoint.loading import load_model
from jaxpaged_model.checkpoint.shards import ShardSource
from jaxpaged_model.checkpoint.tensor_view import tensor_view
from jaxpaged_model.checkpoint.weights import load_params, placements
from jaxpaged_model.config import ModelConfig, RopeScaling, rope_frequencies
from jaxpaged_model.llama import functional
from jaxpaged_model.metadata import ModelError
from small_models import (
    KV_HEADS,
    LAYERS,
    VOCAB,
    Dense,
    config_json,
    logits,
    random_params,
    random_weights,
    write_converted_gguf,
    write_folder,
)

from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.pages.batch import Batch
from jaxpaged.sharding.mesh import MeshError

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_layers": 2,
    "num_q_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "context_length": 128,
}


def joined(tensors: dict[str, np.ndarray]) -> None:
    """Joins queries, keys and values, and gate and up, as llama.cpp's converter does on request or for Phi-3."""
    for i in range(LAYERS):
        for into, parts in (("attn_qkv", ("attn_q", "attn_k", "attn_v")), ("ffn_up", ("ffn_gate", "ffn_up"))):
            for kind in ("weight", "bias"):
                if f"blk.{i}.{parts[0]}.{kind}" in tensors:
                    rows = [tensors.pop(f"blk.{i}.{part}.{kind}") for part in parts]
                    tensors[f"blk.{i}.{into}.{kind}"] = np.concatenate(rows)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])  # interleaved rows; biases
def test_a_file_of_joined_tensors_is_the_same_model(model_type: str, kind: str, tmp_path: Path) -> None:
    config = config_json(model_type)
    weights, quantization = random_weights(config), gguf.GGMLQuantizationType[kind]
    apart, together = (
        write_converted_gguf(tmp_path / name, config, weights, kind=quantization, change=change)
        for name, change in (("apart.gguf", None), ("together.gguf", joined))
    )
    for how in ("stored", "dequantized"):
        one, other = load_model(apart, weights=how), load_model(together, weights=how)
        assert one.config == other.config
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one.params, other.params))


def test_a_folder_of_joined_tensors_is_the_same_model(tmp_path: Path) -> None:
    llama = random_weights(config_json("llama"))
    phi3 = dict(llama)
    for i in range(LAYERS):
        for into, parts in (
            ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            rows = [phi3.pop(f"model.layers.{i}.{part}.weight") for part in parts]
            phi3[f"model.layers.{i}.{into}.weight"] = np.concatenate(rows)
    one = load_model(write_folder(tmp_path / "llama", config_json("llama"), llama))
    other = load_model(write_folder(tmp_path / "phi3", config_json("phi3"), phi3, shards=2))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one.params, other.params))
    name = "model.layers.1.self_attn.qkv_proj.weight"
    phi3[name] = phi3[name][:-1]
    message = r"wrong shape: model\.layers\.1\.self_attn\.qkv_proj\.weight has 127 rows, needed are 128: 64 \+ 32 \+ 32"
    with pytest.raises(ModelError, match=message):
        load_model(write_folder(tmp_path / "wrong", config_json("phi3"), phi3))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_a_folder_with_a_vision_tower_is_its_language_model(prefix: str, tmp_path: Path) -> None:
    config = config_json("ministral3", rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    weights = random_weights(config)
    alone = load_model(write_folder(tmp_path / "alone", config, weights))
    named = {
        name.replace("model.", prefix, 1) if name.startswith("model.") else name: value
        for name, value in weights.items()
    }
    named |= {
        "vision_tower.patch_conv.weight": np.zeros((3, 3), np.float32),
        "multi_modal_projector.linear_1.weight": np.zeros((3, 3), np.float32),
    }
    outer = {"model_type": "mistral3", "text_config": config, "vision_config": {}}
    both = load_model(write_folder(tmp_path / "both", outer, named))
    assert both.config == alone.config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), both.params, alone.params))


class Tensors:
    """A file's tensors as float32 arrays."""

    path = Path("tensors.gguf")

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        self.tensors = {
            name: SimpleNamespace(shape=x.shape, dtype="F32", num_bytes=x.nbytes)
            for name, x in arrays.items()
        }

    def read(self, name: str, part: Any = None) -> np.ndarray:
        return self.arrays[name] if part is None else self.arrays[name][part]

    def raw(self, name: str, part: Any = None) -> np.ndarray:
        return np.ascontiguousarray(self.read(name, part)).view(np.uint8)

    def release(self, name: str) -> None:
        pass


def drawn(config: ModelConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        name: (rng.standard_normal(place.shape) * 0.2 + (len(place.shape) == 1)).astype(np.float32)
        for name, place in placements(config, "gguf").items()
    }


def test_devices_read_their_parts_of_joined_tensors() -> None:
    config = ModelConfig("phi3", **SIZES)
    apart = drawn(config)
    together = dict(apart)
    joined(together)
    view = tensor_view(config, Tensors(together), "gguf")
    assert view.tensors.keys() == apart.keys()
    for rank in range(2):
        found, wanted = (
            ShardSource(config, file, "gguf", rank=rank, size=2) for file in (view, Tensors(apart))
        )
        for name in apart:
            np.testing.assert_array_equal(found.read(name), wanted.read(name), err_msg=name)
            np.testing.assert_array_equal(found.raw(name), wanted.raw(name), err_msg=name)
    assert config.num_kv_heads == KV_HEADS


BLOCKS: dict[str, dict[str, Any]] = {
    "pre": {"residual_scale": 0.3, "attention_out_bias": True, "mlp_bias": True},
    "post": {"norms": "post", "qk_norm": "head"},
    "both": {"norms": "both", "activation": "gelu_tanh", "windows": (5, None)},
    "parallel": {"norms": "parallel", "norm_kind": "layer"},
    "no gate": {"gated": False, "activation": "relu2"},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_devices_that_split_a_block_compute_what_one_computes(name: str) -> None:
    """The axis is one of ``vmap``: sums over it come before norms and factors."""
    config = ModelConfig("llama", **SIZES, **BLOCKS[name])
    file, local = Tensors(drawn(config)), config.shard(2)
    shards = [
        load_params(local, ShardSource(config, file, "gguf", rank=rank, size=2), "gguf") for rank in range(2)
    ]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *shards)
    model = functional(local, axis="tensor")

    def split(params: Any, tokens: Any, cache: Any, batch: Batch, rows: Any) -> tuple[Any, Any]:
        out = jax.vmap(lambda params: model(params, tokens, cache, batch, rows)[0], axis_name="tensor")(
            params
        )
        return out[1], cache

    wanted = logits(config, load_params(config, file, "gguf"))
    np.testing.assert_allclose(logits(local, stacked, function=split), wanted, rtol=0, atol=2e-5)


SCALING = RopeScaling("linear", 4.0)


@pytest.mark.parametrize(
    ("without", "field"),
    [
        ({}, {"embedding_scale": 3.0}),
        ({}, {"residual_scale": 0.5}),
        ({}, {"attention_scale": 0.4}),
        ({}, {"attention_soft_cap": 0.5}),
        ({}, {"logit_scale": 0.5}),
        ({}, {"logit_soft_cap": 0.5}),
        ({}, {"rotates": (True, False)}),
        ({}, {"norm_kind": "layer"}),
        ({}, {"activation": "gelu_tanh"}),
        ({}, {"attention_temperature": 0.5, "attention_temperature_length": 4}),
        ({}, {"windows": (5, None)}),
        ({"windows": (5, None)}, {"window_rope_theta": 100.0}),
        ({"windows": (5, None), "rope_scaling": SCALING}, {"window_rope_theta": 10000.0}),
        ({"windows": (5, None), "window_rope_theta": 50.0}, {"window_rope_scaling": SCALING}),
        ({}, {"rope_scaling": RopeScaling("longrope", original_context_length=128, factors=(2.0,) * 8)}),
    ],
)
def test_every_field_changes_logits(without: dict[str, Any], field: dict[str, Any]) -> None:
    config = ModelConfig("llama", **SIZES, **without)
    params = random_params(config)
    assert np.abs(logits(config, params) - logits(replace(config, **field), params)).max() > 1e-3


@pytest.mark.parametrize(
    "layer",
    [{"windows": (6,), "window_rope_theta": 50.0}, {"rotates": (False,)}],
    ids=["own rope", "no rope"],
)
def test_shifted_keys_are_rotated_as_their_layer_rotates(layer: dict[str, Any]) -> None:
    """In a single layer keys depend on tokens alone: removed ones leave what a cache without them has."""
    config = ModelConfig("llama", **{**SIZES, "num_layers": 1}, **layer)
    params, model = random_params(config), functional(config)
    tokens = np.random.default_rng(0).integers(0, VOCAB, 20)

    @jax.jit
    def step(cache: Any, tokens: Any) -> Any:
        cache, batch, ok = cache.reserve(jnp.asarray([tokens.size]), num_tokens=tokens.size)
        logits, cache = model(params, tokens, cache, batch, jnp.arange(tokens.size))
        return cache, logits, ok

    found = []
    for text in (tokens, tokens[5:]):
        cache = PagedKVCache.create(**config.cache_spec, max_seqs=1, num_pages=8, max_seq_len=64, page_size=8)
        cache, _, _ = step(cache, jnp.asarray(text, jnp.int32))
        if len(text) == 20:
            cache, removed = cache.seq_remove(0, 0, 5)
            cache, shifted = cache.seq_shift(0, 5, -1, -5)
            assert removed and shifted
        _, logits, ok = step(cache, jnp.asarray([7, 8, 9], jnp.int32))
        found.append(logits)
        assert ok
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5)


def test_a_norm_over_all_heads_is_not_split() -> None:
    config = ModelConfig("olmo2", **SIZES, norms="post", qk_norm="width")
    with pytest.raises(MeshError, match="olmo2 model are normalized over all heads, which cannot be split"):
        config.shard(2)
    assert config.shard(1) == config


def test_queries_are_scaled_by_their_position() -> None:
    plain = ModelConfig("mistral3", **SIZES)
    scaled = replace(plain, attention_temperature=0.5, attention_temperature_length=8)
    seen = []

    class Cache(Dense):
        def attend(self, layer: Any, q: Any, *args: Any, **options: Any) -> Any:
            seen.append(q)
            return super().attend(layer, q, *args, **options)

    position = jnp.arange(24, dtype=jnp.int32)
    zeros = jnp.zeros(24, jnp.int32)
    batch = Batch(zeros, position, position, zeros, position, jnp.array([0, 24], jnp.int32))
    params = random_params(replace(plain, num_layers=1))
    for config in (plain, scaled):
        functional(replace(config, num_layers=1))(params, zeros, Cache(), batch, position)
    factor = np.array([1 + 0.5 * math.log(1 + p // 8) for p in range(24)])[:, None, None]
    np.testing.assert_allclose(seen[1], seen[0] * factor, rtol=1e-6)
    with pytest.raises(ModelError, match="attention_temperature_length must be positive"):
        replace(plain, attention_temperature=0.5)


def test_the_context_decides_the_factors_of_longrope(tmp_path: Path) -> None:
    short, long = [1.0] * 7 + [2.0], [3.0] * 8
    rope = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    config = config_json("phi3", original_max_position_embeddings=32, rope_scaling=rope)
    weights = random_weights(config_json("llama"))
    folder = write_folder(tmp_path / "m", config, weights)
    plain = rope_frequencies(
        load_model(write_folder(tmp_path / "llama", config_json("llama"), weights)).config
    )[0]
    for context, factors in ((None, long), (33, long), (32, short), (4096, long)):
        found = load_model(folder, context_length=context).config
        np.testing.assert_allclose(rope_frequencies(found)[0], plain / np.array(factors), rtol=1e-6)
        assert rope_frequencies(found)[1] == pytest.approx(math.sqrt(1 + math.log(4) / math.log(32)))
    assert load_model(tmp_path / "llama", context_length=32).config.context_length == 128


@pytest.mark.parametrize(
    "scaling",
    [RopeScaling("longrope", original_context_length=64, factors=(1.0,) * 8, long_factors=(2.0,))],
)
def test_factors_of_another_number_of_frequencies_are_refused(scaling: RopeScaling) -> None:
    with pytest.raises(ModelError, match="rope factors: 1 given, 8 needed for rotary_dim 16"):
        rope_frequencies(ModelConfig("phi3", **SIZES, rope_scaling=scaling))
