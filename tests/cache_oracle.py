"""Reference implementation of a paged cache in plain Python, one token at a time.

``Oracle`` has the tokens of every sequence and the page slice of each entry. It numbers pages by its
own counter, so comparisons with a cache allow for one renumbering. The ``jit_*`` operations are
compiled once for all tests of a shape, and count their traces.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpaged as ops
from jaxpaged.cache.defragment import seq_defragment
from jaxpaged.cache.invariants import check_invariants
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.pages.batch import Batch
from jaxpaged.pages.rope import Rope

POISON = -77.0
"""Value of padding rows; must never appear in a page."""

traces: collections.Counter[str] = collections.Counter()


def counted(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``jax.jit`` that counts traces by the function's name."""

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        traces[function.__name__] += 1
        return function(*args, **kwargs)

    # Results are compared, not timed, and most of a small program's compilation is optimization.
    return jax.jit(traced, compiler_options={"xla_backend_optimization_level": 0}, **options)


def encode(tokens: jax.Array | np.ndarray, layer: int, values: int, heads: int, dim: int) -> Any:
    """Rows [T, KV, D] that encode token, layer, keys (0) or values (1), head and dimension."""
    lib = jnp if isinstance(tokens, jax.Array) else np
    code = (layer * 2 + values) * heads * dim + lib.arange(heads * dim).reshape(heads, dim)
    rows = lib.asarray(tokens, lib.float32)[:, None, None] * 64 + code
    return lib.where(lib.asarray(tokens)[:, None, None] < 0, POISON, rows)


def write(cache: PagedKVCache, batch: Batch, tokens: jax.Array) -> PagedKVCache:
    """Writes the tokens of a step to all layers, as ``attend`` does, with padding to the sentinel page."""
    heads, dim = cache.k_pages.shape[1], cache.k_pages.shape[3]
    for layer in range(cache.num_layers):
        cache = cache.write(layer, *(encode(tokens, layer, which, heads, dim) for which in (0, 1)), batch)
    return cache


def step(
    cache: PagedKVCache, num_new: jax.Array, first_token: jax.Array, num_tokens: int
) -> tuple[PagedKVCache, Batch, jax.Array]:
    """Reserves, and writes tokens ``first_token, first_token + 1, ...`` in the order of the batch's rows."""
    cache, batch, ok = ops.reserve(cache, num_new, num_tokens=num_tokens)
    tokens = jnp.where(batch.valid, first_token + jnp.arange(num_tokens), -1)
    return write(cache, batch, tokens), batch, ok


def ask(cache: PagedKVCache, num_new: jax.Array) -> tuple[jax.Array, ...]:
    """Results of all queries of a cache."""
    return (
        cache.pages_needed(num_new),
        ops.can_reserve(cache, num_new),
        cache.can_reserve_each(num_new),
        cache.lengths,
        ops.seq_position_min(cache),
        ops.seq_position_max(cache),
        cache.pages_used,
    )


jit_step = counted(step, static_argnames="num_tokens", donate_argnames="cache")
jit_reserve = counted(ops.reserve, static_argnames="num_tokens")
jit_ask = counted(ask)
jit_remove = counted(ops.seq_remove, donate_argnames="cache")
jit_copy = counted(ops.seq_copy, donate_argnames="cache")
jit_shift = counted(ops.seq_shift, donate_argnames="cache")
jit_defragment = counted(seq_defragment, donate_argnames="cache")
jit_reorder = counted(ops.seq_reorder, donate_argnames="cache")
jit_keep = counted(ops.seq_keep, donate_argnames="cache")
jit_clear = counted(ops.clear, donate_argnames="cache", static_argnames="scrub")


SMALL = {"num_pages": 5}
"""Sizes for ``make_cache``: a pool that is soon exhausted."""
NARROW = {"num_pages": 20, "max_pages_per_seq": 4}
"""Few entries per sequence: splits and fresh pages overflow the table's rows."""


def make_cache(**sizes: Any) -> PagedKVCache:
    """A small cache with pages of NaN, which reveal reads of unwritten slots."""
    model = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 2, "rope": Rope.create(())}
    pool = {"num_pages": 14, "max_seqs": 4, "page_size": 8, "max_pages_per_seq": 10} | sizes
    pool["max_seq_len"] = (pool.pop("max_pages_per_seq") - 1) * pool["page_size"]
    cache = PagedKVCache.create(**(model | pool))
    return jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x, cache
    )


def snapshot(cache: PagedKVCache) -> list[np.ndarray]:
    """Copies of all arrays, for ``assert_same``."""
    return [np.array(leaf) for leaf in jax.tree.leaves(cache)]


def assert_same(cache: PagedKVCache, before: list[np.ndarray]) -> None:
    for leaf, old in zip(jax.tree.leaves(cache), before, strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), old)


def read_back(cache: PagedKVCache, seq: int) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Positions of a sequence's tokens, and their keys and values [tokens, L, KV, D], via the table."""
    table = jax.tree.map(lambda x: np.asarray(x)[seq], cache.table)
    page, slot, position = [], [], []
    for e in range(int(table.num_entries)):
        for i in range(int(table.num_tokens[e])):
            page.append(int(table.pages[e]))
            slot.append(int(table.first_slot[e]) + i)
            position.append(int(table.position[e]) + i)
    index = (np.asarray(page, np.int64), slice(None), np.asarray(slot, np.int64))
    k, v = (
        np.stack(
            [pages[index] for pages in np.asarray(pool).reshape(cache.num_layers, -1, *pool.shape[1:])],
            axis=1,
        )
        for pool in (cache.k_pages, cache.v_pages)
    )
    return position, k, v


@dataclass(frozen=True)
class Slice:
    """An entry with its tokens."""

    page: int
    first: int
    position: int
    tokens: tuple[int, ...]
    rotation: int = 0

    @property
    def end(self) -> int:
        return self.position + len(self.tokens)

    def part(self, p0: int, p1: int) -> Slice:
        """The slice of its tokens at positions [p0, p1)."""
        start, stop = max(p0 - self.position, 0), max(min(p1, self.end) - self.position, 0)
        return Slice(
            self.page, self.first + start, self.position + start, self.tokens[start:stop], self.rotation
        )


class Oracle:
    """Expected state of a ``PagedKVCache`` of these sizes."""

    def __init__(self, num_pages: int, max_seqs: int, max_pages_per_seq: int, page_size: int) -> None:
        self.num_pages, self.max_seqs, self.max_pages_per_seq, self.page_size = (
            num_pages,
            max_seqs,
            max_pages_per_seq,
            page_size,
        )
        self.sequences: list[list[Slice]] = [[] for _ in range(max_seqs)]
        self.next_page = 0

    @classmethod
    def of(cls, cache: PagedKVCache) -> Oracle:
        """The oracle of an empty cache."""
        return cls(cache.num_pages, cache.max_seqs, cache.max_pages_per_seq, cache.page_size)

    def references(self) -> collections.Counter[int]:
        return collections.Counter(e.page for entries in self.sequences for e in entries)

    @property
    def pages_used(self) -> int:
        return len(self.references())

    def length(self, seq: int) -> int:
        return sum(len(e.tokens) for e in self.sequences[seq])

    def contents(self, seq: int) -> list[tuple[int, int]]:
        """(position, token) of each token."""
        return [(e.position + i, token) for e in self.sequences[seq] for i, token in enumerate(e.tokens)]

    def fresh_page(self) -> int:
        self.next_page += 1
        return self.next_page

    def entries_after(self, seq: int, count: int) -> int:
        """Number of entries of a sequence after ``count`` more tokens."""
        entries = self.sequences[seq]
        free = self.page_size - entries[-1].first - len(entries[-1].tokens) if entries else 0
        return len(entries) - (-max(count - free, 0) // self.page_size)

    def reserve(self, num_new: Sequence[int], first_token: int, num_tokens: int) -> tuple[bool, list[int]]:
        """Adds tokens in order of sequence, all of them or none.

        Returns ok, and the number of pages that each sequence needs, also if not ok.
        """
        before, used = [list(entries) for entries in self.sequences], self.pages_used
        ok, token, taken = sum(num_new) <= num_tokens and min(num_new) >= 0, first_token, []
        for entries, count in zip(self.sequences, num_new, strict=True):
            pages = 0
            for _ in range(count):
                last = entries[-1] if entries else Slice(-1, self.page_size, 0, ())
                if last.first + len(last.tokens) == self.page_size:
                    entries.append(Slice(self.fresh_page(), 0, last.end, (token,), last.rotation))
                    pages += 1
                else:
                    own = [i for i, entry in enumerate(entries) if entry.page == last.page]
                    if self.references()[last.page] > len(own):  # shared: its own entries move to a copy
                        page = self.fresh_page()
                        pages += 1
                        for i in own:
                            entries[i] = replace(entries[i], page=page)
                    entries[-1] = replace(entries[-1], tokens=(*last.tokens, token))
                token += 1
            taken.append(pages)
            ok = ok and len(entries) <= self.max_pages_per_seq
        ok = ok and used + sum(taken) <= self.num_pages
        if not ok:
            self.sequences = before
        return ok, taken

    def remove(self, marked: Iterable[int], p0: int, p1: int) -> bool:
        p0, p1 = max(p0, 0), 2**31 - 1 if p1 < 0 else p1
        removed = [list(entries) for entries in self.sequences]
        for seq in marked:
            if p0 < p1:
                parts = [part for e in self.sequences[seq] for part in (e.part(0, p0), e.part(p1, 2**31))]
                removed[seq] = [part for part in parts if part.tokens]
            if len(removed[seq]) > self.max_pages_per_seq:
                return False
        self.sequences = removed
        return True

    def copy(self, src: int, dst: int, p0: int, p1: int) -> bool:
        known = 0 <= src < self.max_seqs and 0 <= dst < self.max_seqs
        if not known or self.sequences[dst]:
            return False
        parts = [e.part(max(p0, 0), 2**31 if p1 < 0 else p1) for e in self.sequences[src]]
        self.sequences[dst] = [part for part in parts if part.tokens]
        return True

    def shift(self, marked: Iterable[int], p0: int, p1: int, delta: int) -> bool:
        p0, p1 = max(p0, 0), 2**31 - 1 if p1 < 0 else p1
        shifted = [list(entries) for entries in self.sequences]
        for seq in marked:
            if p0 >= p1 or delta == 0:
                continue
            parts = []
            for e in self.sequences[seq]:
                moved = e.part(p0, p1)
                moved = replace(moved, position=moved.position + delta, rotation=e.rotation - delta)
                parts += [e.part(0, p0), moved.part(0, 2**31), e.part(p1, 2**31)]
            shifted[seq] = [part for part in parts if part.tokens]
            positions = [e.position + i for e in shifted[seq] for i in range(len(e.tokens))]
            if positions != sorted(set(positions)) or len(shifted[seq]) > self.max_pages_per_seq:
                return False
        self.sequences = shifted
        return True

    def defragment(self, marked: Iterable[int]) -> bool:
        """Compacts the tokens of each sequence behind the full pages at its beginning."""
        before = list(self.sequences)
        for seq in marked:
            entries = self.sequences[seq]
            full = [e.first == 0 and len(e.tokens) == self.page_size for e in [*entries, Slice(-1, 1, 0, ())]]
            head, tail = entries[: full.index(False)], entries[full.index(False) :]
            tokens = [(e.position + i, token, e.rotation) for e in tail for i, token in enumerate(e.tokens)]
            distinct = list(dict.fromkeys(e.page for e in tail))
            needed = -(-len(tokens) // self.page_size)
            if needed == len(distinct):
                continue
            own = collections.Counter(e.page for e in tail)
            targets = [p if self.references()[p] == own[p] else self.fresh_page() for p in distinct[:needed]]
            free = self.num_pages - self.pages_used
            packed: list[Slice] = []
            for i, (position, token, rotation) in enumerate(tokens):
                page, slot = targets[i // self.page_size], i % self.page_size
                last = packed[-1] if packed else Slice(-1, 0, 0, ())
                if (last.page, last.end, last.rotation) == (page, position, rotation):
                    packed[-1] = replace(last, tokens=(*last.tokens, token))
                else:
                    packed.append(Slice(page, slot, position, (token,), rotation))
            if len(set(targets) - set(distinct)) > free or len(head) + len(packed) > self.max_pages_per_seq:
                self.sequences = before
                return False
            self.sequences = [*self.sequences]
            self.sequences[seq] = head + packed
        return True

    def reorder(self, source: Sequence[int]) -> None:
        self.sequences = [list(self.sequences[i]) if i < self.max_seqs else [] for i in source]

    def check(self, cache: PagedKVCache, *, contents: bool = True) -> None:
        """Checks invariants, the table up to page numbers, and with ``contents`` keys and values."""
        check_invariants(cache)
        table = jax.tree.map(np.asarray, cache.table)
        entries, expected = [], []
        for seq in range(self.max_seqs):
            for e in range(int(table.num_entries[seq])):
                entries.append(
                    (
                        seq,
                        *(
                            int(f[seq, e])
                            for f in (table.first_slot, table.num_tokens, table.position, table.rotation)
                        ),
                    )
                )
            expected += [(seq, e.first, len(e.tokens), e.position, e.rotation) for e in self.sequences[seq]]
        assert entries == expected
        pages = [int(p) for seq in range(self.max_seqs) for p in table.pages[seq, : table.num_entries[seq]]]
        ours = [e.page for row in self.sequences for e in row]
        pairs = set(zip(pages, ours, strict=True))
        assert len(pairs) == len(set(pages)) == len(set(ours)), "pages are shared that should not be"
        assert self.num_pages - int(cache.allocator.num_free) == self.pages_used
        if not contents:
            return
        heads, dim = cache.k_pages.shape[1], cache.k_pages.shape[3]
        for seq in range(self.max_seqs):
            held = self.contents(seq)
            position, k, v = read_back(cache, seq)
            assert position == [p for p, _ in held]
            tokens = np.asarray([token for _, token in held], np.int64)
            for layer in range(cache.num_layers):
                np.testing.assert_array_equal(k[:, layer], encode(tokens, layer, 0, heads, dim))
                np.testing.assert_array_equal(v[:, layer], encode(tokens, layer, 1, heads, dim))
        for pool in (cache.k_pages, cache.v_pages):
            assert not (np.asarray(pool) == POISON).any(), "padding was written"
