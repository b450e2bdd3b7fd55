"""Partition specs of dense weights, for tensor parallelism by JAX's own partitioner.

Each layer is split as by Megatron-LM (arXiv:1909.08053): the matrices of queries, keys, values, gate
and up by columns, which are heads or inner dimensions, those of both outputs by rows. So a layer has
two sums over devices; and where queries and keys are normalized over all heads, one more, of a
number a row. ``load_model(mesh=...)`` splits every kind of weights, by stacking parts.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxpaged_model.llama import Params

_BY_COLUMNS, _BY_ROWS = {"q", "k", "v", "gate", "up"}, {"out", "down"}
_DENSE = {"kernel", "bias", "scale", "embedding"}
"""Names of the arrays of modules without stored weights."""


def partition_specs(params: Params, axis: str) -> Any:
    """A ``PartitionSpec`` for each array of dense params, in a pytree like theirs.

    Args:
      params: of ``random_params``, or of ``load_model(weights="dequantized")``; arrays may be
        ``jax.ShapeDtypeStruct``.
      axis: mesh axis to split over. Its size must divide the query heads, the KV heads and the inner
        dimension of the MLP.

    Raises:
      ValueError: the params hold weights as stored in a file, whose blocks are not split by axes.

    Example:
      >>> def put(x, spec):  # doctest: +SKIP
      ...     return jax.device_put(x, NamedSharding(mesh, spec))
      >>> params = jax.tree.map(put, params, partition_specs(params, "model"))  # doctest: +SKIP
      >>> heads = NamedSharding(mesh, PartitionSpec(None, "model"))  # doctest: +SKIP
      >>> cache = PagedKVCache.create(**config.cache_spec, **sizes, sharding=heads)  # doctest: +SKIP
      >>> generate(functional(config), params, cache, prompts, max_new_tokens=16)  # doctest: +SKIP
    """

    def spec_of(path: tuple[Any, ...], x: Any) -> PartitionSpec:
        names = [entry.key for entry in path if isinstance(getattr(entry, "key", None), str)]
        if names[-1] not in _DENSE:
            raise ValueError(f"{'.'.join(names)}: only dense weights are split")
        before = [None] * (x.ndim - 1)
        if not _BY_COLUMNS.isdisjoint(names):
            return PartitionSpec(*before, axis)
        if not _BY_ROWS.isdisjoint(names) and names[-1] == "kernel":
            return PartitionSpec(*before[1:], axis, None)
        return PartitionSpec()

    return jax.tree.map_with_path(spec_of, params)
