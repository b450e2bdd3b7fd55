"""Figure of the calculated capacity: latencies against chips, and a day of one replica."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tpu_scripts import common
from tpu_scripts.capacity.search import PERCENTILES, Result, Setup, Targets

_P95 = PERCENTILES.index(95)


def draw(
    curves: Sequence[tuple[Setup, int, Sequence[Result]]],
    day: tuple[Setup, int, Mapping[str, Any]],
    targets: Targets,
    title: str,
    path: Path,
) -> None:
    """Draws two panels of latencies and two of a day.

    Args:
      curves: kinds of replicas, their smallest number, and the results of several numbers.
      day: a kind of replica, their number, and the result of ``Search.day``.
      targets: drawn as lines.
      title: title of the figure.
      path: .svg or .png.
    """
    with common.figure(path, title, nrows=2, ncols=2, figsize=(10, 6.6)) as (figure, axes):
        _latencies(axes[0, 0], curves, "ttft", targets.ttft, 1.0, "p95 time to first token, s")
        _latencies(axes[0, 1], curves, "tpot", targets.tpot, 1e3, "p95 time per output token, ms")
        _day(*axes[1], *day)
        common.legend_below(figure, axes[0, 0], columns=3)


def _latencies(
    axis: Any,
    curves: Sequence[tuple[Setup, int, Sequence[Result]]],
    field: str,
    limit: float,
    factor: float,
    name: str,
) -> None:
    for (setup, fewest, results), colour in zip(curves, common.COLOURS, strict=False):
        x = [setup.chips(result.replicas) for result in results]
        y = [factor * getattr(result, field)[_P95] for result in results]
        label = f"{setup.name}: {fewest} replica{'s' * (fewest > 1)}, {setup.chips(fewest)} chips"
        axis.plot(x, y, marker="o", ms=3, lw=1.2, color=colour, label=label)
        found = [result.replicas for result in results].index(fewest)
        axis.plot(x[found], y[found], "o", ms=8, mfc="none", mec=colour)
    axis.axhline(factor * limit, ls="--", lw=1, color="#222222")
    style = {"ha": "right", "fontsize": 8, "textcoords": "offset points"}
    axis.annotate("target", (1, factor * limit), (-2, 2), xycoords=axis.get_yaxis_transform(), **style)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(*_ticks(*axis.get_xlim(), whole=True))
    axis.set_yticks(*_ticks(*axis.get_ylim()))
    axis.minorticks_off()
    axis.set_xlabel("chips; ring: the fewest that meet both targets")
    axis.set_ylabel(name)


def _day(pool: Any, queue: Any, setup: Setup, replicas: int, values: Mapping[str, Any]) -> None:
    hours, used = values["hours"], [100 * share for share in values["pool"]]
    pool.fill_between(hours, used, step="mid", color="#2f6fb0", alpha=0.35, lw=0)
    pool.set_ylim(0, 100)
    pool.set_ylabel("% of the pages, most in 10 minutes")
    lines = (("running", "mean of", "#3c8c5a"), ("waiting", "most in", "#c8552b"))
    for name, what, colour in lines:
        label = f"{name}, {what} 10 minutes"
        queue.step(hours, values[name], where="mid", color=colour, lw=1.1, label=label)
    queue.set_ylim(0, 1.15 * max(1.0, *values["running"], *values["waiting"]))
    queue.set_ylabel("requests in one replica")
    queue.legend(frameon=False, fontsize=8, loc="upper left")
    count = f"one of {replicas}" if replicas > 1 else "the only one"
    for axis, name in ((pool, f"pool of {setup.replica.num_pages:,} pages"), (queue, "requests")):
        axis.set_title(f"{setup.name}, {count}: {name} over the day")
        axis.set_xlim(0, 24)
        axis.set_xticks(range(0, 25, 3))
        axis.set_xlabel("hour of the day")


def _ticks(low: float, high: float, *, whole: bool = False) -> tuple[list[float], list[str]]:
    """Ticks and labels of a logarithmic axis, 4 to 12 of them."""
    for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 3, 5, 7), (1, 2, 5), (1,)):
        numbers = [step * 10.0**power for power in range(-3, 7) for step in steps]
        found = [n for n in numbers if low <= n <= high and (n == int(n) or not whole)]
        if len(found) <= 12:
            break
    return found, [f"{n:,g}" for n in found]


def counts_around(fewest: int) -> list[int]:
    """Numbers of replicas to simulate around the smallest."""
    return sorted({max(1, math.ceil(fewest * share)) for share in (0.5, 0.7, 0.85, 1, 1.25, 1.6, 2)})
