"""Markdown tables of a result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxpaged.app.bench_serve.results import median
from jaxpaged.app.tables import markdown_table

Row = Mapping[str, Any]
Cell = Callable[[Row], str]


def tables(result: Mapping[str, Any]) -> str:
    """Markdown of a result: workload, throughput and memory, latencies, comparisons."""
    rows = result["medians"]
    parts = [_heading(result), _table(rows, _THROUGHPUT), _table(rows, _LATENCY)]
    parts += [_comparison(comparison) for comparison in result["comparisons"]]
    return "\n\n".join(parts)


def _heading(result: Mapping[str, Any]) -> str:
    work, machine = result["workload"], result["machine"]
    lengths = ", ".join(f"{k} {v}" for k, v in work["lengths"].items() if not isinstance(v, dict | str))
    drawn = work["drawn"]
    lines = [
        f"{result['command']}",
        f"{machine['cpu']}, {machine['cores']} cores; medians of {result['repetitions']} repetition(s)",
        f"{work['lengths']['name']} ({lengths}), seed {work['seed']}: prompts of {drawn['prompt_mean']:.0f} tokens on "
        f"average ({drawn['prompt_max']} at most), outputs of {drawn['output_mean']:.0f} ({drawn['output_max']}), "
        f"{work['shared_prefix']} shared before them; context {work['context']}",
    ]
    slots = ", ".join(f"{name} {info['slots']}" for name, info in result["servers"].items() if info["slots"])
    return "\n".join([*lines, f"sequences at once, at most: {slots}"] if slots else lines)


def _comparison(c: Mapping[str, Any]) -> str:
    first, second = c["first"], c["second"]
    lines = [f"{first} / {second}"]
    for title, name, unit in (
        ("sequences at once, most", "most_sequences", ""),
        ("throughput, best", "best_throughput", " t/s"),
    ):
        if best := c[name]:
            lines.append(
                f"- {title}: {_factor(best['ratio'])} ({best['first']:.4g}{unit} against {best['second']:.4g}{unit})"
            )
    if equal := c["equal_latency"]:
        limits = ", ".join(f"{k} {v:.4g} ms" for k, v in equal["p95_limits_ms"].items())
        found = [
            f"{name} {one['output_tokens_per_second']:.4g} t/s at {one['load']}" if one else f"{name} never"
            for name, one in ((first, equal["first"]), (second, equal["second"]))
        ]
        lines.append(
            f"- throughput at equal latency (p95 within {limits}: {equal['limits_are']}): "
            f"{_factor(equal['ratio'])} ({', '.join(found)})"
        )
    columns: dict[str, Cell] = {
        "load": lambda r: r["load"],
        "sequences": lambda r: _factor(r["sequences_at_once"]),
        "throughput": lambda r: _factor(r["output_tokens_per_second"]),
        "TTFT p50": lambda r: _factor(r["ttft_p50"]),
        "TPOT p50": lambda r: _factor(r["tpot_p50"]),
        f"waste of {first}": lambda r: _percent(r["waste"][0]),
        f"waste of {second}": lambda r: _percent(r["waste"][1]),
    }
    return "\n".join(lines) + "\n\n" + _table(c["levels"], columns)


def _factor(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _number(*path: str, digits: int = 1) -> Cell:
    def cell(row: Row) -> str:
        value = median(row, *path)
        return "-" if value is None else f"{value:.{digits}f}"

    return cell


def _spread(name: str) -> Cell:
    """Median, minimum and maximum over repetitions."""

    def cell(row: Row) -> str:
        value = row[name]
        text = f"{value['median']:.1f}"
        return text if value["min"] == value["max"] else f"{text} ({value['min']:.1f}-{value['max']:.1f})"

    return cell


def _several(name: str, *points: str) -> Cell:
    """Percentiles of a latency, in one cell."""

    def cell(row: Row) -> str:
        values = [median(row, f"{name}_ms", point) for point in points]
        return " / ".join("-" if value is None else f"{value:.4g}" for value in values)

    return cell


def _share(*path: str) -> Cell:
    return lambda row: _percent(median(row, *path))


_LOAD: dict[str, Cell] = {"server": lambda row: row["variant"], "load": lambda row: row["load"]}
_THROUGHPUT: dict[str, Cell] = _LOAD | {
    "output t/s": _spread("output_tokens_per_second"),
    "all t/s": _number("total_tokens_per_second"),
    "req/s": _number("requests_per_second", digits=2),
    "at once, mean": _number("pool", "running_mean"),
    "most": _number("pool", "running_max", digits=0),
    "KV waste": _share("pool", "waste"),
    "pages used": _number("pool", "pages_used_mean", digits=0),
    "cached": _number("pool", "pages_cached_mean", digits=0),
    "free": _number("pool", "pages_free_mean", digits=0),
    "preempted": _number("pool", "preemptions", digits=0),
    "prefix hits": _share("prefix_hit_rate"),
    "retries": _number("retries", digits=0),
    "errors": _number("errors", digits=0),
}
_LATENCY: dict[str, Cell] = _LOAD | {
    "TTFT ms, mean": _number("ttft_ms", "mean"),
    "p50 / p90 / p95 / p99": _several("ttft", "p50", "p90", "p95", "p99"),
    "TPOT ms, mean": _number("tpot_ms", "mean"),
    "p50 / p95 / p99": _several("tpot", "p50", "p95", "p99"),
    "ITL ms, p50 / p99": _several("itl", "p50", "p99"),
    "E2E s, p50": lambda row: _seconds(median(row, "e2e_ms", "p50")),
    "p95": lambda row: _seconds(median(row, "e2e_ms", "p95")),
    "goodput": _share("goodput", "share"),
    "good req/s": _number("goodput", "requests_per_second", digits=2),
}


def _seconds(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds / 1e3:.2f}"


def _table(rows: Sequence[Row], columns: Mapping[str, Cell]) -> str:
    """Markdown table without columns that have no value."""
    cells = {head: [cell(row) for row in rows] for head, cell in columns.items()}
    used = {head: values for head, values in cells.items() if set("".join(values)) - set("- /")}
    return markdown_table(used, left=_LOAD)
