"""Laws of residual formats: no operation loses a token, however pages are shared and split.

The format of these tests is lossless, so that a sequence's tokens can be read back exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from cache_oracle import counted
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from jax import Array
from jax.typing import DTypeLike

import jaxpaged as ops
from jaxpaged.cache.defragment import seq_defragment
from jaxpaged.cache.invariants import check_invariants
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.pages.batch import Batch
from jaxpaged.pages.formats import ResidualFormat, ResidualPages
from jaxpaged.pages.formats.residual import PageCode
from jaxpaged.pages.rope import Rope

PAGE_SIZE, MAX_SEQS, NUM_TOKENS, DIM = 8, 4, 40, 32


@dataclass(frozen=True)
class Lossless(PageCode):
    """Numbers plus one, so that a quantized page cannot be mistaken for a residual one."""

    def check(self, name: str, page_size: int, head_dim: int) -> None:
        pass

    def parts(self, page_size: int, head_dim: int) -> dict[str, tuple[tuple[int, ...], DTypeLike]]:
        return {"numbers": ((page_size, head_dim), jnp.float32)}

    def encode(self, x: Array) -> dict[str, Array]:
        return {"numbers": x + 1}

    def decode(self, parts: Mapping[str, Array], page_size: int, head_dim: int) -> Array:
        return parts["numbers"] - 1


LOSSLESS = ResidualFormat("lossless", jnp.float32, Lossless())


def create(*, k: ResidualFormat = LOSSLESS, v: str = "f32", num_pages: int = 40) -> PagedKVCache:
    sizes = {
        "num_layers": 1,
        "num_kv_heads": 2,
        "head_dim": DIM,
        "page_size": PAGE_SIZE,
        "rope": Rope.create(()),
    }
    cache = PagedKVCache.create(**sizes, num_pages=num_pages, max_seqs=MAX_SEQS, k_dtype="q4_k", v_dtype=v)
    pages = k.create(num_pages, 2, PAGE_SIZE, DIM, num_residual=MAX_SEQS)
    # NaN shows what is read without having been written.
    pages = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), pages)
    return replace(cache, k_pages=pages, k_format=k)


def step(cache: PagedKVCache, num_new: Array, first_token: Array) -> tuple[PagedKVCache, Batch, Array]:
    """Reserves, and writes the numbers of tokens ``first_token, first_token + 1, ...``."""
    cache, batch, ok = ops.reserve(cache, num_new, num_tokens=NUM_TOKENS)
    rows = jnp.broadcast_to((first_token + jnp.arange(NUM_TOKENS))[:, None, None], (NUM_TOKENS, 2, DIM))
    return cache.write(0, rows.astype(jnp.float32), rows.astype(jnp.float32), batch), batch, ok


def read(cache: PagedKVCache) -> tuple[Array, Array]:
    """All pages, residual or quantized, as attention reads them: keys and values ``[N, page_size]``."""
    k, v = cache.pages(0)
    assert isinstance(k, ResidualPages)
    return k.format.load(k, jnp.arange(cache.num_pages))[:, 1, :, 3], v[:, 1, :, 3]


jit_step = counted(step, donate_argnames="cache")
jit_read = counted(read)
jit_remove, jit_shift, jit_copy = counted(ops.seq_remove), counted(ops.seq_shift), counted(ops.seq_copy)
jit_reorder, jit_defragment = counted(ops.seq_reorder), counted(seq_defragment)


def contents(cache: PagedKVCache) -> list[list[tuple[int, float, float]]]:
    """(position, key, value) of every token of every sequence."""
    k, v = map(np.asarray, jit_read(cache))
    table = jax.tree.map(np.asarray, cache.table)
    held = []
    for seq in range(MAX_SEQS):
        held.append([])
        for e in range(table.num_entries[seq]):
            page, first, position = (int(x[seq, e]) for x in (table.pages, table.first_slot, table.position))
            for i in range(int(table.num_tokens[seq, e])):
                held[-1].append((position + i, float(k[page, first + i]), float(v[page, first + i])))
    return held


ids = st.integers(0, MAX_SEQS - 1)
counts = st.sampled_from([0, 0, 1, 1, 1, 2, 3, 7, 8, 9, 17])
positions = st.integers(-1, 40)


class ResidualMachine(RuleBasedStateMachine):
    """Random operations against lists of (position, token)."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = create()
        self.held: list[list[tuple[int, int]]] = [[] for _ in range(MAX_SEQS)]
        self.token = 1

    def check(self) -> None:
        check_invariants(self.cache)
        expected = [[(position, token, token) for position, token in seq] for seq in self.held]
        assert contents(self.cache) == expected

    @initialize()
    def start(self) -> None:
        self.add([5, 3, 0, 0])

    @rule(num_new=st.lists(counts, min_size=MAX_SEQS, max_size=MAX_SEQS))
    def add(self, num_new: list[int]) -> None:
        self.cache, _, ok = jit_step(self.cache, jnp.asarray(num_new), self.token)
        if ok:
            for seq, count in zip(self.held, num_new, strict=True):
                position = seq[-1][0] + 1 if seq else 0
                seq += [(position + i, self.token + i) for i in range(count)]
                self.token += count
        if self.token > 2000:  # integers up to 2,048 are exact in 16 bits
            self.token = 1
        self.check()

    @rule()
    def decode(self) -> None:
        self.add([int(bool(seq)) for seq in self.held])

    @rule(seq=ids, p0=positions, count=st.sampled_from([1, 2, 3, 8, 11]))
    def remove(self, seq: int, p0: int, count: int) -> None:
        self.cache, ok = jit_remove(self.cache, seq, p0, p0 + count)
        if ok:
            self.held[seq] = [x for x in self.held[seq] if not p0 <= x[0] < p0 + count]
        self.check()

    @rule(seq=ids, kept=st.integers(0, 30))
    def cut(self, seq: int, kept: int) -> None:
        """Removes the last tokens, as after a rejected draft."""
        self.remove(seq, kept, 1 << 20)

    @rule(seq=ids, p0=positions, delta=st.integers(-5, 5))
    def shift(self, seq: int, p0: int, delta: int) -> None:
        self.cache, ok = jit_shift(self.cache, seq, p0, -1, delta)
        if ok:
            moved = [(p + delta if p >= max(p0, 0) else p, token) for p, token in self.held[seq]]
            self.held[seq] = [x for x in moved if x[0] >= 0]
        self.check()

    @rule(src=ids, dst=ids, p0=positions, count=st.integers(1, 40))
    def fork(self, src: int, dst: int, p0: int, count: int) -> None:
        if src == dst:
            return
        self.remove(dst, 0, 1 << 20)
        self.cache, ok = jit_copy(self.cache, src, dst, p0, p0 + count)
        if ok:
            self.held[dst] = [x for x in self.held[src] if max(p0, 0) <= x[0] < p0 + count]
        self.check()

    @rule(src=ids, others=st.sets(ids, min_size=1), back=st.integers(1, 5))
    def rivals(self, src: int, others: set[int], back: int) -> None:
        """Several sequences write to a page that each of them has two entries in."""
        if not self.held[src]:
            return
        self.remove(src, max(self.held[src][-1][0] - back, 0), 1)
        for dst in sorted(others - {src}):
            self.fork(src, dst, 0, 40)
        self.decode()

    @rule(source=st.lists(ids, min_size=MAX_SEQS, max_size=MAX_SEQS))
    def reorder(self, source: list[int]) -> None:
        self.cache = jit_reorder(self.cache, jnp.asarray(source))
        self.held = [list(self.held[i]) for i in source]
        self.check()

    @rule(seq=st.integers(-1, MAX_SEQS - 1))
    def defragment(self, seq: int) -> None:
        self.cache, _ = jit_defragment(self.cache, seq)
        self.check()


TestResidual = ResidualMachine.TestCase
TestResidual.settings = settings(max_examples=25, stateful_step_count=40)
