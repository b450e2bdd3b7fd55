"""Time of one context shift: entries that remember their rotation against re-rotating every key, as llama.cpp does.

    python -m tpu_scripts.bench.context_shift

One sequence holds L tokens; a shift forgets 256 of them behind the first 4 and moves the others up. "moved entries" is
``seq_remove`` and ``seq_shift`` on a paged cache; "re-rotated keys" turns every key behind the hole to its new
position, in every layer, in one jitted and donated program. Both run in one process, in turns; compiling is not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged import PagedKVCache, Rope, reserve, seq_remove, seq_shift

KEEP, DISCARD = 4, 256


def make_cache(length: int, layers: int, heads: int, head_dim: int, page_size: int) -> PagedKVCache:
    """One sequence of ``length`` tokens and a few pages more."""
    pages = -(-length // page_size) + 4
    cache = PagedKVCache.create(
        num_layers=layers,
        num_kv_heads=heads,
        head_dim=head_dim,
        num_pages=pages,
        max_seqs=1,
        page_size=page_size,
    )
    cache, _, ok = jax.jit(partial(reserve, num_tokens=length), donate_argnums=0)(
        cache, jnp.array([length], jnp.int32)
    )
    if not ok:
        raise SystemExit(f"no room for {length} tokens")
    return cache


@partial(jax.jit, donate_argnums=0)
def move_entries(cache: PagedKVCache) -> PagedKVCache:
    """The shift of this project: tables alone change."""
    cache, _ = seq_remove(cache, 0, KEEP, KEEP + DISCARD)
    return seq_shift(cache, 0, KEEP + DISCARD, -1, -DISCARD)[0]


@partial(jax.jit, donate_argnums=0)
def rerotate_keys(cache: PagedKVCache, rope: Rope) -> PagedKVCache:
    """The shift of llama.cpp: the cells' positions change, and every key behind the hole is turned."""
    slot = jnp.arange(cache.page_size)
    moved = (cache.table.position[0][:, None] + slot >= KEEP + DISCARD).astype(jnp.int32)
    delta = jnp.zeros((cache.num_pages, cache.page_size), jnp.int32)
    delta = delta.at[cache.table.pages[0]].set(-DISCARD * moved, mode="drop")
    cos, sin = rope.cos_sin(delta)
    k_pages = tuple(rope.rotate_by(k, cos[:, None], sin[:, None]) for k in cache.k_pages)
    return replace(move_entries(cache), k_pages=k_pages)


def seconds_of(run: Callable[[Any], Any], cache: Any) -> float:
    """Of one call on a cache of its own, which is donated."""
    jax.block_until_ready(cache)
    start = time.perf_counter()
    after = jax.block_until_ready(run(cache))
    seconds = time.perf_counter() - start
    del after  # giving gigabytes back to the system takes its time too
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="1024,8192,65536", help="tokens of context")
    parser.add_argument("--layers", type=int, default=30, help="of SmolLM2-135M, like the sizes below")
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--page-size", type=int, default=32)
    parser.add_argument("-r", "--repetitions", type=int, default=7)
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md")
    args = parser.parse_args()
    rope = Rope.create(10_000.0 ** (-np.arange(0, args.head_dim, 2) / args.head_dim))
    ways: dict[str, Callable[[Any], Any]] = {
        "moved entries": move_entries,
        "re-rotated keys": lambda cache: rerotate_keys(cache, rope),
    }
    rows = []
    for length in map(int, args.lengths.split(",")):
        if length <= KEEP + DISCARD:
            raise SystemExit(f"--lengths: {length} is not more than the {KEEP + DISCARD} tokens of a shift")
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for repetition in range(args.repetitions + 1):
            for name, run in ways.items():
                cache = make_cache(length, args.layers, args.kv_heads, args.head_dim, args.page_size)
                seconds = seconds_of(run, cache)
                if repetition:
                    taken[name].append(seconds)
        rows.append(
            {"tokens": length} | {name: statistics.median(times) * 1e6 for name, times in taken.items()}
        )
    if args.output == "json":
        print(json.dumps({"backend": jax.default_backend(), "microseconds": rows}, indent=2))
        return
    print("| tokens of context | moved entries, us | re-rotated keys, us | ratio |\n|---:|---:|---:|---:|")
    for row in rows:
        ours, theirs = row["moved entries"], row["re-rotated keys"]
        print(f"| {row['tokens']:,} | {ours:,.0f} | {theirs:,.0f} | {theirs / ours:.0f} |")


if __name__ == "__main__":
    main()
