"""The pool of a jaxpaged server during the load, sampled from ``GET /pool``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

PERIOD = 0.2
"""Seconds between two samples."""
_LONGEST_LOOK = 5.0


@dataclass(frozen=True)
class PoolSample:
    """One sample of the pool."""

    running: int
    waiting: int
    pages_used: int
    pages_cached: int
    pages_free: int
    waste: float
    preemptions: int
    """Since the server started."""

    @classmethod
    def of(cls, pool: dict[str, Any]) -> PoolSample:
        """Parses the server's answer."""
        return cls(**{name: pool[name] for name in cls.__dataclass_fields__})


async def look(http: httpx.AsyncClient) -> PoolSample | None:
    """Samples the pool; None if the server has none, or does not answer."""
    try:
        response = await http.get("/pool", timeout=_LONGEST_LOOK)
        return PoolSample.of(response.json()) if response.status_code == httpx.codes.OK else None
    except (httpx.HTTPError, ValueError, KeyError, TypeError):  # the last three: another server's /pool
        return None


async def watch(http: httpx.AsyncClient, samples: list[PoolSample], time_limit: float) -> None:
    """Appends five samples per second, until it is cancelled or ``time_limit`` seconds have passed."""
    for _ in range(int(time_limit / PERIOD) + 1):
        sample = await look(http)
        if sample is None:
            if not samples:
                return
        else:
            samples.append(sample)
        await asyncio.sleep(PERIOD)


def summarize(samples: Sequence[PoolSample]) -> dict[str, Any] | None:
    """Means and maxima over the samples with running requests; None without any."""
    busy = [sample for sample in samples if sample.running]
    if not busy:
        return None

    def mean(name: str) -> float:
        return float(sum(getattr(sample, name) for sample in busy) / len(busy))

    return {
        "samples": len(busy),
        "running_mean": mean("running"),
        "running_max": max(sample.running for sample in busy),
        "waiting_mean": mean("waiting"),
        "waste": mean("waste"),
        "pages_used_mean": mean("pages_used"),
        "pages_used_max": max(sample.pages_used for sample in busy),
        "pages_cached_mean": mean("pages_cached"),
        "pages_free_mean": mean("pages_free"),
        "preemptions": samples[-1].preemptions - samples[0].preemptions,
    }
