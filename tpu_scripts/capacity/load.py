"""Requests of a day, sampled from a stated distribution: arrivals, lengths, and shared prefixes."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from tpu_scripts.common import natural, number, option, positive

DAY = 86400.0
"""Seconds."""


@dataclass(frozen=True)
class Lengths:
    """Lognormal numbers of tokens, rounded up, at most ``cap``."""

    median: float
    sigma: float
    """Standard deviation of the logarithm; 0: all are the median."""
    cap: int

    def of(self, normal: np.ndarray) -> np.ndarray:
        """Lengths i64[...] of standard normal numbers."""
        tokens = np.ceil(self.median * np.exp(self.sigma * normal))
        return np.clip(tokens, 1, self.cap).astype(np.int64)

    @staticmethod
    def parse(text: str) -> Lengths:
        parts = text.split(":")
        if len(parts) != 3:
            raise argparse.ArgumentTypeError(f"must be MEDIAN:SIGMA:MOST, such as 800:1:4096, got {text!r}")
        return Lengths(number(1, 1e6)(parts[0]), number(0, 3)(parts[1]), positive(parts[2]))


@dataclass(frozen=True)
class Requests:
    """R requests in order of arrival."""

    arrival: np.ndarray
    """Seconds, f64[R]."""
    prompt: np.ndarray
    """Tokens, the shared prefix included, i64[R]."""
    output: np.ndarray
    """Tokens to generate, at least 1, i64[R]."""
    prefix: np.ndarray
    """Index of the shared prefix, -1 = none, i64[R]."""
    counted: np.ndarray
    """True for requests that count for percentiles; the others warm the replica up, bool[R]."""

    def __len__(self) -> int:
        return len(self.arrival)


@dataclass(frozen=True)
class Load:
    """A day of requests; every day has the same curve and other samples.

    Arrivals are a Poisson process whose rate follows a von Mises curve, ``exp(k cos(2 pi (t - peak_hour) / 24 h))``:
    one smooth peak a day, with k such that its maximum is ``peak`` times the mean.
    """

    per_day: float = option("--requests", "requests per day", number(1, 1e9), "1e6")
    peak: float = option("--peak", "highest rate of the day over the mean", number(1, 24), "2")
    peak_hour: float = option("--peak-hour", "hour of the highest rate", number(0, 24), "15")
    prompt: Lengths = option(
        "--prompt",
        "MEDIAN:SIGMA:MOST tokens of a request's own prompt, lognormal",
        Lengths.parse,
        "800:1:4096",
    )
    output: Lengths = option(
        "--output", "MEDIAN:SIGMA:MOST tokens to generate, lognormal", Lengths.parse, "250:0.8:2048"
    )
    shared: float = option("--shared", "share of requests with a system prompt", number(0, 1), "0.6")
    prefixes: int = option("--prefixes", "number of system prompts, equally likely", positive, "8")
    prefix_tokens: int = option("--prefix-tokens", "tokens of each system prompt", positive, "1024")
    seed: int = option("--seed", "of the samples", natural, "0")

    @property
    def longest(self) -> int:
        """Tokens of the longest possible request, its output included."""
        return self.prefix_tokens * (self.shared > 0) + self.prompt.cap + self.output.cap

    def rate(self, seconds: np.ndarray | float) -> np.ndarray:
        """Requests per second at ``seconds`` of the day."""
        k = _concentration(self.peak)
        angle = 2 * np.pi * (np.asarray(seconds) / DAY - self.peak_hour / 24)
        return self.per_day / DAY * np.exp(k * np.cos(angle)) / np.i0(k)

    def expected(self, begin: float, end: float) -> float:
        """Expected number of requests between two times of the day, in seconds."""
        return float(self._cumulative(begin, end)[1][-1])

    def _cumulative(self, begin: float, end: float) -> tuple[np.ndarray, np.ndarray]:
        times = np.linspace(begin, end, max(2, round((end - begin) / 60) + 1))
        rates = self.rate(times)
        steps = (rates[1:] + rates[:-1]) / 2 * np.diff(times)
        return times, np.concatenate([[0.0], np.cumsum(steps)])

    def requests(
        self, begin: float, end: float, *, replicas: int = 1, warm_up: float = 0.0, day: int = 0
    ) -> Requests:
        """Samples the requests of one of ``replicas`` between two times of the day, if each is equally likely.

        Another number of replicas thins or compresses the same requests in the same order, so that two numbers differ
        by the load and not by the sample.

        Args:
          begin, end: seconds of the day.
          replicas: number of replicas that share the load.
          warm_up: seconds before ``begin`` with requests that do not count.
          day: seed of the day.
        """
        times, cumulative = self._cumulative(begin - warm_up, end)
        cumulative = cumulative / replicas
        # A generator per column, so that request i does not depend on their number.
        when, prompts, outputs, prefixes, shares = (
            np.random.default_rng([self.seed, day, column]) for column in range(5)
        )
        expected = cumulative[-1]
        # A unit Poisson process through the inverse of the expected count.
        unit = np.cumsum(when.exponential(size=int(expected + 10 * np.sqrt(expected) + 50)))
        arrival = np.interp(unit[unit < expected], cumulative, times)
        count = len(arrival)
        begins = shares.random(count) < self.shared
        return Requests(
            arrival,
            self.prompt.of(prompts.normal(size=count)) + self.prefix_tokens * begins,
            self.output.of(outputs.normal(size=count)),
            np.where(begins, prefixes.integers(self.prefixes, size=count), -1),
            arrival >= begin,
        )


def _concentration(peak: float) -> float:
    """Concentration k of a von Mises curve with maximum ``peak`` times its mean: exp(k) / I0(k) = peak."""
    low, high = 0.0, 500.0
    for _ in range(100):
        k = (low + high) / 2
        low, high = (k, high) if np.exp(k) / np.i0(k) < peak else (low, k)
    return low
