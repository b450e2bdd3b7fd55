"""The module's weights, their shapes and dtypes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxpaged_model.checkpoint.huggingface_config import config_from_huggingface
from jaxpaged_model.llama import Llama, abstract_params, functional, random_params
from small_models import config_json


def test_dtypes_are_given_by_any_name() -> None:
    config = config_from_huggingface(config_json("llama"))
    for names in (
        ("bf16", "bfloat16", jnp.bfloat16, jnp.dtype(jnp.bfloat16)),
        ("f32", "float32", np.float32, jnp.float32, np.dtype("float32")),
        ("f16", "float16", np.float16, jnp.float16),
    ):
        wanted = jnp.dtype(names[-1])
        assert {functional(config, name) for name in names} == {functional(config, wanted)}
        for name in names:
            assert all(leaf.dtype == wanted for leaf in jax.tree.leaves(abstract_params(config, name)))
    for name in ("q8_0", "float64", np.int32, None):
        with pytest.raises(
            ValueError, match="dtype must be f32, bf16 or f16, or the same by numpy's name, got"
        ):
            functional(config, name)


def test_random_params_are_those_of_nnx() -> None:
    config = config_from_huggingface(config_json("qwen2"))
    drawn = random_params(config, seed=3)
    expected = nnx.state(Llama(config, rngs=nnx.Rngs(jax.random.key(3))), nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, drawn, expected)
    abstract = abstract_params(config)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract
    )
