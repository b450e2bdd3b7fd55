"""Throughput, latencies and goodput from records of requests, and medians of repetitions.

Times to the first token count from a request's arrival. TPOT is a request's ``(last - first) / (tokens - 1)``, last
being the time of the finish reason. ITL: a chunk of k tokens that comes g seconds after the one before counts
as k gaps of g / k; tokens that come with the first have none. If chunks do not report their tokens (by
log-probabilities or ids), a request's tokens are spread evenly over its chunks. Percentiles interpolate linearly.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from jaxpaged.app.bench_serve.client import Record

PERCENTILES = (50, 90, 95, 99)
METRICS = ("ttft", "tpot", "itl", "e2e", "normalized", "chunk_gap")
"""``normalized`` is the end-to-end time per output token, the PagedAttention paper's latency."""


def tokens_of(record: Record) -> int:
    """Output tokens as the server reports them; else those of its chunks, at least one each."""
    if record.completion_tokens is not None:
        return record.completion_tokens
    return sum(count or 1 for _, count in record.chunks)


def token_counts(record: Record) -> list[int]:
    """Tokens of each chunk."""
    reported = [count for _, count in record.chunks if count is not None]
    if len(reported) == len(record.chunks):
        return reported
    total, chunks = tokens_of(record), len(record.chunks)
    # Rounded up, so that the first chunk always has one.
    ends = [-(-total * i // chunks) for i in range(chunks + 1)]
    return [end - start for start, end in pairwise(ends)]


def inter_token_times(record: Record) -> list[float]:
    """Seconds before each token after the first chunk."""
    times: list[float] = []
    before = record.chunks[0][0]
    for (at, _), count in list(zip(record.chunks, token_counts(record), strict=True))[1:]:
        if count:  # a chunk that only completes a character of the one before adds its time to the next
            times += [(at - before) / count] * count
            before = at
    return times


def latencies(record: Record) -> dict[str, float]:
    """Latencies of one answered request in seconds; no ``tpot`` for a single token."""
    assert record.finished is not None
    first, last = record.chunks[0][0], record.chunks[-1][0]
    if record.ended is not None:
        last = max(last, record.ended)
    num_tokens = tokens_of(record)
    times = {"ttft": first - record.arrival, "e2e": last - record.arrival}
    if num_tokens:
        times["normalized"] = times["e2e"] / num_tokens
    if num_tokens > 1:
        times["tpot"] = (last - first) / (num_tokens - 1)
    return times


def meets(record: Record, limits: Mapping[str, float]) -> bool:
    """True if a request was answered within all limits, in milliseconds."""
    if not record.ok:
        return False
    times = latencies(record)
    return all(1e3 * times.get(name, 0.0) <= limit for name, limit in limits.items())


def summarize(records: Sequence[Record], limits: Mapping[str, float]) -> dict[str, Any]:
    """All metrics of one level of load; latencies in milliseconds.

    Args:
      limits: of the goodput, by metric, in milliseconds; if empty, no goodput.
    """
    done = [record for record in records if record.ok]
    failed = [record for record in records if not record.ok]
    ends = [record.finished for record in records if record.finished is not None]
    seconds = max(ends) - min(record.arrival for record in records) if ends else 0.0
    times = [latencies(record) for record in done]
    values: dict[str, list[float]] = {
        name: [t[name] for t in times if name in t] for name in ("ttft", "tpot", "e2e", "normalized")
    }
    values["itl"] = [gap for record in done for gap in inter_token_times(record)]
    values["chunk_gap"] = [b - a for record in done for (a, _), (b, _) in pairwise(record.chunks)]
    generated = sum(map(tokens_of, done))
    read = sum(_prompt_tokens(record) for record in done)
    cached = sum(record.cached_tokens for record in done)
    good = sum(meets(record, limits) for record in records)

    def a_second(count: int) -> float:
        return count / seconds if seconds else 0.0

    return {
        "requests": len(records),
        "answered": len(done),
        "errors": len(failed),
        "first_error": failed[0].error or "no answer" if failed else None,
        "retries": sum(record.retries for record in records),
        "other_lengths": sum(tokens_of(r) != r.num_output or _prompt_tokens(r) != r.num_prompt for r in done),
        "seconds": seconds,
        "prompt_tokens": read,
        "output_tokens": generated,
        "cached_tokens": cached,
        "prefix_hit_rate": cached / read if read else 0.0,
        "output_tokens_per_second": a_second(generated),
        "total_tokens_per_second": a_second(generated + read),
        "requests_per_second": a_second(len(done)),
        "tokens_per_chunk": generated / max(1, sum(len(record.chunks) for record in done)),
        "itl_counted": "as reported"
        if all(c is not None for r in done for _, c in r.chunks)
        else "spread evenly",
        **{f"{name}_ms": statistics_of([1e3 * v for v in values[name]]) for name in METRICS},
        "goodput": {"share": good / len(records), "requests_per_second": a_second(good)} if limits else None,
    }


def statistics_of(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles; None without values."""
    if not values:
        return None
    points = np.percentile(values, PERCENTILES)
    return {"mean": float(np.mean(values))} | {
        f"p{p}": float(v) for p, v in zip(PERCENTILES, points, strict=True)
    }


def over_repetitions(runs: Sequence[Any]) -> Any:
    """Merges repetitions: numbers become ``{"median", "min", "max"}``, of other values the first is kept."""
    first = next((run for run in runs if run is not None), None)
    if isinstance(first, dict):
        some = [run for run in runs if run is not None]
        return {name: over_repetitions([run.get(name) for run in some]) for name in first}
    numbers = [run for run in runs if isinstance(run, int | float) and not isinstance(run, bool)]
    if not numbers:
        return first
    return {"median": statistics.median(numbers), "min": min(numbers), "max": max(numbers)}


def median(row: Mapping[str, Any], *path: str) -> float | None:
    """Median of ``over_repetitions`` by its path; None if it was not measured."""
    value: Any = row
    for name in (*path, "median"):
        value = value.get(name) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


def _prompt_tokens(record: Record) -> int:
    return record.num_prompt if record.prompt_tokens is None else record.prompt_tokens
