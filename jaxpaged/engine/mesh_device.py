"""MeshDevice: programs over all devices of a mesh, and a ``Device`` for each data shard."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxpaged.compilation import background
from jaxpaged.compilation.options import compiler_options
from jaxpaged.engine.device import Device, HostTable, Program, Progress, name_of
from jaxpaged.engine.programs import SlotParams, StepInput, StepOutput, StepShape, TableState
from jaxpaged.generation.loop import Model
from jaxpaged.sharding.multihost import fetch
from jaxpaged.sharding.specs import (
    BATCH,
    PER_DEVICE,
    SPECS,
    ShardedCache,
    cache_specs,
    over_mesh,
    put,
    unstacked,
)
from jaxpaged.storage import mesh_snapshots
from jaxpaged.storage.snapshot_file import Snapshot

_STACK: dict[str, Callable[..., np.ndarray]] = {BATCH: np.stack, PER_DEVICE: np.concatenate}
"""Function that combines the arguments of all shards, by sharding kind."""


class MeshDevice:
    """The cache on all devices, and programs that all data shards run together.

    Args:
      model, params: loaded for the mesh.
      cache: an empty cache.
    """

    def __init__(self, model: Model, params: Any, cache: ShardedCache) -> None:
        self.cache = cache
        self.shards: list[ShardDevice] = []
        self._model, self._params = model, params
        self._programs: dict[str, tuple[Program, Any]] = {}
        self._slots: SlotParams | None = None

    def shard(self, index: int) -> Any:
        """Constructor of the ``Device`` of data shard ``index``; to be called in order."""
        assert index == len(self.shards)
        return functools.partial(ShardDevice, self, index)

    def compile(self, progress: Progress | None = None) -> None:
        """Compiles every program once; see ``Device.compile``."""
        start = time.monotonic()
        todo = list(self.shards[0].to_compile())
        for i, program in enumerate(todo):
            if progress is not None:
                progress(i, len(todo), program.name)
            in_kinds, out_kinds = program.kinds
            function = over_mesh(functools.partial(program.function, *program.static), in_kinds, out_kinds)
            params = (self._params,) if program.reads_params else ()
            arguments = (*params, self.cache, *self._stacked(program, {}))
            lowered = jax.jit(function, donate_argnums=len(params)).lower(*arguments)
            compiled = lowered.compile(compiler_options=compiler_options(jax.default_backend()))
            self._programs[program.name] = program, compiled
        background.wait()
        if progress is not None:
            progress(len(todo), len(todo), "")
        for shard in self.shards:
            shard.compiled, shard.compile_seconds = len(todo), time.monotonic() - start

    def _stacked(self, program: Program, given: Mapping[int, tuple[Any, ...]]) -> tuple[Any, ...]:
        """Arguments of all shards: those given, and for other shards ones that change nothing."""
        rows = [given.get(d, program.arguments) for d in range(len(self.shards))]
        return tuple(
            put(self.cache.mesh, jax.tree.map(lambda *xs, kind=kind: _STACK[kind](xs), *column), SPECS[kind])
            for column, kind in zip(zip(*rows, strict=True), program.in_kinds, strict=True)
        )

    def run(self, name: str, shard: int, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Runs a program for one shard; returns that shard's results after the cache."""
        program, compiled = self._programs[name]
        out = compiled(self.cache, *self._stacked(program, {shard: arguments}))
        self.cache, *rest = out if isinstance(out, tuple) else (out,)
        return tuple(self._own(one, shard, kind) for one, kind in zip(rest, program.out_kinds, strict=True))

    def _own(self, value: Any, shard: int, kind: str) -> Any:
        """A shard's part of a result, on the host."""
        count = len(self.shards)

        def own(x: np.ndarray) -> np.ndarray:
            return np.split(x, count)[shard] if kind == PER_DEVICE else x[shard]

        return jax.tree.map(own, fetch(value))

    def step(self, shape: StepShape, inputs: Sequence[StepInput]) -> list[StepOutput]:
        """Runs a step of all shards."""
        _, compiled = self._programs[name_of(shape)]
        if self._slots is None or any(shard.slots.changed for shard in self.shards):
            params = [shard.slots.params for shard in self.shards]
            self._slots = put(self.cache.mesh, jax.tree.map(lambda *xs: np.stack(xs), *params))
            for shard in self.shards:
                shard.slots.changed = False
        given = put(self.cache.mesh, jax.tree.map(lambda *xs: np.stack(xs), *inputs))
        self.cache, out = compiled(self._params, self.cache, self._slots, given)
        outs = []
        host = jax.tree.map(np.asarray, out)  # the same on every device
        for d, shard in enumerate(self.shards):
            mine = jax.tree.map(lambda x, d=d: x[d], host)
            shard.state = HostTable(mine.table)
            outs.append(mine)
        return outs


class ShardDevice(Device):
    """The ``Device`` of one data shard."""

    def __init__(self, whole: MeshDevice, index: int, *arguments: Any, **options: Any) -> None:
        self._whole, self._index = whole, index
        whole.shards.append(self)
        self._local = whole.cache.local
        super().__init__(*arguments, **options)

    @property
    def cache(self) -> Any:
        return self._local

    @property
    def swaps(self) -> bool:
        return super().swaps and jax.process_count() == 1

    def _to_device(self, x: np.ndarray) -> Any:
        return x

    def _no_data(self, pool: Any) -> np.ndarray:
        one, devices = super()._no_data(pool), self._whole.cache.mesh.size // self._whole.cache.num_shards
        return np.zeros((devices * one.shape[0], *one.shape[1:]), one.dtype)

    def _fetch(self) -> HostTable:
        s = self.cache.max_seqs
        p, n = (self.cache.max_pages_per_seq, self.cache.num_pages) if self.paged else (0, 0)
        zeros: Any = np.zeros((s, p), np.int32)
        empty: Any = (np.int32(n), np.zeros(s, np.int32), np.full_like(zeros, n), zeros)
        return HostTable(TableState(*empty))

    def _run(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        return self._whole.run(name, self._index, arguments)

    def step(self, shape: StepShape, given: StepInput) -> StepOutput:
        raise NotImplementedError("the shards of a mesh step together")

    def metadata(self) -> Any:
        parts = self._whole.cache.parts
        specs = cache_specs(parts)
        tables = {}
        for name in ("allocator", "table", "staging"):
            if getattr(parts, name) is not None:
                mine = jax.tree.map(lambda x: x[self._index : self._index + 1], fetch(getattr(parts, name)))
                tables[name] = unstacked(mine, getattr(specs, name))
        return replace(self._local, **tables)

    def snapshot(
        self, path: str | os.PathLike[str], slot: int, token_ids: Sequence[int], fingerprint: str
    ) -> None:
        mesh_snapshots.snapshot(
            self._whole.cache, path, seq=self._global_slot(slot), token_ids=token_ids, fingerprint=fingerprint
        )

    def restore(self, saved: Snapshot, slot: int) -> None:
        self._whole.cache = mesh_snapshots.restore(self._whole.cache, saved, seq=self._global_slot(slot))
        metadata = self.metadata()
        state: Any = (
            metadata.allocator.num_free,
            np.zeros(self.cache.max_seqs, np.int32),
            metadata.table.pages,
            metadata.table.num_tokens,
        )
        self.state = HostTable(TableState(*state))

    def _global_slot(self, slot: int) -> int:
        return slot * len(self._whole.shards) + self._index
