"""More than one device: caches, weights and programs spread over a JAX mesh.

Every device runs the program of one device, on values that are smaller: fewer heads, a pool of its own. What differs
between devices is stacked: along the mesh axis "data" each shard has sequences, a block table and a pool of its own;
along "tensor" devices have the same tables, and each the pages of its own KV heads and its own part of every matrix;
along "context" the pages of one sequence lie on several devices. So tables are ``[data, ...]``, weights
``[tensor, ...]``, and pages one behind the other, ``[data * context * tensor * N, ...]``: an axis in front of a large
array that is written to can cost a copy of it.

Whoever holds one part computes with it and knows nothing of the others. What devices tell each other is written down
where it happens: the sums of partial products in the model, and the merge of ``context.py``. Nothing else is a
collective, whatever runs in a program.

Source of the ideas: Megatron-LM (arXiv:1909.08053) for the split of a layer with two sums; ``jax.shard_map`` for one
program on many devices.
"""

from __future__ import annotations

import functools
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxpaged.cache.contiguous import ContiguousKVCache
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.sharding.context import ContextKVCache

T = TypeVar("T")
DATA, CONTEXT, TENSOR = "data", "context", "tensor"
AXES = (DATA, CONTEXT, TENSOR)
"""The axes of every mesh made here, neighbours along "tensor", which talk most."""

Specs = Any
"""A ``PartitionSpec``, or a pytree of them that is a prefix of a value's. It has a name for each axis in front of the
value's own along which parts are stacked; or several names in one place: parts are joined along the first axis."""

_SHARD, _REPLICATED = PartitionSpec(DATA), PartitionSpec()
_PAGES, _METADATA = PartitionSpec((DATA, CONTEXT, TENSOR)), PartitionSpec(DATA, CONTEXT)

STATIC, PARAMS, CACHE, BATCH, PER_DEVICE, REPLICATED, GATHERED = (
    "static",
    "params",
    "cache",
    "rows",
    "each",
    "same",
    "result",
)
"""What an argument or a result of a program is: nothing of an array; weights; a cache; of each data shard its own; of
each device its own; the same everywhere; and what each data shard came to, told to every device, so that every host can
read it."""
SPECS: Mapping[str, Specs] = {
    PARAMS: PartitionSpec(TENSOR), BATCH: _SHARD, PER_DEVICE: _PAGES, REPLICATED: _REPLICATED, GATHERED: _SHARD,
}  # fmt: skip
"""How values of these kinds are stacked; of a cache ``cache_specs`` says it."""


class MeshError(ValueError):
    """Devices or heads that a mesh does not divide; one line that names both and what is allowed."""


# --- meshes -----------------------------------------------------------------------------------------------------


def parse_mesh(text: str) -> dict[str, Any]:
    """ "data=2,tensor=4" as sizes of axes.

    Raises:
      MeshError: it is not of that form.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES or not size.isdecimal() or int(size) < 1 or name in sizes:
            raise MeshError(
                f"mesh {text}: {part.strip()!r} is no axis and its size; write data=2,tensor=4, of the axes "
                f"{', '.join(AXES)}, each once"
            )
        sizes[name] = int(size)
    return sizes


def make_mesh(
    *, data: int = 1, tensor: int = 1, context: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of ``data * context * tensor`` devices with all three axes, those of size 1 too.

    Args:
      data, tensor, context: sizes of the axes; see the module.
      devices: which; default: all, or the first of them where one process has more than are needed.

    Raises:
      MeshError: there are too few devices, or more than are needed and some are another process's.
    """
    sizes = {DATA: data, CONTEXT: context, TENSOR: tensor}
    if wrong := [f"{name}={size}" for name, size in sizes.items() if size < 1]:
        raise MeshError(f"mesh: {wrong[0]} must be at least 1")
    needed = math.prod(sizes.values())
    given = list(jax.devices() if devices is None else devices)
    asked = ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "data=1"
    if needed > len(given) or (needed < len(given) and jax.process_count() > 1 and devices is None):
        raise MeshError(
            f"mesh {asked} has {needed} device{'s' if needed > 1 else ''}, and there are {len(given)}"
            + (
                f" in {jax.process_count()} processes, all of which take part"
                if jax.process_count() > 1
                else ""
            )
        )
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, types, devices=given[:needed])


def check_heads(num_q_heads: int, num_kv_heads: int, tensor: int) -> None:
    """Refuses a number of devices that heads cannot be dealt to: query heads in equal parts, and of KV heads as many
    each, or each KV head as often.

    Raises:
      MeshError: see there; it lists what is allowed.
    """

    def fits(size: int) -> bool:
        return num_q_heads % size == 0 and (num_kv_heads % size == 0 or size % num_kv_heads == 0)

    if not fits(tensor):
        allowed = ", ".join(str(size) for size in range(1, num_q_heads + 1) if fits(size))
        raise MeshError(
            f"tensor={tensor} does not divide {num_q_heads} query heads and {num_kv_heads} KV heads; "
            f"allowed are {allowed}"
        )


def local_kv_heads(num_kv_heads: int, tensor: int) -> int:
    """KV heads of one device; where there are fewer heads than devices, several devices have the same one."""
    return max(1, num_kv_heads // tensor)


# --- values -----------------------------------------------------------------------------------------------------


def cache_specs(cache: Any) -> Specs:
    """How the parts of a cache are stacked: a pytree of ``PartitionSpec`` that is a prefix of the cache's."""
    book: dict[str, Any] = {"allocator": _SHARD, "table": _SHARD}
    pages: dict[str, Any] = {"k_pages": _PAGES, "v_pages": _PAGES}
    if isinstance(cache, ContextKVCache):
        own: dict[str, Any] = {"local_table": _METADATA}
        return replace(cache, **book, **pages, **own)
    if isinstance(cache, PagedKVCache):
        places: dict[str, Any] = {"staging": None if cache.staging is None else _SHARD}
        return replace(cache, **book, **pages, **places)
    if isinstance(cache, ContiguousKVCache):
        rows: dict[str, Any] = {"k": _PAGES, "v": _PAGES, "lengths": _SHARD}
        return replace(cache, **rows)
    raise TypeError(f"a cache is needed, got {type(cache).__name__}")


def _by_spec(change: Callable[[Any, PartitionSpec], Any], specs: Specs, value: Any) -> Any:
    return jax.tree.map(
        lambda spec, part: jax.tree.map(lambda x: change(x, spec), part),
        specs,
        value,
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )


def _num_stacked(spec: PartitionSpec) -> int:
    """Axes in front of a value's own."""
    return sum(isinstance(name, str) for name in spec)


def stacked(value: Any, specs: Specs) -> Any:
    """One device's value as its part of the stack: with an axis of size 1 for each that is stacked."""
    return _by_spec(lambda x, spec: x.reshape((1,) * _num_stacked(spec) + x.shape), specs, value)


def unstacked(part: Any, specs: Specs) -> Any:
    """The inverse of ``stacked``."""
    return _by_spec(lambda x, spec: x.reshape(x.shape[_num_stacked(spec) :]), specs, part)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ShardedCache:
    """A cache on every device of a mesh; ``generate`` and its kind take it in the place of a cache.

    It has ``data`` shards of S sequences each, which serve sequence i as the ``i // data``-th of shard ``i % data``.
    """

    parts: Any
    """A cache whose leaves are stacked as ``cache_specs`` says."""
    mesh: Mesh = field(metadata={"static": True})
    num_kv_heads: int = field(default=0, metadata={"static": True})
    """Of the model; 0: as many as the devices along "tensor" have together, none of them twice."""

    @classmethod
    def create(cls, mesh: Mesh, make: Callable[[], Any], num_kv_heads: int = 0) -> ShardedCache:
        """Empty caches, made where they are.

        Args:
          mesh: of ``make_mesh``.
          make: makes the cache of one device, of ``local_kv_heads`` heads; a pure function.
          num_kv_heads: of the model; asked for by snapshots where several devices have the same head.
        """
        specs = cache_specs(jax.eval_shape(make))
        create = jax.shard_map(
            lambda: stacked(make(), specs), mesh=mesh, in_specs=(), out_specs=specs, check_vma=False
        )
        return cls(jax.jit(create)(), mesh, num_kv_heads)

    @property
    def num_shards(self) -> int:
        """Data shards, static: each with tables and a pool of its own."""
        return self.mesh.shape[DATA]

    @property
    def local(self) -> Any:
        """The cache of one device, with shapes in the place of arrays."""

        def part(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
            shape = NamedSharding(self.mesh, spec).shard_shape(x.shape)
            return jax.ShapeDtypeStruct(shape[_num_stacked(spec) :], x.dtype)

        return _by_spec(part, cache_specs(self.parts), self.parts)

    @property
    def max_seqs(self) -> int:
        """Sequences of all shards together, static."""
        return self.num_shards * self.local.max_seqs

    @property
    def kind(self) -> str:
        return str(self.local.kind)

    @property
    def pages_used(self) -> Array:
        """i32[data]: pages that are not free, of each shard."""
        axes = jax.tree.map(
            lambda spec: 0 if _num_stacked(spec) else None,
            cache_specs(self.parts),
            is_leaf=lambda node: isinstance(node, PartitionSpec),
        )
        return jax.vmap(lambda cache: cache.pages_used, in_axes=(axes,))(self.parts)

    def replaced(self, parts: Any) -> ShardedCache:
        """Other parts on the same mesh."""
        return replace(self, parts=parts)


def num_shards(mesh: Mesh | None) -> int:
    """Data shards of a mesh; 1 where there is none."""
    return 1 if mesh is None else mesh.shape[DATA]


def mesh_of(cache: Any) -> Mesh | None:
    """The mesh that a cache is spread over; None: it is one device's."""
    return cache.mesh if isinstance(cache, ShardedCache) else None


def put(mesh: Mesh, value: Any, specs: Specs = _SHARD) -> Any:
    """Host arrays, the same in every process, as a stack over a mesh."""

    def place(x: Any, spec: PartitionSpec) -> Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, NamedSharding(mesh, spec), lambda index: host[index])

    return _by_spec(place, specs, value)


def put_rows(mesh: Mesh | None, value: Any) -> Any:
    """Host arrays ``[data, ...]`` where a program wants its ``BATCH``: on a mesh, or without one on a single device."""
    return jax.tree.map(lambda x: jnp.asarray(x[0]), value) if mesh is None else put(mesh, value)


def share(value: T) -> list[T]:
    """What every process has for ``value``, by their numbers; all have to ask. It is pickled on the way."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(bucket_of(int(sizes.max())), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def agree(value: T) -> T:
    """What process 0 has for ``value``; all have to ask, in the same order. It is pickled on the way."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    data = np.frombuffer(pickle.dumps(value) if jax.process_index() == 0 else b"", np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(bucket_of(size), np.uint8)
    padded[: len(data)] = data
    told = np.asarray(multihost_utils.broadcast_one_to_all(padded))
    result: T = pickle.loads(told[:size].tobytes())
    return result


def bucket_of(size: int) -> int:
    """Few sizes of messages, few programs."""
    return 1 << max(8, (size - 1).bit_length())


def fetch(value: Any) -> Any:
    """Arrays as numpy, whoever has them; every process has to ask for the same."""
    if all(getattr(x, "is_fully_addressable", True) for x in jax.tree.leaves(value)):
        return jax.tree.map(np.array, value)  # copied: what is donated later must not change it
    from jax.experimental import multihost_utils

    return jax.tree.map(np.asarray, multihost_utils.process_allgather(value, tiled=True))


# --- programs ---------------------------------------------------------------------------------------------------


def over_mesh(
    function: Callable[..., Any], takes: Sequence[str], gives: str | tuple[str, ...]
) -> Callable[..., Any]:
    """A program of one device as one of a mesh, where its cache is a ``ShardedCache``; else it is what it was.

    Args:
      function: pure, of positional arguments.
      takes: what each of them is: ``STATIC``, ``PARAMS``, ``CACHE``, ``BATCH``, ``REPLICATED``.
      gives: the same of what it returns: one, or a tuple.
    """

    @functools.wraps(function)
    def spread(*arguments: Any) -> Any:
        cache = next((x for x in arguments if isinstance(x, ShardedCache)), None)
        if cache is None:
            return function(*arguments)
        of_cache = cache_specs(cache.parts)
        specs = [of_cache if kind == CACHE else SPECS.get(kind) for kind in takes]
        dynamic = [i for i, kind in enumerate(takes) if kind != STATIC]
        kinds = (gives,) if isinstance(gives, str) else gives
        alone = len(kinds) == 1  # a function that returns one thing returns no tuple
        out_specs = tuple(of_cache if kind == CACHE else SPECS[kind] for kind in kinds)

        def local(*given: Any) -> Any:
            own = list(arguments)
            for i, part, whole in zip(dynamic, given, wholes, strict=True):
                own[i] = unstacked(_with_empty(part, specs[i], whole, cache.mesh), specs[i])
            out = function(*own)
            outs = (out,) if alone else out
            return tuple(map(stacked, outs, out_specs))

        wholes = [x.parts if isinstance(x, ShardedCache) else x for x in (arguments[i] for i in dynamic)]
        outs = jax.shard_map(
            local,
            mesh=cache.mesh,
            in_specs=tuple(specs[i] for i in dynamic),
            out_specs=out_specs,
            check_vma=False,
        )(*map(_without_empty, wholes))
        everywhere = NamedSharding(cache.mesh, _REPLICATED)
        done = []
        for kind, out in zip(kinds, outs, strict=True):
            if kind == CACHE:
                out = cache.replaced(out)
            elif kind == GATHERED:
                out = jax.lax.with_sharding_constraint(out, everywhere)
            done.append(out)
        return done[0] if alone else tuple(done)

    return spread


def _without_empty(value: Any) -> Any:
    """None in the place of arrays without elements: XLA of jax 0.11 dies of them as arguments of a ``shard_map``."""
    return jax.tree.map(lambda x: x if np.size(x) else None, value)


def _with_empty(part: Any, specs: Specs, whole: Any, mesh: Mesh) -> Any:
    """One device's part of ``whole``, of which ``_without_empty`` is given."""

    def local_shape(x: Any, spec: PartitionSpec) -> Any:
        if np.size(x):
            return x
        return jax.ShapeDtypeStruct(NamedSharding(mesh, spec).shard_shape(x.shape), x.dtype)

    shapes = _by_spec(local_shape, specs, whole)
    return jax.tree.map(lambda like, x: jnp.zeros(like.shape, like.dtype) if x is None else x, shapes, part)


# --- dealing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchSharding:
    """Which data shard serves which of several prompts: like cards, prompt i is shard ``i % shards``'s.

    A few prompts with many samples are every shard's, and the samples are dealt.
    """

    shards: int
    num_samples: int
    """Of a prompt, in all."""
    splits: bool = False
    """Samples are dealt, not prompts."""

    @classmethod
    def of(cls, mesh: Mesh | None, num_prompts: int, num_samples: int = 1) -> BatchSharding:
        """How ``num_prompts`` prompts are dealt to the data shards of a mesh; to one where there is none."""
        shards = num_shards(mesh)
        splits = num_prompts < shards and num_samples > 1 and num_samples % shards == 0
        return cls(shards, num_samples, splits)

    @property
    def samples_each(self) -> int:
        """Samples of a prompt on one shard."""
        return self.num_samples // self.shards if self.splits else self.num_samples

    def count_each(self, num_prompts: int) -> Any:
        """i32[shards]: prompts of each shard."""
        if self.splits:
            return np.full(self.shards, num_prompts, np.int32)
        return np.asarray([len(range(d, num_prompts, self.shards)) for d in range(self.shards)], np.int32)

    def prompts(self, values: Any) -> Any:
        """``[G * shards, ...]``, or where samples are dealt ``[G, ...]``, as ``[shards, G, ...]``."""
        values = np.asarray(values)
        if self.splits:
            return np.broadcast_to(values, (self.shards, *values.shape))
        return np.swapaxes(values.reshape(len(values) // self.shards, self.shards, *values.shape[1:]), 0, 1)

    def rows(self, values: Any) -> Any:
        """``[prompts * num_samples, ...]`` as ``[shards, rows, ...]``."""
        values = np.asarray(values)
        each, rest = len(values) // self.shards, values.shape[1:]
        count = each // self.samples_each
        if self.splits:
            dealt = np.moveaxis(values.reshape(count, self.samples_each, self.shards, *rest), 2, 0)
        else:
            dealt = np.swapaxes(values.reshape(count, self.shards, self.num_samples, *rest), 0, 1)
        return dealt.reshape(self.shards, each, *rest)

    def gathered(self, values: Any) -> Any:
        """The inverse of ``rows``."""
        values = np.asarray(values)
        each, rest = values.shape[1], values.shape[2:]
        dealt = values.reshape(self.shards, each // self.samples_each, self.samples_each, *rest)
        return np.moveaxis(dealt, 0, 2 if self.splits else 1).reshape(self.shards * each, *rest)

    def same(self, value: Any) -> Any:
        """What is the same for all, as ``[shards, ...]``."""
        return np.broadcast_to(np.asarray(value), (self.shards, *np.shape(value)))

    def gathered_result(self, result: Any, **totals: Callable[[np.ndarray], Any]) -> Any:
        """A dataclass of ``[shards, rows, ...]`` as one of ``[all rows, ...]`` on the host.

        Args:
          result: the dataclass.
          totals: of its fields that are ``[shards]``, how one number is made of them.
        """
        values = {}
        for one in fields(result):
            value = np.asarray(getattr(result, one.name))
            total = totals.get(one.name)
            values[one.name] = self.gathered(value) if total is None else total(value)
        return replace(result, **values)
