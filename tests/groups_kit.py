"""Small caches of two layer groups, filled with rows that tell their tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cache_oracle import counted, encode

import jaxpaged as ops
from jaxpaged import GroupedKVCache, LayerGroup, PagedKVCache
from jaxpaged.pages.batch import Batch
from jaxpaged.pages.rope import Rope

MAX_SEQS, NUM_TOKENS, PAGE_SIZE = 4, 40, 8


def layer_groups(window: int) -> list[LayerGroup]:
    return [LayerGroup((0, 2), 2, 2, window=window), LayerGroup((1,), 1, 4)]


def grouped(window: int = 12, num_pages: Any = (14, 20), **sizes: Any) -> GroupedKVCache:
    given = {"max_seqs": MAX_SEQS, "page_size": PAGE_SIZE, "step_tokens": NUM_TOKENS, "rope": Rope.create(())}
    return GroupedKVCache.create(layer_groups(window), num_pages=num_pages, **(given | sizes))


def write(cache: PagedKVCache, batch: Batch, tokens: jax.Array) -> PagedKVCache:
    for layer in range(cache.num_layers):
        heads, dim = cache.num_kv_heads, cache.head_dim
        cache = cache.write(layer, *(encode(tokens, layer, which, heads, dim) for which in (0, 1)), batch)
    return cache


def step(cache: Any, num_new: jax.Array, first_token: jax.Array) -> Any:
    """Reserves, and writes tokens ``first_token, first_token + 1, ...`` to every group."""
    cache, batch, ok = ops.reserve(cache, num_new, num_tokens=NUM_TOKENS)
    tokens = jnp.where(batch.valid, first_token + jnp.arange(NUM_TOKENS), -1)
    parts = (write(part, batch.of_group(g), tokens) for g, part in enumerate(cache.parts))
    return GroupedKVCache(tuple(parts), cache.groups), batch, ok


jit_step = counted(step)
jit = {
    name: counted(getattr(ops, name))
    for name in ("seq_remove", "seq_copy", "seq_shift", "seq_keep", "seq_reorder", "seq_defragment")
}


def contents(cache: PagedKVCache) -> list[dict[int, int]]:
    """Token at each position of each sequence, read from the keys of the last layer."""
    table = jax.tree.map(np.asarray, cache.table)
    last = np.asarray(cache.k_pages).reshape(cache.num_layers, cache.num_pages, *cache.k_pages.shape[1:])[-1]
    found = []
    for seq in range(cache.max_seqs):
        held = {}
        for e in range(table.num_entries[seq]):
            for i in range(table.num_tokens[seq, e]):
                row = last[table.pages[seq, e], :, table.first_slot[seq, e] + i]
                token = int(row[0, 0]) // 64
                heads, dim = cache.num_kv_heads, cache.head_dim
                expected = encode(np.array([token]), cache.num_layers - 1, 0, heads, dim)[0]
                np.testing.assert_array_equal(row, expected)
                held[int(table.position[seq, e]) + i] = token
        found.append(held)
    return found


def filled(cache: Any, counts: list[int], first: int = 0) -> Any:
    while any(counts):
        now = [min(n, NUM_TOKENS // MAX_SEQS) for n in counts]
        cache, _, ok = jit_step(cache, jnp.asarray(now, jnp.int32), first)
        assert ok
        counts, first = [n - m for n, m in zip(counts, now, strict=True)], first + sum(now)
    return cache
