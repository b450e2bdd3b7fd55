"""A sequence saved on one mesh goes on on another, and on a single device."""

from __future__ import annotations

from dataclasses import replace

import mesh_kit
import numpy as np
import pytest

from jaxpaged import GroupedKVCache, LayerGroup
from jaxpaged.generation.api import generate
from jaxpaged.sharding.specs import ShardedCache
from jaxpaged.storage import mesh_snapshots, snapshots
from jaxpaged.storage.snapshot_file import SnapshotError, read_snapshot

PROMPTS = [[5, 9, 7, 3, 11, 2, 4, 8, 1], [8, 8, 2], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [77, 4]]
SEQ = 2


def mesh_of(sizes):
    return None if sizes is None else mesh_kit.mesh_of(*sizes)


def cache_on(sizes, **more):
    model = mesh_kit.loaded("tiny", mesh_of(sizes))
    return model, mesh_kit.create_cache(model, 4 // (sizes[0] if sizes else 1), 16, **more)


def tokens_of(result):
    """Tokens generated behind the prompt of the sequence."""
    counts = np.asarray(result.num_tokens).reshape(-1)
    return np.asarray(result.tokens).reshape(len(counts), -1)[SEQ, : counts[SEQ]].tolist()


def filled(sizes, **more):
    """A cache of four sequences, and what was generated behind the one that is saved."""
    model, cache = cache_on(sizes, **more)
    result, cache = generate(model.function, model.params, cache, PROMPTS, max_new_tokens=6, keep=True)
    return model, cache, tokens_of(result)


def save(cache, path, tokens):
    room = {"token_ids": tokens, "fingerprint": "model"}
    if isinstance(cache, ShardedCache):
        mesh_snapshots.snapshot(cache, path, seq=SEQ, **room)
    else:
        snapshots.snapshot(cache, path, seq=SEQ, **room)


def continuation(model, cache, last):
    more = [[3], [3], [last, 9], [3]]
    result, _ = generate(model.function, model.params, cache, more, max_new_tokens=8, keep=True)
    return tokens_of(result)


@pytest.mark.parametrize("to", [None, (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_what_one_mesh_saves_another_continues(tmp_path, to, dtype):
    model, cache, told = filled((2, 2), dtype=dtype)
    path = tmp_path / "one"
    save(cache, path, [*PROMPTS[SEQ], *told[:-1]])
    expected = continuation(model, cache, told[-1])
    saved = read_snapshot(path, fingerprint="model")
    other, empty = cache_on(to, dtype=dtype)
    if to is None:
        restored = snapshots.restore(empty, saved, seq=SEQ)
    else:
        restored = mesh_snapshots.restore(empty, saved)
    assert continuation(other, restored, told[-1]) == expected


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    _, cache, told = filled((2, 2))
    path = tmp_path / "one"
    save(cache, path, [*PROMPTS[SEQ], *told[:-1]])
    saved = read_snapshot(path, fingerprint="model")
    _, other = cache_on((2, 2), dtype="bf16")
    before = np.asarray(other.pages_used).tolist()
    with pytest.raises(SnapshotError):
        mesh_snapshots.restore(other, saved)
    assert np.asarray(other.pages_used).tolist() == before
    with pytest.raises(ValueError, match="seq must be an id from 0 to 3"):
        mesh_snapshots.restore(other, saved, seq=9)
    with pytest.raises(SnapshotError, match="has 2 layer groups; a cache on a mesh has one"):
        mesh_snapshots.restore(other, replace(saved, groups=saved.groups * 2))
    group = LayerGroup((0,), 1, 8)
    grouped = replace(other, parts=GroupedKVCache((other.parts, other.parts), (group, group)))
    with pytest.raises(ValueError, match="a snapshot on a mesh needs a paged cache of one layer group"):
        save(grouped, path, [])
