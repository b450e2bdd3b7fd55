"""Products with quantized matrices on a TPU or GPU: time, and the share of the memory's bandwidth.

    python -m tpu_scripts.bench.quantized_matmul
    python -m tpu_scripts.bench.quantized_matmul --types Q4_0,Q8_0 --rows 14336 --columns 4096 --tokens 1,8

Needs: a TPU or a GPU, and jax for it (pip install -e ".[model,tpu]" or ".[model,cuda13]").

Each type's kernel reads several matrices in turn, so that none stays in a cache; beside it, in the same turns, the same
products of bfloat16 matrices by XLA. Medians of turns; compiling is not timed.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxpaged_model.quantized import lanes
from jaxpaged_model.quantized.formats import WEIGHT_FORMATS

from tpu_scripts.common import (
    Parser,
    add_json,
    check_writable,
    in_turns,
    median_ratio,
    note,
    on_cpu,
    positive,
    positives,
    write_json,
)

MATRICES = 8
"""How many are read in turn."""


def timed(product: Callable[[jax.Array, Any], jax.Array], x: jax.Array, matrices: Any) -> Callable[[], float]:
    """Seconds of one product, of a loop that takes all the matrices again and again."""
    rounds = 25

    @jax.jit
    def run(x: jax.Array, matrices: Any) -> jax.Array:
        def body(i: jax.Array, x: jax.Array) -> jax.Array:
            for index in range(MATRICES):
                y = product(x, matrices[index])
                x = x + (y[:, :1] * 1e-30).astype(x.dtype)  # what one product gives is an input of the next
            return x

        return lax.fori_loop(0, rounds, body, x)

    run(x, matrices).block_until_ready()

    def measure() -> float:
        start = time.perf_counter()
        run(x, matrices).block_until_ready()
        return (time.perf_counter() - start) / rounds / MATRICES

    return measure


def drawn(name: str, rows: int, columns: int) -> Any:
    """Matrices of random codes, a list of each part: slices of one array would be copied before they are read."""
    keys = iter(jax.random.split(jax.random.key(0), 100))

    def part(shape: Any) -> list[jax.Array]:
        if shape.dtype == jnp.float16:
            return [
                jax.random.normal(next(keys), shape.shape, jnp.float16) * jnp.float16(0.01)
                for _ in range(MATRICES)
            ]
        return [
            jax.random.bits(next(keys), shape.shape, jnp.uint8).astype(shape.dtype) for _ in range(MATRICES)
        ]

    parts = {k: part(shape) for k, shape in lanes.part_shapes(WEIGHT_FORMATS[name], rows, columns).items()}
    return [{k: v[i] for k, v in parts.items()} for i in range(MATRICES)]


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--types", default="Q4_0,Q8_0,Q4_K,Q6_K", metavar="NAMES", help="(default: %(default)s)"
    )
    parser.add_argument("--rows", type=positive, default=14336, help="of a matrix (default: %(default)s)")
    parser.add_argument("--columns", type=positive, default=4096, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=positives, default=[1, 8, 64], help="rows of x (default: 1,8,64)")
    parser.add_argument("-r", "--repeat", type=positive, default=7, help="turns (default: %(default)s)")
    add_json(parser)
    args = parser.parse_args()
    names = args.types.split(",")
    for name in names:
        if name not in WEIGHT_FORMATS:
            parser.error(f"unknown type {name!r}; there are {', '.join(WEIGHT_FORMATS)}")
    check_writable(parser, args.json)
    if on_cpu():
        note(
            "bench_quantized_products: JAX found no TPU or GPU here; jaxpaged bench measures a CPU's products"
        )
        return 2
    if jax.default_backend() == "tpu":
        from jaxpaged_model.quantized import tpu_kernel as kernel
    else:
        from jaxpaged_model.quantized import gpu_kernel as kernel  # type: ignore[no-redef]
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {args.rows} x {args.columns}\n")
    print(
        "| type | tokens | us | GB/s of codes | bf16 by XLA, us | GB/s | bf16 / type |\n"
        "|---|---:|---:|---:|---:|---:|---:|"
    )
    key = jax.random.key(1)
    plain = [jax.random.normal(key, (args.rows, args.columns), jnp.bfloat16) for _ in range(MATRICES)]
    rows = []
    for name in names:
        parts = drawn(name, args.rows, args.columns)
        size = sum(part.nbytes for part in parts[0].values())
        for tokens in args.tokens:
            x = jax.random.normal(jax.random.key(2), (tokens, args.columns), jnp.bfloat16)
            fmt = WEIGHT_FORMATS[name]
            turns = in_turns(
                {
                    "kernel": timed(lambda x, w, fmt=fmt: kernel.matmul(fmt, x, w), x, parts),
                    "bf16": timed(lambda x, w: jnp.einsum("tk,ok->to", x, w), x, plain),
                },
                args.repeat,
            )
            own, other = statistics.median(turns["kernel"]), statistics.median(turns["bf16"])
            ratio = median_ratio(turns["bf16"], turns["kernel"])
            rows.append({"type": name, "tokens": tokens, "bytes": size, "seconds": turns})
            print(
                f"| {name} | {tokens} | {own * 1e6:.1f} | {size / own / 1e9:,.0f} | {other * 1e6:.1f} | "
                f"{plain[0].nbytes / other / 1e9:,.0f} | {ratio:.2f} |",
                flush=True,
            )
    write_json(args.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
