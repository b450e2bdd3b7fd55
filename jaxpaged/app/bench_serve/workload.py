"""Requests of a benchmark, reproducible from a seed and the same for every server.

Lengths and arrivals depend on the seed alone; token ids also on the repetition and the level of load, so that no
prefix cached in one level helps in the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from jaxpaged.app.bench_serve.lengths import SHORTEST, Lengths

# Part of the seed of each stream of random numbers.
_LENGTHS, _ARRIVALS, _TOKENS, _WARMUP = range(4)
_WARMUP_OUTPUT = 16


@dataclass(frozen=True)
class RequestSpec:
    """One request to send."""

    index: int
    prompt: tuple[int, ...]
    num_output: int
    """Tokens to generate, exactly."""
    arrival: float | None = None
    """Seconds from the start of the level; None = when a client is free."""


@dataclass(frozen=True)
class Workload:
    """A distribution of requests."""

    lengths: Lengths
    seed: int
    vocab: int
    context: int
    """Tokens that prompt and output together may have."""
    shared_prefix: int = 0
    """Tokens that all prompts of a level begin with; a prompt's own tokens follow."""

    def pairs(self, count: int) -> list[tuple[int, int]]:
        """Prompt (without the shared prefix) and output tokens of the first ``count`` requests.

        A smaller count gives the beginning of a larger one.

        Raises:
          ValueError: they do not fit the context.
        """
        limit = self.context - self.shared_prefix
        # One by one, so that a request does not depend on their number.
        return [self.lengths.sample(self._rng(_LENGTHS, i), 1, limit)[0] for i in range(count)]

    def requests(
        self, count: int, *, repetition: int, level: int, rate: float | None = None
    ) -> list[RequestSpec]:
        """Requests of one level of load; ``rate`` (requests per second) makes arrivals a Poisson process."""
        rng = self._rng(_TOKENS, repetition, level)
        prefix = self._random_tokens(rng, self.shared_prefix)
        # Different first tokens, as far as the vocabulary goes, so that prompts share no prefix.
        firsts = rng.permutation(self.vocab)
        arrivals: Sequence[float | None] = [None] * count
        if rate is not None:
            gaps = self._rng(_ARRIVALS).exponential(1.0, count)
            arrivals = (np.cumsum(gaps) / rate).tolist()
        return [
            RequestSpec(
                i,
                (*prefix, int(firsts[i % self.vocab]), *self._random_tokens(rng, num_prompt - 1)),
                num_output,
                arrivals[i],
            )
            for i, (num_prompt, num_output) in enumerate(self.pairs(count))
        ]

    def warmup(self, count: int, repetition: int) -> list[RequestSpec]:
        """Short requests with other tokens."""
        rng = self._rng(_WARMUP, repetition)
        num_output = min(_WARMUP_OUTPUT, self.context // 2)
        limit = self.context - num_output
        return [
            RequestSpec(i, self._random_tokens(rng, max(1, min(p, limit, 64 * SHORTEST))), num_output)
            for i, (p, _) in enumerate(self.pairs(count))
        ]

    def as_dict(self, count: int) -> dict[str, Any]:
        """Parameters of the workload, and statistics of its first ``count`` requests."""
        pairs = self.pairs(count)
        prompts, outputs = zip(*pairs, strict=True)
        limit = self.context - self.shared_prefix
        return {
            "lengths": self.lengths.as_dict(),
            "seed": self.seed,
            "vocab": self.vocab,
            "context": self.context,
            "shared_prefix": self.shared_prefix,
            "drawn": {
                "requests": count,
                "prompt_mean": fmean(prompts),
                "prompt_max": max(prompts),
                "output_mean": fmean(outputs),
                "output_max": max(outputs),
                "at_the_limit": sum(p == limit // 2 or p + o == limit for p, o in pairs),
            },
            "ignore_eos": True,
            "temperature": 0,
        }

    def _rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *purpose))

    def _random_tokens(self, rng: np.random.Generator, count: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, self.vocab, count).tolist())
