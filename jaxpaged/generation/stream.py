"""The decode loop come back to Python every few steps."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxpaged.cache.interface import Cache
from jaxpaged.compilation import background
from jaxpaged.compilation.executable_cache import cached_compile
from jaxpaged.generation.api import gather_result
from jaxpaged.generation.loop import Model, advance, begin, check_model, result_of
from jaxpaged.generation.prompts import PromptsLike
from jaxpaged.generation.request import Request
from jaxpaged.generation.result import RUNNING
from jaxpaged.sharding.mesh import BatchSharding
from jaxpaged.sharding.multihost import fetch
from jaxpaged.sharding.specs import BATCH, CACHE, PARAMS, REPLICATED, mesh_of, over_mesh

begin_jitted = jax.jit(over_mesh(begin, (CACHE, BATCH), BATCH))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def advance_donating(model: Model, *arguments: Any) -> Any:
    """``advance``; donates the cache and the state."""
    chunk = functools.partial(advance, model)
    return over_mesh(chunk, (PARAMS, CACHE, BATCH, BATCH, REPLICATED), (CACHE, BATCH))(*arguments)


@dataclass(frozen=True)
class StreamChunk:
    """Output since the previous chunk."""

    tokens: list[list[int]]
    """New tokens of each sample, in order."""
    finish_reason: list[int]
    """Finish reason of each sample; RUNNING if it continues."""


@dataclass
class GenerateStream:
    """Iterator of StreamChunks over a request; see ``generate_stream``.

    ``compile()`` may be called first, to separate compilation from what is timed. ``cache`` is the
    cache after the latest chunk; the one passed in is donated by the first. The first chunk ends
    after prefill.
    """

    model: Model
    params: Any = field(repr=False)
    cache: Any = field(repr=False)
    request: Request = field(repr=False)
    num_samples: int
    """Number of samples."""
    every: int = 8
    """Steps of the next chunk; may be changed between chunks."""
    sharding: BatchSharding | None = None
    """Distribution of the samples over the data shards of a mesh; None without a mesh."""
    result: Any = field(default=None, repr=False)
    """After each chunk, the result so far, on the host."""
    cache_hit: bool = False
    """True if the programs were in the executable cache."""
    _programs: Any = field(default=None, repr=False)

    def compile(self) -> None:
        """Compiles the programs, and the kernels that they call, without running them."""
        if self._programs is not None:
            return
        given = self.cache, self.request
        first = cached_compile(lambda: begin_jitted.lower(*given), "generation.begin", (), given)
        arguments = self.params, self.cache, first.program.out_info, self.request, np.int32(0)
        more = cached_compile(
            lambda: advance_donating.lower(self.model, *arguments),
            "generation.advance",
            (self.model,),
            arguments,
        )
        self.cache_hit = first.cache_hit and more.cache_hit
        self._programs = first.program, more.program
        background.wait()

    def __iter__(self) -> Iterator[StreamChunk]:
        self.compile()
        first, more = self._programs
        state = first(self.cache, self.request)
        seen, steps, running = [0] * self.num_samples, 0, True
        while running:
            self.cache, state = more(self.params, self.cache, state, self.request, np.int32(steps))
            found = self._on_host(state.result)
            # A copy, since the state is donated to the next chunk.
            self.result = found if state.search is None else self._of_search(state)
            counts = found.num_tokens[: self.num_samples].tolist()
            new = [found.tokens[i, seen[i] : count].tolist() for i, count in enumerate(counts)]
            reasons = found.finish_reason[: self.num_samples].tolist()
            seen, running = counts, RUNNING in reasons
            yield StreamChunk(new, reasons)
            steps = self.every

    def _of_search(self, state: Any) -> Any:
        """BeamResult on the host, in the caller's order."""
        if self.sharding is None:
            return fetch(result_of(state, self.request))
        host, shards = fetch(state), self.sharding.shards
        each = [result_of(jax.tree.map(lambda x, d=d: x[d], host), self.request) for d in range(shards)]
        whole = jax.tree.map(lambda *parts: np.stack(parts), *each)
        return gather_result(whole, BatchSharding(shards, 1))

    def _on_host(self, result: Any) -> Any:
        """A result on the host, in the caller's order."""
        return fetch(result) if self.sharding is None else gather_result(fetch(result), self.sharding)


def generate_stream(
    model: Model,
    params: Any,
    cache: Cache,
    prompts: PromptsLike,
    *,
    every: int = 8,
    n: int = 1,
    **options: Any,
) -> GenerateStream:
    """``generate`` that yields tokens while it runs: the first ones after prefill, then those of
    up to ``every`` steps.

    Tokens are those of ``generate``; the steps of one chunk run in one XLA program.

    Args:
      model, params, cache, prompts, n: as for ``generate``.
      every: steps of a chunk, at most.
      options: the other arguments of ``generate``; and ``fixed_steps``, see ``Request.create``.

    Raises:
      ValueError: as ``generate``, or ``every`` is not positive.
    """
    if every < 1:
        raise ValueError(f"every must be positive, got {every}")
    check_model(model)
    mesh = mesh_of(cache)
    request = Request.create(cache, prompts, n=n, **options)
    sharding = None if mesh is None else BatchSharding.of(mesh, len(prompts), n)
    return GenerateStream(model, params, cache, request, len(prompts) * n, every, sharding)
