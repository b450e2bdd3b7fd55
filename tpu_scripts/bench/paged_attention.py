"""Attention to pages alone: time, bytes of live keys and values a second, and the share of the memory's bandwidth.

    python -m tpu_scripts.bench.paged_attention
    python -m tpu_scripts.bench.paged_attention -m Llama-3-8B -b 1,8 -c 8192,32768 --json rows.json --plot rows.svg

Needs: jax for the device (pip install -e ".[tpu]", ".[cuda13]" or ".[cpu]"); a picture needs matplotlib.

First the bandwidth of the device's memory is measured: a jitted copy on TPU and GPU; on CPU a copy and a read by all
cores, and the read is the limit, because decoding reads keys and values and writes next to nothing. Then, for every
model, batch and context, each implementation reads random keys and values from pages that lie in random order. Every
sequence holds "context" tokens; decode asks one query of each, prefill its last tokens. Medians of turns: each turn
measures every implementation and the memory again, so that a machine's changing speed hits all alike. Compiling is
not timed. A row that does not fit into the memory is left out, and a line says so.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpaged import Batch, BlockTable, PagedKVCache
from jaxpaged.attention import paged_attention
from jaxpaged.attention.cases import MODELS
from jaxpaged.pages.formats import PAGE_FORMATS, check_page_size
from tpu_scripts.common import (
    Bandwidth,
    Parser,
    add_json,
    check_writable,
    choose_implementations,
    choose_models,
    free_memory,
    in_turns,
    last_level_cache,
    mebibytes,
    need,
    noise,
    note,
    on_cpu,
    positive,
    positives,
    write_json,
)

_MOST_ROWS = 16_384
"""Queries of a step; none that is served has more."""


@dataclass(frozen=True)
class Shape:
    """One row of the table, before it is measured."""

    model: str
    batch: int
    context: int
    """Tokens of each sequence, those of the step included."""
    queries: int
    """Of each sequence: 1 = decode."""
    page_size: int
    dtype: str

    @property
    def test(self) -> str:
        return "decode" if self.queries == 1 else f"prefill {self.queries}"

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, KV heads, head_dim."""
        heads = MODELS[self.model]
        return heads["num_q_heads"], heads["num_kv_heads"], heads["head_dim"]

    @property
    def pages(self) -> int:
        """Of each sequence."""
        return -(-self.context // self.page_size)

    @property
    def kv_bytes(self) -> int:
        """Live keys and values of one layer."""
        _, num_kv_heads, head_dim = self.heads
        itemsize = np.dtype(PAGE_FORMATS[self.dtype].dtype).itemsize
        return 2 * num_kv_heads * head_dim * itemsize * self.context * self.batch

    @property
    def operations(self) -> int:
        """Of one layer: a multiplication and an addition for each number of each key and value that a query sees."""
        num_q_heads, _, head_dim = self.heads
        seen = self.queries * (2 * self.context - self.queries + 1) // 2
        return 4 * num_q_heads * head_dim * seen * self.batch

    def pool(self) -> jax.ShapeDtypeStruct:
        """Keys, or values, of one layer, in the layout that a cache has on this platform."""
        _, num_kv_heads, head_dim = self.heads
        create = partial(
            PagedKVCache.create,
            num_layers=1,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_pages=self.batch * self.pages,
            max_seqs=1,
            page_size=self.page_size,
            max_pages_per_seq=1,
            dtype=self.dtype,
        )
        return jax.eval_shape(create).k_pages[0]

    def layer_bytes(self) -> int:
        """Memory of one layer's pages."""
        pool = self.pool()
        return 2 * math.prod(pool.shape) * pool.dtype.itemsize

    def state(self) -> tuple[BlockTable, Batch]:
        """The entries of every sequence over permuted pages, and a step of each one's last tokens."""
        count = self.batch * self.pages
        pages = np.random.default_rng(0).permutation(count).reshape(self.batch, self.pages)
        start = np.broadcast_to(np.arange(self.pages) * self.page_size, pages.shape)
        zeros = np.zeros_like(pages)
        rows = self.batch * self.queries
        position = np.tile(np.arange(self.context - self.queries, self.context), self.batch)

        def integers(x: Any) -> Array:
            return jnp.asarray(x, jnp.int32)

        table = BlockTable(
            pages=integers(pages),
            first_slot=integers(zeros),
            num_tokens=integers(np.minimum(self.context - start, self.page_size)),
            position=integers(start),
            rotation=integers(zeros),
            num_entries=integers(np.full(self.batch, self.pages)),
        )
        batch = Batch(
            sequence=integers(np.repeat(np.arange(self.batch), self.queries)),
            position=integers(position),
            rope_positions=integers(position),
            page=integers(np.full(rows, count)),
            slot=integers(np.zeros(rows)),
            cu_q_lens=integers(np.arange(self.batch + 1) * self.queries),
            max_q_len=self.queries,
        )
        return table, batch


@dataclass(frozen=True)
class Row:
    """One implementation on one shape."""

    shape: Shape
    layers: int
    implementation: str
    seconds: list[float]
    """Of one layer, turn by turn."""
    limit: list[float]
    """Bytes a second that the memory gave in the same turns."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def share(self) -> float:
        """Of the bandwidth: the median of the turns."""
        taken = (self.shape.kv_bytes / s for s in self.seconds)
        return statistics.median(rate / limit for rate, limit in zip(taken, self.limit, strict=True))

    @property
    def cached(self) -> bool:
        """Whether what is read again and again fits into the chip's own memory."""
        return self.layers * self.shape.kv_bytes <= 2 * last_level_cache()

    def cells(self) -> list[str]:
        shape = self.shape
        return [
            shape.model,
            shape.test,
            str(shape.batch),
            f"{shape.context:,}",
            mebibytes(shape.kv_bytes),
            self.implementation,
            f"{1e6 * self.median:,.1f}",
            f"{shape.kv_bytes / self.median / 1e9:,.1f}",
            f"{100 * self.share:.0f}%{'*' if self.cached else ''}",
            f"{shape.operations / self.median / 1e9:,.1f}",
        ]

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self.shape) | {
            "layers": self.layers,
            "implementation": self.implementation,
            "kv_bytes": self.shape.kv_bytes,
            "operations": self.shape.operations,
            "seconds": self.seconds,
            "limit_bytes_per_second": self.limit,
            "share": self.share,
            "cached": self.cached,
        }


_HEADS = (
    "model",
    "test",
    "batch",
    "context",
    "K/V MiB",
    "implementation",
    "us",
    "GB/s",
    "of limit",
    "Gflop/s",
)
_LEFT = {"model", "test", "implementation"}


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


class Attention:
    """One implementation, compiled for one shape, and how often a call of it repeats."""

    def __init__(self, shape: Shape, implementation: str, layers: int) -> None:
        self.layers = layers

        def run(
            times: Array,
            q: Array,
            k_pools: tuple[Array, ...],
            v_pools: tuple[Array, ...],
            table: BlockTable,
            batch: Batch,
        ) -> Array:
            def step(_: Array, mixed: Array) -> Array:
                for k_pages, v_pages in zip(k_pools, v_pools, strict=True):
                    out = paged_attention(
                        mixed, k_pages, v_pages, table, batch, implementation=implementation
                    )
                    # What comes out goes in again, so that nothing can be left out or moved out of the loop.
                    mixed = q + out / 64
                return mixed

            return jax.lax.fori_loop(0, times, step, q)

        num_q_heads, _, head_dim = shape.heads
        pool = shape.pool()
        pools = (pool,) * layers
        table, batch = shape.state()
        q = jax.ShapeDtypeStruct((batch.num_tokens, num_q_heads, head_dim), pool.dtype)
        times = jax.ShapeDtypeStruct((), jnp.int32)
        self._run = jax.jit(run).lower(times, q, pools, pools, table, batch).compile()
        self.q, self.table, self.batch = q, table, batch

    @property
    def temporary_bytes(self) -> int:
        """What the program allocates while it runs."""
        memory = self._run.memory_analysis()
        return int(getattr(memory, "temp_size_in_bytes", 0))

    def prepare(self, arguments: tuple[Any, ...], least: float) -> Callable[[], float]:
        """Finds how many repetitions take ``least`` seconds; what it returns gives the seconds of one layer.

        Repetitions are a loop inside one jitted program. On TPU and GPU a call returns before it has run, and launching
        it and waiting for it takes 50 to 100 us, more than many a kernel: timed call by call, that is what one would
        measure. In a loop the device never waits for Python, as it does not in ``generate``. The layers have pages of
        their own, so what one reads has left the chip's caches by the time it is read again; where all of them fit
        into a cache, the row is marked.
        """

        def seconds(times: int) -> float:
            count = jnp.int32(times)
            start = time.perf_counter()
            jax.block_until_ready(self._run(count, *arguments))
            return time.perf_counter() - start

        seconds(1)  # what is only done once, such as pages that the system has yet to give
        times, taken = 1, seconds(1)
        while taken < least:
            times = math.ceil(times * min(8.0, 1.2 * least / taken))
            taken = seconds(times)
        return lambda: seconds(times) / (times * self.layers)


def measure(
    shape: Shape, implementations: Sequence[str], bandwidth: Bandwidth, args: Any, room: int
) -> Iterator[Row]:
    """The rows of one shape; a line for each that is left out."""
    name = f"{shape.model}, {shape.test}, batch {shape.batch}, context {shape.context:,}"
    layers = min(args.layers, room // shape.layer_bytes())
    if not layers:
        note(
            f"left out: {name}: {mebibytes(shape.layer_bytes())} MiB of pages, there is room for {mebibytes(room)}"
        )
        return
    programs: dict[str, Attention] = {}
    for implementation in implementations:
        try:
            program = Attention(shape, implementation, layers)
        except NotImplementedError as reason:
            note(f"left out: {name}: {reason}")
            continue
        needed = layers * shape.layer_bytes() + program.temporary_bytes
        if needed > room:
            note(
                f"left out: {name}: {implementation} takes {mebibytes(needed)} MiB, there is room for {mebibytes(room)}"
            )
            continue
        programs[implementation] = program
    if not programs:
        return
    some = next(iter(programs.values()))
    pool = shape.pool()
    k_pools, v_pools = (tuple(noise(pool) for _ in range(layers)) for _ in range(2))
    arguments = (noise(some.q), k_pools, v_pools, some.table, some.batch)
    measures = {name: program.prepare(arguments, args.least) for name, program in programs.items()}
    taken = in_turns(measures | {"": bandwidth.limit}, args.repeat)
    limit = taken.pop("")
    for implementation, seconds in taken.items():
        yield Row(shape, layers, implementation, seconds, limit)


def draw(rows: list[Row], path: Path, limit: float, kind: str, device: str) -> None:
    """Time against context: a panel for each model, test and batch, and in it the time that the bandwidth allows."""
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "jaxpaged", "font.size": 9, "font.family": "sans-serif"})
    panels = list(dict.fromkeys((r.shape.model, r.shape.test, r.shape.batch) for r in rows))
    columns = min(len(panels), 4)
    height = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        height,
        columns,
        figsize=(3.2 * columns + 0.6, 2.7 * height + 0.5),
        squeeze=False,
        layout="constrained",
    )
    colours = dict(
        zip(
            dict.fromkeys(r.implementation for r in rows),
            ("#2f6fb0", "#c8552b", "#3c8c5a", "#7a4fa3"),
            strict=False,
        )
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (model, test, batch) in zip(axes.flat, panels, strict=False):
        here = [r for r in rows if (r.shape.model, r.shape.test, r.shape.batch) == (model, test, batch)]
        for implementation, colour in colours.items():
            own = [r for r in here if r.implementation == implementation]
            x, y = [r.shape.context for r in own], [1e6 * r.median for r in own]
            axis.plot(x, y, marker="o", ms=3.5, color=colour, label=implementation)
        contexts = sorted({r.shape.context for r in here})
        size = {r.shape.context: r.shape.kv_bytes for r in here}
        axis.plot(
            contexts, [1e6 * size[c] / limit for c in contexts], "--", color="#444444", lw=1,
            label=f"K/V once at {limit / 1e9:,.0f} GB/s ({kind})",
        )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(contexts, [f"{c / 1024:g}k" for c in contexts])
        axis.minorticks_off()
        axis.set_title(f"{model}, {test}, batch {batch}", fontsize=9)
        axis.grid(color="#dddddd", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("us a layer")
    for axis in axes[-1]:
        axis.set_xlabel("tokens of each sequence")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    figure.suptitle(device, fontsize=9)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=130)


def shapes(args: Any, parser: Parser) -> list[Shape]:
    """What was asked for, smallest first within a model."""
    choose_models(parser, args.model, MODELS)
    try:
        check_page_size(args.page_size)
    except ValueError as error:
        parser.error(str(error))
    found = []
    for model in args.model:
        for queries in (1, *args.prefill):
            for batch in args.batch:
                for context in args.context:
                    if queries > context:
                        note(
                            f"left out: {model}, prefill {queries}, context {context}: the context is shorter"
                        )
                    elif queries > 1 and queries * batch > _MOST_ROWS:
                        most = f"more than {_MOST_ROWS:,} queries a step"
                        note(f"left out: {model}, prefill {queries}, batch {batch}: {most}")
                    else:
                        found.append(Shape(model, batch, context, queries, args.page_size, args.dtype))
    return found


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "-m", "--model", default="SmolLM2-135M,Llama-3-8B", metavar="NAMES", type=lambda text: text.split(","),
        help=f"heads of these models, by default SmolLM2-135M,Llama-3-8B; there are {', '.join(MODELS)}",
    )  # fmt: skip
    parser.add_argument("-b", "--batch", type=positives, help="sequences (default: 1,8,64,256; on CPU 1,8)")
    parser.add_argument(
        "-c", "--context", type=positives,
        help="tokens of each sequence (default: 1024,8192,32768,131072; on CPU 1024,4096,16384)",
    )  # fmt: skip
    parser.add_argument(
        "--prefill", type=positives, default=[], metavar="TOKENS",
        help="also chunks of prompts: the last so many tokens of each sequence",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=PAGE_FORMATS, help="of pages and queries (default: bf16; on CPU f32)"
    )
    parser.add_argument("--page-size", type=positive, default=32, help="tokens of a page (default: 32)")
    parser.add_argument(
        "--implementation", metavar="NAMES",
        help="such as xla,cpu_numba (default: all that this platform tries, but the specification)",
    )  # fmt: skip
    parser.add_argument(
        "--layers", type=positive, default=4,
        help="pools that are read in turn, so that caches are cold; fewer where memory is short (default: 4)",
    )  # fmt: skip
    parser.add_argument("-r", "--repeat", type=positive, default=7, help="turns (default: 7)")
    parser.add_argument(
        "--milliseconds", type=positive, default=50,
        help="the least that one measurement lasts; shorter ones see clocks and launches (default: 50)",
    )  # fmt: skip
    parser.add_argument(
        "--memory",
        type=positive,
        metavar="MIB",
        help="use so much (default: what is free; on CPU half of it)",
    )
    add_json(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time against context, .svg or .png")
    args = parser.parse_args()
    cpu = on_cpu()
    args.batch = args.batch or ([1, 8] if cpu else [1, 8, 64, 256])
    args.context = args.context or ([1024, 4096, 16384] if cpu else [1024, 8192, 32768, 131072])
    args.dtype = args.dtype or ("f32" if cpu else "bf16")
    args.least = args.milliseconds / 1000
    check_writable(parser, args.json, args.plot)
    wanted = shapes(args, parser)
    implementations = choose_implementations(parser, args.implementation)
    if args.plot and (missing := need("matplotlib", "--plot", "pip install matplotlib")):
        parser.error(missing)

    room = args.memory << 20 if args.memory else free_memory()
    bandwidth = Bandwidth(room // 4)
    room -= bandwidth.bytes * (2 if cpu else 1)
    described, rates = bandwidth.describe()
    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(f"{device}; {described}")
    print(
        f"{args.dtype} pages of {args.page_size} tokens in random order; one layer; medians of {args.repeat} turns; "
        f"* = all that is read may stay in the chip's caches\n"
    )
    print(line(_HEADS))
    print(f"|{'|'.join('---' if head in _LEFT else '---:' for head in _HEADS)}|", flush=True)
    rows: list[Row] = []
    for shape in wanted:
        for row in measure(shape, implementations, bandwidth, args, room):
            rows.append(row)
            print(line(row.cells()), flush=True)
    values = [row.values() for row in rows]
    write_json(args.json, {"bandwidth": rates, "limit": bandwidth.kind, "rows": values})
    if not rows:
        raise SystemExit("nothing was measured")
    if args.plot:
        limit = statistics.median(rate for row in rows for rate in row.limit)
        draw(rows, args.plot, limit, bandwidth.kind, device)


if __name__ == "__main__":
    main()
