"""Random operations, each followed by attention, compared with a float64 reference.

Keys in pages are rotated at the position of their write; the reference rotates every key at its
current position.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from cache_oracle import NARROW, counted
from hypothesis import settings
from test_cache_machine import MAX_SEQS, NUM_TOKENS, CacheMachine

import jaxpaged as ops
from jaxpaged.attention import candidates, paged_attention
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.pages.batch import Batch, pack
from jaxpaged.pages.rope import Rope

HEADS, KV_HEADS, DIM = 4, 2, 8
FREQUENCIES = 10_000.0 ** (-np.arange(0, DIM, 2) / DIM)
ROPE = Rope.create(FREQUENCIES)
ROWS = np.random.default_rng(0).normal(size=(2, 1 << 12, KV_HEADS, DIM))
"""Key, not rotated, and value of each token."""
QUERIES = np.random.default_rng(1).normal(size=(MAX_SEQS, HEADS, DIM)) * 2


def attending_step(
    cache: PagedKVCache, num_new: jax.Array, first_token: jax.Array, num_tokens: int
) -> tuple[PagedKVCache, Batch, jax.Array]:
    """Reserves, and writes values and rotated keys of tokens ``first_token, first_token + 1, ...``."""
    cache, batch, ok = ops.reserve(cache, num_new, num_tokens=num_tokens)
    k, v = jnp.asarray(ROWS, jnp.float32)[:, (first_token + jnp.arange(num_tokens)) % ROWS.shape[1]]
    k = ROPE.rotate(k, batch.rope_positions)
    for layer in range(cache.num_layers):
        cache = cache.write(layer, k, v, batch)
    return cache, batch, ok


def attend(cache: PagedKVCache) -> dict[str, jax.Array]:
    """Output ``[S, HEADS, DIM]`` by implementation, of a query at the last position of each sequence."""
    table = cache.table
    position = ops.seq_position_max(cache)
    last = jnp.maximum(table.num_entries - 1, 0)
    rotation = jnp.take_along_axis(table.rotation, last[:, None], axis=1)[:, 0]
    sequence, _, cu_q_lens = pack((position >= 0).astype(jnp.int32), MAX_SEQS)
    row = jnp.minimum(sequence, MAX_SEQS - 1)
    position, rotation = position[row], rotation[row]
    none = jnp.zeros_like(row)
    batch = Batch(sequence, position, position + rotation, none + cache.num_pages, none, cu_q_lens)
    q = ROPE.rotate(jnp.asarray(QUERIES, jnp.float32)[row], batch.rope_positions)
    return {
        name: jnp.zeros_like(q)
        .at[sequence]
        .set(
            paged_attention(q, *cache.pages(1), table, batch, rope=ROPE, implementation=name),
            mode="drop",
        )
        for name in candidates("cpu")
    }


jit_attending_step = counted(attending_step, static_argnames="num_tokens", donate_argnames="cache")
jit_attend = counted(attend)


def expected_attention(contents: list[tuple[int, int]], query: np.ndarray) -> np.ndarray:
    """``f64[HEADS, DIM]``: attention over ``contents``, (position, token) of every token."""
    if not contents:
        return np.zeros((HEADS, DIM))
    position, token = np.asarray(contents).T

    def rotated(x: np.ndarray, at: np.ndarray) -> np.ndarray:
        pairs = (x[..., : DIM // 2] + 1j * x[..., DIM // 2 :]) * np.exp(1j * at[:, None, None] * FREQUENCIES)
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    k, v = ROWS[:, token % ROWS.shape[1]]
    k = np.repeat(rotated(k, position), HEADS // KV_HEADS, axis=1)
    v = np.repeat(v, HEADS // KV_HEADS, axis=1)
    q = rotated(query[None], position[-1:])[0]
    scores = np.einsum("hd,nhd->hn", q, k) * DIM**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hn,nhd->hd", weights / weights.sum(-1, keepdims=True), v)


class AttendingMachine(CacheMachine):
    """``CacheMachine`` with random keys and values, and attention after each operation."""

    model: ClassVar[dict[str, int]] = {"num_kv_heads": KV_HEADS, "head_dim": DIM}
    sizes: ClassVar[dict[str, int]] = model

    def write(self, counts: jax.Array) -> tuple[Batch, jax.Array]:
        self.cache, batch, ok = jit_attending_step(self.cache, counts, self.token, num_tokens=NUM_TOKENS)
        return batch, ok

    def check(self) -> None:
        self.oracle.check(self.cache, contents=False)
        outputs = {name: np.asarray(out, np.float64) for name, out in jit_attend(self.cache).items()}
        for seq in range(MAX_SEQS):
            expected = expected_attention(self.oracle.contents(seq), QUERIES[seq])
            for name, out in outputs.items():
                np.testing.assert_allclose(out[seq], expected, atol=1e-5, err_msg=f"{name}, sequence {seq}")


class NarrowAttendingMachine(AttendingMachine):
    """The same with few entries per sequence."""

    sizes: ClassVar[dict[str, int]] = AttendingMachine.model | NARROW


TestAttending = AttendingMachine.TestCase
TestAttending.settings = settings(max_examples=20, stateful_step_count=40)
TestNarrowAttending = NarrowAttendingMachine.TestCase
TestNarrowAttending.settings = TestAttending.settings
