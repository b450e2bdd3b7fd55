"""MeshEngine: one engine per data shard of a mesh, behind the interface of a single engine.

A request goes to the shard with the fewest tokens to compute before its first token, cached ones
not counted, and stays there. Slot i is sequence ``i % S`` of shard ``i // S``.

Every step is one program on all devices. If some shards decode and others prefill, all run the
prefill program, and shards with less to do wait. Tables and queues are on the host: with several
processes each process has all of them, and makes the same decisions.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np

from jaxpaged.engine.compilations import num_compilations
from jaxpaged.engine.device import Progress
from jaxpaged.engine.engine import Engine, EngineConfig
from jaxpaged.engine.mesh_device import MeshDevice
from jaxpaged.engine.pool import PagedPool
from jaxpaged.engine.request import EngineRequest, EngineStats, QueueFullError, RefusedError, SampleOutput
from jaxpaged.engine.slot_files import SlotTransfer
from jaxpaged.engine.stats import PoolState, SlotState
from jaxpaged.generation.loop import Model
from jaxpaged.sharding.mesh import TENSOR
from jaxpaged.sharding.specs import ShardedCache

T = TypeVar("T")
_NOT_SUMMED = ("page_size", "waste", "bytes_per_page", "compiled", "compiled_late")
"""Fields of ``EngineStats`` that are not summed over shards."""


class MeshEngine:
    """Serves requests on a mesh; see the module. The methods are those of ``Engine``.

    Args:
      model, params: loaded for a mesh (``jaxpaged_model.checkpoint.loading.load_model(mesh=...)``).
      cache: an empty cache, owned by the engine from now on.
      config: sizes and options of each shard; ``max_waiting`` is for all shards together.

    Raises:
      ValueError: see ``Engine``.
    """

    def __init__(self, model: Model, params: Any, cache: ShardedCache, config: EngineConfig) -> None:
        self.config = config
        self._tensor = cache.mesh.shape[TENSOR]
        self._device = MeshDevice(model, params, cache)
        self._engines = [
            Engine(model, params, cache.local, config, device=self._device.shard(d))
            for d in range(cache.num_shards)
        ]
        self._shard_of: dict[str, int] = {}
        """Shard of each request id."""
        self._compiled_late = 0

    @property
    def n_ctx(self) -> int:
        return self.config.n_ctx

    @property
    def max_seqs(self) -> int:
        return self._each * len(self._engines)

    @property
    def _each(self) -> int:
        """Slots per shard."""
        return self._engines[0].max_seqs

    @property
    def page_size(self) -> int:
        return self._engines[0].page_size

    @property
    def has_work(self) -> bool:
        return any(engine.has_work for engine in self._engines)

    def compile(self, progress: Progress | None = None) -> None:
        """See ``Engine.compile``."""
        self._device.compile(progress)

    # Requests

    def check(self, request: EngineRequest) -> None:
        """See ``Engine.check``."""
        shard, local = self._routed(request)
        if request.request_id in self._shard_of and self._serves(request.request_id):
            raise RefusedError(f"a request {request.request_id!r} is being served already")
        self._engines[shard].check(local)

    def add_request(self, request: EngineRequest) -> None:
        """See ``Engine.add_request``."""
        self.check(request)
        if sum(engine.num_waiting for engine in self._engines) >= self.config.max_waiting:
            raise QueueFullError(self.config.max_waiting)
        shard, local = self._routed(request)
        self._engines[shard].add_request(local)
        self._shard_of = {name: d for name, d in self._shard_of.items() if self._serves(name)}
        self._shard_of[request.request_id] = shard

    def _serves(self, request_id: str) -> bool:
        return self._engines[self._shard_of[request_id]].serves(request_id)

    def _routed(self, request: EngineRequest) -> tuple[int, EngineRequest]:
        """Shard of a request, and the request with its slot numbered within the shard."""
        if request.slot is not None:
            if not 0 <= request.slot < self.max_seqs:
                raise RefusedError(f"slot {request.slot}: there are slots 0 to {self.max_seqs - 1}")
            shard, slot = divmod(request.slot, self._each)
            return shard, replace(request, slot=slot)
        load = [engine.load for engine in self._engines]

        def cost(shard: int) -> tuple[int, int]:
            return load[shard] - self._num_cached(shard, request), shard

        return min(range(len(self._engines)), key=cost), request

    def _num_cached(self, shard: int, request: EngineRequest) -> int:
        """Tokens of the prompt in a shard's prefix cache."""
        pool = self._engines[shard].pool
        if not isinstance(pool, PagedPool):
            return 0
        limit = max(0, len(request.prompt) - 1)
        return pool.index.match(pool.root(request), list(request.prompt), limit, tails=False).num_tokens

    def abort(self, request_id: str, index: int | None = None) -> None:
        """See ``Engine.abort``."""
        shard = self._shard_of.get(request_id)
        if shard is not None:
            self._engines[shard].abort(request_id, index)

    # Steps

    def step(self) -> list[SampleOutput]:
        """See ``Engine.step``."""
        before = num_compilations()
        outputs = self._step()
        self._compiled_late += num_compilations() - before
        return outputs

    def _step(self) -> list[SampleOutput]:
        outputs: list[SampleOutput] = []
        plans = []
        for d, engine in enumerate(self._engines):
            done, plan = engine.begin_step()
            outputs += self._numbered(d, done)
            plans.append(plan)
        busy = [plan for plan in plans if plan.work]
        if not busy:
            return outputs
        rows, device = max(sum(plan.work.values()) for plan in busy), self._engines[0].device
        decodes = all(plan.decodes for plan in busy)
        shape = device.decode_shape(rows) if decodes else device.prompt_shape(rows)
        begin = time.monotonic()
        inputs = [engine.step_input(plan, shape) for engine, plan in zip(self._engines, plans, strict=True)]
        outs = self._device.step(shape, inputs)
        for d, (engine, plan, out) in enumerate(zip(self._engines, plans, outs, strict=True)):
            if plan.work:
                done = engine.end_step(plan, out, begin, observed=plan.decodes == decodes)
                outputs += self._numbered(d, done)
        return outputs

    def _numbered(self, shard: int, outputs: list[SampleOutput]) -> list[SampleOutput]:
        return [replace(output, slot=shard * self._each + output.slot) for output in outputs]

    # Statistics

    def stats(self) -> EngineStats:
        """Statistics of all shards together; bytes are summed over devices."""
        each = [engine.stats() for engine in self._engines]
        first = each[0]
        total: dict[str, Any] = {
            one.name: sum(getattr(stats, one.name) for stats in each)
            for one in fields(EngineStats)
            if one.name not in _NOT_SUMMED
        }
        slots = total["pages_used"] * first.page_size
        return replace(
            first,
            **total,
            waste=1 - total["tokens_live"] / slots if slots else 0.0,
            bytes_per_page=first.bytes_per_page * self._tensor,
            compiled_late=self._compiled_late,
        )

    def pool_state(self) -> PoolState:
        """The state of each page; pools are concatenated."""
        pools = [engine.pool_state() for engine in self._engines]
        first = [shard * self._each for shard in range(len(pools))]
        return PoolState(
            sum(pool.num_pages for pool in pools),
            pools[0].page_size,
            np.concatenate([pool.state for pool in pools]),
            np.concatenate(
                [np.where(x.owner < 0, -1, x.owner + i) for i, x in zip(first, pools, strict=True)]
            ),
            [{**s, "slot": s["slot"] + i} for i, x in zip(first, pools, strict=True) for s in x.sequences],
        )

    def slot_states(self) -> list[SlotState]:
        """The state of each slot of all shards, in order."""
        states = [state for engine in self._engines for state in engine.slot_states()]
        return [replace(state, id=i) for i, state in enumerate(states)]

    def check_state(self) -> None:
        """See ``Engine.check_state``."""
        for engine in self._engines:
            engine.check_state()

    def drop_prefix_cache(self) -> int:
        """See ``Engine.drop_prefix_cache``."""
        return sum(engine.drop_prefix_cache() for engine in self._engines)

    # Slot files

    def _of_slot(self, slot: int, function: Callable[[Engine, int], T]) -> T:
        if not 0 <= slot < self.max_seqs:
            raise RefusedError(f"slot {slot}: there are slots 0 to {self.max_seqs - 1}")
        shard, local = divmod(slot, self._each)
        return function(self._engines[shard], local)

    def save_slot(self, slot: int, path: str | os.PathLike[str]) -> SlotTransfer:
        """See ``Engine.save_slot``."""
        return self._of_slot(slot, lambda engine, local: engine.save_slot(local, path))

    def restore_slot(self, slot: int, path: str | os.PathLike[str]) -> SlotTransfer:
        """See ``Engine.restore_slot``."""
        return self._of_slot(slot, lambda engine, local: engine.restore_slot(local, path))

    def erase_slot(self, slot: int) -> int:
        """See ``Engine.erase_slot``."""
        return self._of_slot(slot, lambda engine, local: engine.erase_slot(local))
