"""MeshEngine: an engine for each data shard of a mesh, which step together, behind the face of one engine.

A request goes to the shard that has most of its prompt in the prefix cache, unless that has much more to do than
another, and stays there. Slots count through: slot i is sequence ``i % S`` of shard ``i // S``.

Every step is one program on all devices. Where some shards decode and others read prompts, all run the program that
reads; what a shard has not got to do costs it the time of the step. Tables and queues are the host's: in a run of
several processes each has all of them, and decides alike.
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
_REPLICATED = ("page_size", "waste", "bytes_per_page", "compiled", "compiled_late")
"""Of ``EngineStats``, what is not summed over shards."""


class MeshEngine:
    """See the module; its methods are ``Engine``'s.

    Args:
      model, params: of a mesh (``jaxpaged_model.checkpoint.loading.load_model(mesh=...)``).
      cache: empty; the engine has it from now on.
      config: of each shard; ``max_waiting`` is for all together.

    Raises:
      ValueError: as ``Engine``.
    """

    def __init__(self, model: Model, params: Any, cache: ShardedCache, config: EngineConfig) -> None:
        self.config = config
        self._tensor = cache.mesh.shape[TENSOR]
        self._device = MeshDevice(model, params, cache)
        self._engines = [
            Engine(model, params, cache.local, config, device=self._device.shard(d))
            for d in range(cache.num_shards)
        ]
        self._homes: dict[str, int] = {}
        """The shard of each request."""
        self._compiled_late = 0

    @property
    def n_ctx(self) -> int:
        return self.config.n_ctx

    @property
    def max_seqs(self) -> int:
        return self._each * len(self._engines)

    @property
    def _each(self) -> int:
        """Slots of a shard."""
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
        home, local = self._routed(request)
        if request.request_id in self._homes and self._serves(request.request_id):
            raise RefusedError(f"a request {request.request_id!r} is being served already")
        self._engines[home].check(local)

    def add_request(self, request: EngineRequest) -> None:
        """See ``Engine.add_request``."""
        self.check(request)
        if sum(engine.num_waiting for engine in self._engines) >= self.config.max_waiting:
            raise QueueFullError(self.config.max_waiting)
        home, local = self._routed(request)
        self._engines[home].add_request(local)
        self._homes = {name: d for name, d in self._homes.items() if self._serves(name)}
        self._homes[request.request_id] = home

    def _serves(self, request_id: str) -> bool:
        return self._engines[self._homes[request_id]].serves(request_id)

    def _routed(self, request: EngineRequest) -> tuple[int, EngineRequest]:
        """The shard for a request, and the request as that shard knows it."""
        if request.slot is not None:
            if not 0 <= request.slot < self.max_seqs:
                raise RefusedError(f"slot {request.slot}: there are slots 0 to {self.max_seqs - 1}")
            home, slot = divmod(request.slot, self._each)
            return home, replace(request, slot=slot)
        load = [engine.load for engine in self._engines]

        def cost(shard: int) -> tuple[int, int]:
            # A token that is found need not be computed; one that waits before it must be.
            return load[shard] - self._found(shard, request), shard

        return min(range(len(self._engines)), key=cost), request

    def _found(self, shard: int, request: EngineRequest) -> int:
        """Tokens of the prompt that a shard's prefix cache has."""
        pool = self._engines[shard].pool
        if not isinstance(pool, PagedPool):
            return 0
        limit = max(0, len(request.prompt) - 1)
        return pool.index.match(pool.root(request), list(request.prompt), limit, tails=False).num_tokens

    def abort(self, request_id: str, index: int | None = None) -> None:
        """See ``Engine.abort``."""
        home = self._homes.get(request_id)
        if home is not None:
            self._engines[home].abort(request_id, index)

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

    # What it shows

    def stats(self) -> EngineStats:
        """Of all shards together; bytes are those of all devices."""
        each = [engine.stats() for engine in self._engines]
        first = each[0]
        total: dict[str, Any] = {
            one.name: sum(getattr(stats, one.name) for stats in each)
            for one in fields(EngineStats)
            if one.name not in _REPLICATED
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
        """The pools, one behind the other."""
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
        """The slots of all shards, in order."""
        states = [state for engine in self._engines for state in engine.slot_states()]
        return [replace(state, id=i) for i, state in enumerate(states)]

    def check_state(self) -> None:
        """See ``Engine.check_state``."""
        for engine in self._engines:
            engine.check_state()

    def drop_prefix_cache(self) -> int:
        """See ``Engine.drop_prefix_cache``."""
        return sum(engine.drop_prefix_cache() for engine in self._engines)

    # Slots and files

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
