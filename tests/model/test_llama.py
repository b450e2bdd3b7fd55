"""The module's weights: their numbers, and their shapes without numbers."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx
from jaxpaged_model.checkpoint.read_config import config_from_huggingface
from jaxpaged_model.llama import Llama, abstract_params, random_params
from small_models import config_json


def test_random_params_are_those_that_nnx_draws() -> None:
    config = config_from_huggingface(config_json("qwen2"))
    drawn = random_params(config, seed=3)
    expected = nnx.state(Llama(config, rngs=nnx.Rngs(jax.random.key(3))), nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, drawn, expected)
    abstract = abstract_params(config)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract
    )
