"""Device meshes, and the distribution of heads and of a batch over them.

Every device runs the program of one device on smaller values. Along the mesh axis "data" each shard
has sequences, a block table and a pool of its own; along "tensor" devices have the same tables, and
each its own KV heads and its own part of every matrix; along "context" the pages of one sequence
lie on several devices.

Source of the ideas: Megatron-LM (arXiv:1909.08053) for the split of a layer with two sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

DATA, CONTEXT, TENSOR = "data", "context", "tensor"
AXES = (DATA, CONTEXT, TENSOR)
"""Axes of every mesh made here; neighbours along "tensor", which communicate most, are adjacent."""


class MeshError(ValueError):
    """Devices or heads that a mesh cannot divide; one line that names both and the allowed
    sizes."""


def parse_mesh(text: str) -> dict[str, Any]:
    """Parses "data=2,tensor=4" to sizes of axes.

    Raises:
      MeshError: another form.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES or not size.isdecimal() or int(size) < 1 or name in sizes:
            raise MeshError(
                f"mesh {text}: {part.strip()!r} is not an axis with its size; write data=2,tensor=4, with the axes "
                f"{', '.join(AXES)}, each at most once"
            )
        sizes[name] = int(size)
    return sizes


def make_mesh(
    *, data: int = 1, tensor: int = 1, context: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of ``data * context * tensor`` devices with all three axes, those of size 1 too.

    Args:
      data, tensor, context: sizes of the axes.
      devices: default: all, or the first of them if a single process has more than are needed.

    Raises:
      MeshError: too few devices, or too many and some belong to another process.
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
    """Checks that heads can be split over the devices along "tensor".

    Query heads must be split evenly, and KV heads either split evenly or replicated evenly.

    Raises:
      MeshError: they cannot; lists the allowed sizes.
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
    """KV heads of one device; with fewer heads than devices, several devices have the same head."""
    return max(1, num_kv_heads // tensor)


def num_shards(mesh: Mesh | None) -> int:
    """Data shards of a mesh; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape[DATA]


@dataclass(frozen=True)
class BatchSharding:
    """Distribution of a batch over data shards: prompt i goes to shard ``i % shards``.

    If there are fewer prompts than shards, every shard has all prompts, and the samples are
    distributed.
    """

    shards: int
    num_samples: int
    """Samples of a prompt, on all shards together."""
    split_samples: bool = False
    """True if samples are distributed, not prompts."""

    @classmethod
    def of(cls, mesh: Mesh | None, num_prompts: int, num_samples: int = 1) -> BatchSharding:
        """Distribution of ``num_prompts`` prompts over the data shards of a mesh; one shard without
        a mesh."""
        shards = num_shards(mesh)
        split = num_prompts < shards and num_samples > 1 and num_samples % shards == 0
        return cls(shards, num_samples, split)

    @property
    def samples_per_shard(self) -> int:
        """Samples of a prompt on one shard."""
        return self.num_samples // self.shards if self.split_samples else self.num_samples

    def prompts_per_shard(self, num_prompts: int) -> Any:
        """i32[shards]: prompts of each shard."""
        if self.split_samples:
            return np.full(self.shards, num_prompts, np.int32)
        return np.asarray([len(range(d, num_prompts, self.shards)) for d in range(self.shards)], np.int32)

    def shard_prompts(self, values: Any) -> Any:
        """``[G * shards, ...]``, or ``[G, ...]`` if samples are distributed, as ``[shards, G,
        ...]``."""
        values = np.asarray(values)
        if self.split_samples:
            return np.broadcast_to(values, (self.shards, *values.shape))
        return np.swapaxes(values.reshape(len(values) // self.shards, self.shards, *values.shape[1:]), 0, 1)

    def shard_rows(self, values: Any) -> Any:
        """``[prompts * num_samples, ...]`` as ``[shards, rows, ...]``."""
        values = np.asarray(values)
        each, rest = len(values) // self.shards, values.shape[1:]
        count = each // self.samples_per_shard
        if self.split_samples:
            split = np.moveaxis(values.reshape(count, self.samples_per_shard, self.shards, *rest), 2, 0)
        else:
            split = np.swapaxes(values.reshape(count, self.shards, self.num_samples, *rest), 0, 1)
        return split.reshape(self.shards, each, *rest)

    def gather_rows(self, values: Any) -> Any:
        """Inverse of ``shard_rows``."""
        values = np.asarray(values)
        each, rest = values.shape[1], values.shape[2:]
        split = values.reshape(self.shards, each // self.samples_per_shard, self.samples_per_shard, *rest)
        return np.moveaxis(split, 0, 2 if self.split_samples else 1).reshape(self.shards * each, *rest)

    def replicate(self, value: Any) -> Any:
        """``value`` for every shard, as ``[shards, ...]``."""
        return np.broadcast_to(np.asarray(value), (self.shards, *np.shape(value)))

    def gather_result(self, result: Any, **totals: Callable[[np.ndarray], Any]) -> Any:
        """A dataclass of ``[shards, rows, ...]`` as one of ``[all rows, ...]``, on the host.

        Args:
          result: the dataclass.
          totals: reduction of each field that is ``[shards]``, by name.
        """
        values = {}
        for one in fields(result):
            value = np.asarray(getattr(result, one.name))
            total = totals.get(one.name)
            values[one.name] = self.gather_rows(value) if total is None else total(value)
        return replace(result, **values)
