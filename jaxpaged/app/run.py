"""One generation: compiled first, timed, its tokens passed on as they are generated."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxpaged.app import interrupt
from jaxpaged.app.memory import trim_memory
from jaxpaged.app.timings import Timings
from jaxpaged.generation.request import ContextShift, LogitsProcessor, Lookup
from jaxpaged.generation.result import FINISH_NAN, FINISH_OUT_OF_PAGES, FINISH_STOP
from jaxpaged.generation.sampling_params import SamplingParams
from jaxpaged.generation.stream import GenerateStream, generate_stream
from jaxpaged.sharding.multihost import broadcast_object

_CHUNK_SECONDS = 0.1
_MOST_STEPS = 64
_POLL_SECONDS = 0.05


@dataclass
class Run:
    """Result of one generation, a row per sample."""

    tokens: list[list[int]]
    finish_reason: list[int]
    timings: Timings = field(default_factory=Timings)
    pages_peak: int | np.ndarray = 0
    """In a cache of several layer groups, one number for each."""
    cache_hit: bool = False
    """True if the programs were in the executable cache."""
    drafted: int = 0
    """Tokens drafted by lookup decoding."""
    accepted: int = 0
    """Drafted tokens that became part of the text."""
    interrupted: bool = False
    """True if Ctrl-C ended it early."""
    cache: Any = None
    """The cache afterwards."""

    def reason(self, row: int) -> str:
        """ "stop", "length" or "nan"."""
        return {FINISH_STOP: "stop", FINISH_NAN: "nan"}.get(self.finish_reason[row], "length")

    def drafts_line(self) -> str:
        """One line about accepted drafts."""
        share = self.accepted / max(1, self.drafted)
        return f"{'lookup':>16} = {self.accepted} of {self.drafted} drafted tokens accepted ({share:.0%})"

    @property
    def out_of_pages(self) -> list[int]:
        """Rows that ended because no page was free."""
        return [row for row, reason in enumerate(self.finish_reason) if reason == FINISH_OUT_OF_PAGES]


def generate(
    model: Any,
    params: Any,
    cache: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: SamplingParams,
    stop_ids: Sequence[int],
    batch_size: int,
    samples: int = 1,
    keep: bool = False,
    context_shift: ContextShift | None = None,
    lookup: int = 0,
    logits_processor: LogitsProcessor | None = None,
    history: Sequence[Sequence[int]] = (),
    warmup: bool = True,
    every: Callable[[], int] | None = None,
    fixed_steps: bool = False,
    on_start: Callable[[], None],
    on_cache: Callable[[Any, int], None] | None = None,
    on_tokens: Callable[[list[list[int]]], None],
) -> Run:
    """Runs ``generate_stream`` to its end, or to Ctrl-C, which is deferred from the first token on.

    Args:
      warmup: compile before the clock of the prompt starts.
      on_start: called before the prefill, after compiling.
      samples: per prompt.
      lookup: tokens of a draft; above 0, prompt-lookup decoding.
      logits_processor: see ``generate``.
      every: returns the decode steps per chunk; default: as many as take a tenth of a second.
      fixed_steps: see ``generate_stream``.
      on_cache: called with the cache and the number of tokens generated, after the prefill and after each chunk.
      on_tokens: called with each sample's new tokens.
    """
    rows = len(prompts) * samples
    run = Run([[] for _ in range(rows)], [0] * rows)
    stream = generate_stream(
        model,
        params,
        cache,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        n=samples,
        stop_ids=stop_ids,
        batch_size=batch_size,
        keep=keep,
        context_shift=context_shift,
        history=history,
        lookup=Lookup(lookup) if lookup else None,
        logits_processor=logits_processor,
        fixed_steps=fixed_steps,
        every=1,
    )
    start = time.perf_counter()
    if warmup:
        _compile(stream)
        run.timings.compile_ms = 1e3 * (time.perf_counter() - start)
        run.cache_hit = stream.cache_hit
    first = last = None
    on_start()
    start = time.perf_counter()
    for chunk in () if interrupt.requested() else stream:
        now = time.perf_counter()
        for row, tokens in enumerate(chunk.tokens):
            run.tokens[row] += tokens
        run.finish_reason = chunk.finish_reason
        if stream.result is not None:
            run.pages_peak = np.asarray(stream.result.pages_peak)
            run.drafted, run.accepted = (
                int(x.sum()) for x in (stream.result.drafted, stream.result.accepted)
            )
        if first is None:
            interrupt.defer()
            first = now
            run.timings.prompt_n = sum(map(len, prompts))
            run.timings.prompt_ms = 1e3 * (first - start)
        elif every is not None:
            stream.every = min(every(), _MOST_STEPS)
        elif last is not None:
            # Long enough to cost nothing, short enough to read along and to stop.
            steps = stream.every * _CHUNK_SECONDS / max(now - last, 1e-6)
            stream.every = broadcast_object(min(max(1, int(steps)), 2 * stream.every, _MOST_STEPS))
        on_tokens(chunk.tokens)
        if on_cache is not None:
            on_cache(stream.cache, max(map(len, run.tokens)))
            if first == now:  # saving a prompt does not count as generating
                first = now = time.perf_counter()
        last = time.perf_counter()
        run.timings.predicted_ms = 1e3 * (now - first)
        if broadcast_object(interrupt.requested()):
            break
    run.interrupted = interrupt.requested()
    run.timings.predicted_n = sum(map(len, run.tokens))
    run.cache = stream.cache
    return run


def _compile(stream: GenerateStream) -> None:
    """Compiles, or returns on Ctrl-C, while compiling goes on into the compilation cache."""
    pool = ThreadPoolExecutor(1)
    compiled = pool.submit(stream.compile)
    pool.shutdown(wait=False)
    while not interrupt.requested():
        if wait([compiled], timeout=_POLL_SECONDS).done:
            compiled.result()
            return trim_memory()
