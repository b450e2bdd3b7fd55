"""Loading a model onto a mesh: each device gets its part of every matrix, and each host reads the parts of its own.

The split is Megatron-LM's (arXiv:1909.08053): the matrices that begin attention and MLP are cut by rows, at heads,
those that end them by columns, so that between them nothing has to be told. Embedding, norms and head are whole
everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpaged.sharding.mesh import TENSOR
from jaxpaged_model.checkpoint.weights import (
    Naming,
    Part,
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


class PartialSource(Protocol):
    """A model file or folder that hands out parts of its tensors."""

    @property
    def path(self) -> Path: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    def read(self, name: str, part: Part | None = None) -> np.ndarray: ...
    def raw(self, name: str, part: Part | None = None) -> np.ndarray: ...
    def forget(self, name: str) -> None: ...


@dataclass(frozen=True)
class _Info:
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


class ShardSource:
    """What one of ``size`` devices needs of a file, as if that were a file of a smaller model.

    Where columns are cut inside a block of quantized numbers, the layer is said to be of "F32", and is dense.

    Args:
      config: the whole model.
      file: its weights, which fit it (``check_tensors``).
      naming: how its tensors are called.
      rank: which of the devices.
      size: how many there are.
    """

    def __init__(
        self, config: ModelConfig, file: PartialSource, naming: Naming, *, rank: int, size: int
    ) -> None:
        self._file = file
        self._parts: dict[str, Part | None] = {}
        self._silent: set[str] = set()
        """Biases that are added by another device."""
        self.tensors: dict[str, TensorInfo] = {}
        places = placements(config, naming)
        for name, info in file.tensors.items():
            if (placement := places.get(name)) is None:
                continue
            part = _part(config, placement, rank, size)
            self._parts[name] = part
            if _is_end(placement, "bias") and rank:
                self._silent.add(name)
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
        """The device's numbers of a tensor."""
        if name in self._silent:
            return np.zeros(self.tensors[name].shape, np.float32)
        return self._file.read(name, self._parts[name])

    def raw(self, name: str) -> np.ndarray:
        """The device's bytes of a quantized tensor, u8 ``[rows, bytes of a row]``."""
        return self._file.raw(name, self._parts[name])

    def forget(self, name: str) -> None:
        """See ``GGUFFile.forget``."""
        self._file.forget(name)


def _is_end(placement: Placement, weight: str) -> bool:
    path, _, last = placement.path.rpartition(".")
    return path.endswith(_BY_COLUMNS) and last == weight


def _part(config: ModelConfig, placement: Placement, rank: int, size: int) -> Part | None:
    """Which part of a tensor one device has; None = all."""
    path = placement.path.rpartition(".")[0]
    whole = slice(None)

    def cut(total: int, index: int, parts: int) -> slice:
        each = total // parts
        return slice(index * each, (index + 1) * each)

    if path.endswith(_BY_ROWS):
        index, parts = rank, size
        if path.endswith(("attention.k", "attention.v")) and config.num_kv_heads < size:
            parts = config.num_kv_heads  # several devices have the same head
            index = rank * parts // size
        return (cut(placement.shape[0], index, parts), *[whole] * (len(placement.shape) - 1))
    if _is_end(placement, "kernel"):
        return whole, cut(placement.shape[1], rank, size)
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
    """Reads the parts of this process's devices, one device's after the other, and puts them there.

    Args:
      config: the whole model.
      file: its weights.
      naming: how its tensors are called.
      mesh: of ``jaxpaged.sharding.mesh.make_mesh``.
      plan: which layers stay quantized, given the config of one device and its source.
      dtype: of the dense params.
      progress: called with (bytes done, bytes in all) of what this process reads.

    Returns:
      ``(params, plan)``; each weight has an axis in front, "tensor": a part for each device along it.

    Raises:
      ModelError: as ``load_params``.
      MeshError: the model cannot be dealt to so many devices.
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
    pieces: list[list[jax.Array]] = []
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
            pieces.append([jax.device_put(leaf[None], device) for leaf in leaves])
    sharding = NamedSharding(mesh, PartitionSpec(TENSOR))
    stacked = [
        jax.make_array_from_single_device_arrays((size, *parts[0].shape[1:]), sharding, list(parts))
        for parts in zip(*pieces, strict=True)
    ]
    return jax.tree.unflatten(structure, stacked), decided


def _share_of(progress: Progress, index: int, count: int) -> Progress:
    return lambda done, total: progress(index * total + done, count * total)
