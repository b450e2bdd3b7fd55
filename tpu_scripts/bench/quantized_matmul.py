"""Products with quantized matrices on a TPU or GPU: time, and bytes per second.

    python -m tpu_scripts.bench.quantized_matmul
    python -m tpu_scripts.bench.quantized_matmul --types Q4_0,Q8_0 --rows 14336 --columns 4096 --tokens 1,8

Needs: a TPU or a GPU, and jax for it (pip install -e ".[model,tpu]" or ".[model,cuda13]").

Each type's kernel reads several matrices one after another, so that none stays in a cache; in turns with it, XLA
multiplies bfloat16 matrices of the same sizes. Compiling is not timed.
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

from tpu_scripts import common
from tpu_scripts.common import Parser, each, known, note, on_cpu, positive

MATRICES, ROUNDS = 8, 25
"""Matrices of a type, and how often one program reads all of them."""


def timed(product: Callable[[jax.Array, Any], jax.Array], x: jax.Array, matrices: Any) -> Callable[[], float]:
    """Compiles a loop over all matrices; returns a measurement of the seconds of one product."""

    @jax.jit
    def run(x: jax.Array, matrices: Any) -> jax.Array:
        def body(_: jax.Array, x: jax.Array) -> jax.Array:
            for matrix in matrices:
                y = product(x, matrix)
                x = x + (y[:, :1] * 1e-30).astype(x.dtype)  # the output is an input of the next product
            return x

        return lax.fori_loop(0, ROUNDS, body, x)

    run(x, matrices).block_until_ready()

    def measure() -> float:
        start = time.perf_counter()
        run(x, matrices).block_until_ready()
        return (time.perf_counter() - start) / ROUNDS / MATRICES

    return measure


def random_codes(name: str, rows: int, columns: int) -> list[dict[str, jax.Array]]:
    """Matrices of random codes; separate arrays, because slices of one would be copied before they are read."""
    keys = iter(jax.random.split(jax.random.key(0), 100))

    def part(shape: Any) -> jax.Array:
        if shape.dtype == jnp.float16:
            return jax.random.normal(next(keys), shape.shape, jnp.float16) * jnp.float16(0.01)
        return jax.random.bits(next(keys), shape.shape, jnp.uint8).astype(shape.dtype)

    shapes = lanes.part_shapes(WEIGHT_FORMATS[name], rows, columns).items()
    return [{part_name: part(shape) for part_name, shape in shapes} for _ in range(MATRICES)]


def main() -> int:
    parser = Parser(__doc__, repeat=7, json=None)
    types = ["Q4_0", "Q8_0", "Q4_K", "Q6_K"]
    parser.add("--types", "types of weights", each(known("type", WEIGHT_FORMATS)), types)
    parser.add("--rows", "rows of a matrix", positive, 14336)
    parser.add("--columns", "columns of a matrix", positive, 4096)
    parser.add("--tokens", "rows of x", each(positive), [1, 8, 64])
    args = parser.parse()
    if on_cpu():
        note("JAX found no TPU or GPU here; jaxpaged bench measures the products of a CPU")
        return 2
    if jax.default_backend() == "tpu":
        from jaxpaged_model.quantized import tpu_kernel as kernel
    else:
        from jaxpaged_model.quantized import gpu_kernel as kernel  # type: ignore[no-redef]
    print(f"{common.device()}; {args.rows} x {args.columns}\n")
    heads = ("type", "tokens", "us", "GB/s of codes", "bf16 by XLA, us", "GB/s", "bf16 / type")
    print(common.head(*heads), flush=True)
    key = jax.random.key(1)
    plain = [jax.random.normal(key, (args.rows, args.columns), jnp.bfloat16) for _ in range(MATRICES)]
    rows = []
    for name in args.types:
        fmt, codes = WEIGHT_FORMATS[name], random_codes(name, args.rows, args.columns)
        size = sum(part.nbytes for part in codes[0].values())
        for tokens in args.tokens:
            x = jax.random.normal(jax.random.key(2), (tokens, args.columns), jnp.bfloat16)
            measures = {
                "kernel": timed(lambda x, w, fmt=fmt: kernel.matmul(fmt, x, w), x, codes),
                "bf16": timed(lambda x, w: jnp.einsum("tk,ok->to", x, w), x, plain),
            }
            seconds = common.in_turns(measures, args.repeat)
            rows.append({"type": name, "tokens": tokens, "bytes": size, "seconds": seconds})
            cells = [name, tokens]
            for way, num_bytes in (("kernel", size), ("bf16", plain[0].nbytes)):
                median = statistics.median(seconds[way])
                cells += [f"{median * 1e6:.1f}", f"{num_bytes / median / 1e9:,.0f}"]
            ratio = common.median_ratio(seconds["bf16"], seconds["kernel"])
            print(common.row(*cells, f"{ratio:.2f}"), flush=True)
    common.write_json(args.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
