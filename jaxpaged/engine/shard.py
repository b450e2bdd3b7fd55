"""EngineShard: requests of one data shard of an engine; of all of it where there is no mesh."""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxpaged.cache.invariants import check_invariants
from jaxpaged.engine import slot_files
from jaxpaged.engine.config import EngineConfig
from jaxpaged.engine.device import Device
from jaxpaged.engine.device_shard import DeviceShard
from jaxpaged.engine.pool import PagedPool, Pool
from jaxpaged.engine.programs import NAN_TOKEN, StepInput, StepOutput
from jaxpaged.engine.request import (
    EngineRequest,
    FinishReason,
    RefusedError,
    RequestTimes,
    SampleOutput,
    SlotBusyError,
    TokenLogprobs,
)
from jaxpaged.engine.sample_state import SampleState
from jaxpaged.engine.scheduler import Plan, Scheduler
from jaxpaged.engine.slot_files import SlotTransfer

_ROUND_TRIP_SECONDS = 0.04
"""Longest time of several decode steps in one program: streamed text must not become jerky."""


@dataclass
class StepCounts:
    """Counters of steps, as in ``EngineStats``."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    nan_samples: int = 0
    compiled_late: int = 0


class EngineShard:
    """Scheduler, pool and samples of one data shard.

    A step is ``begin_step``, which plans it, ``step_input``, and, with the output of the program,
    ``end_step``. Slots are sequences of the shard; outputs number them within the engine.

    Args:
      device, index: the engine's device, and which data shard of it this is.
      config: of the engine.
      sizes: token counts that steps are compiled for, ascending.
      counts: of the engine, to be counted up.

    Raises:
      ValueError: the cache cannot hold the context, or a context shift is asked of a contiguous
        cache.
    """

    def __init__(
        self, device: Device, index: int, config: EngineConfig, sizes: Sequence[int], counts: StepCounts
    ) -> None:
        self.config = config
        self.device = DeviceShard(device, index)
        cache = self.device.cache
        self.pool: Pool
        if self.device.parts:
            self.pool = PagedPool(
                self.device,
                prefix_cache=config.prefix_cache,
                swap_bytes=0 if config.lockstep else config.swap_bytes,
                step_tokens=sizes[-1],
            )
            first = self.device.parts[0]
            room = first.page_size * min(first.num_pages - config.spare_pages, first.max_pages_per_seq)
        else:
            if config.context_shift:
                raise ValueError("a context shift needs a paged cache")
            self.pool, room = Pool(self.device), cache.max_length
        if config.n_ctx > room:
            raise ValueError(f"n_ctx = {config.n_ctx} tokens: the cache has room for {room}")
        self.scheduler = Scheduler(
            self.pool, num_slots=cache.max_seqs, sizes=sizes, decode_steps=config.decode_steps
        )
        self.last: list[SampleState | None] = [None] * cache.max_seqs
        """The last sample of each slot."""
        self._mask_words = -(-config.vocab_size // 32)
        self._arrivals = itertools.count()
        self._samples: dict[str, list[SampleState]] = {}
        self._ended: list[SampleState] = []
        self._counts = counts
        self._step_seconds: deque[float] = deque(maxlen=8)

    @property
    def has_work(self) -> bool:
        """True if a step has anything to do."""
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

    # Requests

    def num_cached(self, request: EngineRequest) -> int:
        """Tokens of a request's prompt in the prefix cache."""
        if not isinstance(self.pool, PagedPool):
            return 0
        limit = max(0, len(request.prompt) - 1)
        root = self.pool.root(request)
        return self.pool.index.match(root, list(request.prompt), limit, tails=False).num_tokens

    def add(self, request: EngineRequest) -> None:
        """Queues a checked request.

        Raises:
          RefusedError: its constraint allows no token.
        """
        arrival, times = next(self._arrivals), RequestTimes(arrived=time.monotonic())
        root = self.pool.root(request)
        samples: list[SampleState] = []
        for index in range(request.n):
            samples.append(
                SampleState(
                    request,
                    index,
                    arrival,
                    limit=self.config.limit_of(request),
                    root=root,
                    leader=samples[0] if samples else None,
                    tokens=list(request.prompt),
                    times=times,
                    constraint=None if request.constraint is None else request.constraint.copy(),
                )
            )
            try:
                samples[-1].update_mask(self._mask_words)
            except ValueError as error:
                raise RefusedError(f"the constraint cannot begin: {error}") from None
        self._samples[request.request_id] = samples
        for sample in samples:
            self.scheduler.add(sample)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """See ``Engine.abort``."""
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

    def begin_step(self) -> tuple[list[SampleOutput], Plan]:
        """Plans a step: ``(outputs so far, plan)``. ``end_step`` must follow if the plan has work."""
        self._release_finished()
        outputs = self._shift_full_contexts()
        plan = self.scheduler.plan()
        for sample in plan.work:
            assert sample.slot is not None
            if self.last[sample.slot] is not sample:
                self.last[sample.slot] = sample
                self.device.slots.set(sample.slot, sample.request, sample.index)
            sample.times.scheduled = sample.times.scheduled or time.monotonic()
        return outputs, plan

    def step_input(self, plan: Plan, given: StepInput) -> StepInput:
        """Input of the program from a plan, which may be empty. given: see ``Device.no_work``; filled
        in."""
        row, recent, width = 0, None, given.recent.shape[1]
        for sample, count in sorted(plan.work.items(), key=lambda item: item[0].slot or 0):
            slot, begin = sample.slot, sample.num_computed
            assert slot is not None
            given.tokens[row : row + count] = sample.tokens[begin : begin + count]
            row += count
            given.num_new[slot] = count
            given.left[slot] = left = self._tokens_left(sample)
            given.samples[slot] = count == sample.num_uncomputed and left > 0
            given.position[slot] = sample.position
            request = sample.request
            given.constrained[slot] = sample.mask is not None
            given.mu[slot] = 2 * request.mirostat_tau if sample.mu is None else sample.mu
            if request.has_penalties:
                recent = np.full_like(given.recent, -1) if recent is None else recent
                last = sample.tokens[-width:]
                recent[slot, width - len(last) :] = last
        return replace(
            given,
            recent=given.recent if recent is None else recent,
            steps=np.int32(plan.steps),
            stop_early=np.bool_(plan.stop_early),
        )

    def end_step(self, plan: Plan, out: StepOutput, begin: float, *, decoded: bool) -> list[SampleOutput]:
        """Processes a step's output. begin: its start, seconds; decoded: by a decode program."""
        self.device.update(out.table)
        tokens = np.asarray(out.tokens)
        num_steps = int(out.num_steps)
        self._counts.steps += num_steps
        # Not where another data shard prefilled, and this one's sequences decoded once meanwhile.
        if num_steps and not self.config.lockstep and plan.decodes == decoded:
            self._observe(plan, num_steps, time.monotonic() - begin, decoded)
        if num_steps == 0:  # fewer free pages than the host expected; nothing was computed
            self.scheduler.preempt_newest()
            return []
        outputs = self._process(plan, out, tokens)
        self._release_finished()
        return outputs

    def _tokens_left(self, sample: SampleState) -> int:
        """Tokens that may be sampled before the limit or the end of the context."""
        room = self.config.n_ctx + 1 - len(sample.tokens)
        return max(0, min(sample.limit - sample.num_generated, room))

    def _observe(self, plan: Plan, num_steps: int, seconds: float, decoded: bool) -> None:
        if decoded:
            self._step_seconds.append(seconds / num_steps)
            usual = sorted(self._step_seconds)[len(self._step_seconds) // 2]
            self.scheduler.wanted_steps = max(1, int(_ROUND_TRIP_SECONDS / max(usual, 1e-6)))
        else:
            self.pool.costs.observe_prompt(sum(plan.work.values()), seconds)

    def _process(self, plan: Plan, out: StepOutput, tokens: np.ndarray) -> list[SampleOutput]:
        """Appends sampled tokens, and finishes samples that reached their end."""
        now = time.monotonic()
        wanted = any(sample.request.num_logprobs is not None for sample in plan.work)
        logprobs = _Logprobs(out) if wanted else None
        outputs = []
        self.pool.moved(plan.work)
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
            if sample.request.mirostat and sampled:
                sample.mu = float(np.asarray(out.mu)[slot])
            self.pool.computed(sample)
            if NAN_TOKEN in column:
                self._counts.nan_samples += 1
                self._finish(sample, "nan")
            elif stop is not None:
                self._finish(sample, "stop")
            elif sample.constraint is not None and sampled:
                sampled += self._constrain(sample, sampled)
            self._counts.generated_tokens += len(sampled)
            prefilled = sample.num_uncomputed == 0 or bool(sampled)
            if sample.finish_reason is None and sample.num_generated >= sample.limit and prefilled:
                self._finish(sample, "length")
            if not sampled and sample.finish_reason is None:
                continue
            sample.times.first_token = sample.times.first_token or now
            rows = None
            if logprobs is not None and sample.request.num_logprobs is not None:
                rows = logprobs.rows(slot, sampled, sample.request.num_logprobs)
            outputs.append(self._output(sample, slot, sampled, rows, stop))
        return outputs

    def _constrain(self, sample: SampleState, sampled: list[int]) -> list[int]:
        """Advances a sample's constraint; returns the forced tokens, which are appended to the sample.

        Finishes the sample if nothing can follow.
        """
        constraint, forced = sample.constraint, []
        assert constraint is not None
        try:
            constraint.accept(sampled)
            # Where log-probabilities are wanted, each token is sampled.
            if sample.request.num_logprobs is None:
                forced = constraint.forced()[: self._tokens_left(sample)]
                # A step with several tokens of one sequence costs all running ones about a step more.
                forced = forced if len(forced) > len(self.scheduler.running) else []
                constraint.accept(forced)
            sample.tokens += forced
            sample.num_generated += len(forced)
            if constraint.is_finished:
                self._finish(sample, "stop")
            else:
                sample.update_mask(self._mask_words)
        except ValueError:
            self._finish(sample, "stop" if constraint.is_finished else "constraint")
        return forced

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
            self.device.first_slot + slot,
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
        for sample in [s for s in self.scheduler.running if len(s.tokens) > self.config.n_ctx]:
            request = sample.request
            keep = sample.prompt_len if request.n_keep < 0 else min(request.n_keep, sample.prompt_len)
            keep = max(0, min(keep, self.config.n_ctx - 4))
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

    # Pages

    def check_state(self) -> None:
        """See ``Engine.check_state``."""
        if isinstance(self.pool, PagedPool):
            index = self.pool.index
            pins = [
                np.bincount(np.asarray(index.pinned_pages(g), int), minlength=part.num_pages)
                for g, part in enumerate(self.device.parts)
            ]
            metadata = self.device.metadata()
            check_invariants(metadata, pins if len(pins) > 1 else pins[0])

    def drop_prefix_cache(self) -> int:
        """See ``Engine.drop_prefix_cache``."""
        if not isinstance(self.pool, PagedPool):
            return 0
        pages = self.pool.index.evict(self.pool.index.num_unused)
        self.device.edit(unpinned=pages)
        return sum(map(len, pages))

    # Slot files

    def _idle(self, slot: int) -> SampleState | None:
        """The last sample of an idle slot.

        Raises:
          SlotBusyError: it is busy.
        """
        if any(sample.slot == slot for sample in self.scheduler.running):
            raise SlotBusyError(self.device.first_slot + slot)
        return self.last[slot]

    def save_slot(self, slot: int, path: str | os.PathLike[str]) -> SlotTransfer:
        """See ``Engine.save_slot``."""
        last = self._idle(slot)
        if last is None:
            raise RefusedError(
                f"slot {self.device.first_slot + slot} has nothing in the pool that could be saved"
            )
        tokens = last.tokens[: last.num_computed]
        return slot_files.save(self.device, self.pool, slot, last.root, tokens, path, self.config.fingerprint)

    def restore_slot(self, slot: int, path: str | os.PathLike[str]) -> SlotTransfer:
        """See ``Engine.restore_slot``."""
        self._idle(slot)
        transfer, tokens = slot_files.load(self.device, self.pool, slot, path, self.config.fingerprint)
        request = EngineRequest(
            f"restored into slot {self.device.first_slot + slot}", tuple(tokens), max_new_tokens=0
        )
        self.last[slot] = SampleState(
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
        """See ``Engine.erase_slot``."""
        last = self._idle(slot)
        if last is None:
            return 0
        self.last[slot] = None
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
