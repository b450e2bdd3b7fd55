"""Engine: continuous batching of requests on one cache, step by step."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

from jaxpaged.cache.contiguous import ContiguousKVCache
from jaxpaged.cache.groups import GroupedKVCache
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.engine.compilations import num_compilations
from jaxpaged.engine.config import EngineConfig
from jaxpaged.engine.device import Device, Progress
from jaxpaged.engine.request import (
    ContextError,
    EngineRequest,
    EngineStats,
    PoolError,
    QueueFullError,
    RefusedError,
    SampleOutput,
)
from jaxpaged.engine.scheduler import Plan
from jaxpaged.engine.shard import EngineShard, StepCounts
from jaxpaged.engine.slot_files import SlotTransfer
from jaxpaged.engine.stats import Monitor, PoolState, SlotState, page_size_of
from jaxpaged.generation.loop import Model
from jaxpaged.sharding.specs import ShardedCache

_MOST_RECENT = 4096
"""Tokens that penalties can cover, at most."""


class Engine:
    """Serves requests by continuous batching on one cache, step by step.

        engine = Engine(model, params, cache, EngineConfig(n_ctx=2048, vocab_size=49152))
        engine.compile()
        engine.add_request(EngineRequest("a", prompt=(1, 2, 3), max_new_tokens=16))
        while engine.has_work:
            for output in engine.step():
                ...

    It must be called from one thread. ``Scheduler`` plans a step on the host and ``Device`` runs it as
    one program. ``compile`` compiles everything a step needs; nothing is compiled afterwards.

    On a mesh each data shard has a scheduler and a pool of its own (``EngineShard``); without one there
    is one shard. A request goes to the shard with the fewest tokens to compute before its first token,
    cached ones not counted, and stays there. Slot i is sequence ``i % S`` of shard ``i // S``. If some
    shards decode and others prefill, all run the prefill program, and shards with less to do wait.
    Queues and the host's copies of tables are of all shards: with several processes each process has
    all of them, and makes the same decisions.

    Args:
      model: a ``generation.Model``.
      params: its weights; on a mesh, model and params are loaded for it
        (``jaxpaged_model.checkpoint.loading.load_model(mesh=...)``).
      cache: an empty cache, paged, contiguous, or a ``ShardedCache`` of one of them, owned by the
        engine from now on; up to ``max_seqs`` sequences run at once.
      config: sizes and options.

    Raises:
      ValueError: the cache cannot hold the context, or a context shift is asked of a contiguous
        cache.
    """

    def __init__(
        self,
        model: Model,
        params: Any,
        cache: PagedKVCache | GroupedKVCache | ContiguousKVCache | ShardedCache,
        config: EngineConfig,
    ) -> None:
        slots = cache.local.max_seqs if isinstance(cache, ShardedCache) else cache.max_seqs
        rows = max(config.max_batch_tokens, slots)
        sizes = [size for size in _sizes(rows, 2) if size >= slots][-4:]
        # Where padding rows cost as much as others, a program for two sequences is not worth compiling.
        decode_sizes = [size for size in _sizes(slots, 2) if size != 2 or slots == 2]
        self.config = config
        self.device = Device(
            model,
            params,
            cache,
            decode_rows=decode_sizes[-1:] if config.skips_padding else decode_sizes,
            prompt_rows=sizes[-1:] if config.skips_padding else sizes,
            decode_steps=config.decode_steps,
            num_recent=min(1 << (config.n_ctx - 1).bit_length(), _MOST_RECENT),  # few sizes, few programs
            vocab_size=config.vocab_size,
        )
        self._counts = StepCounts()
        self.shards = [
            EngineShard(self.device, index, config, sizes, self._counts)
            for index in range(self.device.num_shards)
        ]
        self._monitor = Monitor(self.device, self.shards)

    # Sizes and state

    @property
    def n_ctx(self) -> int:
        return self.config.n_ctx

    @property
    def max_seqs(self) -> int:
        return self._each * len(self.shards)

    @property
    def _each(self) -> int:
        """Slots of a shard."""
        return len(self.shards[0].last)

    @property
    def page_size(self) -> int:
        """Tokens of a page; of a sequence in a contiguous cache."""
        return page_size_of(self.device.local)

    @property
    def has_work(self) -> bool:
        """True if ``step`` has anything to do."""
        return any(shard.has_work for shard in self.shards)

    def compile(self, progress: Progress | None = None) -> None:
        """Compiles all programs; calls ``progress`` before each."""
        self.device.compile(progress)

    # Requests

    def check(self, request: EngineRequest) -> None:
        """Refuses a request that can never be served.

        Raises:
          RefusedError: a token outside the vocabulary, an id in use, ``n`` above the sequences
            of a data shard, an unknown slot.
          ContextError: the prompt fills the context.
          PoolError: the request does not fit the whole pool.
        """
        vocab_size = self.config.vocab_size
        for what, tokens in (("prompt", request.prompt), ("logit_bias", request.logit_bias)):
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise RefusedError(
                        f"{what}: token {token} is not one of the model's, 0 to {vocab_size - 1}"
                    )
        if any(shard.serves(request.request_id) for shard in self.shards):
            raise RefusedError(f"a request {request.request_id!r} is being served already")
        if request.n > self._each:
            raise RefusedError(f"n = {request.n}: {self._each} sequences run at once")
        if request.slot is not None:
            self._of_slot(request.slot)
        if len(request.prompt) >= self.n_ctx:
            raise ContextError(len(request.prompt), self.n_ctx)
        longest = min(len(request.prompt) + self.config.limit_of(request), self.n_ctx)
        if self.device.parts:
            first = self.device.parts[0]
            needed = -(-longest // first.page_size) + self.config.spare_pages
            if needed > first.num_pages:
                raise PoolError(needed, first.num_pages)

    def add_request(self, request: EngineRequest) -> None:
        """Queues a request.

        Raises:
          RefusedError: see ``check``; nothing was changed.
          QueueFullError: ``max_waiting`` requests wait already.
        """
        self.check(request)
        if sum(shard.num_waiting for shard in self.shards) >= self.config.max_waiting:
            raise QueueFullError(self.config.max_waiting)
        if request.slot is not None:
            shard, slot = self._of_slot(request.slot)
            shard.add(replace(request, slot=slot))
        elif len(self.shards) == 1:
            self.shards[0].add(request)
        else:
            min(self.shards, key=lambda shard: shard.load - shard.num_cached(request)).add(request)

    def _of_slot(self, slot: int) -> tuple[EngineShard, int]:
        """Shard of a slot, and its number there.

        Raises:
          RefusedError: there is no such slot.
        """
        if not 0 <= slot < self.max_seqs:
            raise RefusedError(f"slot {slot}: there are slots 0 to {self.max_seqs - 1}")
        index, local = divmod(slot, self._each)
        return self.shards[index], local

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one of its samples, without further output. An unknown request is
        ignored.

        The next ``step`` begins by releasing its pages.
        """
        for shard in self.shards:
            shard.abort(request_id, index)

    # Steps

    def step(self) -> list[SampleOutput]:
        """Admits waiting samples, computes tokens of the running ones, and returns what changed."""
        before = num_compilations()
        outputs = self._step()
        self._counts.compiled_late += num_compilations() - before
        return outputs

    def _step(self) -> list[SampleOutput]:
        outputs: list[SampleOutput] = []
        plans: list[Plan] = []
        for shard in self.shards:
            done, plan = shard.begin_step()
            outputs += done
            plans.append(plan)
        busy = [plan for plan in plans if plan.work]
        if not busy:
            return outputs
        decode = all(plan.decodes for plan in busy)
        shape = self.device.shape(max(sum(plan.work.values()) for plan in busy), decode=decode)
        begin = time.monotonic()
        given = [
            shard.step_input(plan, self.device.no_work(shape))
            for shard, plan in zip(self.shards, plans, strict=True)
        ]
        outs = self.device.step(shape, given, [plan.masks for plan in plans])
        for shard, plan, out in zip(self.shards, plans, outs, strict=True):
            if plan.work:
                outputs += shard.end_step(plan, out, begin, decoded=decode)
        return outputs

    # Statistics

    def stats(self) -> EngineStats:
        """Gauges and counters as they are now, of all shards together; bytes are summed over
        devices."""
        return self._monitor.stats(self._counts)

    def pool_state(self) -> PoolState:
        """The state of each page; in a contiguous cache, of each sequence."""
        return self._monitor.pool_state()

    def slot_states(self) -> list[SlotState]:
        """The state of each slot, in order."""
        return self._monitor.slot_states(self.n_ctx)

    def check_state(self) -> None:
        """Checks the invariants of cache and prefix index (slow: for tests and debugging).

        Raises:
          InvariantError: the first violated invariant.
        """
        for shard in self.shards:
            shard.check_state()

    def drop_prefix_cache(self) -> int:
        """Releases every unused page of the prefix cache; returns their number."""
        return sum(shard.drop_prefix_cache() for shard in self.shards)

    # Slot files

    def save_slot(self, slot: int, path: str | os.PathLike[str]) -> SlotTransfer:
        """Writes the cached part of a slot's last text to a file, between two steps.

        Raises:
          RefusedError: there is no such slot, it is busy (``SlotBusyError``), or nothing of its
            text is cached.
          OSError: the file cannot be written.
        """
        shard, local = self._of_slot(slot)
        return shard.save_slot(local, path)

    def restore_slot(self, slot: int, path: str | os.PathLike[str]) -> SlotTransfer:
        """Loads a file's text into the prefix cache, and makes it the slot's last text.

        Raises:
          RefusedError: there is no such slot, or it is busy (``SlotBusyError``).
          SnapshotError: the file is damaged or of another model; nothing was changed.
          OutOfPages: running requests leave too few pages.
          OSError: the file cannot be read.
        """
        shard, local = self._of_slot(slot)
        return shard.restore_slot(local, path)

    def erase_slot(self, slot: int) -> int:
        """Releases cached pages of a slot's last text that no other text shares; returns their
        tokens' number.

        Raises:
          RefusedError: there is no such slot, or it is busy (``SlotBusyError``).
        """
        shard, local = self._of_slot(slot)
        return shard.erase_slot(local)


def _sizes(largest: int, factor: int) -> list[int]:
    """Program sizes: ``largest``, and each smaller by ``factor`` than the next, down to 1."""
    sizes = [largest]
    while sizes[0] > 1:
        sizes.insert(0, -(-sizes[0] // factor))
    return sizes
