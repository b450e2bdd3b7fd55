"""The soak, for a few seconds; `make soak` is the long one."""

import asyncio

import pytest
from soak import soak

pytestmark = pytest.mark.slow


def test_every_request_ends_rightly_and_every_page_comes_back():
    report = asyncio.run(soak(requests=160, clients=60, pages=20, rounds=2, limit_seconds=150))
    assert not report.wrong
    assert report.outcomes["right"] > 40 and report.outcomes["constrained, valid"] > 20
    assert report.outcomes["429"] > 0
    assert report.stats is not None
    assert report.stats.preemptions > 0
