"""The requests of a run: reproducible from a seed, the same for every server.

Lengths and arrivals follow from the seed alone; token ids from the seed, the repetition and the level of load, so that
nothing that a server has kept of one level helps it in the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from jaxpaged.app.bench_serve.lengths import SHORTEST, Lengths

# What a stream of random numbers is for; part of its seed, so that no two are the same.
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
    """Seconds from the start of the level; None: when a client is free."""


@dataclass(frozen=True)
class Workload:
    """Requests of some lengths over some vocabulary."""

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
        room = self.context - self.shared_prefix
        # Request by request: the numbers that one takes do not depend on how many there are.
        return [self.lengths.draw(self._rng(_LENGTHS, i), 1, room)[0] for i in range(count)]

    def requests(
        self, count: int, *, repetition: int, level: int, rate: float | None = None
    ) -> list[RequestSpec]:
        """The requests of one level of load; ``rate`` (requests a second) makes arrivals a Poisson process."""
        rng = self._rng(_TOKENS, repetition, level)
        prefix = self._draw(rng, self.shared_prefix)
        # Other first tokens, as long as the vocabulary has them: no two prompts begin alike.
        firsts = rng.permutation(self.vocab)
        arrivals: Sequence[float | None] = [None] * count
        if rate is not None:
            gaps = self._rng(_ARRIVALS).exponential(1.0, count)
            arrivals = (np.cumsum(gaps) / rate).tolist()
        return [
            RequestSpec(
                i,
                (*prefix, int(firsts[i % self.vocab]), *self._draw(rng, num_prompt - 1)),
                num_output,
                arrivals[i],
            )
            for i, (num_prompt, num_output) in enumerate(self.pairs(count))
        ]

    def warmup(self, count: int, repetition: int) -> list[RequestSpec]:
        """Short requests of other tokens."""
        rng = self._rng(_WARMUP, repetition)
        num_output = min(_WARMUP_OUTPUT, self.context // 2)
        room = self.context - num_output
        return [
            RequestSpec(i, self._draw(rng, max(1, min(p, room, 64 * SHORTEST))), num_output)
            for i, (p, _) in enumerate(self.pairs(count))
        ]

    def as_dict(self, count: int) -> dict[str, Any]:
        """What a reader needs to make the same requests, and what came of it for ``count`` of them."""
        pairs = self.pairs(count)
        prompts, outputs = zip(*pairs, strict=True)
        room = self.context - self.shared_prefix
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
                "at_the_limit": sum(p == room // 2 or p + o == room for p, o in pairs),
            },
            "ignore_eos": True,
            "temperature": 0,
        }

    def _rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *purpose))

    def _draw(self, rng: np.random.Generator, count: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, self.vocab, count).tolist())
