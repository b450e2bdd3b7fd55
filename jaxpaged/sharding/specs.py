"""Partition specs of caches, weights and batches, and programs of one device on a mesh.

A value that differs between devices is stacked along leading axes: tables are ``[data, ...]``,
weights ``[tensor, ...]``, and pages are joined along their first axis, ``[data * context * tensor *
N, ...]``, since a leading axis of a large array that is written to can cost a copy of it.

A program on a mesh is a ``shard_map`` of that of one device. Its collectives are the sums of
partial products in the model and the merge of attention states in ``context``; there are no others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpaged.cache.contiguous import ContiguousKVCache
from jaxpaged.cache.groups import GroupedKVCache, map_parts
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.sharding.context import ContextKVCache
from jaxpaged.sharding.mesh import CONTEXT, DATA, TENSOR

Specs = Any
"""A ``PartitionSpec``, or a pytree of them that is a prefix of a value's. One axis name in an entry
is a leading axis along which parts are stacked; a tuple of names joins parts along the first
axis."""

PARAMS, BATCH, REPLICATED = PartitionSpec(TENSOR), PartitionSpec(DATA), PartitionSpec()
"""Specs of weights, of one value a data shard, and of the same value everywhere."""
PER_DEVICE = PartitionSpec((DATA, CONTEXT, TENSOR))
"""Spec of one value a device, joined along the first axis, as pages are."""
CACHE = None
"""In place of the specs of a ``ShardedCache``: those of its ``parts``, see ``cache_specs``."""


def cache_specs(cache: Any) -> Specs:
    """Specs of a cache: a pytree of ``PartitionSpec`` that is a prefix of the cache's."""
    metadata: dict[str, Any] = {"allocator": BATCH, "table": BATCH}
    pages: dict[str, Any] = {"k_pages": PER_DEVICE, "v_pages": PER_DEVICE}
    if isinstance(cache, GroupedKVCache):
        return map_parts(cache_specs, cache)
    if isinstance(cache, ContextKVCache):
        own: dict[str, Any] = {"local_table": PartitionSpec(DATA, CONTEXT)}
        return replace(cache, **metadata, **pages, **own)
    if isinstance(cache, PagedKVCache):
        places: dict[str, Any] = {"staging": None if cache.staging is None else BATCH}
        return replace(cache, **metadata, **pages, **places)
    if isinstance(cache, ContiguousKVCache):
        rows: dict[str, Any] = {"k": PER_DEVICE, "v": PER_DEVICE, "lengths": BATCH}
        return replace(cache, **rows)
    raise TypeError(f"a cache is needed, got {type(cache).__name__}")


def _by_spec(change: Callable[[Any, PartitionSpec], Any], specs: Specs, value: Any) -> Any:
    return jax.tree.map(
        lambda spec, part: jax.tree.map(lambda x: change(x, spec), part),
        specs,
        value,
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )


def _is_spec(node: Any) -> bool:
    return node is CACHE or isinstance(node, PartitionSpec)


def _num_stacked(spec: PartitionSpec) -> int:
    """Number of leading axes along which a value is stacked."""
    return sum(isinstance(name, str) for name in spec)


def stacked(value: Any, specs: Specs) -> Any:
    """Part of one device in a stacked value: ``value`` with a leading axis of size 1 for each
    stacked axis."""
    return _by_spec(lambda x, spec: x.reshape((1,) * _num_stacked(spec) + x.shape), specs, value)


def unstacked(part: Any, specs: Specs) -> Any:
    """Inverse of ``stacked``."""
    return _by_spec(lambda x, spec: x.reshape(x.shape[_num_stacked(spec) :]), specs, part)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class ShardedCache:
    """A cache on every device of a mesh; accepted by ``generate`` and its variants in place of a
    cache.

    It has ``data`` shards of S sequences each; sequence i is number ``i // data`` of shard ``i %
    data``.
    """

    parts: Any
    """Cache whose leaves are stacked by ``cache_specs``."""
    mesh: Mesh = field(metadata={"static": True})
    num_kv_heads: int = field(default=0, metadata={"static": True})
    """KV heads of the model; 0 = those of all devices along "tensor", if none has a head of
    another."""

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in self.mesh.shape.items() if size > 1)
        return f"ShardedCache({self.local!r} on a mesh of {sizes or '1 device'})"

    @classmethod
    def create(cls, mesh: Mesh, make: Callable[[], Any], num_kv_heads: int = 0) -> ShardedCache:
        """Creates empty caches on their devices.

        Args:
          mesh: of ``make_mesh``.
          make: pure function that creates the cache of one device, with ``local_kv_heads`` heads.
          num_kv_heads: KV heads of the model; needed by snapshots if several devices have the same
            head.
        """
        specs = cache_specs(jax.eval_shape(make))
        create = jax.shard_map(
            lambda: stacked(make(), specs), mesh=mesh, in_specs=(), out_specs=specs, check_vma=False
        )
        return cls(jax.jit(create)(), mesh, num_kv_heads)

    @property
    def num_shards(self) -> int:
        """Data shards, static; each has its own tables and pool."""
        return self.mesh.shape[DATA]

    @property
    def local(self) -> Any:
        """Cache of one device, with shapes in place of arrays."""

        def part(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
            shape = NamedSharding(self.mesh, spec).shard_shape(x.shape)
            return jax.ShapeDtypeStruct(shape[_num_stacked(spec) :], x.dtype)

        return _by_spec(part, cache_specs(self.parts), self.parts)

    @property
    def max_seqs(self) -> int:
        """Sequences of all shards, static."""
        return self.num_shards * self.local.max_seqs

    @property
    def kind(self) -> str:
        return str(self.local.kind)

    @property
    def pages_used(self) -> Array:
        """i32[data]: pages in use of each shard; i32[data, G] with G layer groups."""
        axes = jax.tree.map(
            lambda spec: 0 if _num_stacked(spec) else None,
            cache_specs(self.parts),
            is_leaf=lambda node: isinstance(node, PartitionSpec),
        )
        return jax.vmap(lambda cache: cache.pages_used, in_axes=(axes,))(self.parts)


def mesh_of(cache: Any) -> Mesh | None:
    """Mesh of a cache; None if it is on one device."""
    return cache.mesh if isinstance(cache, ShardedCache) else None


def put(mesh: Mesh, value: Any, specs: Specs = BATCH) -> Any:
    """Puts host arrays, the same in every process, on a mesh."""

    def place(x: Any, spec: PartitionSpec) -> Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, NamedSharding(mesh, spec), lambda index: host[index])

    return _by_spec(place, specs, value)


def over_mesh(
    function: Callable[..., Any], in_specs: tuple[Specs, ...], out_specs: Specs, *, gather: bool = False
) -> Callable[..., Any]:
    """Runs a function of one device on a mesh if one of its arguments is a ``ShardedCache``.

    Args:
      function: pure, with positional arguments, all of them pytrees of arrays.
      in_specs: specs of each argument: ``PARAMS``, ``CACHE``, ``BATCH``, ``REPLICATED``.
      out_specs: specs of the result, or a tuple, of each result.
      gather: gather ``BATCH`` results on all devices, so that every process can read them.
    """

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        cache = next((x for x in arguments if isinstance(x, ShardedCache)), None)
        if cache is None:
            return function(*arguments)
        of_cache = cache_specs(cache.parts)
        given = tuple(x.parts if isinstance(x, ShardedCache) else x for x in arguments)
        ins = tuple(of_cache if spec is CACHE else spec for spec in in_specs)
        outs = jax.tree.map(lambda spec: of_cache if spec is CACHE else spec, out_specs, is_leaf=_is_spec)

        def local(*parts: Any) -> Any:
            return stacked(function(*unstacked(_with_empty(parts, ins, given, cache.mesh), ins)), outs)

        def finished(spec: Specs, out: Any) -> Any:
            if spec is CACHE:
                return replace(cache, parts=out)
            if gather and spec == BATCH:
                return jax.lax.with_sharding_constraint(out, NamedSharding(cache.mesh, REPLICATED))
            return out

        spread = jax.shard_map(local, mesh=cache.mesh, in_specs=ins, out_specs=outs, check_vma=False)
        return jax.tree.map(finished, out_specs, spread(*_without_empty(given)), is_leaf=_is_spec)

    return run


def _without_empty(value: Any) -> Any:
    """None in place of arrays without elements, which crash XLA of jax 0.11 as arguments of a
    ``shard_map``."""
    return jax.tree.map(lambda x: x if np.size(x) else None, value)


def _with_empty(part: Any, specs: Specs, whole: Any, mesh: Mesh) -> Any:
    """Part of one device of ``whole``, with the empty arrays that ``_without_empty`` left out."""

    def local_shape(x: Any, spec: PartitionSpec) -> Any:
        if np.size(x):
            return x
        return jax.ShapeDtypeStruct(NamedSharding(mesh, spec).shard_shape(x.shape), x.dtype)

    shapes = _by_spec(local_shape, specs, whole)
    return jax.tree.map(lambda like, x: jnp.zeros(like.shape, like.dtype) if x is None else x, shapes, part)
