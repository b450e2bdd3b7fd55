"""generate_stream: a generation that comes back to Python every few tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxpaged.compilation.executable_cache import cached_compile
from jaxpaged.generation.loop import (
    RUNNING,
    Cache,
    GenerateResult,
    Model,
    advance_donating,
    begin_jitted,
    in_order,
)
from jaxpaged.generation.request import ContextShift, Request, Shape, make_request
from jaxpaged.generation.sampling import SamplingParams
from jaxpaged.sharding.mesh import BatchSharding, fetch, mesh_of


@dataclass(frozen=True)
class StreamChunk:
    """What came out since the chunk before."""

    tokens: list[list[int]]
    """New tokens of each sample, in order."""
    finish_reason: list[int]
    """RUNNING, or why the sequence ended."""


@dataclass
class GenerateStream:
    """An iterator of StreamChunks; see ``generate_stream``.

    ``compile()`` may be called first, to keep compilation out of what is timed. ``cache`` is the cache after the last
    chunk taken; the one passed in is donated by the first.
    """

    model: Model
    params: Any
    cache: Any
    num_samples: int
    request: Request
    shape: Shape
    every: int
    deal: BatchSharding | None = None
    """How rows were dealt to the data shards of a mesh; None = there is none."""
    result: GenerateResult | None = None
    """After each chunk, all that was generated so far."""
    found: bool = False
    """Whether the programs were found on disk; see ``executable_cache``."""
    _begin: Any = field(default=None, repr=False)
    _advance: Any = field(default=None, repr=False)

    def compile(self) -> None:
        """Compiles the programs, without running them."""
        if self._advance is not None:
            return
        static, given = (self.model, self.shape), (self.cache, self.request)
        begin = cached_compile(
            lambda: begin_jitted.lower(*given, self.shape), "generation.begin", (self.shape,), given
        )
        arguments = (self.params, self.cache, begin.program.out_info, self.request, np.int32(0))
        advance = cached_compile(
            lambda: advance_donating.lower(*static, *arguments), "generation.advance", static, arguments
        )
        self._begin, self._advance = begin.program, advance.program
        self.found = begin.found and advance.found

    def __iter__(self) -> Iterator[StreamChunk]:
        self.compile()
        state = self._begin(self.cache, self.request)
        seen, steps, running = [0] * self.num_samples, 0, True
        while running:
            self.cache, state = self._advance(self.params, self.cache, state, self.request, np.int32(steps))
            # Copied: the arrays of `state` are donated to the next call.
            self.result = fetch(state.result())
            if self.deal is not None:
                self.result = in_order(self.result, self.deal)
            counts = self.result.num_tokens
            new = [self.result.tokens[i, seen[i] : counts[i]].tolist() for i in range(self.num_samples)]
            seen = [int(counts[i]) for i in range(self.num_samples)]
            reasons = self.result.finish_reason[: self.num_samples].tolist()
            running = RUNNING in reasons
            yield StreamChunk(new, reasons)
            steps = self.every


def generate_stream(
    model: Model,
    params: Any,
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    n: int = 1,
    sampling: SamplingParams | None = None,
    stop_ids: Sequence[int] = (),
    batch_size: int = 512,
    keep: bool = False,
    context_shift: ContextShift | None = None,
    window: int | None = None,
    history: Sequence[Sequence[int]] = (),
    every: int = 8,
) -> GenerateStream:
    """``generate`` that hands out tokens while it runs: first what comes while prompts are read, then up to ``every``.

    Same arguments, same tokens; the steps of one chunk still run inside one XLA program.

    Raises:
      ValueError: as ``generate``, or ``every`` is not positive.
    """
    if every < 1:
        raise ValueError(f"every must be positive, got {every}")
    mesh = mesh_of(cache)
    request, shape = make_request(
        cache.max_seqs,
        prompts,
        max_new_tokens,
        sampling,
        stop_ids,
        batch_size,
        keep,
        n,
        context_shift,
        window,
        history,
        mesh,
    )
    deal = None if mesh is None else BatchSharding.of(mesh, len(prompts), n)
    return GenerateStream(model, params, cache, len(prompts) * n, request, shape, every, deal)
