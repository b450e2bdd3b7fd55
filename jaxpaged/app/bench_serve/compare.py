"""Comparison of two variants of a server: ratios at each level of load, and throughput at equal latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpaged.app.bench_serve.results import median

PAIRS = (("paged", "contiguous"), ("prefix", "no-prefix"))
"""Pairs of variants to compare, the baseline second."""
_OUTPUT = "output_tokens_per_second"
_LIMITED = ("ttft", "tpot")


def compare(rows: Sequence[Mapping[str, Any]], limits: Mapping[str, float]) -> list[dict[str, Any]]:
    """Compares each pair of variants that was measured.

    Args:
      rows: medians over repetitions, with ``variant`` and ``load``.
      limits: of p95 in milliseconds, by metric; if empty, see ``at_equal_latency``.
    """
    by_variant: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_variant.setdefault(row["variant"], []).append(row)
    return [
        _pair(first, second, by_variant[first], by_variant[second], limits)
        for first, second in PAIRS
        if first in by_variant and second in by_variant
    ]


def _pair(
    first: str,
    second: str,
    ours: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
    limits: Mapping[str, float],
) -> dict[str, Any]:
    by_load = {row["load"]: row for row in theirs}
    levels = [
        {
            "load": row["load"],
            "sequences_at_once": _ratio(row, by_load[row["load"]], "pool", "running_mean"),
            "sequences_at_once_max": _ratio(row, by_load[row["load"]], "pool", "running_max"),
            "output_tokens_per_second": _ratio(row, by_load[row["load"]], _OUTPUT),
            "ttft_p50": _ratio(row, by_load[row["load"]], "ttft_ms", "p50"),
            "tpot_p50": _ratio(row, by_load[row["load"]], "tpot_ms", "p50"),
            "waste": [median(row, "pool", "waste"), median(by_load[row["load"]], "pool", "waste")],
        }
        for row in ours
        if row["load"] in by_load
    ]
    return {
        "first": first,
        "second": second,
        "levels": levels,
        "most_sequences": _best_of(ours, theirs, "pool", "running_max"),
        "best_throughput": _best_of(ours, theirs, _OUTPUT),
        "equal_latency": at_equal_latency(ours, theirs, limits),
    }


def at_equal_latency(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], limits: Mapping[str, float]
) -> dict[str, Any] | None:
    """The largest throughput of each variant within p95 limits, and their ratio.

    Without limits, they are the p95 of the second variant at its largest throughput.
    """
    stated = dict(limits)
    if not stated:
        answering = [row for row in theirs if median(row, _OUTPUT)]
        if not answering:
            return None
        best = max(answering, key=lambda row: median(row, _OUTPUT) or 0.0)
        p95 = {name: median(best, f"{name}_ms", "p95") for name in _LIMITED}
        stated = {name: limit for name, limit in p95.items() if limit is not None}
    first, second = (_largest_within(rows, stated) for rows in (ours, theirs))
    return {
        "p95_limits_ms": stated,
        "limits_are": "as given" if limits else "those of the second at its largest throughput",
        "first": first,
        "second": second,
        "ratio": first[_OUTPUT] / second[_OUTPUT] if first and second else None,
    }


def _largest_within(rows: Sequence[Mapping[str, Any]], limits: Mapping[str, float]) -> dict[str, Any] | None:
    def keeps(row: Mapping[str, Any]) -> bool:
        # And no failed requests, which have no latency.
        values = {name: median(row, f"{name}_ms", "p95") for name in limits}
        return not median(row, "errors") and all(
            value is not None and value <= limits[name] for name, value in values.items()
        )

    kept = [(median(row, _OUTPUT) or 0.0, row["load"]) for row in rows if keeps(row)]
    if not kept:
        return None
    throughput, load = max(kept, key=lambda pair: pair[0])
    return {"load": load, _OUTPUT: throughput} if throughput else None


def _best_of(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], *path: str
) -> dict[str, Any] | None:
    """Largest value of each variant, and their ratio."""
    both = [[v for row in rows if (v := median(row, *path)) is not None] for rows in (ours, theirs)]
    if not all(both):
        return None
    first, second = map(max, both)
    return {"first": first, "second": second, "ratio": first / second if second else None}


def _ratio(one: Mapping[str, Any], other: Mapping[str, Any], *path: str) -> float | None:
    a, b = median(one, *path), median(other, *path)
    return a / b if a is not None and b else None
