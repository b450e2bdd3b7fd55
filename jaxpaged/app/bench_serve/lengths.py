"""Named distributions of prompt and output lengths."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

PROMPT_MEAN, OUTPUT_MEAN = 161.31, 337.99
"""Tokens; the means of ShareGPT in the PagedAttention paper (arXiv:2309.06180, Fig. 11)."""
SIGMA = 1.0
"""Standard deviation of the logarithm. The paper gives means only; 1.0 has its long tail (95% below 3.1 means)."""
SHORTEST = 4
"""Shortest length; vLLM's benchmark drops shorter ones."""
DEFAULT = "sharegpt-like"
_LONGEST = 2**24


class Lengths(Protocol):
    """A distribution of pairs of lengths."""

    def sample(self, rng: np.random.Generator, count: int, limit: int) -> list[tuple[int, int]]:
        """Prompt and output tokens of ``count`` requests.

        Raises:
          ValueError: the sum of both may exceed ``limit``.
        """
        ...

    def as_dict(self) -> dict[str, Any]:
        """Name and parameters, for JSON."""
        ...


@dataclass(frozen=True)
class ShareGPTLike:
    """Lognormal, with the means of ShareGPT's conversations times ``scale``."""

    scale: float = 1.0

    def sample(self, rng: np.random.Generator, count: int, limit: int) -> list[tuple[int, int]]:
        if limit < 2 * SHORTEST:
            raise ValueError(
                f"the context has {limit} tokens for prompt and output; {DEFAULT} needs {2 * SHORTEST}"
            )
        prompts = rng.lognormal(_mu(PROMPT_MEAN * self.scale), SIGMA, count)
        outputs = rng.lognormal(_mu(OUTPUT_MEAN * self.scale), SIGMA, count)
        pairs = []
        for prompt, output in zip(prompts, outputs, strict=True):
            # Clipped, not sampled again, so that a seed gives the same requests whatever the context is.
            p = min(max(round(prompt), SHORTEST), limit // 2)
            pairs.append((p, min(max(round(output), SHORTEST), limit - p)))
        return pairs

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": DEFAULT,
            "scale": self.scale,
            "prompt": {"lognormal": {"mu": _mu(PROMPT_MEAN * self.scale), "sigma": SIGMA}},
            "output": {"lognormal": {"mu": _mu(OUTPUT_MEAN * self.scale), "sigma": SIGMA}},
            "clipped_to": f"prompt {SHORTEST} to limit / 2, output {SHORTEST} to limit - prompt",
        }


@dataclass(frozen=True)
class Uniform:
    """Prompts and outputs from ``low`` to ``high``, both included."""

    low: int
    high: int

    def sample(self, rng: np.random.Generator, count: int, limit: int) -> list[tuple[int, int]]:
        _check_limit(2 * self.high, limit)
        pairs = rng.integers(self.low, self.high, (count, 2), endpoint=True)
        return [(int(p), int(o)) for p, o in pairs]

    def as_dict(self) -> dict[str, Any]:
        return {"name": "uniform", "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Fixed:
    """The same lengths for all requests."""

    prompt: int
    output: int

    def sample(self, rng: np.random.Generator, count: int, limit: int) -> list[tuple[int, int]]:
        _check_limit(self.prompt + self.output, limit)
        return [(self.prompt, self.output)] * count

    def as_dict(self) -> dict[str, Any]:
        return {"name": "fixed", "prompt": self.prompt, "output": self.output}


def parse_lengths(text: str) -> Lengths:
    """Parses ``sharegpt-like``, ``sharegpt-like:0.5``, ``uniform:16:256`` or ``fixed:128:64``.

    Raises:
      ValueError: it is none of these.
    """
    name, *words = re.split(r"[:\s]+", text.strip())
    try:
        if name == DEFAULT and len(words) <= 1:
            scale = float(words[0]) if words else 1.0
            if 0 < scale <= 1000 and math.isfinite(scale):
                return ShareGPTLike(scale)
        elif name in ("uniform", "fixed") and len(words) == 2:
            a, b = (int(word) for word in words)
            if min(a, b) >= 1 and max(a, b) <= _LONGEST:
                if name == "fixed":
                    return Fixed(a, b)
                if a <= b:
                    return Uniform(a, b)
    except ValueError:
        pass
    raise ValueError(
        f"{text!r} is not sharegpt-like, sharegpt-like:SCALE, uniform:LOW:HIGH or fixed:PROMPT:OUTPUT"
    )


def _mu(mean: float) -> float:
    """Mean of the logarithm, for a lognormal distribution with mean ``mean``."""
    return math.log(mean) - SIGMA**2 / 2


def _check_limit(most: int, limit: int) -> None:
    if most > limit:
        raise ValueError(f"--lengths has up to {most} tokens of prompt and output; the context has {limit}")
