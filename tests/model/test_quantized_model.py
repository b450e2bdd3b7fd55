"""Models with stored weights: their logits are those of dequantized weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxpaged_model.checkpoint.export import write_gguf
from jaxpaged_model.checkpoint.loading import load_model
from jaxpaged_model.checkpoint.weights import Placement, load_params, placements, weight_plan
from jaxpaged_model.config import ModelConfig
from jaxpaged_model.llama import abstract_params, functional
from jaxpaged_model.quantized import product
from jaxpaged_model.quantized.formats import WEIGHT_FORMATS
from jaxpaged_model.quantized.layouts import Layout
from jaxpaged_model.quantized.linear import WeightPlan
from quantized_matrices import bits_per_weight, numbers, random_weights_raw
from small_models import VOCAB, Dense, logits, random_params, tokenizer_metadata

from jaxpaged.pages.batch import Batch


class Drawn:
    """Replaces a GGUF file: matrices of random blocks of the type that ``kind`` returns, or float32."""

    path = Path("drawn.gguf")

    def __init__(self, config: ModelConfig, kind: Callable[[Placement], str]) -> None:
        self._numbers: dict[str, np.ndarray] = {}
        self._raw: dict[str, np.ndarray] = {}
        self.tensors: dict[str, Any] = {}
        self.released: list[str] = []
        rng = np.random.default_rng(0)
        for name, place in placements(config, "gguf").items():
            dtype = "F32" if len(place.shape) == 1 else kind(place)
            if dtype == "F32":
                self._numbers[name] = rng.standard_normal(place.shape).astype(np.float32)
            else:
                self._raw[name] = random_weights_raw(dtype, *place.shape, seed=len(self._raw))
                self._numbers[name] = numbers(dtype, self._raw[name])
            size = self._raw.get(name, self._numbers[name]).nbytes
            self.tensors[name] = SimpleNamespace(shape=place.shape, dtype=dtype, num_bytes=size)

    def read(self, name: str) -> np.ndarray:
        return self._numbers[name]

    def raw(self, name: str) -> np.ndarray:
        return self._raw[name] if name in self._raw else self._numbers[name].view(np.uint8)

    def release(self, name: str) -> None:
        self.released.append(name)


def small(architecture: str, **changes: Any) -> ModelConfig:
    """A model of whole super-blocks with a vocabulary that ends inside a panel."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_layers": 2,
        "num_q_heads": 4,
    }
    sizes |= {"num_kv_heads": 2, "head_dim": 64, "context_length": 128}
    return ModelConfig(architecture=architecture, **(sizes | changes))  # type: ignore[arg-type]


def as_q4_k_m(place: Placement) -> str:
    """llama.cpp's mixture: more bits for values and the output layer."""
    return "Q6_K" if place.path.endswith(("attention.v.kernel", "mlp.down.kernel", "head.kernel")) else "Q4_K"


MODELS: dict[str, tuple[ModelConfig, Callable[[Placement], str]]] = {
    "llama, tied": (small("llama", tie_embeddings=True), lambda _: "Q8_0"),
    "llama, as Q4_K_M": (small("llama"), as_q4_k_m),
    "qwen2, biases": (small("qwen2", qkv_bias=True), lambda _: "Q5_0"),
    "qwen3": (small("qwen3", qk_norm="head"), lambda _: "IQ4_XS"),
    "gemma3": (
        small(
            "gemma3", num_layers=3, qk_norm="head", norms="both", activation="gelu_tanh", windows=(9, 9, None),
            window_rope_theta=1e4, rope_theta=1e6, embedding_scale=16.0, attention_scale=0.1, logit_soft_cap=20.0,
            tie_embeddings=True,
        ),
        lambda _: "Q8_0",
    ),
    # Which layers have which type is no matter of their kinds: period 2, and types of layers 0 and 3.
    "two kinds, two types": (
        small("llama", num_layers=4, windows=(9, None) * 2, rotates=(True, False) * 2),
        lambda place: "Q6_K" if place.path.startswith(("blocks.0.", "blocks.3.mlp")) else "Q8_0",
    ),
    "no gate": (small("arcee", gated=False, activation="relu2", tie_embeddings=True), lambda _: "Q8_0"),
    "all biases": (small("llama", qkv_bias=True, attention_out_bias=True, mlp_bias=True), lambda _: "Q4_1"),
    "half a panel": (small("llama", num_kv_heads=1, head_dim=8, num_q_heads=32), lambda _: "Q3_K"),
    "head alone": (small("llama"), lambda place: "Q6_K" if "head" in place.path else "F32"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_dequantized_weights(name: str) -> None:
    config, kind = MODELS[name]
    file = Drawn(config, kind)
    wanted = logits(config, load_params(config, file, "gguf"))
    for exact, bound in ((True, 1e-4), (False, 1e-3)):
        plan = weight_plan(config, file, "gguf", exact=exact)
        params = load_params(config, file, "gguf", plan=plan)
        found = logits(config, params, function=functional(config, plan=plan))
        assert np.linalg.norm(found - wanted) < bound * np.linalg.norm(wanted), exact


@pytest.mark.parametrize("name", ["llama, as Q4_K_M", "qwen2, biases", "half a panel", "gemma3"])
def test_logits_are_those_of_dequantized_weights_on_accelerators_too(name: str) -> None:
    """Computed by XLA; in this layout keys of 8 rows are part of one matrix."""
    config, kind = MODELS[name]
    file = Drawn(config, kind)
    plan = weight_plan(config, file, "gguf", layout="lanes")
    assert any(path.endswith("attention.qkv") for path, _ in plan.formats) == (name != "llama, as Q4_K_M")
    found = logits(
        config, load_params(config, file, "gguf", plan=plan), function=functional(config, plan=plan)
    )
    wanted = logits(config, load_params(config, file, "gguf"))
    assert np.linalg.norm(found - wanted) < 1e-4 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("name", "stored"), [("qwen2, biases", False), ("qwen2, biases", True), ("gemma3", False)]
)
def test_a_model_with_an_array_for_each_layer_is_that_with_stacks(
    name: str, stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense matrices on a GPU, and those among stored ones."""
    config, kind = MODELS[name]
    file = Drawn(config, kind)
    plan = weight_plan(config, file, "gguf") if stored else WeightPlan()
    plan = replace(plan, formats=tuple(one for one in plan.formats if one[0] != "blocks.1.mlp.down"))
    found = {}
    for platform in ("xla", "gpu"):
        monkeypatch.setattr(product, "choose", lambda *_, platform=platform: platform)
        params = load_params(config, file, "gguf", plan=plan)
        wanted = abstract_params(config, plan=plan)
        assert jax.tree.structure(params) == jax.tree.structure(wanted)
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, wanted)
        dense = [one.get_value() for path, one in nnx.to_flat_state(params.blocks) if path[-1] == "kernel"]
        assert all(isinstance(kernel, tuple) == (platform == "gpu") for kernel in dense) and dense
        found[platform] = logits(config, params, function=functional(config, plan=plan))
    np.testing.assert_allclose(found["gpu"], found["xla"], rtol=0, atol=1e-5 * np.abs(found["xla"]).max())


@pytest.mark.parametrize("layout", [None, "panels", "lanes"])
def test_logits_do_not_depend_on_x64(layout: Layout | None) -> None:
    config, kind = small("llama", num_layers=1), as_q4_k_m
    file = Drawn(config, kind)
    plan = WeightPlan() if layout is None else weight_plan(config, file, "gguf", layout=layout)
    params = load_params(config, file, "gguf", plan=plan)
    wanted = logits(config, params, function=functional(config, plan=plan))
    with jax.enable_x64(True):
        again = load_params(config, file, "gguf", plan=plan)
        assert jax.tree.map(lambda x: x.dtype, again) == jax.tree.map(lambda x: x.dtype, params)
        found = logits(config, again, function=functional(config, plan=plan))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted)


def test_a_batch_of_a_vmap_equals_a_loop() -> None:
    """vmap of the model, also inside of other transformations, over tokens and over weights."""
    config, kind = small("llama", num_layers=1, tie_embeddings=True), lambda _: "Q8_0"
    file = Drawn(config, kind)
    plan = weight_plan(config, file, "gguf", exact=True)
    params = load_params(config, file, "gguf", plan=plan)
    model, position = functional(config, plan=plan), jnp.arange(5, dtype=jnp.int32)
    zeros = jnp.zeros(5, jnp.int32)
    batch = Batch(zeros, position, position, zeros, position, jnp.array([0, 5], jnp.int32))
    tokens = jnp.arange(15, dtype=jnp.int32).reshape(3, 5)

    @jax.jit
    def logits_of(params: Any, tokens: Any) -> Any:
        return model(params, tokens, Dense(), batch, position)[0]

    def scanned(params: Any, tokens: Any) -> Any:
        return jax.lax.scan(lambda carry, _: (carry, logits_of(params, tokens)), 0, None, length=1)[1][0]

    wanted = np.stack([logits_of(params, row) for row in tokens])
    for found in (
        jax.vmap(logits_of, (None, 0))(params, tokens),
        jax.jit(jax.vmap(scanned, (None, 0)))(params, tokens),
        jax.vmap(logits_of)(jax.tree.map(lambda x: jnp.stack([x] * 3), params), tokens),
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_layers_that_are_quantized_alike_are_one() -> None:
    def layers(name: str) -> dict[str, str]:
        config, kind = MODELS[name]
        found = weight_plan(config, Drawn(config, kind), "gguf").formats
        return {
            path.removeprefix("blocks.1."): kind for path, kind in found if not path.startswith("blocks.0.")
        }

    assert layers("llama, tied") == dict.fromkeys(
        ("attention.out", "attention.qkv", "embedding", "mlp.down", "mlp.gate_up"), "Q8_0"
    )
    assert layers("llama, as Q4_K_M") == {
        "attention.k": "Q4_K", "attention.out": "Q4_K", "attention.q": "Q4_K", "attention.v": "Q6_K",
        "embedding": "Q4_K", "head": "Q6_K", "mlp.down": "Q6_K", "mlp.gate_up": "Q4_K",
    }  # fmt: skip
    # Biases of gate and up are not fused; keys of 8 rows end inside a panel.
    assert {"mlp.gate", "mlp.up"} <= layers("all biases").keys()
    assert {"attention.k", "attention.q", "attention.v"} <= layers("half a panel").keys()
    floats = ("attention.out", "attention.qkv", "embedding", "mlp.down", "mlp.gate_up")
    assert layers("head alone") == {"head": "Q6_K"} | dict.fromkeys(floats, "F32")


def test_the_files_memory_is_released_tensor_by_tensor() -> None:
    config, kind = MODELS["llama, as Q4_K_M"]
    file = Drawn(config, kind)
    load_params(config, file, "gguf", plan=weight_plan(config, file, "gguf"))
    assert sorted(file.released) == sorted(n for n, tensor in file.tensors.items() if tensor.dtype != "F32")


def test_params_have_the_size_of_the_file() -> None:
    config, kind = MODELS["llama, tied"]
    file = Drawn(config, kind)
    params = load_params(config, file, "gguf", plan=weight_plan(config, file, "gguf"))
    inside = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    in_file = sum(tensor.num_bytes for tensor in file.tensors.values())
    filled = 12 * config.hidden_size * bits_per_weight("Q8_0") / 8  # the last panel of the embedding
    assert inside == in_file + filled


def test_a_file_opens_stored_or_dequantized(tmp_path: Path) -> None:
    config = small("llama", tie_embeddings=True)
    path = tmp_path / "m.gguf"
    write_gguf(
        path, config, random_params(config), quantization="Q8_0", tokenizer_metadata=tokenizer_metadata()
    )
    stored, exact, dense = (
        load_model(path, weights="stored"),
        load_model(path, weights="stored", exact=True),
        load_model(path, weights="dequantized"),
    )
    wanted = logits(config, dense.params)
    for model, bound in ((exact, 1e-5), (stored, 1e-3)):
        found = logits(config, model.params, function=model.function)
        assert 0 < np.linalg.norm(found - wanted) < bound * np.linalg.norm(wanted)
    with pytest.raises(ValueError, match="weights must be one of auto, stored, dequantized, got 'q8'"):
        load_model(path, weights="q8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="load_model's result has the function that takes its params"):
        logits(config, stored.params)
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r'dense weights are needed: load_model\(path, weights="dequantized"\)'
    ):
        write_gguf(path, config, stored.params, tokenizer_metadata=tokenizer_metadata())
    assert path.read_bytes() == before


def test_a_plan_names_formats() -> None:
    plan = WeightPlan((("head", "Q6_K"),), exact=True)
    assert plan.of("head") == "Q6_K" and plan.of("embedding") is None
    assert hash(plan) == hash(WeightPlan((("head", "Q6_K"),), exact=True)) and set(WEIGHT_FORMATS) >= {"Q6_K"}
