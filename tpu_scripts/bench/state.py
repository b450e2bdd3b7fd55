"""What must not depend on the pool: ``reserve`` over many pages, and a decode step beside a larger pool or table.

    python -m tpu_scripts.bench.state

Measurements are taken in turns; medians. The model has SmolLM2-135M's layers, fewer of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jaxpaged_model.llama import functional, random_params

from jaxpaged import PagedKVCache, generate_stream, reserve
from tpu_scripts.common import SMOLLM2_135M, generation_rate


def reserve_microseconds(num_seqs: int, num_pages: int, repeat: int) -> float:
    """Median time of reserving one token for each sequence, donated, dispatch and wait included."""
    cache = PagedKVCache.create(
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        num_pages=num_pages,
        max_seqs=num_seqs,
        max_pages_per_seq=512,
        page_size=16,
    )
    step = jax.jit(reserve, static_argnames="num_tokens", donate_argnames="cache")
    depth = np.random.default_rng(0).integers(1, 3000, num_seqs)
    cache, _, ok = step(cache, jnp.asarray(depth), num_tokens=int(depth.sum()))
    one, seconds = jnp.ones(num_seqs, jnp.int32), []
    for _ in range(repeat):
        start = time.perf_counter()
        cache, _, ok = step(cache, one, num_tokens=num_seqs)
        ok.block_until_ready()
        seconds.append(time.perf_counter() - start)
        if not ok:
            raise SystemExit("the pool ran out of pages; fewer repeats are needed")
    return 1e6 * statistics.median(seconds[5:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-r", "--repeat", type=int, default=9)
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args()
    micros = reserve_microseconds(256, 65536, 200)
    print(f"reserve, one token of each of 256 sequences over 65,536 pages: {micros:.0f} us", flush=True)

    config = dataclasses.replace(SMOLLM2_135M, num_layers=args.layers)
    model, params = functional(config), random_params(config)
    streams = {}
    for pages, entries in ((32, 32), (512, 32), (32, 512)):
        cache = PagedKVCache.create(
            num_layers=args.layers,
            num_kv_heads=3,
            head_dim=64,
            num_pages=pages,
            max_seqs=1,
            max_pages_per_seq=entries,
        )
        stream = generate_stream(model, params, cache, [[1]], max_new_tokens=65, every=64, batch_size=1)
        stream.compile()
        streams[pages, entries] = stream
    rates: dict[tuple[int, int], list[float]] = {key: [] for key in streams}
    for _ in range(args.repeat):
        for key, stream in streams.items():
            rates[key].append(generation_rate(stream, 700))
    base = rates[32, 32]
    for (pages, entries), own in rates.items():
        ratio = statistics.median(a / b for a, b in zip(base, own, strict=True))
        print(
            f"decode step at 700 live tokens, pool of {pages} pages, table of {entries} entries: "
            f"{1e3 / statistics.median(own):.2f} ms, {ratio:.3f} x the first"
        )


if __name__ == "__main__":
    main()
