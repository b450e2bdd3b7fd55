"""Layer groups on meshes: pools and tables of each group on every device, and the tokens of one device."""

from __future__ import annotations

import functools
from typing import Any

import mesh_kit
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxpaged import GroupedKVCache, generate
from jaxpaged.cache.groups import create_cache
from jaxpaged.engine import Engine, EngineConfig, EngineRequest
from jaxpaged.sharding.context import ContextKVCache
from jaxpaged.sharding.mesh import CONTEXT
from jaxpaged.sharding.specs import ShardedCache

PROMPTS = [np.random.default_rng(i).integers(3, 100, n).tolist() for i, n in enumerate((5, 33, 18, 1))]


def grouped(mesh: Mesh | None, max_seqs: int, **sizes: Any) -> Any:
    model = mesh_kit.loaded("windowed", mesh)
    config = model.local_config
    assert [group.window for group in config.groups] == [None, 9]
    given = {"page_size": mesh_kit.PAGE_SIZE, "step_tokens": 16, "rope": config.rope, "dtype": "f32", **sizes}
    if mesh is not None and mesh.shape[CONTEXT] > 1:
        given["make"] = functools.partial(ContextKVCache.create, axis_size=mesh.shape[CONTEXT])

    def create() -> GroupedKVCache:
        return create_cache(config.groups, num_pages=(48, 24), max_seqs=max_seqs, **given)

    return create() if mesh is None else ShardedCache.create(mesh, create, model.config.num_kv_heads)


@functools.cache
def expected() -> list[list[int]]:
    model = mesh_kit.loaded("windowed")
    result, _ = generate(
        model.function, model.params, grouped(None, 4), PROMPTS, max_new_tokens=24, batch_size=16
    )
    return np.asarray(result.tokens)[:, :24].tolist()


@pytest.mark.parametrize(("data", "tensor", "context"), [(2, 2, 1), (1, 1, 2), (1, 2, 2)])
def test_generate_has_the_tokens_of_one_device(data: int, tensor: int, context: int) -> None:
    mesh = mesh_kit.mesh_of(data, tensor, context)
    model = mesh_kit.loaded("windowed", mesh)
    cache = grouped(mesh, 4 // data)
    result, cache = generate(model.function, model.params, cache, PROMPTS, max_new_tokens=24, batch_size=16)
    assert np.asarray(result.tokens)[:, :24].tolist() == expected()
    assert np.asarray(cache.pages_used).tolist() == [[0, 0]] * data
    everything, local = np.asarray(result.pages_peak)
    assert 0 < local < everything


def test_an_engine_serves_them_in_shards() -> None:
    mesh = mesh_kit.mesh_of(2, 2)
    model = mesh_kit.loaded("windowed", mesh)
    config = EngineConfig(64, model.config.vocab_size, max_batch_tokens=16, decode_steps=4)
    engine = Engine(model.function, model.params, grouped(mesh, 2), config)
    engine.compile()
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(EngineRequest(str(i), tuple(prompt), max_new_tokens=24, temperature=0.0))
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.tokens)
        engine.check_state()
    assert [tokens[str(i)] for i in range(len(PROMPTS))] == expected()
    everything, local = engine.stats().groups
    assert (everything.pages_total, local.pages_total) == (96, 48)
    assert len(engine.pool_state().state) == 144
