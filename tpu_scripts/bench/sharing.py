"""KV memory saved by sharing pages between beams and samples, as the PagedAttention paper measures it.

    python -m tpu_scripts.bench.sharing --json sharing.json --plot docs/pictures/sharing.svg

Needs: pip install -e ".[model]"; --plot needs matplotlib.

Saved = 1 - pages in use / pages that the same sequences would take if each had its own, both summed over all decode
steps (arXiv:2309.06180, Fig. 15). Beams fork and end as the embedded model makes them. Samples share their prompt and
nothing else, so for them tables are enough and no model runs. Prompts are parts of Python files that the model never
saw. Lengths of prompts and outputs are spread exponentially around the means that the paper gives for its two data
sets, and every sequence runs to its end.
"""

from __future__ import annotations

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
from tpu_scripts import common
from tpu_scripts.common import Parser, each, positive

MEANS = {"Alpaca": (19, 58), "ShareGPT": (161, 338)}
PAPER = {
    ("samples", "Alpaca"): "6.1 - 9.8",
    ("beams", "Alpaca"): "37.6 - 55.2",
    ("samples", "ShareGPT"): "16.2 - 30.5",
    ("beams", "ShareGPT"): "44.3 - 66.3",
}
"""Percentages saved for 2 to 6 samples or beams, pages of 16 tokens."""
_LONGEST = 1024


@dataclass(frozen=True)
class Row:
    """One measurement."""

    method: str
    lengths: str
    count: int
    page_size: int
    saved: float
    """Share of the pages saved, summed over the decode steps."""
    saved_at_peak: float
    seconds: float


def sample_lengths(name: str, count: int) -> tuple[list[int], list[int]]:
    """Numbers of tokens of ``count`` prompts and of their outputs."""
    # The quantiles of the distribution, so that a few prompts have its mean; paired at random.
    quantiles = -np.log1p(-(np.arange(count) + 0.5) / count)
    prompt, output = (np.ceil(mean * quantiles).astype(int) for mean in MEANS[name])
    prompt = np.minimum(np.random.default_rng(0).permutation(prompt), _LONGEST // 2)
    return prompt.tolist(), np.minimum(output, _LONGEST - prompt).tolist()


def sample_prompts(loaded: LoadedModel, lengths: list[int]) -> list[list[int]]:
    """Parts of files that the model was not trained on."""
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
    """Number of pages that ``count`` sequences of each prompt take without sharing."""
    return count * sum(-(-(p + o) // page_size) for p, o in zip(prompts, outputs, strict=True))


def beams(loaded: LoadedModel, name: str, prompts: int, width: int, page_size: int) -> Row:
    start = time.perf_counter()
    lengths, outputs = sample_lengths(name, prompts)
    config = loaded.config
    cache = PagedKVCache.create(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_pages=pages_for(lengths, outputs, width, page_size),
        max_seqs=prompts * width,
        max_seq_len=_LONGEST,
        page_size=page_size,
    )
    result, _ = beam_search(
        loaded.function,
        loaded.params,
        cache,
        sample_prompts(loaded, lengths),
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
        # The last generated token is not an input.
        cache, _ = seq_remove(cache, i >= outputs - 1)
        cache, _, _ = reserve(cache, (i < outputs - 1).astype(jnp.int32), num_tokens=s, max_new=1)
        return cache, jnp.stack([cache.pages_used, jnp.sum(cache.table.num_entries)])

    return jax.lax.scan(step, cache, jnp.arange(steps))[1]


def samples(_: LoadedModel, name: str, prompts: int, count: int, page_size: int) -> Row:
    start = time.perf_counter()
    lengths, outputs = sample_lengths(name, prompts)
    cache = PagedKVCache.create(
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        num_pages=pages_for(lengths, outputs, count, page_size),
        max_seqs=prompts * count,
        max_seq_len=_LONGEST,
        page_size=page_size,
    )
    each = [jnp.repeat(jnp.asarray(x), count) for x in (lengths, outputs)]
    used, unshared = np.asarray(_decode(cache, max(outputs), count, sum(lengths), *each)).T
    saved, at_peak = 1 - used.sum() / unshared.sum(), 1 - used.max() / unshared.max()
    return Row("samples", name, count, page_size, float(saved), float(at_peak), time.perf_counter() - start)


def table(rows: list[Row], page_sizes: list[int]) -> str:
    """Markdown table of the percentages saved, a row per method, data set and count."""
    saved = {(r.method, r.lengths, r.count, r.page_size): f"{100 * r.saved:.1f}%" for r in rows}
    heads = ("", "lengths", "count", *(f"pages of {size}" for size in page_sizes), "paper, for 2 to 6")
    lines = [common.head(*heads, left=heads[:2])]
    for key in dict.fromkeys((r.method, r.lengths, r.count) for r in rows):
        cells = (saved[(*key, size)] for size in page_sizes)
        lines.append(common.row(*key, *cells, f"{PAPER[key[:2]]}%"))
    return "\n".join(lines)


def draw(rows: list[Row], page_sizes: list[int], path: Path) -> None:
    """Draws the percentages saved over the count: a panel for samples and one for beams."""
    counts = sorted({r.count for r in rows})
    with common.figure(path, "", ncols=2, figsize=(9, 3.6), sharey=True) as (figure, axes):
        for panel, method in zip(axes[0], ("samples", "beams"), strict=True):
            for name, colour in zip(MEANS, common.COLOURS, strict=False):
                low, high = (float(x) for x in PAPER[method, name].split(" - "))
                ends, label = [counts[0], counts[-1]], f"paper, {name}"
                panel.fill_between(ends, low, high, color=colour, alpha=0.13, lw=0, label=label)
                for size, style in zip(page_sizes, (":", "-", "--"), strict=False):
                    own = [r for r in rows if (r.method, r.lengths, r.page_size) == (method, name, size)]
                    x, y = [r.count for r in own], [100 * r.saved for r in own]
                    label = f"{name} lengths, pages of {size}"
                    panel.plot(x, y, style, color=colour, marker="o", ms=3.5, label=label)
            panel.set_title("parallel samples" if method == "samples" else "beam search")
            panel.set_xlabel(method)
            panel.set_xticks(counts)
        axes[0, 0].set_ylabel("KV memory saved by sharing, %")
        axes[0, 0].set_ylim(0, 80)
        handles, labels = axes[0, 1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)


def main() -> None:
    parser = Parser(__doc__, json=None, plot=None)
    parser.add("--prompts", "prompts at once", positive, 24)
    parser.add("--counts", "numbers of samples, and of beams", each(positive), [2, 4, 6])
    parser.add("--page-sizes", "tokens per page", each(common.page_size), [8, 16, 32])
    args = parser.parse()
    loaded = load_model(tiny.PATH)
    rows = []
    for method in (samples, beams):
        for name in MEANS:
            for count in args.counts:
                for size in args.page_sizes:
                    rows.append(method(loaded, name, args.prompts, count, size))
                    print(rows[-1], flush=True)
    print(table(rows, args.page_sizes))
    common.write_json(args.json, {"rows": [asdict(row) for row in rows]})
    if args.plot:
        draw(rows, args.page_sizes, args.plot)


if __name__ == "__main__":
    main()
