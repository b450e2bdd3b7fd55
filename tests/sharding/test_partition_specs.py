"""Dense weights split by partition specs: JAX's partitioner makes a model of one device tensor parallel."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import mesh_kit
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxpaged_model.config import ModelConfig
from jaxpaged_model.llama import functional, random_params
from jaxpaged_model.partition import partition_specs

from jaxpaged import PagedKVCache, Request, SamplingParams, check_invariants, generate
from jaxpaged.generation.api import run_donating
from tpu_scripts.compile_check.hlo import contents_of

LAYERS, NEW = 4, 12
PROMPTS = [[1, 2, 3, 4], np.random.default_rng(1).integers(0, 97, 13).tolist(), [7]]
BIASES = {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "biases": {**BIASES, "qk_norm": "head", "tie_embeddings": True},
    "both norms": {
        "norms": "both",
        "activation": "gelu_tanh",
        "windows": (9, None) * 2,
        "logit_soft_cap": 30.0,
    },
}


def config_of(kind: str) -> ModelConfig:
    return ModelConfig("llama", 97, 64, 96, LAYERS, 8, 4, 16, 128, **KINDS[kind])


def params_of(config: ModelConfig) -> Any:
    """Weights of which none is 0 or 1, as biases and norms would be."""
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(x.dtype) * 0.1, random_params(config))


def split(params: Any, mesh: Any) -> Any:
    specs = partition_specs(params, "model")
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, specs)


def create(config: ModelConfig, mesh: Any = None) -> PagedKVCache:
    heads = None if mesh is None else NamedSharding(mesh, P(None, "model"))
    return PagedKVCache.create(
        **config.cache_spec, num_pages=24, page_size=8, max_seqs=4, dtype="f32", sharding=heads
    )


@pytest.fixture
def mesh() -> Any:
    return jax.make_mesh((4,), ("model",), (AxisType.Auto,), devices=jax.devices()[:4])


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_those_of_one_device_by_two_sums_a_layer(kind: str, mesh: Any) -> None:
    config = config_of(kind)
    model, whole = functional(config), params_of(config)
    parts = split(whole, mesh)
    sampling = SamplingParams.create(3, temperature=0.6, seed=2)
    options: dict[str, Any] = {"max_new_tokens": NEW, "sampling": sampling, "logprobs": 0}
    expected, _ = generate(model, whole, create(config), PROMPTS, **options)
    found, cache = generate(model, parts, create(config, mesh), PROMPTS, **options)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
    check_invariants(cache)

    request = Request.create(cache, PROMPTS, **options)
    compiled = run_donating("cpu").lower(model, parts, create(config, mesh), request).compile()
    sent = contents_of(compiled.as_text(), dict(mesh.shape)).collectives
    # The model is in the program twice, for prompts and for decoding; its layers are a loop over one of each kind.
    layers = len(set(config.kinds))
    assert Counter((one.kind, one.over) for one in sent) == {("all-reduce", "model"): 2 * 2 * layers}
    held = sum(x.nbytes for x in jax.tree.leaves(whole))
    on_each = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(parts))
    assert on_each < 0.5 * held  # a quarter, and the whole embedding and head


def test_stored_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"attention.out.*codes: only dense weights are split"):
        partition_specs(mesh_kit.loaded("tiny").params, "model")
