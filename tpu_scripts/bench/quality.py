"""Quality lost to a page format: how far predictions move, and what is still retrieved from the context.

    python -m tpu_scripts.bench.quality
    python -m tpu_scripts.bench.quality -m model.gguf -f text.txt --formats q8_0,q8_0/q4_0,q4_0 --plot quality.svg

Needs: jax for the device and ".[model]" (pip install -e ".[model,tpu]", or cuda13); --plot needs matplotlib.

Caches of all formats get the same text beside one of f32, each format as it is and with rows under a Hadamard
transform; k/v names one format for keys and one for values. Without -m and -f the text is Python that the embedded
model was not trained on. Behind ± is one standard error. Two things are measured.

Divergence, over chunks of -c tokens from all of the text, the second half of each scored: the mean Kullback-Leibler
divergence from the predictions of f32 in nats, its 99% quantile, the share of tokens where both predict the same one,
and the ratio of perplexities. `jaxpaged perplexity --kl-divergence` prints more of it for one format.

Retrieval: a passage of 48 tokens stands in a chunk twice, --distances tokens apart, with other text before and
between. Retrieved are those tokens of the second one, its first 8 left out, that f32 predicts, and does not predict
if other text replaces the first one: they come from there. "kept" is the share of them that a format predicts as well,
"nats" their mean loss of log-likelihood. As f32 defines the set, other formats can only lose.

Retrieval is copying: among all keys of the context those of the passage must be found, and their values must say what
comes next. It is not a question answered from memory, for which the embedded model is too small: asked for a random
value that it saw once behind a random name, it predicted the first digit of a number in 5 of 10 cases right behind it
and in 2 of 10 after 256 tokens, the first letters of a word in fewer, and all of the value next to never. Beyond some
500 tokens, the length it was mostly trained with, even f32 retrieves one token in twenty; a larger model, -c and
--distances go further.

The result depends on -ub: residual formats keep the newest page of each sequence in 16 bits. With -ub 512 most pages
are quantized before anything attends to them; -ub 1 appends tokens as decoding does, takes longer, and finds a third to
a quarter of the divergence with the embedded model. Other formats quantize each row as it is written and do not depend
on it. The bits per value are those of the pool, scales included; residual pages come on top, one per sequence.
"""

from __future__ import annotations

import argparse
import math
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
from jaxpaged.app.loading import ReadyModel, open_model
from jaxpaged.app.options import ModelFlags
from jaxpaged.app.perplexity import BASE, HELD_OUT, chunks_of, context_of, scored_text, tokens_of
from jaxpaged.app.scoring import Scores, default_parallel, score
from jaxpaged.pages.formats import PAGE_FORMATS
from tpu_scripts import common
from tpu_scripts.common import Parser, each, natural, note, positive, progress

_MIXED = ("q8_0/q5_1", "q8_0/q4_0", "q5_1/q4_0", "q4_0/q8_0")
_PASSAGE = 48
_LED_IN = 8
"""First tokens of a second passage, which let the model recognize it."""
_HEADS = ("K", "V", "Hadamard", "bits", "KLD", "99% KLD", "same top %", "PPL ratio", "kept %", "nats")


@dataclass(frozen=True)
class Row:
    """Measurements of one format of keys and values."""

    kind: CacheType
    bits: float
    divergence: Divergence
    kept: Estimate
    """Share kept of the tokens that f32 retrieves."""
    nats: Estimate
    """Mean loss of their log-likelihood."""

    def cells(self) -> list[str]:
        d, hadamard = self.divergence, {None: "", True: "yes", False: "no"}[self.kind.hadamard]
        cells = [self.kind.k, self.kind.v, hadamard, f"{self.bits:.4g}", _digits(d.kld)]
        cells += [f"{d.kld_quantiles['99.0%']:.2g}", _digits(d.same_top, 100), _digits(d.ratio)]
        return [*cells, _digits(self.kept, 100), _digits(self.nats)]

    def values(self) -> dict[str, Any]:
        """Values for JSON."""
        kind = {"k": self.kind.k, "v": self.kind.v, "hadamard": self.kind.hadamard}
        found = {"bits_per_value": self.bits, "kept": self.kept._asdict(), "nats": self.nats._asdict()}
        return kind | self.divergence.as_dict() | found


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


def passages(
    tokens: np.ndarray, n_ctx: int, distance: int, count: int, seed: int, bos: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Makes chunks that end with a repeated passage, and the same chunks with other text in place of the first one.

    Args:
      tokens: i32[...], at least ``2 * n_ctx`` of a text. Passages and the text around come from parts of it that do
        not overlap.
      n_ctx: tokens per chunk.
      distance: tokens from the beginning of a passage to that of its repetition.
      count: number of chunks.
      seed: seed of the positions.
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
    """Mask of the tokens of second passages that f32 retrieves, bool[...], and the scores of each kind for all."""
    copied = np.s_[:, _LED_IN - _PASSAGE :]
    (without,) = meter.scores(kinds[:1], unseen, "passages not seen before")
    found = [scores[copied] for scores in meter.scores(kinds, seen, "passages seen before")]
    return found[0].right & ~without[copied].right, found


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draws quality against bits, a named point per row: divergence on the left, retrieval on the right."""
    rows = [row for row in rows if row.divergence.kld.value > 0]  # f32 is not on a logarithmic axis
    bits = [row.bits for row in rows]
    klds = [row.divergence.kld.value for row in rows]
    lost = [100 * (1 - row.kept.value) for row in rows]
    kinds = {
        None: ("s", "#444444", "no transform"),
        False: ("o", "#2f6fb0", "as it is"),
        True: ("^", "#c8552b", "Hadamard transform"),
    }
    wrapped = "\n".join(textwrap.wrap(title, 150))
    with common.figure(path, wrapped, ncols=2, figsize=(12, 6.6)) as (figure, panels):
        axes = panels[0]
        for axis, values in zip(axes, (klds, lost), strict=True):
            for hadamard, (marker, colour, label) in kinds.items():
                own = [i for i, row in enumerate(rows) if row.kind.hadamard is hadamard]
                x, y = [bits[i] for i in own], [values[i] for i in own]
                axis.scatter(x, y, s=22, marker=marker, color=colour, label=label if own else None, zorder=3)
            axis.set_xscale("log", base=2)
            axis.set_xticks(_TICKS, [str(tick) for tick in _TICKS])
            axis.set_xlim(0.85 * min(bits), 1.2 * max(bits))
            axis.set_xlabel("bits per value")
            axis.margins(y=0.1)
        axes[0].set_yscale("log")
        axes[0].set_title("divergence from f32: mean KLD, nats")
        axes[1].set_yscale("symlog", linthresh=1)
        axes[1].set_yticks(_LOST_TICKS, [str(tick) for tick in _LOST_TICKS])
        axes[1].set_ylim(-0.3, max(2.0, 1.3 * max(lost)))
        axes[1].set_title("tokens that f32 retrieves from the context, and the format does not, %")
        for axis in axes:
            axis.minorticks_off()
        common.legend_below(figure, axes[0])
        figure.draw_without_rendering()  # from here on, points have their positions
        figure.set_layout_engine("none")
        names = [row.kind.k if row.kind.k == row.kind.v else f"{row.kind.k}/{row.kind.v}" for row in rows]
        for axis, values in zip(axes, (klds, lost), strict=True):
            _name_points(axis, list(zip(names, bits, values, strict=True)))


_TICKS = (2, 3, 4, 5, 6, 8, 10, 12, 16)
_LOST_TICKS = (0, 0.5, 1, 2, 5, 10, 20, 50, 100)


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
        style = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 7}
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
    config, tokenizer = ready.loaded.config, ready.loaded.tokenizer
    n_ctx = context_of(config.context_length, args.context)
    for distance in args.distances:
        if not _PASSAGE <= distance <= n_ctx - _PASSAGE:
            allowed = f"{_PASSAGE} to {n_ctx - _PASSAGE}"
            raise InputError(f"--distances {distance}: chunks of {n_ctx} tokens (-c) allow {allowed}")
    tokens = tokens_of(tokenizer, text)
    if len(tokens) < 2 * n_ctx:
        name = args.file or HELD_OUT
        raise InputError(f"{name} has {len(tokens)} tokens; passages and the text around need {2 * n_ctx}")
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
    parser = Parser(__doc__, page_size=32, json=None, plot=None)
    parser.add("-m --model", "GGUF file or Hugging Face folder (default: the embedded model)", Path)
    parser.add("-f --file", "text (default: Python that the embedded model was not trained on)")
    parser.add("--formats", "such as q8_0,q8_0/q4_0 (default: all, and some pairs)", each(str))
    parser.add("--dtype", "of the computation", default="auto", choices=["auto", "f32", "bf16", "f16"])
    parser.add("-c --context", "tokens per chunk", positive, 512)
    parser.add("--chunks", "number of chunks, spread over the text", positive, 32)
    parser.add("--distances", f"tokens between passages, at least {_PASSAGE}", each(positive), [96, 192, 320])
    parser.add("--passages", "passages of each distance", positive, 24)
    parser.add("-ub --ubatch-size", "tokens of a chunk per step", positive, 512)
    parser.add(
        "-np --parallel", "chunks per step (default: as many as have 512 tokens, 32 at most)", positive
    )
    parser.add("--seed", "of the passages' positions", natural, 0)
    args = parser.parse()
    try:
        described, rows = measure(args)
    except InputError as error:
        parser.error(error.message)
    print(f"{common.device()}; {described}\n")
    print(common.head(*_HEADS, left=_HEADS[:3]))
    for row in rows:
        print(common.row(*row.cells()))
    common.write_json(args.json, {"measured": described, "rows": [row.values() for row in rows]})
    if args.plot:
        draw(rows, args.plot, described)


if __name__ == "__main__":
    main()
