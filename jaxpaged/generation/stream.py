"""Generation that returns to Python every few tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxpaged.cache.interface import Cache
from jaxpaged.compilation import background
from jaxpaged.compilation.executable_cache import cached_compile
from jaxpaged.generation.loop import (
    RUNNING,
    GenerateResult,
    Model,
    advance_donating,
    begin_jitted,
    gather_result,
)
from jaxpaged.generation.prompts import PromptsLike
from jaxpaged.generation.request import ContextShift, make_request
from jaxpaged.generation.sampling import SamplingParams
from jaxpaged.sharding.mesh import BatchSharding
from jaxpaged.sharding.multihost import fetch
from jaxpaged.sharding.specs import mesh_of


@dataclass(frozen=True)
class StreamChunk:
    """Output since the previous chunk."""

    tokens: list[list[int]]
    """New tokens of each sample, in order."""
    finish_reason: list[int]
    """Finish reason of each sample; RUNNING if it continues."""


@dataclass
class TokenStream:
    """Iterator of StreamChunks; see ``generate_stream`` and ``lookup_stream``.

    ``compile()`` may be called first, to separate compilation from what is timed. ``cache`` is the
    cache after the latest chunk; the one passed in is donated by the first.
    """

    model: Model
    params: Any = field(repr=False)
    cache: Any = field(repr=False)
    num_samples: int
    """Number of samples."""
    request: Any = field(repr=False)
    shape: Any
    every: int
    """Steps of the next chunk; may be changed between chunks."""
    result: Any = field(default=None, repr=False)
    """After each chunk, the result so far, on the host."""
    cache_hit: bool = False
    """True if the programs were in the executable cache."""
    _programs: Any = field(default=None, repr=False)
    _first_steps = 0

    def compile(self) -> None:
        """Compiles the programs, and the kernels that they call, without running them."""
        if self._programs is None:
            self._programs = self._compile()
            background.wait()

    def _compile(self) -> Any:
        """The program that makes the state of ``_begin``, and the one that advances it."""
        raise NotImplementedError

    def _begin(self) -> Any:
        """State before the first chunk."""
        raise NotImplementedError

    def _result(self, state: Any) -> Any:
        """Result on the host, in the caller's order; a copy, as ``state`` is donated to the next
        chunk."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[StreamChunk]:
        self.compile()
        state = self._begin()
        advance = self._programs[1]
        seen, steps, running = [0] * self.num_samples, self._first_steps, True
        while running:
            self.cache, state = advance(self.params, self.cache, state, self.request, np.int32(steps))
            self.result = self._result(state)
            counts = self.result.num_tokens[: self.num_samples].tolist()
            new = [self.result.tokens[i, seen[i] : count].tolist() for i, count in enumerate(counts)]
            reasons = self.result.finish_reason[: self.num_samples].tolist()
            seen, running = counts, RUNNING in reasons
            yield StreamChunk(new, reasons)
            steps = self.every


@dataclass
class GenerateStream(TokenStream):
    """Iterator of StreamChunks; see ``generate_stream``."""

    sharding: BatchSharding | None = None
    """Distribution of the samples over the data shards of a mesh; None without a mesh."""

    def _compile(self) -> Any:
        static, given = (self.model, self.shape), (self.cache, self.request)
        begin = cached_compile(
            lambda: begin_jitted.lower(*given, self.shape), "generation.begin", (self.shape,), given
        )
        arguments = (self.params, self.cache, begin.program.out_info, self.request, np.int32(0))
        advance = cached_compile(
            lambda: advance_donating.lower(*static, *arguments), "generation.advance", static, arguments
        )
        self.cache_hit = begin.cache_hit and advance.cache_hit
        return begin.program, advance.program

    def _begin(self) -> Any:
        return self._programs[0](self.cache, self.request)

    def _result(self, state: Any) -> GenerateResult:
        result = fetch(state.result())
        return result if self.sharding is None else gather_result(result, self.sharding)


def generate_stream(
    model: Model,
    params: Any,
    cache: Cache,
    prompts: PromptsLike,
    *,
    max_new_tokens: npt.ArrayLike,
    prompt_lens: npt.ArrayLike | None = None,
    n: int = 1,
    sampling: SamplingParams | None = None,
    stop_ids: Sequence[int] = (),
    batch_size: int = 512,
    keep: bool = False,
    context_shift: ContextShift | None = None,
    window: int | None = None,
    history: Sequence[Sequence[int]] = (),
    every: int = 8,
    fixed_steps: bool = False,
) -> GenerateStream:
    """``generate`` that yields tokens while it runs: the first ones after prefill, then up to
    ``every`` a sample.

    Arguments and tokens are those of ``generate``; the steps of one chunk run in one XLA program.

    Args:
      every: tokens of a chunk, at most.
      fixed_steps: prefill in steps of ``batch_size`` tokens, however short a prompt is, so that all
        prompts share a program; for models whose products skip padding.

    Raises:
      ValueError: as ``generate``, or ``every`` is not positive.
    """
    if every < 1:
        raise ValueError(f"every must be positive, got {every}")
    mesh = mesh_of(cache)
    request, shape = make_request(
        cache.max_seqs, prompts, max_new_tokens, sampling, stop_ids, batch_size, keep, n, context_shift,
        window, history, mesh, prompt_lens, fixed_steps,
    )  # fmt: skip
    sharding = None if mesh is None else BatchSharding.of(mesh, len(prompts), n)
    return GenerateStream(model, params, cache, len(prompts) * n, request, shape, every, sharding=sharding)
