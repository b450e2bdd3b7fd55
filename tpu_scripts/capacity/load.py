"""Requests of a day, drawn from a stated distribution: when they come, how long they are, and how they begin."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DAY = 86400.0
"""Seconds."""


@dataclass(frozen=True)
class Lengths:
    """Lognormal numbers of tokens, rounded up, never above ``cap``."""

    median: float
    sigma: float
    """Of the logarithm; 0: all are the median."""
    cap: int

    def of(self, normal: np.ndarray) -> np.ndarray:
        """i64: what standard normal numbers come to."""
        tokens = np.ceil(self.median * np.exp(self.sigma * normal))
        return np.clip(tokens, 1, self.cap).astype(np.int64)


@dataclass(frozen=True)
class Requests:
    """R requests in the order of their arrival."""

    arrival: np.ndarray
    """f64[R]: seconds."""
    prompt: np.ndarray
    """i64[R]: tokens, the shared beginning included."""
    output: np.ndarray
    """i64[R]: tokens to generate, at least 1."""
    prefix: np.ndarray
    """i64[R]: which shared beginning; -1 = none."""
    counted: np.ndarray
    """bool[R]: whether it counts for percentiles; the others fill the replica before."""

    def __len__(self) -> int:
        return len(self.arrival)


@dataclass(frozen=True)
class Load:
    """A day of requests; every day has the same curve and other draws.

    Arrivals are a Poisson process whose rate follows a von Mises curve, ``exp(k cos(2 pi (t - peak_hour) / 24 h))``:
    one smooth hump a day, k such that its top is ``peak`` times the mean.
    """

    per_day: float = 1e6
    peak: float = 2.0
    """The highest rate over the mean one; 1: the same all day."""
    peak_hour: float = 15.0
    prompt: Lengths = Lengths(800, 1.0, 4096)
    """Of what a request has for itself."""
    output: Lengths = Lengths(250, 0.8, 2048)
    shared: float = 0.6
    """Share of the requests that begin with one of the system prompts."""
    prefixes: int = 8
    """System prompts, each as likely as the others."""
    prefix_tokens: int = 1024
    """Of each of them."""
    seed: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest request that can be drawn, its output included."""
        return self.prefix_tokens * (self.shared > 0) + self.prompt.cap + self.output.cap

    def rate(self, seconds: np.ndarray | float) -> np.ndarray:
        """Requests a second at ``seconds`` of the day."""
        k = _concentration(self.peak)
        angle = 2 * np.pi * (np.asarray(seconds) / DAY - self.peak_hour / 24)
        return self.per_day / DAY * np.exp(k * np.cos(angle)) / np.i0(k)

    def expected(self, begin: float, end: float) -> float:
        """Requests between two times of the day, in seconds, on average."""
        return float(self._cumulative(begin, end)[1][-1])

    def _cumulative(self, begin: float, end: float) -> tuple[np.ndarray, np.ndarray]:
        times = np.linspace(begin, end, max(2, round((end - begin) / 60) + 1))
        rates = self.rate(times)
        steps = (rates[1:] + rates[:-1]) / 2 * np.diff(times)
        return times, np.concatenate([[0.0], np.cumsum(steps)])

    def requests(
        self, begin: float, end: float, *, replicas: int = 1, warm_up: float = 0.0, day: int = 0
    ) -> Requests:
        """What one of ``replicas`` gets between two times of the day, if each request goes to any of them alike.

        Another number of replicas thins out or crowds the same requests in the same order, so that two numbers differ
        by the load and not by the draw.

        Args:
          begin, end: seconds of the day.
          replicas: that share the load.
          warm_up: seconds before ``begin`` whose requests do not count.
          day: another number draws another day.
        """
        times, cumulative = self._cumulative(begin - warm_up, end)
        cumulative = cumulative / replicas
        # One generator for each column: request i is the same, however many there are.
        when, prompts, outputs, prefixes, shares = (
            np.random.default_rng([self.seed, day, column]) for column in range(5)
        )
        expected = cumulative[-1]
        # A unit Poisson process, run through the inverse of the expected count.
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
    """k of a von Mises curve whose top is ``peak`` times its mean: exp(k) / I0(k) = peak."""
    low, high = 0.0, 500.0
    for _ in range(100):
        k = (low + high) / 2
        low, high = (k, high) if np.exp(k) / np.i0(k) < peak else (low, k)
    return low
