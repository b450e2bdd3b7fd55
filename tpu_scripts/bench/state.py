"""Costs that must not depend on the pool: ``reserve`` over many pages, and a decode step with a larger pool or table.

    python -m tpu_scripts.bench.state

Needs: pip install -e ".[model]".

Measured in turns; medians. The model has the shape of SmolLM2-135M with fewer layers.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxpaged_model.llama import functional, random_params

from jaxpaged import PagedKVCache, generate_stream, reserve
from tpu_scripts import common
from tpu_scripts.bench.models import SMOLLM2_135M, generation_rate
from tpu_scripts.common import Parser, positive


def reserve_microseconds(num_seqs: int, num_pages: int, repeat: int) -> float:
    """Median time of reserving one token per sequence, cache donated, dispatch and wait included."""
    cache = PagedKVCache.create(
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        num_pages=num_pages,
        max_seqs=num_seqs,
        max_seq_len=511 * 16,
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
    parser = Parser(__doc__, repeat=9)
    parser.add("--layers", "layers of the model", positive, 6)
    args = parser.parse()
    micros = reserve_microseconds(256, 65536, 200)
    print(f"reserve, one token of each of 256 sequences over 65,536 pages: {micros:.0f} us", flush=True)

    config = dataclasses.replace(SMOLLM2_135M, num_layers=args.layers)
    model, params = functional(config), random_params(config)
    measures = {}
    for pages, entries in ((32, 32), (512, 32), (32, 512)):
        sizes = {"num_pages": pages, "max_seqs": 1, "max_seq_len": (entries - 1) * 32}
        cache = PagedKVCache.create(**config.cache_spec, **sizes)
        stream = generate_stream(model, params, cache, [[1]], max_new_tokens=65, every=64, batch_size=1)
        stream.compile()
        name = f"pool of {pages} pages, table of {entries} entries"
        measures[name] = partial(generation_rate, stream, 700)
    rates = common.in_turns(measures, args.repeat)
    first = next(iter(rates.values()))
    for name, own in rates.items():
        milliseconds = 1e3 / statistics.median(own)
        ratio = common.median_ratio(first, own)
        print(f"decode step at 700 live tokens, {name}: {milliseconds:.2f} ms, {ratio:.3f} x the first")


if __name__ == "__main__":
    main()
