"""Loads a model onto a mesh: each device gets its shard of every matrix, each host reads those of its devices.

The sharding is that of Megatron-LM (arXiv:1909.08053): the first matrices of attention and MLP are split
by rows, at heads, the last ones by columns, so that nothing is communicated between them. Embedding,
norms and head are replicated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpaged.sharding.mesh import TENSOR
from jaxpaged_model.checkpoint.weights import (
    Naming,
    Part,
    PartialSource,
    Placement,
    Progress,
    TensorInfo,
    check_tensors,
    load_params,
    placements,
)
from jaxpaged_model.config import ModelConfig
from jaxpaged_model.llama import Params
from jaxpaged_model.quantized.formats import WEIGHT_FORMATS
from jaxpaged_model.quantized.linear import WeightPlan

_BY_ROWS = ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up")
_BY_COLUMNS = ("attention.out", "mlp.down")


@dataclass(frozen=True)
class _Info:
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


class ShardSource:
    """A file's tensors as one of ``size`` devices needs them: the source of a smaller model.

    A layer that is split inside a block of quantized numbers has the type "F32": it is dequantized.

    Args:
      config: the whole model.
      file: its weights, checked with ``check_tensors``.
      naming: convention of the tensors' names.
      rank: index of the device.
      size: number of devices.
    """

    def __init__(
        self, config: ModelConfig, file: PartialSource, naming: Naming, *, rank: int, size: int
    ) -> None:
        self._file = file
        self._parts: dict[str, Part | None] = {}
        self._zero_biases: set[str] = set()
        """Biases that device 0 adds, zero on the others."""
        self.tensors: dict[str, TensorInfo] = {}
        places = placements(config, naming)
        for name, info in file.tensors.items():
            if (placement := places.get(name)) is None:
                continue
            part = _part(config, placement, rank, size)
            self._parts[name] = part
            if _is_last(placement, "bias") and rank:
                self._zero_biases.add(name)
            shape, kind = info.shape, info.dtype
            if part is not None:
                shape = tuple(len(range(*cut.indices(n))) for cut, n in zip(part, info.shape, strict=True))
                if kind in WEIGHT_FORMATS and shape[-1] % WEIGHT_FORMATS[kind].file_block:
                    kind = "F32"
            share = math.prod(shape) / max(1, math.prod(info.shape))
            self.tensors[name] = _Info(shape, kind, int(info.num_bytes * share))

    @property
    def path(self) -> Path:
        return self._file.path

    def read(self, name: str) -> np.ndarray:
        """The device's values of a tensor."""
        if name in self._zero_biases:
            return np.zeros(self.tensors[name].shape, np.float32)
        return self._file.read(name, self._parts[name])

    def raw(self, name: str) -> np.ndarray:
        """The device's bytes of a tensor, u8 ``[rows, bytes of a row]``."""
        if self.tensors[name].dtype != self._file.tensors[name].dtype:
            return np.ascontiguousarray(self.read(name), np.float32).view(np.uint8)
        return self._file.raw(name, self._parts[name])

    def release(self, name: str) -> None:
        """See ``GGUFFile.release``."""
        self._file.release(name)


def _is_last(placement: Placement, weight: str) -> bool:
    path, _, last = placement.path.rpartition(".")
    return path.endswith(_BY_COLUMNS) and last == weight


def _part(config: ModelConfig, placement: Placement, rank: int, size: int) -> Part | None:
    """The part of a tensor that one device has; None = all of it."""
    path = placement.path.rpartition(".")[0]
    whole = slice(None)

    def share(total: int, index: int, parts: int) -> slice:
        each = total // parts
        return slice(index * each, (index + 1) * each)

    if path.endswith(_BY_ROWS):
        index, parts = rank, size
        if path.endswith(("attention.k", "attention.v")) and config.num_kv_heads < size:
            parts = config.num_kv_heads  # several devices share one head
            index = rank * parts // size
        return (share(placement.shape[0], index, parts), *[whole] * (len(placement.shape) - 1))
    if _is_last(placement, "kernel"):
        return whole, share(placement.shape[1], rank, size)
    return None


def load_shards(
    config: ModelConfig,
    file: PartialSource,
    naming: Naming,
    mesh: Mesh,
    *,
    plan: Callable[[ModelConfig, Any], WeightPlan],
    dtype: Any,
    progress: Progress | None = None,
) -> tuple[Params, WeightPlan]:
    """Reads the shards of this process's devices, one device after the other.

    Args:
      config: the whole model.
      file: its weights.
      naming: convention of the tensors' names.
      mesh: a mesh of ``jaxpaged.sharding.mesh.make_mesh``.
      plan: function from (config of one device, its source) to the layers that stay as in the file.
      dtype: dtype of the dense params.
      progress: called with (bytes done, total bytes), of the bytes that this process reads.

    Returns:
      ``(params, plan)``; each weight has a leading axis "tensor", with the shard of each device.

    Raises:
      ModelError: as ``load_params``.
      MeshError: the model cannot be split over so many devices.
    """
    size = mesh.shape[TENSOR]
    local = config.shard(size)
    check_tensors(config, file, placements(config, naming))
    here = jax.process_index()
    devices = mesh.devices.reshape(-1, size)  # "tensor" is the last axis
    ranks = {
        rank: found
        for rank in range(size)
        if (found := [d for d in devices[:, rank] if d.process_index == here])
    }
    shards: list[list[jax.Array]] = []
    structure: Any = None
    decided = WeightPlan()
    for i, (rank, places) in enumerate(ranks.items()):
        source = ShardSource(config, file, naming, rank=rank, size=size)
        decided = plan(local, source)
        report = None if progress is None else _share_of(progress, i, len(ranks))
        with jax.default_device(places[0]):
            params = load_params(local, source, naming, dtype=dtype, plan=decided, progress=report)
        leaves, structure = jax.tree.flatten(params)
        for device in places:
            shards.append([jax.device_put(leaf[None], device) for leaf in leaves])
    sharding = NamedSharding(mesh, PartitionSpec(TENSOR))
    stacked = [
        jax.make_array_from_single_device_arrays((size, *parts[0].shape[1:]), sharding, list(parts))
        for parts in zip(*shards, strict=True)
    ]
    return jax.tree.unflatten(structure, stacked), decided


def _share_of(progress: Progress, index: int, count: int) -> Progress:
    return lambda done, total: progress(index * total + done, count * total)
