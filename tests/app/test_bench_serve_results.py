"""The figures of bench-serve, against numbers made by hand for a scripted server; errors, retries, comparisons."""

from __future__ import annotations

from collections import Counter

import httpx
import pytest
from scripted_server import SCRIPT, Stub, run, specs

from jaxpaged.app.bench_serve import watch
from jaxpaged.app.bench_serve.client import Record, retry_after
from jaxpaged.app.bench_serve.compare import compare
from jaxpaged.app.bench_serve.load import Load
from jaxpaged.app.bench_serve.results import (
    inter_token_times,
    over_repetitions,
    statistics_of,
    summarize,
    token_counts,
)


def test_figures_of_one_request():
    (record,) = run(Stub(SCRIPT), Load(clients=1), specs(1))
    row = summarize([record], {})
    assert row["ttft_ms"] == pytest.approx(dict.fromkeys(("mean", "p50", "p90", "p95", "p99"), 500))
    assert row["tpot_ms"]["p50"] == pytest.approx(500 / 4)
    assert row["e2e_ms"]["p50"] == pytest.approx(1000) and row["normalized_ms"]["mean"] == pytest.approx(200)
    assert inter_token_times(record) == pytest.approx([0.1, 0.1, 0.1, 0.2])
    assert row["itl_ms"]["mean"] == pytest.approx(125) and row["itl_ms"]["p50"] == pytest.approx(100)
    assert row["chunk_gap_ms"]["mean"] == pytest.approx(250)
    assert row["seconds"] == pytest.approx(1) and row["output_tokens_per_second"] == pytest.approx(5)
    assert row["total_tokens_per_second"] == pytest.approx(8) and row["prefix_hit_rate"] == pytest.approx(
        1 / 3
    )
    assert (row["itl_counted"], row["other_lengths"], row["goodput"]) == ("as reported", 0, None)


def test_what_is_asked_for():
    stub = Stub(SCRIPT)
    run(stub, Load(clients=1), specs(1))
    assert stub.bodies == [
        {
            "model": "m", "prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True},
        }
    ]  # fmt: skip


def test_tokens_are_spread_over_chunks_that_do_not_tell():
    (record,) = run(Stub(SCRIPT, told=False), Load(clients=1), specs(1))
    assert token_counts(record) == [2, 2, 1]
    assert inter_token_times(record) == pytest.approx([0.15, 0.15, 0.2])
    assert summarize([record], {})["itl_counted"] == "spread evenly"
    # More chunks than tokens: one of them only completed a character.
    record = Record(3, 2, 0.0, chunks=[(1.0, None), (2.0, None), (4.0, None)], completion_tokens=2)
    assert token_counts(record) == [1, 1, 0] and inter_token_times(record) == [1.0]


def test_tokens_without_text_take_their_time():
    end = 'data: {"choices": [{"text": "", "finish_reason": "length"}], "usage": {"completion_tokens": 5}}'
    (record,) = run(Stub(SCRIPT, raw=[end, "data: [DONE]"]), Load(clients=1), specs(1))
    assert record.ok and len(record.chunks) == 1
    record = Record(3, 5, 0.0, chunks=[(1.0, None)], ended=3.0, finished=3.0, completion_tokens=5)
    row = summarize([record], {})
    assert row["tpot_ms"]["p50"] == 500 and row["e2e_ms"]["p50"] == 3000 and row["ttft_ms"]["p50"] == 1000


def test_a_server_without_usage_has_a_token_a_chunk():
    (record,) = run(Stub(SCRIPT, told=False, usage=False), Load(clients=1), specs(1))
    row = summarize([record], {})
    assert row["output_tokens"] == 3 and row["other_lengths"] == 1


def test_a_closed_loop_keeps_its_clients_busy():
    records = run(Stub(SCRIPT), Load(clients=2), specs(5))
    assert [r.arrival for r in records] == pytest.approx([0, 0, 1, 1, 2])
    row = summarize(records, {})
    assert row["seconds"] == pytest.approx(3) and row["requests_per_second"] == pytest.approx(5 / 3)
    assert row["output_tokens_per_second"] == pytest.approx(25 / 3)


def test_waiting_is_latency_and_goodput_counts_it():
    records = run(Stub(SCRIPT, slots=1), Load(clients=2), specs(4))
    row = summarize(records, {"ttft": 600.0, "tpot": 125.001})
    assert sorted(r.chunks[0][0] - r.arrival for r in records) == pytest.approx([0.5, 1.5, 1.5, 1.5])
    assert row["ttft_ms"]["mean"] == pytest.approx(1250) and row["ttft_ms"]["p50"] == pytest.approx(1500)
    assert row["seconds"] == pytest.approx(4)
    assert row["goodput"] == pytest.approx({"share": 0.25, "requests_per_second": 0.25})
    assert summarize(records, {"tpot": 124.0})["goodput"]["share"] == 0


def test_an_open_loop_does_not_wait():
    records = run(Stub(SCRIPT, slots=1), Load(rate=1.0), specs(3, arrivals=[0.25, 0.5, 4.0]))
    assert [r.arrival for r in records] == pytest.approx([0.25, 0.5, 4.0])
    assert [r.chunks[0][0] - r.arrival for r in records] == pytest.approx([0.5, 1.25, 0.5])


def test_percentiles_interpolate():
    assert statistics_of(range(1, 102)) == {"mean": 51, "p50": 51, "p90": 91, "p95": 96, "p99": 100}
    assert statistics_of([]) is None


def test_the_pool_is_watched_five_times_a_second():
    samples = []
    run(Stub(SCRIPT, slots=2), Load(clients=3), specs(4), samples=samples)
    pool = watch.summarize(samples)
    assert len(samples) == pytest.approx(11, abs=1)
    assert Counter(sample.running for sample in samples)[2] >= 9
    assert pool["running_max"] == 2 and 1.8 < pool["running_mean"] <= 2
    assert pool["waste"] == 0.25 and pool["preemptions"] == 0 and pool["pages_free_mean"] == 3
    assert watch.summarize([]) is None


def test_over_repetitions():
    rows = [{"a": 1, "b": {"c": 5.0}, "d": None, "e": "x"}, {"a": 3, "b": None, "d": None, "e": "y"}]
    rows.append({"a": 2, "b": {"c": 7.0}, "d": 4, "e": "z"})
    assert over_repetitions(rows) == {
        "a": {"median": 2, "min": 1, "max": 3},
        "b": {"c": {"median": 6.0, "min": 5.0, "max": 7.0}},
        "d": {"median": 4, "min": 4, "max": 4},
        "e": "x",
    }


def test_busy_is_waited_out():
    stub = Stub(SCRIPT, refusals=[(429, {"Retry-After": "3"}), (503, {"Retry-After": "2.5"})])
    (record,) = run(stub, Load(clients=1), specs(1))
    assert record.ok and record.retries == 2 and len(stub.bodies) == 3
    assert record.chunks[0][0] - record.arrival == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [({}, 1), ({"Retry-After": "99999"}, 10), ({"Retry-After": "-3"}, 0), ({"Retry-After": "nan"}, 1),
     ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, 1)],
)  # fmt: skip
def test_a_wait_is_bounded(header, seconds):
    assert retry_after(httpx.Response(429, headers=header)) == seconds


@pytest.mark.parametrize(
    ("stub", "said"),
    [
        ({"refusals": [(400, {})]}, "400: full"),
        ({"refusals": [(429, {})] * 9}, "busy: 429: full, 4 times"),
        ({"raw": ['data: {"error": {"message": "the engine has failed"}}']}, "in the stream: the engine has failed"),
        ({"raw": ["data: {"]}, "an event is not JSON"),
        ({"raw": ["data: 3"]}, "an event is no object"),
        ({"raw": ['data: {"choices": [{"text": "x"}]}']}, "the stream ended before [DONE]"),
        ({"raw": ["data: [DONE]"]}, "the answer has no tokens"),
        ({"script": ((500.0, 1),)}, "no end after 100 s"),
    ],
)  # fmt: skip
def test_what_goes_wrong_stands_in_the_record(stub, said):
    records = run(Stub(**({"script": SCRIPT} | stub)), Load(clients=1), specs(1))
    assert not records[0].ok and said in records[0].error
    row = summarize(records, {"ttft": 1e9})
    assert (row["errors"], row["answered"], row["ttft_ms"]) == (1, 0, None)
    assert said in row["first_error"] and row["goodput"]["share"] == 0


def test_a_connection_that_fails():
    def refuse(request):
        raise httpx.ConnectError("connection refused", request=request)

    (record,) = run(refuse, Load(clients=1), specs(1))
    assert record.error == "ConnectError: connection refused"


def test_a_level_ends_in_time():
    records = run(Stub(SCRIPT), Load(clients=1), specs(4), time_limit=1.75)
    assert [r.ok for r in records] == [True, False, False, False]
    assert all("not answered within the level's 1.75 s" in r.error for r in records[1:])


def row(variant, clients, throughput, ttft, tpot, *, running=1.0, waste=0.1, errors=0):
    figures = {"output_tokens_per_second": throughput, "errors": errors}
    figures |= {"ttft_ms": {"p50": ttft / 2, "p95": ttft}, "tpot_ms": {"p50": tpot / 2, "p95": tpot}}
    figures["pool"] = {"running_mean": running, "running_max": running, "waste": waste}
    return {"variant": variant, "load": f"{clients} clients"} | over_repetitions([figures])


ROWS = [
    row("paged", 1, 100.0, 10, 5),
    row("paged", 8, 400.0, 60, 9, running=8.0, waste=0.02),
    row("paged", 32, 900.0, 300, 20, running=30.0, waste=0.03),
    row("contiguous", 1, 110.0, 10, 5),
    row("contiguous", 8, 200.0, 90, 10, running=2.0, waste=0.7),
    row("contiguous", 32, 180.0, 900, 10, running=2.0, waste=0.7),
]


def test_paged_against_contiguous():
    (one,) = compare(ROWS, {})
    assert one["most_sequences"] == {"first": 30.0, "second": 2.0, "ratio": 15.0}
    assert one["best_throughput"]["ratio"] == 4.5
    assert [level["sequences_at_once"] for level in one["levels"]] == [1.0, 4.0, 15.0]
    assert one["levels"][1]["output_tokens_per_second"] == 2.0 and one["levels"][1]["waste"] == [0.02, 0.7]


def test_throughput_at_equal_latency():
    equal = compare(ROWS, {"ttft": 50.0})[0]["equal_latency"]
    assert (equal["first"]["load"], equal["second"]["load"]) == ("1 clients", "1 clients")
    equal = compare(ROWS, {"ttft": 500.0, "tpot": 50.0})[0]["equal_latency"]
    assert equal["ratio"] == 4.5
    # Without limits: those of contiguous where it does best, at 8 clients.
    equal = compare(ROWS, {})[0]["equal_latency"]
    assert equal["p95_limits_ms"] == {"ttft": 90, "tpot": 10} and equal["ratio"] == 2.0
    # A level that lost requests kept no latency.
    failing = [*ROWS[:1], row("paged", 8, 400.0, 60, 9, errors=1), *ROWS[2:]]
    assert compare(failing, {})[0]["equal_latency"]["first"]["load"] == "1 clients"
    assert compare(ROWS, {"ttft": 1.0})[0]["equal_latency"]["ratio"] is None
    assert compare(ROWS[:3], {}) == []
