"""The capacity planner: its simulation loses nothing, decides as the engine does, and agrees with queueing theory."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine_kit import FEW_PAGES, SLOTS, greedy, make_engine, prompt
from jaxpaged_model import tiny
from jaxpaged_model.checkpoint.loading import read_config
from jaxpaged_model.metadata import ModelError
from script_kit import run, table
from toy_transformer import PAGE_SIZE

from jaxpaged import PagedKVCache
from jaxpaged.sharding.mesh import local_kv_heads
from tpu_scripts.capacity.chips import (
    CHIPS,
    MODELS,
    Assumptions,
    StepTimes,
    model_shape,
    page_bytes,
    step_times,
)
from tpu_scripts.capacity.load import DAY, Lengths, Load, Requests
from tpu_scripts.capacity.replica import Limits, Replica, simulate
from tpu_scripts.capacity.search import Impossible, Search, Server, Targets, latencies, make_setup

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
HOST = 1e-3
TIMES = StepTimes(
    weights=5e-3, kv_token=2e-7, row=2e-5, logits=1e-6, pair=1e-9, reduce_row=1e-7, reduce=1e-4, host=HOST
)
SMALL = Load(
    per_day=3e5,
    prompt=Lengths(120, 0.8, 400),
    output=Lengths(60, 0.7, 200),
    prefixes=3,
    prefix_tokens=100,
)
POOLS = {"roomy": 1000, "tight": 60}


@functools.cache
def served(pool):
    """Ten minutes of a replica: ``(replica, requests, outcome, looks at the queue)``."""
    requests = SMALL.requests(15 * 3600, 15 * 3600 + 600)
    replica = Replica(TIMES, POOLS[pool], slots=32, batch_tokens=128)
    looks = []
    outcome = simulate(
        replica, requests, prefix_tokens=SMALL.prefix_tokens, watch=lambda *look: looks.append(look)
    )
    return replica, requests, outcome, np.array(looks)


# --- the load -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peak", [1.0, 2.0, 6.0])
def test_a_day_has_its_requests_and_its_peak(peak):
    load = replace(SMALL, peak=peak, per_day=200000)
    rates = load.rate(np.linspace(0, DAY, 1441)[:-1])
    assert rates.mean() * DAY == pytest.approx(200000, rel=1e-6)
    assert rates.max() == pytest.approx(peak * 200000 / DAY, rel=1e-6)
    arrival = load.requests(0, DAY).arrival
    assert len(arrival) == pytest.approx(200000, abs=5 * np.sqrt(200000))
    counts, _ = np.histogram(arrival, bins=24, range=(0, DAY))
    expected = [load.expected(h * 3600, (h + 1) * 3600) for h in range(24)]
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected))


def test_lengths_are_as_stated():
    requests = replace(SMALL, per_day=2e6, shared=0.25).requests(0, 36000)
    begins = requests.prefix >= 0
    own = requests.prompt - SMALL.prefix_tokens * begins
    assert begins.mean() == pytest.approx(0.25, abs=0.01)
    assert set(requests.prefix[begins]) == {0, 1, 2}
    for tokens, said in ((own, SMALL.prompt), (requests.output, SMALL.output)):
        assert np.median(tokens) == pytest.approx(said.median, rel=0.02)
        assert tokens.min() >= 1 and tokens.max() == said.cap
        below = tokens < said.cap  # of a lognormal cut off there, as many as there should be
        assert np.mean(tokens <= said.median * np.exp(-said.sigma)) == pytest.approx(0.159, abs=0.01)
        assert 1 - below.mean() == pytest.approx(
            np.mean(
                np.random.default_rng(0).normal(size=10**6)
                > np.log((said.cap - 1) / said.median) / said.sigma
            ),
            abs=0.01,
        )


def test_more_replicas_get_the_same_requests_more_slowly():
    few, many = (SMALL.requests(0, 7200, replicas=n) for n in (1, 4))
    count = len(many)
    assert count == pytest.approx(len(few) / 4, rel=0.1)
    for name in ("prompt", "output", "prefix"):
        np.testing.assert_array_equal(getattr(few, name)[:count], getattr(many, name))
    assert np.all(few.arrival[:count] < many.arrival)


# --- the replica --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
def test_every_request_ends_once_with_its_tokens(pool):
    replica, requests, outcome, looks = served(pool)
    assert not outcome.aborted and not np.isnan(outcome.finish).any()
    np.testing.assert_array_equal(outcome.generated, requests.output)
    assert np.all(requests.arrival <= outcome.begun)
    assert np.all(outcome.begun < outcome.first) and np.all(outcome.first <= outcome.finish)
    assert looks[:, 4].max() <= outcome.peak_pages <= replica.num_pages
    assert looks[:, 3].max() <= replica.slots
    assert looks[-1, 4] == 0, "pages are still held"
    assert (outcome.preemptions > 0) == (pool == "tight")
    # A request is in order of its arrival until it has begun.
    assert np.all(np.diff(outcome.begun) >= 0)


def test_littles_law():
    """Requests in the system, summed over time, are the times that they spend there; nothing else is counted."""
    _, requests, outcome, looks = served("roomy")
    began, lasted, waiting, running, _ = looks.T
    assert np.sum(lasted * running) == pytest.approx(np.sum(outcome.finish - outcome.begun), rel=1e-9)
    # Who comes during a look is seen at its end; the others are counted as those that wait.
    ends = began + lasted
    look = np.searchsorted(ends, requests.arrival)
    unseen = np.where(requests.arrival > began[look], ends[look] - requests.arrival, 0.0)
    waited = np.sum(outcome.begun - requests.arrival)
    assert waited == pytest.approx(np.sum(lasted * waiting) + np.sum(unseen), rel=1e-9)
    assert outcome.busy + HOST * len(looks) == pytest.approx(np.sum(lasted), rel=1e-9)


def test_work_is_conserved():
    """Tokens computed are those of prompts and outputs, without those found in the pool."""
    _, requests, outcome, _ = served("roomy")
    total = int(np.sum(requests.prompt + requests.output - 1))
    assert outcome.useful_tokens == total - outcome.cached_tokens
    most = int(np.sum(requests.prefix >= 0)) * SMALL.prefix_tokens
    assert 0.9 * most < outcome.cached_tokens <= most


def test_shared_pages_are_held_once():
    """Everybody runs at once behind one beginning: its pages, and each one's own."""
    count, own = 8, 40
    requests = Requests(
        np.concatenate([[0.0], np.full(count, 10.0)]),
        np.full(count + 1, 96 + own),
        np.full(count + 1, 24),
        np.zeros(count + 1, np.int64),
        np.ones(count + 1, bool),
    )
    pages = {}
    for cache in (True, False):
        replica = Replica(TIMES, 200, slots=16, batch_tokens=512, prefix_cache=cache)
        outcome = simulate(replica, requests, prefix_tokens=96)
        pages[cache] = outcome.peak_pages
        assert outcome.cached_tokens == (96 * count if cache else 0)
    assert pages == {True: 3 + count * 2, False: count * 5}


def test_one_server_of_constant_service_is_m_d_1():
    """Pollaczek and Khinchine: the mean wait is rho s / (2 (1 - rho)) for Poisson arrivals and a service time s."""
    service = 0.5
    times = StepTimes(service, 0, 0, 0, 0, 0, 0, 0)
    for rho in (0.3, 0.6, 0.8):
        load = Load(
            per_day=rho / service * DAY,
            peak=1.0,
            prompt=Lengths(64, 0, 64),
            output=Lengths(1, 0, 1),
            shared=0.0,
            seed=3,
        )
        requests = load.requests(0, 2 * DAY / rho / 10)
        outcome = simulate(Replica(times, 4, slots=1, batch_tokens=64), requests)
        np.testing.assert_allclose(outcome.finish - outcome.begun, service, rtol=1e-9)
        wait = np.mean(outcome.begun - requests.arrival)
        assert wait == pytest.approx(rho * service / (2 * (1 - rho)), rel=0.05), rho
        assert outcome.busy / (outcome.end - outcome.begin) == pytest.approx(rho, rel=0.03)


def test_a_run_is_aborted_when_the_targets_are_missed():
    _, requests, outcome, _ = served("tight")
    ttft, tpot = latencies(requests, outcome)
    replica = Replica(TIMES, POOLS["tight"], slots=32, batch_tokens=128)
    late = Limits(float(np.percentile(ttft, 50)), float(tpot.max()), len(ttft) // 20)
    assert simulate(replica, requests, prefix_tokens=SMALL.prefix_tokens, limits=late).aborted
    kept = Limits(float(ttft.max()), float(tpot.max()) + 1e-9, 0)
    assert not simulate(replica, requests, prefix_tokens=SMALL.prefix_tokens, limits=kept).aborted


def test_a_request_that_never_fits_is_refused():
    requests = Requests(np.zeros(1), np.array([90]), np.array([40]), np.array([-1]), np.ones(1, bool))
    with pytest.raises(ValueError, match="may need 5 pages, the whole pool has 4"):
        simulate(Replica(TIMES, 4), requests)


@pytest.mark.parametrize("prefix", [0, 2 * PAGE_SIZE])
def test_it_decides_as_the_engine_does(engine, prefix):
    """The same requests, all at once, in a pool for few: equal counts of steps, looks and the like, and one order."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        count, names = 24, ("steps", "preemptions", "evictions", "prefix_hits")
        own, outputs = rng.integers(2, 28, count), rng.integers(1, 28, count)
        which = (
            np.where(rng.random(count) < 0.6, rng.integers(0, 2, count), -1) if prefix else np.full(count, -1)
        )
        prompts = own + prefix * (which >= 0)
        outputs = np.maximum(1, np.minimum(outputs, engine.n_ctx - prompts))
        begins = [(60 + i, *prompt(1000 + i, prefix - 1)) for i in range(2 if prefix else 0)]
        engine.drop_prefix_cache()
        before = engine.stats()
        for i in range(count):  # no two begin alike by chance
            text = (begins[which[i]] if which[i] >= 0 else ()) + (i, *prompt(i, int(own[i]) - 1))
            engine.add_request(greedy(str(i), text, int(outputs[i])))
        ended, looks = [], 0
        while engine.has_work:
            looks += 1
            ended += [int(output.request_id) for output in engine.step() if output.finish_reason]
        after = engine.stats()
        seen = []
        outcome = simulate(
            Replica(
                replace(TIMES, weights=1e-5),
                engine.device.cache.num_pages,
                PAGE_SIZE,
                SLOTS,
                engine.config.max_batch_tokens,
                engine.config.decode_steps,
            ),
            Requests(np.zeros(count), prompts, outputs, which, np.ones(count, bool)),
            prefix_tokens=prefix,
            watch=lambda *look, seen=seen: seen.append(look),
        )
        found = outcome.steps, outcome.preemptions, outcome.evictions, outcome.cached_tokens
        wanted = tuple(getattr(after, name) - getattr(before, name) for name in names)
        if (
            prefix
        ):  # the engine also shares a page that somebody is about to fill, which saves a page and its tokens
            assert np.all(np.abs(np.subtract(found, wanted)) <= [0, 0, 1, PAGE_SIZE - 1])
        else:
            assert found == wanted
        assert len(seen) == looks and outcome.preemptions > 0
        assert np.argsort(outcome.finish, kind="stable").tolist() == ended


@pytest.fixture(scope="module")
def engine():
    return make_engine(num_pages=FEW_PAGES, lockstep=True, max_waiting=100)


# --- time of a step and size of the pool --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensor", "formats"),
    [
        ("smollm2-135m", 1, ("bf16", "bf16")),
        ("smollm2-135m", 3, ("q8_0", "q4_0")),
        ("qwen3-8b", 16, ("bf16", "bf16")),
        ("qwen3-8b", 2, ("q4_k", "q4_k")),
    ],
)
def test_pages_are_as_large_as_the_caches(name, tensor, formats):
    config, (k_format, v_format) = MODELS[name], formats
    heads = local_kv_heads(config.num_kv_heads, tensor)
    assert heads == max(1, config.num_kv_heads // tensor)
    cache = PagedKVCache.create(
        num_layers=config.num_layers, num_kv_heads=heads, head_dim=config.head_dim, num_pages=2, max_seqs=3,
        page_size=16, k_dtype=k_format, v_dtype=v_format,
    )  # fmt: skip
    found = page_bytes(
        config.shard(tensor), CHIPS["h100"], k_format=k_format, v_format=v_format, page_size=16, slots=3
    )
    assert found == (cache.bytes_per_page, cache.bytes_of_staging)
    if formats == ("bf16", "bf16"):
        assert found[0] == 2 * 2 * config.num_layers * heads * config.head_dim * 16
        tpu = page_bytes(
            config.shard(tensor), CHIPS["v6e"], k_format=k_format, v_format=v_format, page_size=16, slots=3
        )
        assert tpu == found, "rows on lanes hold the same numbers"


def test_a_step_is_the_roofline():
    """By hand: Llama 3.1 8B on one H100 that reaches everything."""
    chip, config = CHIPS["h100"], MODELS["llama-3.1-8b"]
    assert config.num_parameters() == 8030261248
    times = step_times(config, chip, 1, 131072, Assumptions(1.0, 1.0, 1.0))
    read = 2 * (8030261248 - 128256 * 4096)  # of the embedding next to nothing
    assert times.step(1, 1, 1000, 1000) == pytest.approx((read + 1000 * 131072) / 3.35e12, rel=1e-9)
    in_layers = 8030261248 - 2 * 128256 * 4096 - 4096
    operations = 2 * 4096 * in_layers + 4 * 4096 * 32 * 4096 * 2048
    assert times.step(4096, 0, 4096, 4096 * 2048) == pytest.approx(operations / 989e12, rel=1e-9)
    four = step_times(config, chip, 4, 131072 / 4, Assumptions(1.0, 1.0, 1.0, reduce_seconds=0.0))
    moved = 64 * 2 * 3 / 4 * 4096 * 2 / 450e9
    assert four.reduce_row == pytest.approx(moved, rel=1e-9) and times.reduce_row == times.reduce == 0
    assert four.row == pytest.approx(times.row / 4, rel=1e-3)


def test_the_memory_holds_weights_and_pool():
    given, server = Assumptions(), Server()
    setup = make_setup(MODELS["llama-3.1-70b"], CHIPS["v6e"], 16, server, given, 7168)
    memory = 32 * 2**30 * 0.9
    used = setup.weight_bytes + setup.replica.num_pages * setup.page_bytes
    assert memory - setup.page_bytes < used <= memory
    assert setup.page_bytes == 2 * 2 * 80 * 1 * 128 * 32, "8 KV heads on 16 devices: one each"
    with pytest.raises(Impossible, match=r"weights take 141\.1 of 72\.0 GB"):
        make_setup(MODELS["llama-3.1-70b"], CHIPS["h100"], 1, server, given, 7168)
    with pytest.raises(Impossible, match="tensor=3 does not divide 64 query heads"):
        make_setup(MODELS["llama-3.1-70b"], CHIPS["v6e"], 3, server, given, 7168)
    with pytest.raises(Impossible, match="8 devices are linked"):
        make_setup(MODELS["llama-3.1-70b"], CHIPS["h100"], 16, server, given, 7168)
    half = make_setup(MODELS["llama-3.1-8b"], CHIPS["tpu7x"], 1, server, given, 7168)
    assert [half.chips(n) for n in (1, 2, 3)] == [1, 1, 2], "a chip is two devices"


def test_models_come_from_files(tmp_path):
    assert model_shape(str(tiny.PATH)) == replace(read_config(tiny.PATH), name=tiny.PATH.name)
    shape = {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    }  # fmt: skip
    file = tmp_path / "config.json"
    file.write_text(json.dumps(shape))
    assert replace(model_shape(str(file)), name="llama-3.1-70b") == MODELS["llama-3.1-70b"]
    file.write_text("[]")
    with pytest.raises(ModelError, match="an object is needed"):
        model_shape(str(file))


# --- the search and the script ------------------------------------------------------------------------------


def test_the_fewest_replicas_are_found_and_more_are_no_worse():
    load = replace(SMALL, per_day=2e6)
    search = Search(load, Targets(ttft=0.4, tpot=0.04), window=600)
    setup = make_setup(MODELS["smollm2-135m"], CHIPS["v5e"], 1, Server(slots=32), Assumptions(), load.longest)
    slow = replace(setup, replica=replace(setup.replica, times=TIMES, num_pages=200))
    found = search.fewest(slow)
    assert found.replicas > 1 and found.meets(search.targets)
    assert not search.evaluate(slow, found.replicas - 1).meets(search.targets)
    results = [search.evaluate(slow, found.replicas + n) for n in (0, 2, 5, 10)]
    assert found.ttft == results[0].ttft, "giving up early changes nothing of a run that meets the targets"
    for fewer, more in itertools.pairwise(results):
        assert more.ttft[1] <= 1.05 * fewer.ttft[1] and more.tpot[1] <= 1.02 * fewer.tpot[1]
        assert more.peak_pages <= fewer.peak_pages
    with pytest.raises(Impossible, match="requests one at a time"):
        Search(load, Targets(ttft=1e-3, tpot=0.04), window=600).fewest(slow)


ARGUMENTS = [
    *("-m", "smollm2-135m", "--chips", "v5e,h100", "--tp", "1,3", "--requests", "20000", "--window", "10"),
    *("--prompt", "200:0.5:600", "--output", "30:0.5:90", "--prefix-tokens", "256"),
    *("-ctk", "q8_0", "--price", "v5e=1"),
]


def test_a_plan_is_a_table_and_the_same_each_time(monkeypatch, capsys, tmp_path):
    files = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    said = []
    for file, seed in zip(files, (1, 1, 2), strict=True):
        assert run(monkeypatch, "capacity", *ARGUMENTS, "--seed", seed, "--json", file) == 0
        said.append(capsys.readouterr())
    assert said[0] == said[1] and said[0].out != said[2].out
    first, second, other = (json.loads(file.read_text()) for file in files)
    assert first["rows"] == second["rows"] != other["rows"] and first["calculated"] is True
    assert "calculated, not measured: smollm2-135m" in said[0].out and not said[0].err
    rows = table(re.sub(r"\| p95 \| p99 \| TPOT", "| TTFT p95 | TTFT p99 | TPOT", said[0].out))
    assert [(row["chip"], row["tp"]) for row in rows] == [
        ("v5e", "1"),
        ("v5e", "3"),
        ("h100", "1"),
        ("h100", "3"),
    ]
    for row, values in zip(rows, first["rows"], strict=True):
        assert int(row["chips"]) == int(row["replicas"]) * int(row["tp"]) == values["chips"]
        assert float(row["TTFT p95"]) == pytest.approx(1e3 * values["ttft"]["p95"], abs=0.51)
        assert values["ttft"]["p50"] <= values["ttft"]["p95"] <= min(1.0, values["ttft"]["p99"])
        assert values["tpot"]["p95"] <= 0.05
        assert row["price a day"] == (f"{24 * values['chips']}" if row["chip"] == "v5e" else "")


def test_a_plan_is_drawn(monkeypatch, capsys, tmp_path):
    file, picture = tmp_path / "plan.json", tmp_path / "plan.svg"
    flags = ["--tp", "1", "--day", "h100:1", "--json", file]
    if importlib.util.find_spec("matplotlib"):
        flags += ["--plot", picture]
    assert run(monkeypatch, "capacity", *ARGUMENTS, *flags) == 0
    day = json.loads(file.read_text())["day"]
    assert (day["chip"], day["tp"]) == ("h100", 1) and max(day["pool"]) <= 1
    assert np.argmax(day["running"]) // 6 in range(12, 19), "the peak is at 15 h"
    assert picture.is_file() == ("--plot" in flags)
    capsys.readouterr()


def test_what_serves_nothing_is_said(monkeypatch, capsys):
    assert run(monkeypatch, "capacity", "--chips", "v5e", "--tp", "1") == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("left out: v5e tp=1: weights take 141.1 of 14.4 GB")
    assert said[1] == "nothing serves this load within these targets"


def test_it_teaches():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tpu_scripts.capacity", "--help"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr
    assert "python -m tpu_scripts.capacity" in done.stdout and "\nNeeds: " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["-m", "gpt-9"], "unknown model 'gpt-9': no such file, and known shapes are llama-3.1-8b, "),
        (["--chips", "v6e,v9"], "unknown chip 'v9'; known are v5e, v6e, "),
        (["--tp", "0"], "must be a positive integer, got '0'"),
        (["--requests", "many"], "must be a number from 1 to 1e+09, got 'many'"),
        (["--peak", "0.5"], "must be a number from 1 to 24, got '0.5'"),
        (["--prompt", "800"], "must be MEDIAN:SIGMA:MOST, such as 800:1:4096, got '800'"),
        (["--shared", "nan"], "must be a number from 0 to 1, got 'nan'"),
        (["--utilization", "1.2"], "must be a number from 0.01 to 1, got '1.2'"),
        (["--page-size", "24"], "page_size must be a power of two from 8 to 256"),
        (["-ctk", "int8"], "page format 'int8' is not known; known are f32, bf16, "),
        (["-m", "smollm2-135m", "--prompt", "800:1:8000"], "the longest request has 11072 tokens"),
        (["--price", "v9=1"], "unknown chip 'v9'"),
        (["--price", "v6e"], "must be a number from 0 to 1e+06, got ''"),
        (["--day", "v6e:5"], "--day v6e:5 is not among --chips and --tp"),
        (["--json", "nowhere/plan.json"], "cannot write nowhere/plan.json"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, arguments, complaint):
    assert run(monkeypatch, "capacity", *arguments) == 2
    said = capsys.readouterr()
    assert complaint in said.err and said.err.count("\n") == 1 and not said.out
