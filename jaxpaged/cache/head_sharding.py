"""Pages that are split over devices by their KV heads, in the global arrays of a caller's program.

Heads are independent of each other, so each device writes and reads the heads it has, and nothing
is communicated. XLA knows that of no kernel, and of few writes; so what touches pages runs in a
``shard_map``, and all else of the cache is replicated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxpaged.attention.base import Pages

REPLICATED = PartitionSpec()


class HeadAxis(NamedTuple):
    """Mesh axis that KV heads are split over, in the program that is traced."""

    mesh: Mesh | AbstractMesh
    name: str
    explicit: bool
    """True if shardings are part of types along it (``AxisType.Explicit``)."""

    @property
    def heads(self) -> PartitionSpec:
        """Spec of an array with heads as its second axis."""
        return PartitionSpec(None, self.name)


def split_heads(sharding: NamedSharding, num_kv_heads: int) -> tuple[str, int]:
    """Checks the sharding of pages ``[pages, KV heads, ...]``.

    Returns:
      ``(axis, heads)``: the mesh axis, and the number of heads that pages have: where there are
      fewer KV heads than devices, several devices have the same head.

    Raises:
      ValueError: another axis is split, or the heads cannot be.
    """
    spec = tuple(sharding.spec)
    name = spec[1] if len(spec) > 1 else None
    if not isinstance(name, str) or any(axis is not None for axis in (spec[0], *spec[2:])):
        raise ValueError(
            "sharding must split the KV heads of pages over one mesh axis, PartitionSpec(None, axis), "
            f"got {sharding.spec}"
        )
    size = sharding.mesh.shape[name]
    if num_kv_heads % size and size % num_kv_heads:
        raise ValueError(
            f"{num_kv_heads} KV heads cannot be split over the {size} devices of mesh axis {name!r}: "
            "one number must divide the other"
        )
    return name, max(num_kv_heads, size)


def head_axis(pages: Pages, sharding: NamedSharding | None) -> HeadAxis | None:
    """Mesh axis that the heads of pages are split over here; None if the pages here have all their heads.

    Args:
      pages: ``[pages, KV heads, ...]``. Their type says it along explicit axes.
      sharding: of ``PagedKVCache.create``, which says it along auto axes.
    """
    here = jax.sharding.get_abstract_mesh()
    typed = jax.typeof(jax.tree.leaves(pages)[0]).sharding
    name = tuple(typed.spec)[1] if len(typed.spec) > 1 else None
    if isinstance(name, str) and not typed.mesh.empty:
        return HeadAxis(typed.mesh, name, explicit=True)
    if sharding is None:
        return None
    name = tuple(sharding.spec)[1]
    if name in here.manual_axes:  # the caller's own shard_map: this is one device's part
        return None
    mesh = sharding.mesh if here.empty else here
    if name not in mesh.axis_names:
        raise ValueError(f"pages are split over mesh axis {name!r}, which is none of {mesh.axis_names} here")
    return HeadAxis(mesh, name, mesh.axis_types[mesh.axis_names.index(name)] == AxisType.Explicit)


def over_heads(
    axis: HeadAxis, function: Callable[..., Any], in_specs: Sequence[Any], out_specs: Any, *arguments: Any
) -> Any:
    """Runs ``function(*arguments)`` on each device's heads.

    Args:
      axis: of ``head_axis``.
      in_specs, out_specs: specs of arguments and results, as for ``jax.shard_map``.
    """
    if axis.explicit:
        arguments = tuple(
            jax.tree.map(lambda x, spec=spec: jax.sharding.reshard(x, spec), argument)
            if isinstance(spec, PartitionSpec)
            else argument
            for argument, spec in zip(arguments, in_specs, strict=True)
        )
    free = set(axis.mesh.axis_names) - set(jax.sharding.get_abstract_mesh().manual_axes)
    mapped: Callable[..., Any] = jax.shard_map(
        function,
        mesh=axis.mesh,
        in_specs=tuple(in_specs),
        out_specs=out_specs,
        axis_names=free,
        check_vma=False,
    )
    return mapped(*arguments)


def repeated(rows: Array, num_heads: int) -> Array:
    """Keys or values ``[T, KV, D]`` with each head as often as pages of ``num_heads`` heads have it."""
    given = rows.shape[1] if rows.ndim == 3 else 0
    if given == num_heads or not given or num_heads % given:
        return rows
    return jnp.repeat(rows, num_heads // given, axis=1)
