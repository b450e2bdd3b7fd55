"""What a page format costs in quality: how far predictions move, and what is still found in the context.

    python -m tpu_scripts.bench.quality
    python -m tpu_scripts.bench.quality -m model.gguf -f text.txt --formats q8_0,q8_0/q4_0,q4_0 --plot quality.svg

Needs: jax for the device and ".[model]" (pip install -e ".[model,tpu]", or cuda13); a picture needs matplotlib.

Caches of all formats read the same text beside one of f32, each format as it is and with rows turned by a Hadamard
matrix; k/v names one format for keys and one for values. Without -m and -f the text is Python that the embedded model
was not trained on. Behind ± is one standard error. Two things are measured.

Divergence, over chunks of -c tokens from all of the text, the second half of each scored: the mean Kullback-Leibler
divergence from the predictions of f32 in nats, its 99% quantile, the share of tokens where both find the same one
likeliest, and the ratio of perplexities. `jaxpaged perplexity --kl-divergence` prints more of it for one format.

Retrieval: a passage of 48 tokens stands in a chunk twice, --distances tokens apart, with other text before and
between. Retrieved are those tokens of the second one, its first 8 left out, that f32 predicts, and does not predict
where other text stands in the place of the first one: they come from there. "kept" is the share of them that a format
predicts as well, "nats" their mean loss of log-likelihood. Chosen by what f32 can do, they leave others only to lose.

Retrieval is copying: among all keys of the context those of the passage must be found, and their values must say what
comes next. It is no question answered from memory, which the embedded model is too small for: asked for a random value
that it saw once behind a random name, its first guess was the first digits of a number in 5 of 10 cases right behind
it and in 2 of 10 after 256 tokens, the first letters of a word in fewer, and all of the value next to never. Beyond
some 500 tokens, the length it was mostly trained with, even f32 retrieves one token in twenty; a larger model, -c and
--distances go further.

-ub is a part of the question: formats that seal their pages keep the newest one of each sequence in 16 bits. With
-ub 512 most pages are sealed before anything attends to them; -ub 1 reads as decoding does, takes longer, and finds a
third to a quarter of the divergence with the embedded model. Other formats quantize each row as it is written and do
not depend on it. The bits of a value are those of the pool, scales and all; open pages come on top, one a sequence.
"""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpaged.app.cache_type import CacheType, bits_per_value, check_formats
from jaxpaged.app.divergence import Divergence, Estimate
from jaxpaged.app.errors import InputError
from jaxpaged.app.loading import ModelChoice, ReadyModel, open_model
from jaxpaged.app.perplexity import BASE, HELD_OUT, chunks_of, context_of, read_text, tokens_of
from jaxpaged.app.scoring import Scores, default_parallel, score
from jaxpaged.pages.formats import PAGE_FORMATS, check_page_size
from tpu_scripts.bench.paged_attention import line
from tpu_scripts.common import Parser, add_json, check_writable, need, note, positive, positives, write_json

_MIXED = ("q8_0/q5_1", "q8_0/q4_0", "q5_1/q4_0", "q4_0/q8_0")
_PASSAGE = 48
_LED_IN = 8
"""Tokens at the beginning of a second passage from which the model can tell that it is one."""
_HEADS = ("K", "V", "turned", "bits", "KLD", "99% KLD", "same top %", "PPL ratio", "kept %", "nats")


@dataclass(frozen=True)
class Row:
    """One way of keeping keys and values, and what it costs."""

    kind: CacheType
    bits: float
    divergence: Divergence
    kept: Estimate
    """Share of the tokens that f32 retrieves."""
    nats: Estimate
    """Their mean loss of log-likelihood."""

    def cells(self) -> list[str]:
        d, turned = self.divergence, {None: "", True: "yes", False: "no"}[self.kind.hadamard]
        return [
            self.kind.k, self.kind.v, turned, f"{self.bits:.4g}", _digits(d.kld), f"{d.kld_quantiles['99.0%']:.2g}",
            _digits(d.same_top, 100), _digits(d.ratio), _digits(self.kept, 100), _digits(self.nats),
        ]  # fmt: skip

    def values(self) -> dict[str, Any]:
        """For JSON."""
        kind = {"k": self.kind.k, "v": self.kind.v, "turned": self.kind.hadamard, "bits_per_value": self.bits}
        return kind | self.divergence.as_dict() | {"kept": self.kept._asdict(), "nats": self.nats._asdict()}


def _digits(estimate: Estimate, factor: int = 1) -> str:
    """A value and its error, as many digits as that allows."""
    value, error = factor * estimate.value, factor * estimate.error
    if not error:
        return f"{value:g}"
    if abs(value) < 1e-3 and error < 1e-3:
        return f"{value:.1e} ± {error:.0e}"
    places = max(1 - math.floor(math.log10(error)), 0)
    return f"{value:.{places}f} ± {error:.{places}f}"


class Meter:
    """A model, and what it predicts of chunks that it reads through caches."""

    def __init__(self, ready: ReadyModel, n_ctx: int, args: argparse.Namespace) -> None:
        self._ready, self._n_ctx, self._page_size = ready, n_ctx, args.page_size
        self._step = min(args.ubatch_size, n_ctx)
        self._parallel = args.parallel or default_parallel(self._step)

    def create(self, kind: CacheType) -> Any:
        """An empty cache."""
        config = self._ready.loaded.config
        return kind.create(config, num_seqs=self._parallel, tokens=self._n_ctx, page_size=self._page_size)

    def bits(self, kind: CacheType) -> float:
        """Bits of a value."""
        return bits_per_value(jax.eval_shape(lambda: self.create(kind)), self._ready.loaded.config)

    def variants(self, name: str) -> list[CacheType]:
        """A format, or two with a / between them, as it is and turned; once, where nothing is turned.

        Raises:
          InputError: there is no such format, or pages and heads of these sizes cannot be stored in it.
        """
        k, _, v = name.partition("/")
        v = v or k
        check_formats(k=k, v=v)
        kinds = [CacheType(k, v, hadamard=turned) for turned in (False, True)]
        # The formats are static, a part of the structure.
        structures = {
            jax.tree.structure(jax.eval_shape(lambda kind=kind: self.create(kind))) for kind in kinds
        }
        return kinds if len(structures) == 2 else [CacheType(k, v)]

    def scores(self, kinds: Sequence[CacheType], chunks: np.ndarray, what: str) -> list[Scores]:
        """Of a cache of each kind, against the first one."""
        loaded, done = self._ready.loaded, []
        caches = [self.create(kind) for kind in kinds]
        config = loaded.config
        for group in score(
            self._ready.call, loaded.params, config.vocab_size, caches, chunks, step=self._step
        ):
            done.append(group)
            _progress(f"{what}: {min(len(done) * self._parallel, len(chunks))} of {len(chunks)}")
        _progress("")
        return [Scores.join(parts) for parts in zip(*done, strict=True)]


def _progress(line: str) -> None:
    """A line that is overwritten, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def passages(
    tokens: np.ndarray, n_ctx: int, distance: int, count: int, seed: int, bos: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Chunks that end with a passage seen before, and the same chunks with other text where it was seen.

    Args:
      tokens: i32[...], at least ``2 * n_ctx`` of a text. Passages and what surrounds them come from places of it that
        do not overlap.
      n_ctx: tokens of a chunk.
      distance: tokens from the beginning of a passage to that of its repetition.
      count: how many chunks.
      seed: of the places.
      bos: the first token of every chunk, unless None.

    Returns:
      ``(seen, unseen)``, i32[count, n_ctx] each.
    """
    rng = np.random.default_rng((seed, distance))
    filler, before = n_ctx - 2 * _PASSAGE, n_ctx - distance - _PASSAGE
    seen, unseen = np.zeros((2, count, n_ctx), np.int32)
    for i in range(count):
        at = int(rng.integers(len(tokens) - filler + 1))
        others = np.concatenate([tokens[at + filler :], tokens[:at]])
        first, second = rng.choice(len(others) // _PASSAGE, 2, replace=False) * _PASSAGE
        passage, other = others[first : first + _PASSAGE], others[second : second + _PASSAGE]
        text = tokens[at : at + filler]
        seen[i] = np.concatenate([text[:before], passage, text[before:], passage])
        unseen[i] = np.concatenate([text[:before], other, text[before:], passage])
    if bos is not None:
        seen[:, 0] = unseen[:, 0] = bos
    return seen, unseen


def retrieval(
    meter: Meter, kinds: Sequence[CacheType], seen: np.ndarray, unseen: np.ndarray
) -> tuple[np.ndarray, list[Scores]]:
    """Which tokens of second passages f32 retrieves, bool[...], and the scores of each kind for all of them."""
    copied = np.s_[:, _LED_IN - _PASSAGE :]
    (without,) = meter.scores(kinds[:1], unseen, "passages not seen before")
    found = [scores[copied] for scores in meter.scores(kinds, seen, "passages seen before")]
    return found[0].right & ~without[copied].right, found


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Quality against bits, a named point for each row: divergence on the left, retrieval on the right."""
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "jaxpaged", "font.size": 9, "font.family": "sans-serif"})
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 6.6), layout="constrained")
    rows = [
        row for row in rows if row.divergence.kld.value > 0
    ]  # f32 itself has no place on a logarithmic axis
    bits = [row.bits for row in rows]
    klds = [row.divergence.kld.value for row in rows]
    lost = [100 * (1 - row.kept.value) for row in rows]
    kinds = {
        None: ("s", "#444444", "nothing to turn"),
        False: ("o", "#2f6fb0", "as it is"),
        True: ("^", "#c8552b", "rows turned (Hadamard)"),
    }
    for axis, values in zip(axes, (klds, lost), strict=True):
        for turned, (marker, colour, label) in kinds.items():
            own = [
                (b, v) for b, v, row in zip(bits, values, rows, strict=True) if row.kind.hadamard is turned
            ]
            if own:
                axis.scatter(
                    *zip(*own, strict=True), s=22, marker=marker, color=colour, label=label, zorder=3
                )
        axis.set_xscale("log", base=2)
        axis.set_xticks(_TICKS, [str(tick) for tick in _TICKS])
        axis.set_xlim(0.85 * min(bits), 1.2 * max(bits))
        axis.set_xlabel("bits a value")
        axis.grid(color="#dddddd", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.1)
    axes[0].set_yscale("log")
    axes[0].set_title("divergence from f32: mean KLD, nats", fontsize=9)
    axes[1].set_yscale("symlog", linthresh=1)
    axes[1].set_yticks(_LOST_TICKS, [str(tick) for tick in _LOST_TICKS])
    axes[1].set_ylim(-0.3, max(2.0, 1.3 * max(lost)))
    axes[1].set_title("tokens that f32 retrieves from the context, and the format does not, %", fontsize=9)
    for axis in axes:
        axis.minorticks_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    figure.suptitle("\n".join(textwrap.wrap(title, 150)), fontsize=8)
    figure.draw_without_rendering()  # from here on, points have their places
    figure.set_layout_engine("none")
    for axis, values in zip(axes, (klds, lost), strict=True):
        _name_points(axis, [(_name(row.kind), b, v) for row, b, v in zip(rows, bits, values, strict=True)])
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=130)


_TICKS = (2, 3, 4, 5, 6, 8, 10, 12, 16)
_LOST_TICKS = (0, 0.5, 1, 2, 5, 10, 20, 50, 100)


def _name(kind: CacheType) -> str:
    return kind.k if kind.k == kind.v else f"{kind.k}/{kind.v}"


def _name_points(axis: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Writes each name as near to its lowest point as can be without touching a point or another name.

    The points of one name are joined by a line.
    """
    at = axis.transData.transform([place for _, *place in points])
    unit = axis.figure.dpi / 72  # pixels of a typographic point
    taken = [np.concatenate([place - 4 * unit, place + 4 * unit]) for place in at]
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    around = [(r, np.asarray([np.cos(angle), np.sin(angle)])) for r in range(6, 120, 4) for angle in angles]
    for text in dict.fromkeys(text for text, *_ in points):
        own = [i for i, (other, *_) in enumerate(points) if other == text]
        axis.plot(*zip(*(points[i][1:] for i in own), strict=True), color="#999999", lw=0.8, zorder=2)
        i = min(own, key=lambda i: at[i][1])
        name = axis.annotate(
            text, points[i][1:], (0, 0), textcoords="offset points", ha="center", va="center", fontsize=7,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "#999999", "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip
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
    """Whether two boxes, each ``(left, bottom, right, top)``, do."""
    return bool(np.all(a[:2] < b[2:]) and np.all(b[:2] < a[2:]))


def measure(args: argparse.Namespace) -> tuple[str, list[Row]]:
    """What was asked for: the circumstances in words, and a row for each variant of each format.

    Raises:
      InputError: anything about the arguments that cannot be used.
    """
    text = read_text(args.file)
    ready = open_model(ModelChoice(args.model, args.dtype, exact=True))  # pages alone are to differ
    config, tokenizer = ready.loaded.config, ready.loaded.tokenizer
    n_ctx = context_of(config.context_length, args.context)
    for distance in args.distances:
        if not _PASSAGE <= distance <= n_ctx - _PASSAGE:
            allowed = f"{_PASSAGE} to {n_ctx - _PASSAGE}"
            raise InputError(
                f"--distances {distance}: chunks of {n_ctx} tokens (-c) have passages {allowed} apart"
            )
    tokens = tokens_of(tokenizer, text)
    if len(tokens) < 2 * n_ctx:
        raise InputError(
            f"{args.file or HELD_OUT} has {len(tokens)} tokens; passages and the text around need {2 * n_ctx}"
        )
    chunks = chunks_of(tokenizer, tokens, n_ctx, args.file or HELD_OUT)
    chunks = chunks[np.unique(np.linspace(0, len(chunks) - 1, args.chunks).astype(int))]
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
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    pairs = [passages(np.asarray(tokens), n_ctx, d, args.passages, args.seed, bos) for d in args.distances]
    seen, unseen = (np.concatenate(side) for side in zip(*pairs, strict=True))
    retrieved, found = retrieval(meter, kinds, seen, unseen)
    if not retrieved.any():
        raise InputError("this model retrieves nothing at these --distances")
    rows = [
        Row(
            kind,
            meter.bits(kind),
            Divergence(scores[0], one),
            Estimate.mean(copied.right[retrieved]),
            Estimate.mean((copied.nll - found[0].nll)[retrieved]),
        )
        for kind, one, copied in zip(kinds[1:], scores[1:], found[1:], strict=True)
    ]
    by_distance = retrieved.reshape(len(args.distances), -1).mean(axis=1)
    shares = ", ".join(f"{100 * s:.0f}% at {d}" for d, s in zip(args.distances, by_distance, strict=True))
    return (
        f"{ready.loaded.description}, computing in {ready.dtype}; {len(chunks)} chunks of {n_ctx} tokens, "
        f"{min(args.ubatch_size, n_ctx)} a step, pages of {args.page_size}; perplexity with f32 "
        f"{Divergence(scores[0], scores[0]).ppl.value:.4f}; {retrieved.sum()} of {retrieved.size} tokens of passages "
        f"retrieved ({shares} tokens)"
    ), rows


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "-m", "--model", type=Path, help="a GGUF file or a Hugging Face folder (default: the embedded model)"
    )
    parser.add_argument(
        "-f", "--file", help="the text (default: Python that the embedded model was not trained on)"
    )
    parser.add_argument(
        "--formats", metavar="NAMES", type=lambda text: text.split(","),
        help="such as q8_0,q8_0/q4_0 (default: all, and some pairs)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["auto", "f32", "bf16", "f16"], default="auto", help="of the computation"
    )
    parser.add_argument(
        "-c", "--context", type=positive, default=512, help="tokens of a chunk (default: 512)"
    )
    parser.add_argument("--chunks", type=positive, default=32, help="of the text, evenly apart (default: 32)")
    parser.add_argument(
        "--distances", type=positives, default=[96, 192, 320],
        help=f"tokens that passages are apart, at least {_PASSAGE} (default: 96,192,320)",
    )  # fmt: skip
    parser.add_argument("--passages", type=positive, default=24, help="of each distance (default: 24)")
    parser.add_argument("--page-size", type=positive, default=32, help="tokens of a page (default: 32)")
    parser.add_argument(
        "-ub",
        "--ubatch-size",
        type=positive,
        default=512,
        help="tokens of a chunk that a step reads (default: 512)",
    )
    parser.add_argument(
        "-np",
        "--parallel",
        type=positive,
        help="chunks side by side (default: what makes 512 tokens a step, 32 at most)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the passages' places (default: 0)")
    add_json(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw quality against bits, .svg or .png")
    args = parser.parse_args()
    check_writable(parser, args.json, args.plot)
    if args.plot and (missing := need("matplotlib", "--plot", "pip install matplotlib")):
        parser.error(missing)
    try:
        check_page_size(args.page_size)
        described, rows = measure(args)
    except InputError as error:
        parser.error(error.message)
    except ValueError as error:  # the page size
        parser.error(str(error))
    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(f"{device}; {described}\n")
    print(line(_HEADS))
    print(f"|{'|'.join('---' if head in ('K', 'V', 'turned') else '---:' for head in _HEADS)}|")
    for row in rows:
        print(line(row.cells()))
    write_json(args.json, {"measured": described, "rows": [row.values() for row in rows]})
    if args.plot:
        draw(rows, args.plot, described)


if __name__ == "__main__":
    main()
