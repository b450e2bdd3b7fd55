"""Attention over pages alone: time, bytes of live keys and values per second, and the share of the memory bandwidth.

    python -m tpu_scripts.bench.paged_attention
    python -m tpu_scripts.bench.paged_attention -m Llama-3-8B -b 1,8 -c 8192,32768 --json rows.json --plot rows.svg

Needs: jax for the device (pip install -e ".[tpu]", ".[cuda13]" or ".[cpu]"); --plot needs matplotlib.

First the bandwidth of the device's memory is measured: a jitted copy on TPU and GPU; on CPU a copy and a read by all
cores, and the read is the limit, because decoding reads keys and values and writes next to nothing. Then, for every
model, batch and context, each implementation attends to random keys and values in pages in random order. Every
sequence holds "context" tokens; decode has one query of each, prefill its last tokens. Each round measures every
implementation and the memory again, so that a machine's changing speed affects all alike. Compiling is not timed.
A row that does not fit into the memory is left out with a line on stderr.
"""

from __future__ import annotations

import itertools
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

from jaxpaged import Batch, PagedKVCache
from jaxpaged.attention import paged_attention
from jaxpaged.attention.cases import MODELS
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.formats import PAGE_FORMATS
from tpu_scripts import common
from tpu_scripts.bench.memory import Bandwidth, free_memory, last_level_cache
from tpu_scripts.bench.models import noise
from tpu_scripts.common import Parser, each, in_turns, known, mebibytes, note, on_cpu, positive

_MAX_QUERIES = 16_384
"""Queries of a step; more than any server uses."""
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


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement."""

    model: str
    batch: int
    context: int
    """Tokens per sequence, those of the step included."""
    queries: int
    """Queries per sequence; 1 = decode."""
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
        """Pages per sequence."""
        return -(-self.context // self.page_size)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the live keys and values of one layer."""
        _, num_kv_heads, head_dim = self.heads
        itemsize = np.dtype(PAGE_FORMATS[self.dtype].dtype).itemsize
        return 2 * num_kv_heads * head_dim * itemsize * self.context * self.batch

    @property
    def operations(self) -> int:
        """Operations of one layer: a multiply and an add per number of each key and value that a query sees."""
        num_q_heads, _, head_dim = self.heads
        seen = self.queries * (2 * self.context - self.queries + 1) // 2
        return 4 * num_q_heads * head_dim * seen * self.batch

    def pool(self) -> jax.ShapeDtypeStruct:
        """Shape of one layer's keys, or values, in the layout that a cache has on this platform."""
        _, num_kv_heads, head_dim = self.heads
        create = partial(
            PagedKVCache.create,
            num_layers=1,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_pages=self.batch * self.pages,
            max_seqs=1,
            page_size=self.page_size,
            max_seq_len=1,
            dtype=self.dtype,
        )
        return jax.eval_shape(create).k_pages

    def layer_bytes(self) -> int:
        """Bytes of one layer's pages."""
        pool = self.pool()
        return 2 * math.prod(pool.shape) * pool.dtype.itemsize

    def state(self) -> tuple[BlockTable, Batch]:
        """Table of every sequence over permuted pages, and the batch of a step with its last tokens."""
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
    """Measurements of one implementation on one shape."""

    shape: Shape
    layers: int
    implementation: str
    seconds: list[float]
    """Seconds of one layer, per round."""
    limit: list[float]
    """Memory bandwidth in the same rounds, bytes per second."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def share(self) -> float:
        """Share of the bandwidth, median of the rounds."""
        taken = (self.shape.kv_bytes / s for s in self.seconds)
        return statistics.median(rate / limit for rate, limit in zip(taken, self.limit, strict=True))

    @property
    def cached(self) -> bool:
        """True if all that is read may stay in the chip's caches."""
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


class Attention:
    """One implementation, compiled for one shape."""

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
                    # The output is an input of the next layer, so that nothing can be moved out of the loop.
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
        """Bytes that the program allocates while it runs."""
        memory = self._run.memory_analysis()
        return int(getattr(memory, "temp_size_in_bytes", 0))

    def prepare(self, arguments: tuple[Any, ...], least: float) -> Callable[[], float]:
        """Finds how many repetitions take ``least`` seconds; returns a measurement of the seconds of one layer.

        Repetitions are a loop inside one jitted program. On TPU and GPU a call returns before it has run, and launching
        it and waiting for it takes 50 to 100 us, more than many a kernel. In a loop the device never waits for Python,
        as it does not in ``generate``. Each layer has its own pages, so that what one reads has left the chip's caches
        by the time it is read again; where all of them fit into a cache, the row is marked.
        """

        def seconds(times: int) -> float:
            count = jnp.int32(times)
            start = time.perf_counter()
            jax.block_until_ready(self._run(count, *arguments))
            return time.perf_counter() - start

        seconds(1)  # warm-up, such as page faults
        times, taken = 1, seconds(1)
        while taken < least:
            times = math.ceil(times * min(8.0, 1.2 * least / taken))
            taken = seconds(times)
        return lambda: seconds(times) / (times * self.layers)


def measure(
    shape: Shape, implementations: Sequence[str], bandwidth: Bandwidth, args: Any, free: int
) -> Iterator[Row]:
    """Yields the rows of one shape; prints a line for each that is left out."""
    name = f"{shape.model}, {shape.test}, batch {shape.batch}, context {shape.context:,}"
    layers = min(args.layers, free // shape.layer_bytes())
    if not layers:
        note(f"left out: {name}: {mebibytes(shape.layer_bytes())} MiB of pages, {mebibytes(free)} are free")
        return
    programs: dict[str, Attention] = {}
    for implementation in implementations:
        try:
            program = Attention(shape, implementation, layers)
        except NotImplementedError as reason:
            note(f"left out: {name}: {reason}")
            continue
        needed = layers * shape.layer_bytes() + program.temporary_bytes
        if needed > free:
            note(
                f"left out: {name}: {implementation} takes {mebibytes(needed)} MiB, {mebibytes(free)} are free"
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


def draw(rows: list[Row], path: Path, limit: float, kind: str) -> None:
    """Draws time against context: a panel per model, test and batch, with the time that the bandwidth allows."""
    panels = list(dict.fromkeys((r.shape.model, r.shape.test, r.shape.batch) for r in rows))
    columns = min(len(panels), 4)
    height = -(-len(panels) // columns)
    colours = dict(zip(dict.fromkeys(r.implementation for r in rows), common.COLOURS, strict=False))
    size = (3.2 * columns + 0.6, 2.7 * height + 0.5)
    with common.figure(path, common.device(), nrows=height, ncols=columns, figsize=size) as (figure, axes):
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, (model, test, batch) in zip(axes.flat, panels, strict=False):
            here = [r for r in rows if (r.shape.model, r.shape.test, r.shape.batch) == (model, test, batch)]
            for implementation, colour in colours.items():
                own = [r for r in here if r.implementation == implementation]
                x, y = [r.shape.context for r in own], [1e6 * r.median for r in own]
                axis.plot(x, y, marker="o", ms=3.5, color=colour, label=implementation)
            bound = {r.shape.context: 1e6 * r.shape.kv_bytes / limit for r in here}
            contexts = sorted(bound)
            label = f"K/V once at {limit / 1e9:,.0f} GB/s ({kind})"
            axis.plot(contexts, [bound[c] for c in contexts], "--", color="#444444", lw=1, label=label)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(contexts, [f"{c / 1024:g}k" for c in contexts])
            axis.minorticks_off()
            axis.set_title(f"{model}, {test}, batch {batch}")
        for axis in axes[:, 0]:
            axis.set_ylabel("us per layer")
        for axis in axes[-1]:
            axis.set_xlabel("tokens per sequence")
        common.legend_below(figure, axes.flat[0])


def shapes(args: Any) -> list[Shape]:
    """Shapes to measure, smallest first within a model; prints a line for each that makes no sense."""
    found = []
    chosen = itertools.product(args.model, (1, *args.prefill), args.batch, args.context)
    for model, queries, batch, context in chosen:
        name = f"{model}, prefill {queries}, batch {batch}, context {context:,}"
        if queries > context:
            note(f"left out: {name}: the context is shorter")
        elif queries > 1 and queries * batch > _MAX_QUERIES:
            note(f"left out: {name}: more than {_MAX_QUERIES:,} queries per step")
        else:
            found.append(Shape(model, batch, context, queries, args.page_size, args.dtype))
    return found


def main() -> None:
    cpu = on_cpu()
    parser = Parser(__doc__, page_size=32, implementation=None, repeat=7, memory=None, json=None, plot=None)
    models = ["SmolLM2-135M", "Llama-3-8B"]
    parser.add(
        "-m --model",
        f"models whose heads to use, of {', '.join(MODELS)}",
        each(known("model", MODELS)),
        models,
    )
    parser.add("-b --batch", "numbers of sequences", each(positive), [1, 8] if cpu else [1, 8, 64, 256])
    contexts = [1024, 4096, 16384] if cpu else [1024, 8192, 32768, 131072]
    parser.add("-c --context", "tokens per sequence", each(positive), contexts)
    parser.add(
        "--prefill", "also prefill: numbers of queries, the last tokens of each sequence", each(positive), []
    )
    parser.add("--dtype", "of pages and queries", default="f32" if cpu else "bf16", choices=PAGE_FORMATS)
    parser.add(
        "--layers", "pools to read in turn, so that caches are cold; fewer if memory is short", positive, 4
    )
    parser.add(
        "--milliseconds",
        "minimum duration of a measurement",
        positive,
        50,
    )
    args = parser.parse()
    args.least = args.milliseconds / 1000
    implementations = common.choose_implementations(parser, args.implementation)

    free = args.memory << 20 if args.memory else free_memory()
    bandwidth = Bandwidth(free // 4)
    free -= bandwidth.bytes * (2 if cpu else 1)
    described, rates = bandwidth.describe()
    print(f"{common.device()}; {described}")
    print(
        f"{args.dtype} pages of {args.page_size} tokens in random order; one layer; medians of {args.repeat} rounds; "
        f"* = all that is read may stay in the chip's caches\n"
    )
    print(common.head(*_HEADS, left=("model", "test", "implementation")), flush=True)
    rows: list[Row] = []
    for shape in shapes(args):
        for row in measure(shape, implementations, bandwidth, args, free):
            rows.append(row)
            print(common.row(*row.cells()), flush=True)
    values = {"bandwidth": rates, "limit": bandwidth.kind, "rows": [row.values() for row in rows]}
    common.write_json(args.json, values)
    if not rows:
        raise SystemExit("nothing was measured")
    if args.plot:
        draw(rows, args.plot, statistics.median(rate for row in rows for rate in row.limit), bandwidth.kind)


if __name__ == "__main__":
    main()
