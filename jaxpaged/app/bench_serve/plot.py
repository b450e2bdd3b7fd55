"""Plot of a result: a panel per metric, over the load, with a line per variant."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpaged.app.bench_serve.results import median

_COLOURS = ("#2f6fb0", "#c8552b", "#4a8f4a", "#8a5aa8")
_SOLID, _DASHED = "-", "--"
_PANELS: tuple[tuple[str, tuple[tuple[tuple[str, ...], str], ...], float], ...] = (
    ("output tokens a second", ((("output_tokens_per_second",), _SOLID),), 1),
    ("TTFT, ms: p50 solid, p95 dashed", ((("ttft_ms", "p50"), _SOLID), (("ttft_ms", "p95"), _DASHED)), 1),
    ("TPOT, ms: p50 solid, p95 dashed", ((("tpot_ms", "p50"), _SOLID), (("tpot_ms", "p95"), _DASHED)), 1),
    ("sequences at once: mean solid, most dashed",
     ((("pool", "running_mean"), _SOLID), (("pool", "running_max"), _DASHED)), 1),
    ("KV memory wasted, %", ((("pool", "waste"), _SOLID),), 100),
    ("prompt tokens from the prefix cache, %", ((("prefix_hit_rate",), _SOLID),), 100),
)  # fmt: skip


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Writes the plot, .svg or .png, without panels that hold no value but zero."""
    import matplotlib

    matplotlib.use("Agg")  # a file, on machines without a screen
    from matplotlib import pyplot

    rows = result["medians"]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    panels = [panel for panel in _PANELS if any(any(_points(rows, path)[1]) for path, _ in panel[1])]
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    pyplot.rcParams.update({"svg.hashsalt": "jaxpaged", "font.size": 9, "font.family": "sans-serif"})
    figure, grid = pyplot.subplots(
        height, columns, figsize=(3.6 * columns, 2.8 * height + 0.8), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    levels = sorted({row["load_value"] for row in rows})
    for axes, (title, lines, factor) in zip(grid.flat, panels, strict=False):
        for variant, colour in zip(variants, _COLOURS, strict=False):
            mine = [row for row in rows if row["variant"] == variant]
            for figure_path, style in lines:
                x, y = _points(mine, figure_path)
                label = variant if style == _SOLID else None
                axes.plot(x, [factor * v for v in y], style, color=colour, marker="o", ms=3.5, label=label)
        axes.set_title(title, fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xticks(levels, [f"{level:g}" for level in levels])
        axes.minorticks_off()
        axes.set_xlabel("clients" if rows[0]["clients"] is not None else "requests a second")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#dddddd", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    machine = result["machine"]
    note = f"{result['command']}\n{machine['cpu']}, {machine['cores']} cores, jaxpaged {machine['jaxpaged']}"
    width = 50 * columns
    wrapped = "\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in note.splitlines())
    # A supxlabel has its own space in the layout; a dollar would begin mathematics.
    figure.supxlabel(wrapped.replace("$", r"\$"), fontsize=6, x=0.01, ha="left", color="#555555")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=130)
    pyplot.close(figure)


def _points(rows: Sequence[Mapping[str, Any]], path: Sequence[str]) -> tuple[list[float], list[float]]:
    """Load and value of the rows that have the value."""
    pairs = [(row["load_value"], value) for row in rows if (value := median(row, *path)) is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]
