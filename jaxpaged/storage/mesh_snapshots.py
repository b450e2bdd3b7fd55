"""Snapshots of caches on a mesh, in files with all heads of a sequence.

A snapshot of one mesh can be restored on another, or on a single device: heads are joined when
saving and split when restoring. Sequence i is number ``i // data`` of data shard ``i % data``, as
for ``generate``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.sharding.mesh import CONTEXT, TENSOR
from jaxpaged.sharding.multihost import allgather_objects
from jaxpaged.sharding.specs import ShardedCache, cache_specs, stacked, unstacked
from jaxpaged.storage import snapshots
from jaxpaged.storage.snapshot_file import Snapshot, SnapshotError, write_snapshot


def snapshot(
    cache: ShardedCache,
    path: str | os.PathLike[str],
    *,
    seq: int,
    token_ids: Sequence[int],
    fingerprint: str,
) -> None:
    """Saves one sequence to a safetensors file. All processes call it, and the first one writes.

    Args:
      cache: not changed.
      path, token_ids, fingerprint: as for ``snapshots.snapshot``.
      seq: id of the sequence.

    Raises:
      ValueError: as ``snapshots.snapshot``; a cache without pages, of several layer groups, or with a
        "context" axis.
      OSError: the file cannot be written.
    """
    shard, local = _locate(cache, seq)
    taken = {
        rank: snapshots.take(part, seq=local, token_ids=token_ids, fingerprint=fingerprint)
        for rank, part in _parts(cache, shard)
    }
    ranks: dict[int, Snapshot] = {}
    for others in allgather_objects(taken):
        ranks |= others
    whole = [ranks[rank] for rank in _with_own_heads(cache)]
    groups = [one.groups[0] for one in whole]
    joined: Any = [
        jax.tree.map(lambda *heads: np.concatenate(heads, axis=1), *layers)
        for layers in (tuple(one.keys for one in groups), tuple(one.values for one in groups))
    ]
    if jax.process_index() == 0:
        entries = groups[0].entries.copy()
        entries[:, 0] = seq  # a shard has numbers of its own
        heads = sum(one.num_kv_heads for one in groups)
        group = replace(groups[0], entries=entries, num_kv_heads=heads, keys=joined[0], values=joined[1])
        write_snapshot(path, replace(whole[0], sequences=(seq,), groups=(group,)))
    allgather_objects(None)  # waits until the file is there


def restore(cache: ShardedCache, saved: Snapshot, *, seq: int | None = None) -> ShardedCache:
    """Restores the only sequence of a snapshot as sequence ``seq``.

    Args:
      cache: **donated** when it succeeds, untouched when it raises.
      saved: result of ``snapshot_file.read_snapshot``, the same in every process.
      seq: default: the id with which it was saved.

    Raises:
      OutOfPages, SnapshotError, ValueError: as ``snapshots.restore``; as ``snapshot``.
    """
    if len(saved.sequences) != 1:
        raise ValueError(f"a mesh restores snapshots of one sequence; this one has {len(saved.sequences)}")
    shard, local = _locate(cache, saved.sequences[0] if seq is None else seq)
    heads = _heads(cache)
    each = _local_heads(cache)
    if len(saved.groups) != 1:
        raise SnapshotError(f"the snapshot has {len(saved.groups)} layer groups; a cache on a mesh has one")
    if saved.groups[0].num_kv_heads != heads:
        raise SnapshotError(
            f"the snapshot has {saved.groups[0].num_kv_heads} KV heads; the cache has {heads} on "
            f"{cache.mesh.shape[TENSOR]} devices"
        )
    group = saved.groups[0]

    def of_rank(rank: int) -> Snapshot:
        begin = rank * heads // cache.mesh.shape[TENSOR]
        mine = slice(begin, begin + each)
        keys, values = jax.tree.map(lambda x: x[:, mine], (group.keys, group.values))
        count = keys[0].shape[1] if isinstance(keys[0], np.ndarray) else each
        return replace(saved, groups=(replace(group, num_kv_heads=count, keys=keys, values=values),))

    for rank, part in _parts(cache, shard):
        snapshots.check_restore(part, of_rank(rank), seq=local)
    specs = cache_specs(cache.parts)
    leaves, structure = jax.tree.flatten(cache.parts)
    devices = {device: place for place, device in np.ndenumerate(cache.mesh.devices)}
    data = [{one.device: one.data for one in leaf.addressable_shards} for leaf in leaves]
    unstack = jax.jit(lambda part: unstacked(part, specs), donate_argnums=0)
    restack = jax.jit(lambda value: stacked(value, specs), donate_argnums=0)
    for device in data[0]:
        if devices[device][0] == shard:
            part = unstack(jax.tree.unflatten(structure, [one[device] for one in data]))
            part = restack(snapshots.restore(part, of_rank(devices[device][2]), seq=local))
            for one, leaf in zip(data, jax.tree.leaves(part), strict=True):
                one[device] = leaf
    arrays = [
        jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, list(one.values()))
        for leaf, one in zip(leaves, data, strict=True)
    ]
    return replace(cache, parts=jax.tree.unflatten(structure, arrays))


def _locate(cache: ShardedCache, seq: int) -> tuple[int, int]:
    """Data shard of a sequence, and its number there."""
    if not isinstance(cache.parts, PagedKVCache) or cache.mesh.shape[CONTEXT] > 1:
        raise ValueError(
            'a snapshot on a mesh needs a paged cache of one layer group and a "context" axis of size 1'
        )
    if not 0 <= seq < cache.max_seqs:
        raise ValueError(f"seq must be an id from 0 to {cache.max_seqs - 1}, got {seq}")
    return seq % cache.num_shards, seq // cache.num_shards


def _local_heads(cache: ShardedCache) -> int:
    return int(cache.local.k_pages.shape[1])


def _heads(cache: ShardedCache) -> int:
    return cache.num_kv_heads or _local_heads(cache) * cache.mesh.shape[TENSOR]


def _with_own_heads(cache: ShardedCache) -> list[int]:
    """Ranks along "tensor" that have each head once."""
    size = cache.mesh.shape[TENSOR]
    first = {rank * _heads(cache) // size: rank for rank in reversed(range(size))}
    return sorted(first.values())


def _parts(cache: ShardedCache, shard: int) -> Iterator[tuple[int, Any]]:
    """Parts of a data shard in this process, with their ranks along "tensor"; not to be donated."""
    leaves, structure = jax.tree.flatten(cache.parts)
    data: list[dict[Any, Array]] = [{one.device: one.data for one in x.addressable_shards} for x in leaves]
    specs = cache_specs(cache.parts)
    for rank in range(cache.mesh.shape[TENSOR]):
        device = cache.mesh.devices[shard, 0, rank]
        if device in data[0]:
            part = jax.tree.unflatten(structure, [one[device] for one in data])
            yield rank, unstacked(part, specs)
