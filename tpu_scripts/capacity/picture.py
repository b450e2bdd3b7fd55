"""Draws what ``plan_capacity`` calculated: latencies against replicas, and a day of one of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tpu_scripts.capacity.search import PERCENTILES, Result, Setup, Targets

_COLOURS = ("#2f6fb0", "#c8552b", "#3c8c5a", "#7a4fa3", "#b08a2f", "#444444")
_P95 = PERCENTILES.index(95)


def draw(
    curves: Sequence[tuple[Setup, int, Sequence[Result]]],
    day: tuple[Setup, int, Mapping[str, Any]],
    targets: Targets,
    title: str,
    path: Path,
) -> None:
    """Two panels of latencies, two of a day.

    Args:
      curves: a kind of replica, the number of them that was found, and what came of several numbers.
      day: a kind of replica, how many, and what ``Search.day`` gave.
      targets: drawn as lines.
      title: above all.
      path: .svg or .png.
    """
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "jaxpaged", "font.size": 9, "font.family": "sans-serif"})
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6.6), layout="constrained")
    for axis, field, limit, factor, name in (
        (axes[0, 0], "ttft", targets.ttft, 1.0, "p95 time to first token, s"),
        (axes[0, 1], "tpot", targets.tpot, 1e3, "p95 time per output token, ms"),
    ):
        for (setup, fewest, results), colour in zip(curves, _COLOURS, strict=False):
            x = [setup.chips(result.replicas) for result in results]
            y = [factor * getattr(result, field)[_P95] for result in results]
            label = f"{setup.name}: {fewest} replica{'s' * (fewest > 1)}, {setup.chips(fewest)} chips"
            axis.plot(x, y, marker="o", ms=3, lw=1.2, color=colour, label=label)
            found = [result.replicas for result in results].index(fewest)
            axis.plot(x[found], y[found], "o", ms=8, mfc="none", mec=colour)
        axis.axhline(factor * limit, ls="--", lw=1, color="#222222")
        axis.annotate(
            "target", (1, factor * limit), (-2, 2), ha="right", fontsize=8, textcoords="offset points",
            xycoords=axis.get_yaxis_transform(),
        )  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(*_ticks(*axis.get_xlim(), whole=True))
        axis.set_yticks(*_ticks(*axis.get_ylim()))
        axis.minorticks_off()
        axis.set_xlabel("chips; ring: the fewest that meet both targets")
        axis.set_ylabel(name)
        axis.grid(color="#dddddd", lw=0.6)
    setup, replicas, values = day
    hours = values["hours"]
    pool, queue = axes[1]
    pool.fill_between(
        hours, [100 * share for share in values["pool"]], step="mid", color="#2f6fb0", alpha=0.35, lw=0
    )
    pool.set_ylim(0, 100)
    pool.set_ylabel("% of the pages, most in 10 minutes")
    queue.step(
        hours, values["running"], where="mid", color="#3c8c5a", lw=1.2, label="running, mean of 10 minutes"
    )
    queue.step(
        hours, values["waiting"], where="mid", color="#c8552b", lw=1.0, label="waiting, most in 10 minutes"
    )
    queue.set_ylim(0, 1.15 * max(1.0, *values["running"], *values["waiting"]))
    queue.set_ylabel("requests in one replica")
    queue.legend(frameon=False, fontsize=8, loc="upper left")
    count = f"one of {replicas}" if replicas > 1 else "the only one"
    for axis, name in ((pool, f"pool of {setup.replica.num_pages:,} pages"), (queue, "requests")):
        axis.set_title(f"{setup.name}, {count}: {name} over the day", fontsize=9)
        axis.set_xlim(0, 24)
        axis.set_xticks(range(0, 25, 3))
        axis.set_xlabel("hour of the day")
        axis.grid(color="#dddddd", lw=0.6)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=130)
    pyplot.close(figure)


def _ticks(low: float, high: float, *, whole: bool = False) -> tuple[list[float], list[str]]:
    """Numbers to write at a logarithmic axis, 4 to 12 of them."""
    for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 3, 5, 7), (1, 2, 5), (1,)):
        numbers = [step * 10.0**power for power in range(-3, 7) for step in steps]
        found = [n for n in numbers if low <= n <= high and (n == int(n) or not whole)]
        if len(found) <= 12:
            break
    return found, [f"{n:,g}" for n in found]


def counts_around(fewest: int) -> list[int]:
    """Numbers of replicas to draw."""
    return sorted({max(1, math.ceil(fewest * share)) for share in (0.5, 0.7, 0.85, 1, 1.25, 1.6, 2)})
