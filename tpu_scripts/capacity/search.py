"""How many replicas of a kind serve a load within its limits: replicas simulated, and the smallest number found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxpaged_model.config import ModelConfig

from jaxpaged.pages.formats import formats_of
from jaxpaged.sharding.mesh import MeshError
from tpu_scripts.capacity.chips import Assumptions, Chip, page_bytes, step_times, weight_bytes
from tpu_scripts.capacity.load import DAY, Load, Requests
from tpu_scripts.capacity.replica import Limits, Outcome, Replica, simulate

_WARM_UP = 180.0
"""Seconds before a window whose requests fill the replica and do not count; most requests take less."""
_LEAST_COUNTED, _MOST_DAYS = 2000, 100
"""A window is simulated on as many days as give so many requests, so that a p95 says something."""
_ALONE = 400
"""Requests that have a replica for themselves, to see whether it can be quick enough at all."""
_SHARE = 0.95
PERCENTILES = (50, 95, 99)
BINS = 144
"""Of a day: 10 minutes each."""


class Impossible(Exception):
    """A kind of replica that cannot serve the load, however many there are; one line says why."""


@dataclass(frozen=True)
class Server:
    """Flags of the server, as ``jaxpaged serve`` has them."""

    k_format: str = "bf16"
    v_format: str = "bf16"
    page_size: int = 32
    slots: int = 256
    batch_tokens: int = 512
    decode_steps: int = 8
    prefix_cache: bool = True


@dataclass(frozen=True)
class Targets:
    """What 95% of the requests must not exceed, in seconds."""

    ttft: float = 1.0
    """From the arrival to the first token, the queue included."""
    tpot: float = 0.05
    """(last token - first) / (tokens - 1) of a request."""


@dataclass(frozen=True)
class Setup:
    """A kind of replica: ``tensor`` devices of a chip."""

    chip: Chip
    tensor: int
    replica: Replica
    weight_bytes: float
    """Of each device."""
    page_bytes: int
    """Of each device."""
    peak_row: float
    """Seconds that one token takes at the data sheet's operations, attention and head aside."""

    @property
    def name(self) -> str:
        return f"{self.chip.name} tp={self.tensor}"

    def chips(self, replicas: int) -> int:
        """Chips that so many replicas take."""
        return -(-replicas * self.tensor // self.chip.devices)


def make_setup(
    config: ModelConfig, chip: Chip, tensor: int, server: Server, given: Assumptions, longest: int
) -> Setup:
    """What a device's memory has room for.

    Args:
      config: the whole model.
      chip: see there.
      tensor: devices of a replica.
      server: its flags.
      given: efficiencies and the like.
      longest: tokens that a pool must have room for.

    Raises:
      Impossible: the model cannot be dealt so, or there is no room for it and a pool.
      ValueError: the page formats do not fit the model.
    """
    if tensor > chip.most_linked * chip.devices:
        raise Impossible(f"{chip.most_linked * chip.devices} devices are linked")
    try:
        local = config.shard(tensor)
    except MeshError as error:
        raise Impossible(str(error)) from None
    size, beside = page_bytes(
        local, chip, k_format=server.k_format, v_format=server.v_format,
        page_size=server.page_size, slots=server.slots,
    )  # fmt: skip
    weights = weight_bytes(config, tensor, given.weight_bits)
    memory = chip.hbm / chip.devices * given.utilization
    num_pages = math.floor((memory - weights - beside) / size)
    needed = -(-longest // server.page_size)
    if num_pages < needed:
        raise Impossible(
            f"weights take {weights / 1e9:.1f} of {memory / 1e9:.1f} GB, and the longest request {needed} pages of "
            f"{size / 2**20:.2f} MiB"
        )
    seals = any(
        storage.has_residual for storage in formats_of(server.k_format, server.k_format, server.v_format)
    )
    times = step_times(config, chip, tensor, size / server.page_size, given)
    return Setup(
        chip,
        tensor,
        Replica(
            times,
            num_pages,
            server.page_size,
            server.slots,
            server.batch_tokens,
            server.decode_steps,
            server.prefix_cache,
            shares_tails=not seals,
        ),
        weights,
        size,
        times.row * given.compute_efficiency,
    )


@dataclass(frozen=True)
class Result:
    """Calculated for one replica of so many, in the window."""

    replicas: int
    counted: int
    """Requests that arrived in the window, all simulated days together."""
    ttft: tuple[float, ...]
    """Seconds, at PERCENTILES; infinite where the run was given up."""
    tpot: tuple[float, ...]
    peak_pages: int
    preemptions: float
    """For each 1,000 requests."""
    evictions: int
    busy: float
    """Share of the time in which the device computes; near 1 as soon as somebody always decodes."""
    running: float
    """Requests that run, on average over the time."""
    operations: float
    """Share of the data sheet's operations that layers need for each token once; no rows that only fill a program."""
    cached: float
    """Share of the prompts' tokens that were in the pool already."""

    def meets(self, targets: Targets) -> bool:
        p95 = PERCENTILES.index(95)
        return self.ttft[p95] <= targets.ttft and self.tpot[p95] <= targets.tpot


def latencies(requests: Requests, outcome: Outcome) -> tuple[np.ndarray, np.ndarray]:
    """Seconds to the first token and per token, of the requests that count; requests of one token have no second."""
    several = requests.counted & (requests.output > 1)
    tpot = (outcome.finish - outcome.first)[several] / (requests.output[several] - 1)
    return (outcome.first - requests.arrival)[requests.counted], tpot


def _percentiles(values: Sequence[np.ndarray], given_up: bool) -> tuple[float, ...]:
    together = np.concatenate(values)
    if given_up:
        return (math.inf,) * len(PERCENTILES)
    return tuple(np.percentile(together, PERCENTILES).tolist() if len(together) else [0.0] * len(PERCENTILES))


def summary(setup: Setup, replicas: int, runs: Sequence[tuple[Requests, Outcome]]) -> Result:
    """What came of the days of a window."""
    given_up = any(outcome.given_up for _, outcome in runs)
    ttft, tpot = zip(*(latencies(*run) for run in runs), strict=True)
    total = max(1, sum(len(requests) for requests, _ in runs))
    seconds = max(1e-9, sum(o.end - o.begin for _, o in runs))
    prompts = max(1, sum(int(requests.prompt.sum()) for requests, _ in runs))
    return Result(
        replicas,
        sum(int(requests.counted.sum()) for requests, _ in runs),
        _percentiles(ttft, given_up),
        _percentiles(tpot, given_up),
        max(outcome.peak_pages for _, outcome in runs),
        1000 * sum(outcome.preemptions for _, outcome in runs) / total,
        sum(outcome.evictions for _, outcome in runs),
        sum(o.busy for _, o in runs) / seconds,
        sum(float(np.nansum(o.finish - o.begun)) for _, o in runs) / seconds,
        sum(o.useful_tokens for _, o in runs) * setup.peak_row / seconds,
        sum(outcome.cached_tokens for _, outcome in runs) / prompts,
    )  # fmt: skip


@dataclass(frozen=True)
class Search:
    """A load, its limits, and the window around its peak in which they are to be met."""

    load: Load
    targets: Targets
    window: float = 1800.0
    """Seconds, the peak in their middle; at most a day."""

    @property
    def _window(self) -> tuple[float, float]:
        middle = self.load.peak_hour * 3600
        return middle - self.window / 2, middle + self.window / 2

    def evaluate(self, setup: Setup, replicas: int, *, to_the_end: bool = True) -> Result:
        """One of ``replicas`` in the window; given up as soon as the limits are missed unless ``to_the_end``."""
        begin, end = self._window
        expected = self.load.expected(begin, end) / replicas
        days = min(_MOST_DAYS, max(1, math.ceil(_LEAST_COUNTED / max(expected, 1e-9))))
        draws = [
            self.load.requests(begin, end, replicas=replicas, warm_up=_WARM_UP, day=day)
            for day in range(days)
        ]
        limits = None
        if not to_the_end:
            counted = sum(int(requests.counted.sum()) for requests in draws)
            # With one more the 95th percentile lies beyond them, however it is interpolated.
            most = counted - 1 - math.floor(_SHARE * max(0, counted - 1))
            limits = Limits(self.targets.ttft, self.targets.tpot, most)
        runs = []
        for requests in draws:
            outcome = simulate(setup.replica, requests, prefix_tokens=self.load.prefix_tokens, limits=limits)
            runs.append((requests, outcome))
            if outcome.given_up:
                break
        return summary(setup, replicas, runs)

    def alone(self, setup: Setup) -> Result:
        """Requests that meet nobody."""
        seconds = _ALONE / max(self.load.rate(np.array([self.load.peak_hour * 3600]))[0], 1e-9)
        draw = self.load.requests(self.load.peak_hour * 3600, self.load.peak_hour * 3600 + seconds)
        apart = replace(draw, arrival=1e5 * np.arange(1, len(draw) + 1))
        outcome = simulate(setup.replica, apart, prefix_tokens=self.load.prefix_tokens)
        return summary(setup, 1, [(apart, outcome)])

    def fewest(self, setup: Setup) -> Result:
        """The smallest number of replicas that meets the targets, while one less does not.

        Raises:
          Impossible: not even a request alone is served in time.
        """
        targets = self.targets
        alone = self.alone(setup)
        if not alone.meets(targets):
            p95 = PERCENTILES.index(95)
            raise Impossible(
                f"p95 of requests that meet nobody: {1e3 * alone.ttft[p95]:,.0f} ms to the first token, "
                f"{1e3 * alone.tpot[p95]:,.1f} ms a token"
            )
        low, high = self._least(setup) - 1, self._least(setup)
        while not (found := self.evaluate(setup, high, to_the_end=False)).meets(targets):
            low, high = high, high + max(1, high // 2)
        while high - low > 1:
            middle = (low + high) // 2
            result = self.evaluate(setup, middle, to_the_end=False)
            if result.meets(targets):
                high, found = middle, result
            else:
                low = middle
        return found

    def _least(self, setup: Setup) -> int:
        """Replicas that the operations alone would keep busy at the peak; fewer cannot do."""
        begin, end = self._window
        requests = self.load.requests(begin, begin + min(end - begin, 600.0))
        if not len(requests):
            return 1
        times, prompt = setup.replica.times, requests.prompt.mean()
        if setup.replica.prefix_cache:
            prompt -= self.load.prefix_tokens * (requests.prefix >= 0).mean()
        seconds = (prompt + requests.output.mean() - 1) * times.row
        rate = self.load.expected(begin, end) / (end - begin)
        # Half of it: a queue at the peak may empty behind it.
        return max(1, math.floor(rate * seconds / 2))

    def day(self, setup: Setup, replicas: int) -> dict[str, Any]:
        """One replica's whole day: for each of BINS, most pages held, most waiting, and running on average."""
        pages, waiting, running = (np.zeros(BINS) for _ in range(3))

        def watch(began: float, lasted: float, waits: int, runs: int, used: int) -> None:
            i = min(BINS - 1, int(began / DAY * BINS))
            pages[i], waiting[i] = max(pages[i], used), max(waiting[i], waits)
            running[i] += runs * lasted

        requests = self.load.requests(0.0, DAY, replicas=replicas)
        outcome = simulate(setup.replica, requests, prefix_tokens=self.load.prefix_tokens, watch=watch)
        return {
            "hours": ((np.arange(BINS) + 0.5) * 24 / BINS).tolist(),
            "pool": (pages / setup.replica.num_pages).tolist(),
            "waiting": waiting.tolist(),
            "running": (running * BINS / DAY).tolist(),
            "requests": len(requests),
            "preemptions": outcome.preemptions,
            "busy": outcome.busy / DAY,
        }
