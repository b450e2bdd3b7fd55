"""Smallest number of replicas that serve a load within its targets, found by simulating one of them."""

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
from tpu_scripts.common import number, option, page_size, positive

_WARM_UP = 180.0
"""Seconds before a window with requests that do not count; most requests take less."""
_LEAST_COUNTED, _MOST_DAYS = 2000, 100
"""A window is simulated on enough days for so many requests, so that a p95 is meaningful."""
_ALONE = 400
"""Requests that are simulated alone, to see if the targets can be met at all."""
_SHARE = 0.95
PERCENTILES = (50, 95, 99)
BINS = 144
"""Intervals of a day, 10 minutes each."""


class Impossible(Exception):
    """A kind of replica that cannot serve the load, whatever their number; the message is one line."""


@dataclass(frozen=True)
class Server:
    """Options of ``jaxpaged serve``."""

    k_format: str = option(
        "-ctk --cache-type-k", "format of keys: bf16, q8_0, fp8_e4m3, q4_0, ...", str, "bf16"
    )
    v_format: str = option("-ctv --cache-type-v", "format of values (default: as keys)", str, "")
    page_size: int = option("--page-size", "tokens per page", page_size, "32")
    slots: int = option("-np --parallel", "concurrent sequences of a replica", positive, "256")
    batch_tokens: int = option("-b --batch-size", "tokens of a step", positive, "512")
    decode_steps: int = option("--decode-steps", "steps between two schedulings, at most", positive, "8")
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "v_format", self.v_format or self.k_format)


@dataclass(frozen=True)
class Targets:
    """Latencies in seconds that 95% of the requests must not exceed."""

    ttft: float = option(
        "--ttft",
        "target of the p95 time to the first token, queue included, ms",
        number(1, 1e6, 1e-3),
        "1000",
    )
    tpot: float = option(
        "--tpot", "target of the p95 time per output token after the first, ms", number(0.1, 1e5, 1e-3), "50"
    )


@dataclass(frozen=True)
class Setup:
    """A kind of replica: ``tensor`` devices of a chip."""

    chip: Chip
    tensor: int
    replica: Replica
    weight_bytes: float
    """Bytes of weights per device."""
    page_bytes: int
    """Bytes of a page per device."""
    peak_row: float
    """Seconds of one token at the data sheet's operations, without attention and head."""

    @property
    def name(self) -> str:
        return f"{self.chip.name} tp={self.tensor}"

    def chips(self, replicas: int) -> int:
        """Number of chips of so many replicas."""
        return -(-replicas * self.tensor // self.chip.devices)


def make_setup(
    config: ModelConfig, chip: Chip, tensor: int, server: Server, given: Assumptions, longest: int
) -> Setup:
    """Sizes of a replica, with as many pages as fit into the memory.

    Args:
      config: the whole model.
      chip: the chip.
      tensor: devices of a replica.
      server: its options.
      given: efficiencies and so on.
      longest: tokens that a pool must be able to hold.

    Raises:
      Impossible: the model cannot be split so, or it and a pool do not fit.
      ValueError: the page formats do not fit the model.
    """
    if tensor > chip.most_linked * chip.devices:
        raise Impossible(f"{chip.most_linked * chip.devices} devices are linked")
    try:
        local = config.shard(tensor)
    except MeshError as error:
        raise Impossible(str(error)) from None
    formats = {"k_format": server.k_format, "v_format": server.v_format}
    size, residual = page_bytes(local, chip, **formats, page_size=server.page_size, slots=server.slots)
    weights = weight_bytes(config, tensor, given.weight_bits)
    memory = chip.hbm / chip.devices * given.utilization
    num_pages = math.floor((memory - weights - residual) / size)
    needed = -(-longest // server.page_size)
    if num_pages < needed:
        raise Impossible(
            f"weights take {weights / 1e9:.1f} of {memory / 1e9:.1f} GB, and the longest request {needed} pages of "
            f"{size / 2**20:.2f} MiB"
        )
    stored = formats_of(server.k_format, server.k_format, server.v_format)
    times = step_times(config, chip, tensor, size / server.page_size, given)
    replica = Replica(
        times,
        num_pages,
        server.page_size,
        server.slots,
        server.batch_tokens,
        server.decode_steps,
        server.prefix_cache,
        shares_tails=not any(storage.has_residual for storage in stored),
    )
    return Setup(chip, tensor, replica, weights, size, times.row * given.compute_efficiency)


@dataclass(frozen=True)
class Result:
    """Results of one replica of so many, in the window."""

    replicas: int
    counted: int
    """Requests that arrived in the window, over all simulated days."""
    ttft: tuple[float, ...]
    """Seconds at PERCENTILES; infinite if the run was aborted."""
    tpot: tuple[float, ...]
    peak_pages: int
    preemptions: float
    """Preemptions per 1,000 requests."""
    evictions: int
    busy: float
    """Share of the time in which the device computes; near 1 as soon as some request always decodes."""
    running: float
    """Running requests, average over time."""
    operations: float
    """Share of the data sheet's operations that is useful: the layers' for each token once, without padding."""
    cached: float
    """Share of prompt tokens found in the pool."""

    def meets(self, targets: Targets) -> bool:
        p95 = PERCENTILES.index(95)
        return self.ttft[p95] <= targets.ttft and self.tpot[p95] <= targets.tpot


def latencies(requests: Requests, outcome: Outcome) -> tuple[np.ndarray, np.ndarray]:
    """Seconds to the first token and per token of the counted requests; those of one token have no second."""
    several = requests.counted & (requests.output > 1)
    tpot = (outcome.finish - outcome.first)[several] / (requests.output[several] - 1)
    return (outcome.first - requests.arrival)[requests.counted], tpot


def _percentiles(values: Sequence[np.ndarray], aborted: bool) -> tuple[float, ...]:
    together = np.concatenate(values)
    if aborted:
        return (math.inf,) * len(PERCENTILES)
    return tuple(np.percentile(together, PERCENTILES).tolist() if len(together) else [0.0] * len(PERCENTILES))


def summary(setup: Setup, replicas: int, runs: Sequence[tuple[Requests, Outcome]]) -> Result:
    """Combines the days of a window."""
    aborted = any(outcome.aborted for _, outcome in runs)
    ttft, tpot = zip(*(latencies(*run) for run in runs), strict=True)
    outcomes = [outcome for _, outcome in runs]
    total = max(1, sum(len(requests) for requests, _ in runs))
    seconds = max(1e-9, sum(o.end - o.begin for o in outcomes))
    prompts = max(1, sum(int(requests.prompt.sum()) for requests, _ in runs))
    return Result(
        replicas,
        counted=sum(int(requests.counted.sum()) for requests, _ in runs),
        ttft=_percentiles(ttft, aborted),
        tpot=_percentiles(tpot, aborted),
        peak_pages=max(o.peak_pages for o in outcomes),
        preemptions=1000 * sum(o.preemptions for o in outcomes) / total,
        evictions=sum(o.evictions for o in outcomes),
        busy=sum(o.busy for o in outcomes) / seconds,
        running=sum(float(np.nansum(o.finish - o.begun)) for o in outcomes) / seconds,
        operations=sum(o.useful_tokens for o in outcomes) * setup.peak_row / seconds,
        cached=sum(o.cached_tokens for o in outcomes) / prompts,
    )


@dataclass(frozen=True)
class Search:
    """A load, its targets, and the window around its peak in which they have to be met."""

    load: Load
    targets: Targets
    window: float = option(
        "--window", "minutes around the peak in which the targets have to be met", number(1, 1440, 60), "30"
    )

    @property
    def _window(self) -> tuple[float, float]:
        middle = self.load.peak_hour * 3600
        return middle - self.window / 2, middle + self.window / 2

    def evaluate(self, setup: Setup, replicas: int, *, abort: bool = False) -> Result:
        """Simulates one of ``replicas`` in the window; with ``abort`` no further than to missing the targets."""
        begin, end = self._window
        expected = self.load.expected(begin, end) / replicas
        days = min(_MOST_DAYS, max(1, math.ceil(_LEAST_COUNTED / max(expected, 1e-9))))
        sampled = [
            self.load.requests(begin, end, replicas=replicas, warm_up=_WARM_UP, day=day)
            for day in range(days)
        ]
        limits = None
        if abort:
            counted = sum(int(requests.counted.sum()) for requests in sampled)
            # One more, and the 95th percentile is above them, however it is interpolated.
            most = counted - 1 - math.floor(_SHARE * max(0, counted - 1))
            limits = Limits(self.targets.ttft, self.targets.tpot, most)
        runs = []
        for requests in sampled:
            outcome = simulate(setup.replica, requests, prefix_tokens=self.load.prefix_tokens, limits=limits)
            runs.append((requests, outcome))
            if outcome.aborted:
                break
        return summary(setup, replicas, runs)

    def alone(self, setup: Setup) -> Result:
        """Simulates requests one at a time."""
        seconds = _ALONE / max(self.load.rate(np.array([self.load.peak_hour * 3600]))[0], 1e-9)
        requests = self.load.requests(self.load.peak_hour * 3600, self.load.peak_hour * 3600 + seconds)
        apart = replace(requests, arrival=1e5 * np.arange(1, len(requests) + 1))
        outcome = simulate(setup.replica, apart, prefix_tokens=self.load.prefix_tokens)
        return summary(setup, 1, [(apart, outcome)])

    def fewest(self, setup: Setup) -> Result:
        """Finds the smallest number of replicas that meets the targets.

        Raises:
          Impossible: not even a single request is served in time.
        """
        targets = self.targets
        alone = self.alone(setup)
        if not alone.meets(targets):
            p95 = PERCENTILES.index(95)
            raise Impossible(
                f"p95 of requests one at a time: {1e3 * alone.ttft[p95]:,.0f} ms to the first token, "
                f"{1e3 * alone.tpot[p95]:,.1f} ms a token"
            )
        low, high = self._least(setup) - 1, self._least(setup)
        while not (found := self.evaluate(setup, high, abort=True)).meets(targets):
            low, high = high, high + max(1, high // 2)
        while high - low > 1:
            middle = (low + high) // 2
            result = self.evaluate(setup, middle, abort=True)
            if result.meets(targets):
                high, found = middle, result
            else:
                low = middle
        return found

    def _least(self, setup: Setup) -> int:
        """Lower bound of the number of replicas, from the operations at the peak."""
        begin, end = self._window
        requests = self.load.requests(begin, begin + min(end - begin, 600.0))
        if not len(requests):
            return 1
        times, prompt = setup.replica.times, requests.prompt.mean()
        if setup.replica.prefix_cache:
            prompt -= self.load.prefix_tokens * (requests.prefix >= 0).mean()
        seconds = (prompt + requests.output.mean() - 1) * times.row
        rate = self.load.expected(begin, end) / (end - begin)
        # Half of it: a queue at the peak may drain after it.
        return max(1, math.floor(rate * seconds / 2))

    def day(self, setup: Setup, replicas: int) -> dict[str, Any]:
        """Simulates one replica's day: per bin the most pages held, the most waiting, and the mean running."""
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
