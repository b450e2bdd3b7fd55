"""The requests of bench-serve: a seed gives them again, and lengths are distributed as stated."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxpaged.app.bench_serve.lengths import Fixed, ShareGPTLike, Uniform, parse_lengths
from jaxpaged.app.bench_serve.workload import Workload


def workload(**changes):
    return Workload(**({"lengths": Uniform(2, 9), "seed": 5, "vocab": 97, "context": 64} | changes))


def test_a_seed_gives_the_same_requests_and_another_seed_others():
    first = workload().requests(12, repetition=1, level=2)
    assert first == workload().requests(12, repetition=1, level=2)
    assert first != workload(seed=6).requests(12, repetition=1, level=2)
    assert all(0 <= token < 97 for request in first for token in request.prompt)


def test_levels_and_repetitions_differ_in_tokens_alone():
    """A prefix cached in one level is no help in the next."""
    runs = [workload().requests(12, repetition=r, level=n) for r, n in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple((len(r.prompt), r.num_output) for r in requests) for requests in runs}) == 1
    assert len({tuple(r.prompt for r in requests) for requests in runs}) == 3
    # Fewer requests are the beginning of more.
    assert workload().pairs(40)[:12] == workload().pairs(12)


def test_prompts_share_the_prefix_and_nothing_else():
    requests = workload(shared_prefix=20).requests(30, repetition=0, level=0)
    assert len({r.prompt[:20] for r in requests}) == 1
    assert len({r.prompt[20] for r in requests}) == 30
    assert [len(r.prompt) - 20 for r in requests] == [p for p, _ in workload().pairs(30)]
    other = workload(shared_prefix=20).requests(1, repetition=0, level=1)
    assert other[0].prompt[:20] != requests[0].prompt[:20]


def test_sharegpt_like_is_the_lognormal_that_it_says():
    limit, scale = 2**22, 0.5
    lengths = ShareGPTLike(scale)
    pairs = np.array(lengths.sample(np.random.default_rng(0), 40_000, limit))
    for column, name, mean in zip(pairs.T, ("prompt", "output"), (161.31, 337.99), strict=True):
        stated = lengths.as_dict()[name]["lognormal"]
        assert math.exp(stated["mu"] + stated["sigma"] ** 2 / 2) == pytest.approx(mean * scale)
        assert column.mean() == pytest.approx(mean * scale, rel=0.03)
        assert np.median(column) == pytest.approx(math.exp(stated["mu"]), rel=0.03)
        assert np.log(column).std() == pytest.approx(stated["sigma"], rel=0.03)
        assert column.min() >= 4


def test_sharegpt_like_is_cut_to_the_context():
    pairs = ShareGPTLike().sample(np.random.default_rng(0), 2000, 200)
    assert all(4 <= p <= 100 and o >= 4 and p + o <= 200 for p, o in pairs)
    assert any(p == 100 for p, _ in pairs) and any(p + o == 200 for p, o in pairs)
    with pytest.raises(ValueError, match="the context has 7 tokens"):
        ShareGPTLike().sample(np.random.default_rng(0), 1, 7)


def test_other_lengths_are_never_cut():
    pairs = Uniform(3, 5).sample(np.random.default_rng(0), 500, 10)
    assert set(np.array(pairs).flat) == {3, 4, 5}
    assert Fixed(7, 3).sample(np.random.default_rng(0), 2, 10) == [(7, 3), (7, 3)]
    for lengths in (Uniform(3, 5), Fixed(7, 3)):
        with pytest.raises(ValueError, match=r"up to 10 tokens .* the context has 9"):
            lengths.sample(np.random.default_rng(0), 2, 9)


def test_arrivals_are_a_poisson_process_of_the_rate():
    requests = workload().requests(4000, repetition=0, level=0, rate=4.0)
    gaps = np.diff([0.0, *(r.arrival for r in requests)])
    assert gaps.mean() == pytest.approx(0.25, rel=0.05) and gaps.std() == pytest.approx(0.25, rel=0.05)
    faster = workload().requests(4000, repetition=0, level=1, rate=8.0)
    assert [r.arrival for r in faster] == pytest.approx([r.arrival / 2 for r in requests])


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("sharegpt-like", ShareGPTLike()),
        ("sharegpt-like:0.25", ShareGPTLike(0.25)),
        ("uniform 4:9", Uniform(4, 9)),
        ("fixed:128:1", Fixed(128, 1)),
    ],
)
def test_lengths_by_name(text, lengths):
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sharegpt",
        "sharegpt-like:0",
        "sharegpt-like:nan",
        "uniform:9:4",
        "fixed:8",
        "fixed:0:4",
        "fixed:a:b",
    ],
)
def test_lengths_that_are_none(text):
    with pytest.raises(ValueError, match="is not sharegpt-like"):
        parse_lengths(text)
