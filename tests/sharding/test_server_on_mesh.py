"""The server on a mesh, under load: more clients than it has room for, and every answer that of one device."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "app" / "server"))

from soak import soak


def test_every_answer_under_load_is_that_of_one_device():
    one = asyncio.run(soak(requests=0, clients=0, pages=40, rounds=1))
    report = asyncio.run(
        soak(requests=120, clients=40, pages=40, rounds=2, mesh="data=2,tensor=2", limit_seconds=400)
    )
    assert report.alone == one.alone
    assert not report.wrong
    assert report.outcomes["right"] > 30 and report.outcomes["constrained, valid"] > 10
    assert report.outcomes["429"] > 0
    assert report.stats is not None
    assert report.stats.preemptions > 0
