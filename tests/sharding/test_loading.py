"""``load_model`` over a mesh: each device holds its own part of every weight, and nothing else."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from jaxpaged_model.checkpoint.loading import load_model
from mesh_kit import loaded, mesh_of

from jaxpaged.sharding.mesh import TENSOR

CUT = {"q": -1, "k": -1, "v": -1, "gate": -1, "up": -1, "out": -2, "down": -2}
"""The axis of a layer's ``[layers, in, out]`` kernel that is split, by layer."""


def keys_of(path: tuple) -> list[str]:
    return [str(getattr(key, "key", getattr(key, "name", key))) for key in path]


@pytest.mark.parametrize(("data", "tensor"), [(1, 2), (2, 2), (2, 4), (1, 4)])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "biased", "gguf"])
def test_each_device_has_its_part(kind, data, tensor):
    mesh = mesh_of(data, tensor)
    whole = loaded(kind, weights="dequantized").params
    sharded = load_model(loaded(kind).path, weights="dequantized", mesh=mesh).params
    wanted = jax.tree_util.tree_leaves_with_path(whole)
    found = dict(jax.tree_util.tree_leaves_with_path(sharded))
    assert found.keys() == {path for path, _ in wanted}
    kv_heads, head_dim = 2, 16
    for path, leaf in wanted:
        stacked, keys = found[path], keys_of(path)
        assert stacked.sharding.spec == jax.sharding.PartitionSpec(TENSOR)
        assert stacked.shape[0] == tensor
        pieces = {shard.device: np.asarray(shard.data) for shard in stacked.addressable_shards}
        layer, weight = (
            next((key for key in keys if key in CUT), None),
            next(key for key in reversed(keys) if key in ("kernel", "bias", "scale", "embedding")),
        )
        for row, rank in itertools.product(range(data), range(tensor)):
            piece = pieces[mesh.devices.reshape(data, tensor)[row, rank]]
            assert piece.shape[0] == 1
            expected = np.asarray(leaf)
            if layer is None:
                pass
            elif weight == "bias" and layer in ("out", "down"):
                expected = expected if rank == 0 else np.zeros_like(expected)
            else:
                axis = CUT[layer] if weight == "kernel" else -1
                parts = min(tensor, kv_heads) if layer in ("k", "v") else tensor
                expected = np.split(expected, parts, axis)[rank * parts // tensor]
                assert layer not in ("k", "v") or expected.shape[axis] % head_dim == 0
            np.testing.assert_array_equal(piece[0], expected, err_msg=".".join(keys))


def test_what_is_read_is_told_to_the_end():
    told: list[tuple[int, int]] = []
    load_model(loaded("biased").path, mesh=mesh_of(2, 4), progress=lambda *now: told.append(now))
    assert told == sorted(told) and told[-1][0] == told[-1][1]
    assert len({total for _, total in told}) == 1
