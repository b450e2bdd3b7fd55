"""Engine: continuous batching of requests on one cache, step by step.

    engine = Engine(model, params, cache, EngineConfig(n_ctx=2048, vocab_size=49152))
    engine.compile()
    engine.add_request(EngineRequest("a", prompt=(1, 2, 3), max_new_tokens=16))
    while engine.has_work:
        for output in engine.step():
            ...

It must be called from one thread. ``Scheduler`` plans a step on the host and ``Device`` runs it as
one program. ``compile`` compiles everything a step needs; nothing is compiled afterwards.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpaged.cache.contiguous import ContiguousKVCache
from jaxpaged.cache.invariants import check_invariants
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.engine import slot_files
from jaxpaged.engine.compilations import num_compilations
from jaxpaged.engine.device import Device, Progress
from jaxpaged.engine.pool import PagedPool, Pool
from jaxpaged.engine.programs import NAN_TOKEN, StepInput, StepOutput, StepShape
from jaxpaged.engine.request import (
    ContextError,
    EngineRequest,
    EngineStats,
    FinishReason,
    PoolError,
    QueueFullError,
    RefusedError,
    RequestTimes,
    SampleOutput,
    SlotBusyError,
    TokenLogprobs,
)
from jaxpaged.engine.sample_state import SampleState
from jaxpaged.engine.scheduler import Plan, Scheduler
from jaxpaged.engine.slot_files import SlotTransfer
from jaxpaged.engine.stats import Monitor, PoolState, SlotState, StepCounts, slot_state
from jaxpaged.generation.loop import Model

_ROUND_TRIP_SECONDS = 0.04
"""Longest time of several decode steps in one program: streamed text must not become jerky."""
_MOST_RECENT = 4096
"""Tokens that penalties can cover, at most."""
_SHIFT_PAGES = 2
"""Pages that a shifted context may take beyond those that its tokens fill."""


@dataclass(frozen=True)
class EngineConfig:
    """Sizes and options of an engine."""

    n_ctx: int
    """Tokens of a sequence, at most."""
    vocab_size: int
    max_batch_tokens: int = 512
    """Token budget of a step."""
    decode_steps: int = 8
    """Decode steps per round trip to the host, at most."""
    max_waiting: int = 256
    """Waiting requests, at most."""
    prefix_cache: bool = True
    context_shift: bool = False
    """True: a full context drops its oldest tokens and continues. False: the text ends there."""
    swap_bytes: int = 2**30
    """Host memory for preempted sequences; 0 = always recompute them."""
    fingerprint: str = ""
    """Identifies the model in slot files."""
    skips_padding: bool = False
    """True if the model's products skip rows of padding: one program then serves steps of all sizes."""
    lockstep: bool = False
    """True: no decision depends on time, so that several processes make the same ones."""

    def __post_init__(self) -> None:
        for name in ("n_ctx", "vocab_size", "max_batch_tokens", "decode_steps", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.swap_bytes < 0:
            raise ValueError(f"swap_bytes must not be negative, got {self.swap_bytes}")


class Engine:
    """Serves requests; see the module.

    Args:
      model: a ``generation.Model``.
      params: its weights.
      cache: an empty cache, paged or contiguous, owned by the engine from now on; up to
        ``max_seqs`` sequences run at once.
      config: sizes and options.
      device: constructor of the ``Device``; engines of a mesh's data shards have their own.

    Raises:
      ValueError: the cache cannot hold the context, or a context shift is asked of a contiguous
        cache.
    """

    def __init__(
        self,
        model: Model,
        params: Any,
        cache: PagedKVCache | ContiguousKVCache,
        config: EngineConfig,
        *,
        device: Callable[..., Device] = Device,
    ) -> None:
        slots = cache.max_seqs
        rows = max(config.max_batch_tokens, slots)
        sizes = [size for size in _sizes(rows, 2) if size >= slots][-4:]
        # Where padding rows cost as much as others, a program for two sequences is not worth compiling.
        decode_sizes = [size for size in _sizes(slots, 2) if size != 2 or slots == 2]
        self.config = config
        self.device = device(
            model,
            params,
            cache,
            decode_rows=decode_sizes[-1:] if config.skips_padding else decode_sizes,
            prompt_rows=sizes[-1:] if config.skips_padding else sizes,
            decode_steps=config.decode_steps,
            num_recent=min(1 << (config.n_ctx - 1).bit_length(), _MOST_RECENT),  # few sizes, few programs
        )
        self.pool: Pool
        if isinstance(cache, PagedKVCache):
            self.pool = PagedPool(
                self.device,
                prefix_cache=config.prefix_cache,
                swap_bytes=0 if config.lockstep else config.swap_bytes,
            )
            room = cache.page_size * min(
                cache.num_pages - _SHIFT_PAGES * config.context_shift, cache.max_pages_per_seq
            )
        else:
            if config.context_shift:
                raise ValueError("a context shift needs a paged cache")
            self.pool, room = Pool(self.device), cache.max_length
        if config.n_ctx > room:
            raise ValueError(f"n_ctx = {config.n_ctx} tokens: the cache has room for {room}")
        self.scheduler = Scheduler(self.pool, num_slots=slots, sizes=sizes, decode_steps=config.decode_steps)
        if config.lockstep:
            self.scheduler.wanted_steps = config.decode_steps
        self._arrivals = itertools.count()
        self._samples: dict[str, list[SampleState]] = {}
        self._ended: list[SampleState] = []
        self._last: list[SampleState | None] = [None] * slots
        self._counts = StepCounts()
        self._monitor = Monitor(self.device, self.pool, self.scheduler)
        self._step_seconds: deque[float] = deque(maxlen=8)

    # Sizes and state

    @property
    def n_ctx(self) -> int:
        return self.config.n_ctx

    @property
    def max_seqs(self) -> int:
        return self.device.cache.max_seqs

    @property
    def page_size(self) -> int:
        """Tokens of a page; of a sequence in a contiguous cache."""
        cache = self.device.cache
        return cache.page_size if isinstance(cache, PagedKVCache) else cache.max_length

    @property
    def has_work(self) -> bool:
        """True if ``step`` has anything to do."""
        return bool(self._samples or self._ended)

    @property
    def load(self) -> int:
        """Tokens to compute before every running and waiting sample has its next one."""
        samples = [*self.scheduler.running, *self.scheduler.waiting]
        return sum(sample.num_uncomputed for sample in samples)

    @property
    def num_waiting(self) -> int:
        """Requests with waiting samples."""
        return len({sample.request.request_id for sample in self.scheduler.waiting})

    def serves(self, request_id: str) -> bool:
        """True if the request exists and is not finished."""
        return request_id in self._samples

    def compile(self, progress: Progress | None = None) -> None:
        """Compiles all programs; calls ``progress`` before each."""
        self.device.compile(progress)

    # Requests

    def check(self, request: EngineRequest) -> None:
        """Refuses a request that can never be served.

        Raises:
          RefusedError: a token outside the vocabulary, an id in use, ``n`` above ``max_seqs``, an
            unknown slot.
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
        if request.request_id in self._samples:
            raise RefusedError(f"a request {request.request_id!r} is being served already")
        if request.n > self.max_seqs:
            raise RefusedError(f"n = {request.n}: {self.max_seqs} sequences run at once")
        if request.slot is not None and not 0 <= request.slot < self.max_seqs:
            raise RefusedError(f"slot {request.slot}: there are slots 0 to {self.max_seqs - 1}")
        if len(request.prompt) >= self.n_ctx:
            raise ContextError(len(request.prompt), self.n_ctx)
        longest = min(len(request.prompt) + self._limit(request), self.n_ctx)
        cache = self.device.cache
        if isinstance(cache, PagedKVCache):
            needed = self.pool.pages_for_text(longest) + _SHIFT_PAGES * self.config.context_shift
            if needed > cache.num_pages:
                raise PoolError(needed, cache.num_pages)

    def _limit(self, request: EngineRequest) -> int:
        room = self.n_ctx - len(request.prompt)
        if request.max_new_tokens is None:
            return room
        return request.max_new_tokens if self.config.context_shift else min(request.max_new_tokens, room)

    def add_request(self, request: EngineRequest) -> None:
        """Queues a request.

        Raises:
          RefusedError: see ``check``; nothing was changed.
          QueueFullError: ``max_waiting`` requests wait already.
        """
        self.check(request)
        if self.num_waiting >= self.config.max_waiting:
            raise QueueFullError(self.config.max_waiting)
        arrival, times = next(self._arrivals), RequestTimes(arrived=time.monotonic())
        root = self.pool.root(request)
        samples: list[SampleState] = []
        for index in range(request.n):
            samples.append(
                SampleState(
                    request,
                    index,
                    arrival,
                    limit=self._limit(request),
                    root=root,
                    leader=samples[0] if samples else None,
                    tokens=list(request.prompt),
                    times=times,
                )
            )
        self._samples[request.request_id] = samples
        for sample in samples:
            self.scheduler.add(sample)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one of its samples, without further output. An unknown request is
        ignored.

        The next ``step`` begins by releasing its pages.
        """
        for sample in self._samples.get(request_id, []):
            if sample.finish_reason is None and index in (None, sample.index):
                self._finish(sample, "abort")

    def _finish(self, sample: SampleState, reason: FinishReason) -> None:
        sample.finish_reason = reason
        sample.times.finished = time.monotonic()
        if sample.slot is None:
            self.scheduler.dequeue(sample)
            self.pool.drop_swapped(sample)
        else:
            self._ended.append(sample)
        request_id = sample.request.request_id
        if all(other.finish_reason is not None for other in self._samples[request_id]):
            del self._samples[request_id]

    def _release_finished(self) -> None:
        """Releases slots and pages of finished samples."""
        if self._ended:
            ended, self._ended = self._ended, []
            self.pool.end(ended)
            for sample in ended:
                assert sample.slot is not None
                self.scheduler.leave(sample)
                self.device.slots.clear(sample.slot)

    # Steps

    def step(self) -> list[SampleOutput]:
        """Admits waiting samples, computes tokens of the running ones, and returns what changed."""
        before = num_compilations()
        outputs = self._step()
        self._counts.compiled_late += num_compilations() - before
        return outputs

    def _step(self) -> list[SampleOutput]:
        outputs, plan = self.begin_step()
        if not plan.work:
            return outputs
        shape = self.shape_of(plan)
        begin = time.monotonic()
        out = self.device.step(shape, self.step_input(plan, shape))
        return outputs + self.end_step(plan, out, begin)

    def begin_step(self) -> tuple[list[SampleOutput], Plan]:
        """Plans a step: ``(outputs so far, plan)``. ``end_step`` must follow if the plan has work."""
        self._release_finished()
        outputs = self._shift_full_contexts()
        plan = self.scheduler.plan()
        for sample in plan.work:
            assert sample.slot is not None
            if self._last[sample.slot] is not sample:
                self._last[sample.slot] = sample
                self.device.slots.set(sample.slot, sample.request, sample.index)
            sample.times.scheduled = sample.times.scheduled or time.monotonic()
        return outputs, plan

    def end_step(
        self, plan: Plan, out: StepOutput, begin: float, *, observed: bool = True
    ) -> list[SampleOutput]:
        """Processes a step's output. begin: its start, seconds; observed: its time is typical."""
        tokens = np.asarray(out.tokens)
        num_steps = int(out.num_steps)
        self._counts.steps += num_steps
        if observed and not self.config.lockstep:
            self._observe(plan, num_steps, time.monotonic() - begin)
        if num_steps == 0:  # fewer free pages than the host expected; nothing was computed
            self.scheduler.preempt_newest()
            return []
        outputs = self._process(plan, out, tokens)
        self._release_finished()
        return outputs

    def shape_of(self, plan: Plan) -> StepShape:
        """The smallest program that a plan fits."""
        total = sum(plan.work.values())
        return self.device.decode_shape(total) if plan.decodes else self.device.prompt_shape(total)

    def step_input(self, plan: Plan, shape: StepShape) -> StepInput:
        """Input of the program from a plan; the plan may be empty, for a data shard without work."""
        s = self.max_seqs
        num_new, left, position = (np.zeros(s, np.int32) for _ in range(3))
        samples = np.zeros(s, bool)
        tokens = np.zeros(shape.rows, np.int32)
        row = 0
        recent = None
        for sample, count in sorted(plan.work.items(), key=lambda item: item[0].slot or 0):
            slot, begin = sample.slot, sample.num_computed
            assert slot is not None
            tokens[row : row + count] = sample.tokens[begin : begin + count]
            row += count
            num_new[slot] = count
            left[slot] = self._tokens_left(sample)
            samples[slot] = count == sample.num_uncomputed and left[slot] > 0
            position[slot] = sample.position
            request = sample.request
            if request.repeat_penalty != 1.0 or request.presence_penalty or request.frequency_penalty:
                recent = np.full((s, self.device.num_recent), -1, np.int32) if recent is None else recent
                last = sample.tokens[-self.device.num_recent :]
                recent[slot, self.device.num_recent - len(last) :] = last
        return self.device.step_input(
            shape,
            num_new,
            tokens,
            samples=samples,
            left=left,
            position=position,
            recent=recent,
            steps=plan.steps,
            stop_early=plan.stop_early,
        )

    def _tokens_left(self, sample: SampleState) -> int:
        """Tokens that may be sampled before the limit or the end of the context."""
        room = self.n_ctx + 1 - len(sample.tokens)
        return max(0, min(sample.limit - sample.num_generated, room))

    def _observe(self, plan: Plan, num_steps: int, seconds: float) -> None:
        if plan.decodes and num_steps:
            self._step_seconds.append(seconds / num_steps)
            usual = sorted(self._step_seconds)[len(self._step_seconds) // 2]
            self.scheduler.wanted_steps = max(1, int(_ROUND_TRIP_SECONDS / max(usual, 1e-6)))
        elif num_steps:
            self.pool.costs.observe_prompt(sum(plan.work.values()), seconds)

    def _process(self, plan: Plan, out: StepOutput, tokens: np.ndarray) -> list[SampleOutput]:
        """Appends sampled tokens, and finishes samples that reached their end."""
        now = time.monotonic()
        wanted = any(sample.request.num_logprobs is not None for sample in plan.work)
        logprobs = _Logprobs(out) if wanted else None
        outputs = []
        for sample, count in plan.work.items():
            slot = sample.slot
            assert slot is not None
            column = tokens[:, slot]
            sampled = [int(token) for token in column if token >= 0]
            self._counts.prompt_tokens += max(0, min(count, sample.prompt_len - sample.num_computed))
            # All sampled tokens but the last were computed too.
            sample.num_computed += count + max(0, len(sampled) - 1)
            stop = sampled.pop() if sampled and sampled[-1] in sample.request.stop_ids else None
            sample.tokens += sampled
            sample.num_generated += len(sampled)
            self._counts.generated_tokens += len(sampled)
            self.pool.computed(sample)
            prefilled = sample.num_uncomputed == 0 or bool(sampled)
            if NAN_TOKEN in column:
                self._counts.nan_samples += 1
                self._finish(sample, "nan")
            elif stop is not None:
                self._finish(sample, "stop")
            elif sample.num_generated >= sample.limit and prefilled:
                self._finish(sample, "length")
            if not sampled and sample.finish_reason is None:
                continue
            sample.times.first_token = sample.times.first_token or now
            rows = None
            if logprobs is not None and sample.request.num_logprobs is not None:
                rows = logprobs.rows(slot, sampled, sample.request.num_logprobs)
            outputs.append(self._output(sample, slot, sampled, rows, stop))
        return outputs

    def _output(
        self,
        sample: SampleState,
        slot: int,
        sampled: list[int],
        logprobs: tuple[TokenLogprobs, ...] | None = None,
        stop: int | None = None,
    ) -> SampleOutput:
        return SampleOutput(
            sample.request.request_id,
            sample.index,
            tuple(sampled),
            logprobs,
            sample.finish_reason,
            stop,
            slot,
            sample.num_cached or 0,
            self._truncated(sample),
            sample.times,
        )

    def _truncated(self, sample: SampleState) -> bool:
        wanted = sample.request.max_new_tokens
        cut = sample.finish_reason == "length" and (wanted is None or sample.num_generated < wanted)
        return bool(sample.num_forgotten) or cut

    def _shift_full_contexts(self) -> list[SampleOutput]:
        """Shifts full contexts; returns the last outputs of samples with too narrow a row."""
        outputs = []
        for sample in [s for s in self.scheduler.running if len(s.tokens) > self.n_ctx]:
            request = sample.request
            keep = sample.prompt_len if request.n_keep < 0 else min(request.n_keep, sample.prompt_len)
            keep = max(0, min(keep, self.n_ctx - 4))
            held = sample.num_computed
            discard = min(request.n_discard or (held - keep) // 2, held - keep)
            discard = max(1, discard)
            if not self.pool.shift(sample, keep, discard):
                assert sample.slot is not None
                self._finish(sample, "length")
                outputs.append(self._output(sample, sample.slot, []))
                continue
            del sample.tokens[keep : keep + discard]
            sample.num_computed -= discard
            sample.num_forgotten += discard
        self._release_finished()
        return outputs

    # Statistics

    def stats(self) -> EngineStats:
        """Gauges and counters as they are now."""
        return self._monitor.stats(self._counts)

    def pool_state(self) -> PoolState:
        """The state of each page; in a contiguous cache, of each sequence."""
        return self._monitor.pool_state()

    def slot_states(self) -> list[SlotState]:
        """The state of each slot, in order."""
        return [slot_state(slot, sample, self.n_ctx) for slot, sample in enumerate(self._last)]

    def check_state(self) -> None:
        """Checks the invariants of cache and prefix index (slow: for tests and debugging).

        Raises:
          InvariantError: the first violated invariant.
        """
        cache = self.device.cache
        if isinstance(cache, PagedKVCache) and isinstance(self.pool, PagedPool):
            pins = np.bincount(self.pool.index.pinned_pages(), minlength=cache.num_pages)
            check_invariants(self.device.metadata(), pins)

    def drop_prefix_cache(self) -> int:
        """Releases every unused page of the prefix cache; returns their number."""
        if not isinstance(self.pool, PagedPool):
            return 0
        pages = self.pool.index.evict(self.pool.index.num_unused)
        self.device.edit(unpinned=pages)
        return len(pages)

    # Slot files

    def _idle(self, slot: int) -> SampleState | None:
        """The last sample of an idle slot.

        Raises:
          RefusedError: there is no such slot, or it is busy (``SlotBusyError``).
        """
        if not 0 <= slot < self.max_seqs:
            raise RefusedError(f"slot {slot}: there are slots 0 to {self.max_seqs - 1}")
        if any(sample.slot == slot for sample in self.scheduler.running):
            raise SlotBusyError(slot)
        return self._last[slot]

    def save_slot(self, slot: int, path: str | os.PathLike[str]) -> SlotTransfer:
        """Writes the cached part of a slot's last text to a file, between two steps.

        Raises:
          RefusedError: there is no such slot, it is busy (``SlotBusyError``), or nothing of its
            text is cached.
          OSError: the file cannot be written.
        """
        last = self._idle(slot)
        if last is None:
            raise RefusedError(f"slot {slot} has nothing in the pool that could be saved")
        tokens = last.tokens[: last.num_computed]
        return slot_files.save(self.device, self.pool, slot, last.root, tokens, path, self.config.fingerprint)

    def restore_slot(self, slot: int, path: str | os.PathLike[str]) -> SlotTransfer:
        """Loads a file's text into the prefix cache, and makes it the slot's last text.

        Raises:
          RefusedError: there is no such slot, or it is busy (``SlotBusyError``).
          SnapshotError: the file is damaged or of another model; nothing was changed.
          OutOfPages: running requests leave too few pages.
          OSError: the file cannot be read.
        """
        self._idle(slot)
        transfer, tokens = slot_files.load(self.device, self.pool, slot, path, self.config.fingerprint)
        request = EngineRequest(f"restored into slot {slot}", tuple(tokens), max_new_tokens=0)
        self._last[slot] = SampleState(
            request,
            0,
            next(self._arrivals),
            limit=0,
            root=self.pool.root(request),
            leader=None,
            tokens=tokens,
            times=RequestTimes(),
            num_computed=len(tokens),
            finish_reason="stop",
        )
        return transfer

    def erase_slot(self, slot: int) -> int:
        """Releases cached pages of a slot's last text that no other text shares; returns their
        tokens' number.

        Raises:
          RefusedError: there is no such slot, or it is busy (``SlotBusyError``).
        """
        last = self._idle(slot)
        if last is None:
            return 0
        self._last[slot] = None
        return slot_files.erase(self.device, self.pool, last.root, last.tokens[: last.num_computed])


class _Logprobs:
    """Log-probabilities of a step on the host."""

    def __init__(self, out: StepOutput) -> None:
        self._chosen = np.asarray(out.logprobs)
        self._ids = np.asarray(out.top_tokens)
        self._values = np.asarray(out.top_logprobs)

    def rows(self, slot: int, tokens: list[int], count: int) -> tuple[TokenLogprobs, ...]:
        """Log-probabilities of a slot's sampled tokens, each with the ``count`` likeliest ones."""
        return tuple(
            TokenLogprobs(
                token,
                float(self._chosen[i, slot]),
                tuple(
                    (int(t), float(value))
                    for t, value in zip(
                        self._ids[i, slot, :count], self._values[i, slot, :count], strict=True
                    )
                    if t >= 0
                ),
            )
            for i, token in enumerate(tokens)
        )


def _sizes(largest: int, factor: int) -> list[int]:
    """Program sizes: ``largest``, and each smaller by ``factor`` than the next, down to 1."""
    sizes = [largest]
    while sizes[0] > 1:
        sizes.insert(0, -(-sizes[0] // factor))
    return sizes
