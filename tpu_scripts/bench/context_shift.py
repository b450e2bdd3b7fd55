"""Time of one context shift: entries that store their rotation, against re-rotating every key as llama.cpp does.

    python -m tpu_scripts.bench.context_shift

Needs: jax, and pip install -e ".[model]".

One sequence holds L tokens; a shift removes 256 of them behind the first 4 and moves the others up. "moved entries" is
``seq_remove`` and ``seq_shift`` on a paged cache; "re-rotated keys" rotates every key behind the hole to its new
position, in every layer, in one jitted and donated program. Both run in one process, in turns; compiling is not timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged import PagedKVCache, Rope, seq_remove, seq_shift
from tpu_scripts import common
from tpu_scripts.bench.models import SMOLLM2_135M, fill, make_cache
from tpu_scripts.common import Parser, each, positive

KEEP, DISCARD = 4, 256


@partial(jax.jit, donate_argnums=0)
def move_entries(cache: PagedKVCache) -> PagedKVCache:
    """Shifts as this project does: only tables change."""
    cache, _ = seq_remove(cache, 0, KEEP, KEEP + DISCARD)
    return seq_shift(cache, 0, KEEP + DISCARD, -1, -DISCARD)[0]


@partial(jax.jit, donate_argnums=0)
def rerotate_keys(cache: PagedKVCache, rope: Rope) -> PagedKVCache:
    """Shifts as llama.cpp does: positions change, and every key behind the hole is rotated."""
    slot = jnp.arange(cache.page_size)
    moved = (cache.table.position[0][:, None] + slot >= KEEP + DISCARD).astype(jnp.int32)
    delta = jnp.zeros((cache.num_pages, cache.page_size), jnp.int32)
    delta = delta.at[cache.table.pages[0]].set(-DISCARD * moved, mode="drop")
    cos, sin = (jnp.tile(x, (cache.num_layers, 1, 1))[:, None] for x in rope.cos_sin(delta))
    k_pages = rope.rotate_by(cache.k_pages, cos, sin)
    return replace(move_entries(cache), k_pages=k_pages)


def seconds_of(run: Callable[[Any], Any], config: Any, length: int, page_size: int) -> float:
    """Seconds of one call on a cache of its own, of one sequence of ``length`` tokens; the cache is donated."""
    cache = make_cache("paged", config, 1, length + 4 * page_size, page_size)
    cache, ok = fill(cache, np.array([length], np.int32), length)
    if not ok:
        raise SystemExit(f"the cache cannot hold {length} tokens")
    jax.block_until_ready(cache)
    start = time.perf_counter()
    after = jax.block_until_ready(run(cache))
    seconds = time.perf_counter() - start
    del after  # returning gigabytes to the system takes time, too
    return seconds


def main() -> None:
    parser = Parser(__doc__, page_size=32, repeat=7, json=None)
    parser.add("--lengths", "tokens of context", each(positive), [1024, 8192, 65536])
    parser.add("--layers", "layers", positive, SMOLLM2_135M.num_layers)
    parser.add("--kv-heads", "KV heads", positive, SMOLLM2_135M.num_kv_heads)
    parser.add("--head-dim", "numbers per head", positive, SMOLLM2_135M.head_dim)
    args = parser.parse()
    if min(args.lengths) <= KEEP + DISCARD:
        parser.error(
            f"--lengths must be more than the {KEEP + DISCARD} tokens of a shift, got {min(args.lengths)}"
        )
    sizes = {"num_layers": args.layers, "num_kv_heads": args.kv_heads, "head_dim": args.head_dim}
    config = replace(SMOLLM2_135M, **sizes)
    ways = {"moved entries": move_entries, "re-rotated keys": partial(rerotate_keys, rope=config.rope)}
    print(
        common.head("tokens of context", "moved entries, us", "re-rotated keys, us", "ratio", left=()),
        flush=True,
    )
    rows = []
    for length in args.lengths:
        measures = {
            name: partial(seconds_of, run, config, length, args.page_size) for name, run in ways.items()
        }
        common.in_turns(measures, 1)
        seconds = common.in_turns(measures, args.repeat)
        rows.append({"tokens": length, "seconds": seconds})
        ours, theirs = (1e6 * statistics.median(times) for times in seconds.values())
        print(common.row(f"{length:,}", f"{ours:,.0f}", f"{theirs:,.0f}", f"{theirs / ours:.0f}"), flush=True)
    common.write_json(args.json, {"rows": rows})


if __name__ == "__main__":
    main()
