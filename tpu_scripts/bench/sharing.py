"""The share of KV memory that sharing pages saves, over beams and samples, as the PagedAttention paper measures it.

    python -m tpu_scripts.bench.sharing -o build/sharing.json --picture docs/pictures/sharing.svg

Saved = 1 - pages in use / pages that the same sequences would take if each had its own, both summed over all decode
steps (arXiv:2309.06180, Fig. 15). Beams fork and end as the embedded model makes them. Samples share their prompt and
nothing else, so for them tables are enough and no model runs. Prompts are pieces of Python files that the model never
saw. Lengths of prompts and outputs are spread exponentially around the means that the paper gives for its two data
sets, and every sequence runs to its end.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxpaged_model import tiny
from jaxpaged_model.checkpoint.loading import LoadedModel, load_model
from jaxpaged_model.tiny.corpus import read_corpus

from jaxpaged import PagedKVCache, beam_search, reserve, seq_remove, seq_reorder

MEANS = {"Alpaca": (19, 58), "ShareGPT": (161, 338)}
PAPER = {
    ("samples", "Alpaca"): "6.1 - 9.8",
    ("beams", "Alpaca"): "37.6 - 55.2",
    ("samples", "ShareGPT"): "16.2 - 30.5",
    ("beams", "ShareGPT"): "44.3 - 66.3",
}
"""In percent, for 2 to 6 samples or beams, pages of 16 tokens."""
_LONGEST = 1024


@dataclass(frozen=True)
class Row:
    """What was measured once."""

    method: str
    lengths: str
    count: int
    page_size: int
    saved: float
    """Summed over the decode steps."""
    saved_at_peak: float
    seconds: float


def draw_lengths(name: str, count: int) -> tuple[list[int], list[int]]:
    """Tokens of ``count`` prompts and of their outputs."""
    # The quantiles of the distribution, so that a few prompts have its mean; paired at random.
    quantiles = -np.log1p(-(np.arange(count) + 0.5) / count)
    prompt, output = (np.ceil(mean * quantiles).astype(int) for mean in MEANS[name])
    prompt = np.minimum(np.random.default_rng(0).permutation(prompt), _LONGEST // 2)
    return prompt.tolist(), np.minimum(output, _LONGEST - prompt).tolist()


def draw_prompts(loaded: LoadedModel, lengths: list[int]) -> list[list[int]]:
    """Pieces of files that the model did not learn."""
    rng = np.random.default_rng(1)
    texts = [loaded.tokenizer.encode(text) for text in read_corpus().held_out.values()]
    texts = [text for text in texts if len(text) > _LONGEST]
    prompts = []
    for length in lengths:
        text = texts[rng.integers(len(texts))]
        start = rng.integers(len(text) - length)
        prompts.append(text[start : start + length])
    return prompts


def pages_for(prompts: list[int], outputs: list[int], count: int, page_size: int) -> int:
    """Pages that ``count`` sequences of each prompt take without sharing."""
    return count * sum(-(-(p + o) // page_size) for p, o in zip(prompts, outputs, strict=True))


def beams(loaded: LoadedModel, name: str, prompts: int, width: int, page_size: int) -> Row:
    start = time.perf_counter()
    lengths, outputs = draw_lengths(name, prompts)
    config = loaded.config
    cache = PagedKVCache.create(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_pages=pages_for(lengths, outputs, width, page_size),
        max_seqs=prompts * width,
        max_pages_per_seq=-(-_LONGEST // page_size) + 1,
        page_size=page_size,
    )
    result, _ = beam_search(
        loaded.function,
        loaded.params,
        cache,
        draw_prompts(loaded, lengths),
        num_beams=width,
        max_new_tokens=outputs,
        early_stopping="never",
    )
    if not np.asarray(result.complete).all():
        raise SystemExit("the pool ran out of pages")
    saved = 1 - float(result.pages_mean) / float(result.unshared_mean)
    at_peak = 1 - int(result.pages_peak) / int(result.unshared_peak)
    return Row("beams", name, width, page_size, saved, at_peak, time.perf_counter() - start)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _decode(
    cache: PagedKVCache, steps: int, count: int, prompt_rows: int, prompts: jax.Array, outputs: jax.Array
) -> jax.Array:
    """i32[steps, 2]: pages in use and entries, after each step of all samples."""
    s = cache.max_seqs
    first = jnp.arange(s) // count * count
    cache, _, _ = reserve(cache, jnp.where(jnp.arange(s) == first, prompts, 0), num_tokens=prompt_rows)
    cache = seq_reorder(cache, first)

    def step(cache: PagedKVCache, i: jax.Array) -> tuple[PagedKVCache, jax.Array]:
        # The last token that is generated is never fed back.
        cache, _ = seq_remove(cache, i >= outputs - 1)
        cache, _, _ = reserve(cache, (i < outputs - 1).astype(jnp.int32), num_tokens=s, max_new=1)
        return cache, jnp.stack([cache.pages_used, jnp.sum(cache.table.num_entries)])

    return jax.lax.scan(step, cache, jnp.arange(steps))[1]


def samples(name: str, prompts: int, count: int, page_size: int) -> Row:
    start = time.perf_counter()
    lengths, outputs = draw_lengths(name, prompts)
    cache = PagedKVCache.create(
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        num_pages=pages_for(lengths, outputs, count, page_size),
        max_seqs=prompts * count,
        max_pages_per_seq=-(-_LONGEST // page_size) + 1,
        page_size=page_size,
    )
    each = [jnp.repeat(jnp.asarray(x), count) for x in (lengths, outputs)]
    used, unshared = np.asarray(_decode(cache, max(outputs), count, sum(lengths), *each)).T
    saved, at_peak = 1 - used.sum() / unshared.sum(), 1 - used.max() / unshared.max()
    return Row("samples", name, count, page_size, float(saved), float(at_peak), time.perf_counter() - start)


def table(rows: list[Row], page_sizes: list[int]) -> str:
    """Markdown: percent saved, a line for each method, data set and count."""
    by_key = {(r.method, r.lengths, r.count, r.page_size): r for r in rows}
    heads = [f"pages of {size}" for size in page_sizes]
    lines = [
        f"| | lengths | count | {' | '.join(heads)} | paper, for 2 to 6 |",
        f"|---|---|---:|{'---:|' * len(heads)}---:|",
    ]
    for method, name, count in dict.fromkeys((r.method, r.lengths, r.count) for r in rows):
        cells = [f"{100 * by_key[method, name, count, size].saved:.1f}%" for size in page_sizes]
        lines.append(f"| {method} | {name} | {count} | {' | '.join(cells)} | {PAPER[method, name]}% |")
    return "\n".join(lines)


def draw(rows: list[Row], page_sizes: list[int], path: Path) -> None:
    """A panel for samples and one for beams."""
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "jaxpaged", "font.size": 10, "font.family": "sans-serif"})
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    colours = {"Alpaca": "#2f6fb0", "ShareGPT": "#c8552b"}
    for panel, method in zip(panels, ("samples", "beams"), strict=True):
        counts = sorted({r.count for r in rows})
        for name, colour in colours.items():
            low, high = (float(x) for x in PAPER[method, name].split(" - "))
            panel.fill_between(
                [counts[0], counts[-1]], low, high, color=colour, alpha=0.13, lw=0,
                label=f"paper, {name}: {low:.0f} to {high:.0f}%",
            )  # fmt: skip
            for size, style in zip(page_sizes, (":", "-", "--"), strict=False):
                chosen = [r for r in rows if (r.method, r.lengths, r.page_size) == (method, name, size)]
                panel.plot(
                    [r.count for r in chosen], [100 * r.saved for r in chosen], style, color=colour,
                    marker="o", ms=3.5, label=f"{name} lengths, pages of {size}",
                )  # fmt: skip
        panel.set_title(f"parallel {method}" if method == "samples" else "beam search")
        panel.set_xlabel("samples" if method == "samples" else "beams")
        panel.set_xticks(counts)
        panel.grid(axis="y", color="#dddddd", lw=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("KV memory saved by sharing, %")
    panels[0].set_ylim(0, 80)
    handles, labels = panels[1].get_legend_handles_labels()
    labels = [label.split(":")[0] for label in labels]
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=24, help="prompts at once")
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 4, 6], help="samples, and beams")
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("-o", "--output", type=Path, help="write JSON here")
    parser.add_argument("--picture", type=Path, help="write a plot here, .svg or .png")
    args = parser.parse_args()
    loaded = load_model(tiny.PATH)
    rows = []
    for method in ("samples", "beams"):
        for name in MEANS:
            for count in args.counts:
                for page_size in args.page_sizes:
                    if method == "beams":
                        row = beams(loaded, name, args.prompts, count, page_size)
                    else:
                        row = samples(name, args.prompts, count, page_size)
                    rows.append(row)
                    print(row, flush=True)
    print(table(rows, args.page_sizes))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if args.picture:
        draw(rows, args.page_sizes, args.picture)


if __name__ == "__main__":
    main()
