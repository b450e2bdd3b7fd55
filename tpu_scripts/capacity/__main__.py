"""Number of chips that serve a day of requests within latency targets: calculated by simulation, measured nowhere.

    python -m tpu_scripts.capacity
    python -m tpu_scripts.capacity -m llama-3.1-8b --chips v6e,h100 --tp 1,2 --ttft 500 --tpot 30
    python -m tpu_scripts.capacity -m config.json --requests 250000 -ctk q8_0 -ctv q8_0
    python -m tpu_scripts.capacity --price v6e=2,h100=3 --json plan.json --plot plan.svg

Needs: the model's readers (pip install -e ".[model]"); --plot needs matplotlib. No device.

Requests of a day are sampled from a distribution that the first lines of the output state: a Poisson process with one
smooth peak a day, lognormal lengths, and a share that begins with one of some system prompts. For each kind of chip
and each number of devices that split the model (--tp), one replica of the server is simulated step by step, with the
rules of jaxpaged.engine for admission, chunks of prompts, shared pages and preemption (tpu_scripts/capacity/replica.py
says where it is simpler), and gets its share of the requests. What counts is the window around the peak, after a
warm-up of three minutes. Bisection finds the smallest number of replicas with a p95 that meets both targets there.

The time of a step is a roofline: the larger of bytes (weights and live keys and values) over bandwidth and operations
over peak, of the rows that the program is compiled for, each at a stated efficiency, and two all-reduces per layer if
devices split the model. The pool has as many pages as fit into the memory beside the weights, of the size that the real
cache has with these formats and KV heads; with more devices than KV heads each head is replicated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

from tpu_scripts import common
from tpu_scripts.capacity.load import Lengths
from tpu_scripts.capacity.options import Question, asked
from tpu_scripts.capacity.picture import counts_around, draw
from tpu_scripts.capacity.search import PERCENTILES, Impossible, Result, Setup, make_setup
from tpu_scripts.common import note

_HEADS = [
    "chip",
    "tp",
    "replicas",
    "chips",
    "pool pages",
    "peak use",
    "preempted / 1,000",
    "TTFT ms p50",
    "p95",
    "p99",
    "TPOT ms p50",
    "p95",
    "p99",
    "running",
    "busy",
    "of peak op/s",
]
Row = tuple[Setup, Result]


def stated(question: Question) -> str:
    """Paragraphs above the table: all inputs of the calculation."""
    config, server, given = question.config, question.server, question.assumed
    search, load, targets = question.search, question.search.load, question.search.targets

    def said(length: Lengths) -> str:
        return f"median {length.median:,g}, sigma {length.sigma:g}, at most {length.cap:,}"

    shares = (
        f"{100 * load.shared:g}% behind one of {load.prefixes} system prompts of {load.prefix_tokens:,} tokens"
        if load.shared
        else "no shared prefix"
    )
    formats = (
        server.k_format if server.k_format == server.v_format else f"{server.k_format}/{server.v_format}"
    )
    return "\n\n".join(
        (
            f"calculated, not measured: {config.name or config.architecture}, {config.num_parameters() / 1e9:.2f} G "
            f"parameters of {given.weight_bits:g} bits, {formats} pages of {server.page_size} tokens, -np "
            f"{server.slots} -b {server.batch_tokens} --decode-steps {server.decode_steps}"
            + ("" if server.prefix_cache else " --no-prefix-cache"),
            f"load: {load.per_day:,.0f} requests per day, Poisson, {float(load.rate(load.peak_hour * 3600)):,.1f} per "
            f"second at the peak at {load.peak_hour:g} h, {load.peak:g} times the mean; prompts lognormal, "
            f"{said(load.prompt)}, {shares}; outputs lognormal, {said(load.output)}; seed {load.seed}",
            f"targets: p95 of {search.window / 60:g} minutes around the peak, TTFT {1e3 * targets.ttft:g} ms and TPOT "
            f"{1e3 * targets.tpot:g} ms",
            f"assumed: {100 * given.memory_efficiency:g}% of the bandwidth, {100 * given.compute_efficiency:g}% of the "
            f"peak of operations, {100 * given.link_efficiency:g}% of the links and {1e6 * given.reduce_seconds:g} us "
            f"per all-reduce, {1e3 * given.host_seconds:g} ms of the host per scheduling, "
            f"{100 * given.utilization:g}% of the memory",
        )
    )


def cells(setup: Setup, result: Result, prices: Mapping[str, float]) -> list[str]:
    """Cells of a row."""
    chips = setup.chips(result.replicas)
    found = [
        setup.chip.name,
        f"{setup.tensor}",
        f"{result.replicas:,}",
        f"{chips:,}",
        f"{setup.replica.num_pages:,}",
        f"{100 * result.peak_pages / setup.replica.num_pages:.0f}%",
        f"{result.preemptions:.1f}",
        *(f"{1e3 * value:,.0f}" for value in result.ttft),
        *(f"{1e3 * value:,.1f}" for value in result.tpot),
        f"{result.running:,.0f}",
        f"{100 * result.busy:.0f}%",
        f"{100 * result.operations:.0f}%",
    ]
    if prices:
        price = prices.get(setup.chip.name)
        found.append("" if price is None else f"{24 * chips * price:,.0f}")
    return found


def values(setup: Setup, result: Result, prices: Mapping[str, float]) -> dict[str, Any]:
    """Values of a row for JSON, in seconds and bytes."""
    chips = setup.chips(result.replicas)
    found: dict[str, Any] = {
        "chip": setup.chip.name,
        "tp": setup.tensor,
        "chips": chips,
        "pool_pages": setup.replica.num_pages,
        "page_bytes_per_device": setup.page_bytes,
        "weight_bytes_per_device": setup.weight_bytes,
        "step_seconds": asdict(setup.replica.times),
        **asdict(result),
    }
    for name in ("ttft", "tpot"):
        numbers = zip(PERCENTILES, found[name], strict=True)
        found[name] = {f"p{p}": value if isfinite(value) else None for p, value in numbers}
    if setup.chip.name in prices:
        found["price_a_day"] = 24 * chips * prices[setup.chip.name]
    return found


def chosen(rows: Sequence[Row], prices: Mapping[str, float]) -> Row:
    """Cheapest row if there are prices, else the one of fewest chips; of equals the faster one."""
    priced = [row for row in rows if row[0].chip.name in prices]

    def cost(row: Row) -> tuple[float, float]:
        setup, result = row
        return setup.chips(result.replicas) * prices.get(setup.chip.name, 1.0), result.tpot[-1]

    return min(priced or rows, key=cost)


def found_rows(question: Question) -> list[Row]:
    """Computes and prints the rows; what cannot serve is a line on stderr."""
    rows = []
    for chip in question.chips:
        for tensor in question.tensors:
            try:
                longest = question.search.load.longest
                setup = make_setup(question.config, chip, tensor, question.server, question.assumed, longest)
                result = question.search.fewest(setup)
            except Impossible as reason:
                note(f"left out: {chip.name} tp={tensor}: {reason}")
                continue
            rows.append((setup, result))
            print(common.row(*cells(setup, result, question.prices)), flush=True)
    return rows


def more(question: Question, rows: Sequence[Row]) -> dict[str, Any]:
    """Simulates a day, and latencies around the numbers found, for --plot and --json; draws them."""
    search, prices = question.search, question.prices
    if not (question.plot or question.day):
        return {}
    named = [row for row in rows if (row[0].chip.name, row[0].tensor) == question.day]
    if question.day and not named:
        note(f"--day {question.day[0]}:{question.day[1]} is left out, as above; another is shown")
    setup, result = named[0] if named else chosen(rows, prices)
    day = search.day(setup, result.replicas)
    shown: dict[str, Any] = {
        "day": {"chip": setup.chip.name, "tp": setup.tensor, "replicas": result.replicas, **day}
    }
    if question.plot is None:
        return shown
    names = dict.fromkeys(setup.chip.name for setup, _ in rows)
    best = [chosen([row for row in rows if row[0].chip.name == name], prices) for name in names]
    curves = [
        (one, fewest.replicas, [search.evaluate(one, n) for n in counts_around(fewest.replicas)])
        for one, fewest in best
    ]
    title = (
        f"calculated, not measured: {question.config.name}, {search.load.per_day:,.0f} requests a day, "
        f"{search.window / 60:g} minutes around the peak; of each chip the tp that takes the fewest"
    )
    draw(curves, (setup, result.replicas, day), search.targets, title, question.plot)
    shown["curves"] = [values(one, each, prices) for one, _, results in curves for each in results]
    return shown


def main() -> int:
    question = asked(__doc__)
    print(stated(question) + "\n")
    print(common.head(*_HEADS, *(["price a day"] if question.prices else [])), flush=True)
    rows = found_rows(question)
    if not rows:
        note("nothing serves this load within these targets")
        return 1
    shown = more(question, rows)
    inputs = {
        "calculated": True,
        "model": asdict(question.config),
        "search": asdict(question.search),
        "server": asdict(question.server),
        "assumed": asdict(question.assumed),
    }
    found = {"rows": [values(*row, question.prices) for row in rows]}
    common.write_json(question.json, inputs | found | shown, measured=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
