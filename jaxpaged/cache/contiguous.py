"""ContiguousKVCache: the same seam without pages, a row of memory for each sequence; the baseline."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxpaged.attention.api import candidates, load
from jaxpaged.attention.base import (
    NOWHERE,
    Config,
    Pages,
    Source,
    Tiling,
    check_queries,
    compute_dtype,
    has_hadamard,
    make_config,
    power_of_two,
    ragged_attention,
)
from jaxpaged.pages.batch import Batch, pack
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.formats import (
    MAX_PAGE_SIZE,
    PAGE_FORMATS,
    BlockPages,
    PageFormat,
    formats_of,
    hadamard_transform,
)
from jaxpaged.pages.rope import Rope

_CHUNK_TOKENS = 256


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ContiguousKVCache:
    """Keys and values of S sequences, each with memory for ``max_length`` tokens from the start.

    In a ``Batch`` of this cache the page is the sequence (S = written nowhere), the slot the index in it.
    """

    k: tuple[Pages, ...]
    """L arrays [S, KV, max_length rounded up to whole chunks, D], or as many quantized rows; finite everywhere."""
    v: tuple[Pages, ...]
    """As k."""
    lengths: Array
    """i32[S]: tokens of each sequence, at the positions 0 .. length."""
    max_length: int = dataclasses.field(metadata={"static": True})
    """Tokens that a row holds."""
    k_format: PageFormat = dataclasses.field(metadata={"static": True})
    v_format: PageFormat = dataclasses.field(metadata={"static": True})

    @staticmethod
    def create(
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        max_seqs: int,
        max_length: int,
        dtype: str = "f32",
        k_dtype: str | None = None,
        v_dtype: str | None = None,
        hadamard: bool | None = None,
    ) -> ContiguousKVCache:
        """An empty cache, all its memory allocated.

        Args:
          num_layers, num_kv_heads, head_dim: of the model.
          max_seqs: S, rows.
          max_length: tokens that each row holds.
          dtype, k_dtype, v_dtype, hadamard: as for ``PagedKVCache.create``; formats that seal pages need pages.

        Raises:
          ValueError: a size below 1, or a format that is unknown or does not fit.
        """
        sizes = {
            "num_layers": num_layers,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "max_seqs": max_seqs,
            "max_length": max_length,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        k_format, v_format = formats_of(dtype, k_dtype, v_dtype, hadamard)
        for storage in (k_format, v_format):
            if storage.has_residual:
                rows = ", ".join(name for name, one in PAGE_FORMATS.items() if not one.has_residual)
                raise ValueError(f"{storage.name} quantizes whole pages; a cache without pages stores {rows}")
            storage.check(MAX_PAGE_SIZE, head_dim)
        chunk = min(max_length, _CHUNK_TOKENS)
        shape = max_seqs, num_kv_heads, -(-max_length // chunk) * chunk, head_dim
        # Every layer its own buffer: donation refuses one buffer given twice.
        k, v = (tuple(storage.create(*shape) for _ in range(num_layers)) for storage in (k_format, v_format))
        return ContiguousKVCache(k, v, jnp.zeros(max_seqs, jnp.int32), max_length, k_format, v_format)

    @property
    def kind(self) -> Literal["contiguous"]:
        """What this cache is called in tables and flags."""
        return "contiguous"

    @property
    def max_seqs(self) -> int:
        """S, static."""
        return self.lengths.shape[0]

    @property
    def num_layers(self) -> int:
        """L, static."""
        return len(self.k)

    @property
    def num_pages(self) -> int:
        """Rows count as pages, one a sequence."""
        return self.max_seqs

    @property
    def bytes_per_page(self) -> int:
        """Bytes of a row: keys and values of every layer."""
        return sum(x.nbytes for x in (*self.k, *self.v)) // self.max_seqs

    @property
    def pages_used(self) -> Array:
        """i32[]: rows that hold a token."""
        return jnp.sum(self.lengths > 0, dtype=jnp.int32)

    @property
    def pages_free(self) -> Array:
        """i32[]: rows that hold no token."""
        return self.max_seqs - self.pages_used

    def pages_needed(self, num_new: Array, *, limit: int | None = None) -> Array:
        """i32[S]: nothing: each sequence has its row from the start."""
        return jnp.zeros(self.max_seqs, jnp.int32)

    def whole_pages(self, num_tokens: Array) -> Array:
        """Nothing: rows are not shared."""
        return jnp.zeros_like(num_tokens)

    def seq_position_min(self) -> Array:
        """i32[S]: 0, or -1 where a sequence is empty."""
        return jnp.where(self.lengths > 0, 0, -1)

    def seq_drop_unseen(self, window: int) -> ContiguousKVCache:
        """Nothing to give back: rows stay whole."""
        return self

    def seq_shift(
        self, seq: int | Array, p0: int | Array, p1: int | Array, delta: int | Array
    ) -> tuple[ContiguousKVCache, Array]:
        """Refused, as positions are places in the row."""
        return self, jnp.bool_(False)

    def can_reserve_each(self, num_new: Array) -> Array:
        """bool[S]: which sequences have room for ``num_new i32[S]`` more tokens; rows are independent."""
        return self.lengths + jnp.asarray(num_new, jnp.int32) <= self.max_length

    def reserve(
        self, num_new: Array, *, num_tokens: int | None = None, max_new: int | None = None
    ) -> tuple[ContiguousKVCache, Batch, Array]:
        """Room for ``num_new i32[S]`` more tokens of each sequence, for all or for none.

        Args:
          num_new: i32[S].
          num_tokens: T, static; ``sum(num_new)`` if left out, which then has to be concrete.
          max_new: static bound on the tokens of one sequence; T if left out.

        Returns:
          ``(cache, batch, ok bool[])``; not ok: the cache as it was and a batch of padding.
        """
        if num_tokens is None:
            num_tokens = int(np.sum(np.asarray(num_new)))
        num_new = jnp.asarray(num_new, jnp.int32)
        ok = jnp.all(self.can_reserve_each(num_new)) & (jnp.sum(num_new) <= num_tokens)
        ok &= jnp.all(num_new <= (num_tokens if max_new is None else max_new))
        num_new = jnp.where(ok, num_new, 0)
        sequence, offset, cu_q_lens = pack(num_new, num_tokens)
        position = offset + self.lengths.at[sequence].get(mode="fill", fill_value=0)
        batch = Batch(
            sequence=sequence,
            position=position,
            rope_positions=position,
            page=sequence,
            slot=position,
            cu_q_lens=cu_q_lens,
            max_q_len=max_new,
        )
        return dataclasses.replace(self, lengths=self.lengths + num_new), batch, ok

    def attend(
        self,
        layer: int,
        q: Array,
        k: Array,
        v: Array,
        batch: Batch,
        *,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks: Array | None = None,
        rope: Rope | None = None,
    ) -> tuple[Array, ContiguousKVCache]:
        """Writes a step's keys and values to a layer and attends to them and all before.

        Args:
          layer: of L, static.
          q: [T, Hq, D]; k, v: [T, KV, D].
          batch: from ``reserve``.
          scale, window, soft_cap, sinks: as in ``jaxpaged.attention.paged_attention``.
          rope: not needed, as positions never change here.

        Returns:
          ``(out [T, Hq, D], cache)``.
        """
        max_seqs, num_kv_heads, _, head_dim = self.k[layer].shape
        check_queries(q, num_kv_heads, head_dim, batch, max_seqs, sinks)
        config = make_config(head_dim, scale, window, soft_cap)

        def write(storage: PageFormat, pool: Any, rows: Array) -> Pages:
            return storage.write(pool, batch.page, batch.slot, rows)

        k_row, v_row = write(self.k_format, self.k[layer], k), write(self.v_format, self.v[layer], v)
        out = self._attend_in_place(q, k_row, v_row, batch, config, sinks)
        if out is None:
            out = lax.platform_dependent(
                q,
                k_row,
                v_row,
                self.lengths,
                batch,
                sinks,
                cpu=partial(_attend, config=config, cpu=True),
                default=partial(_attend, config=config, cpu=False),
            )
        if has_hadamard(v_row):
            out = hadamard_transform(out)
        cache = dataclasses.replace(
            self,
            k=(*self.k[:layer], k_row, *self.k[layer + 1 :]),
            v=(*self.v[:layer], v_row, *self.v[layer + 1 :]),
        )
        return out.astype(q.dtype), cache

    def _attend_in_place(
        self, q: Array, k: Pages, v: Pages, batch: Batch, config: Config, sinks: Array | None
    ) -> Array | None:
        """By the kernel for CPUs, if there is one: a row is a page as long as the context, its chunks are entries."""
        if "cpu_numba" not in candidates():
            return None
        chunk = min(k.shape[2], _CHUNK_TOKENS)
        begin = jnp.broadcast_to(
            jnp.arange(k.shape[2] // chunk, dtype=jnp.int32) * chunk, (self.max_seqs, k.shape[2] // chunk)
        )
        rows = jnp.broadcast_to(jnp.arange(self.max_seqs, dtype=jnp.int32)[:, None], begin.shape)
        table = BlockTable(
            pages=rows,
            first_slot=begin,
            num_tokens=jnp.clip(self.lengths[:, None] - begin, 0, chunk),
            position=begin,
            rotation=jnp.zeros_like(begin),
            num_entries=-(-self.lengths // chunk),
        )
        try:
            return load("cpu_numba")(q, k, v, table, batch, config, sinks, None)[0]
        except NotImplementedError:
            return None

    def seq_remove(
        self, seq: int | Array, p0: int | Array = 0, p1: int | Array = -1
    ) -> tuple[ContiguousKVCache, Array]:
        """Forgets the tokens in [p0, p1): the end of a sequence, or all of it. No byte moves.

        Args:
          seq: a sequence, -1 for all, or bool[S].
          p0, p1: positions; p0 < 0 is 0, p1 < 0 the end.

        Returns:
          ``(cache, ok bool[])``; a range with tokens behind it is refused, and nothing changes.
        """
        seq, p0, p1 = jnp.asarray(seq), jnp.maximum(p0, 0), jnp.asarray(p1)
        chosen = seq if seq.dtype == jnp.bool_ else (seq < 0) | (jnp.arange(self.max_seqs) == seq)
        end = jnp.where(p1 < 0, self.lengths, jnp.minimum(p1, self.lengths))
        removes = chosen & (p0 < end)
        ok = ~jnp.any(removes & (end < self.lengths))
        return dataclasses.replace(self, lengths=jnp.where(removes & ok, p0, self.lengths)), ok

    def seq_reorder(self, source: Array) -> ContiguousKVCache:
        """Lets each sequence become what ``source i32[S]`` of them was; S = empty. Every row moves."""
        source = jnp.asarray(source, jnp.int32)
        lengths = self.lengths.at[source].get(mode="fill", fill_value=0)
        k, v = jax.tree.map(lambda pool: pool.at[source].get(mode="clip"), (self.k, self.v))
        return dataclasses.replace(self, k=k, v=v, lengths=lengths)

    def seq_copy(
        self, src: int | Array, dst: int | Array, p0: int | Array = 0, p1: int | Array = -1
    ) -> tuple[ContiguousKVCache, Array]:
        """Copies the tokens of src in [p0, p1), a prefix, to dst, which is empty. The whole row moves.

        Returns:
          ``(cache, ok bool[])``; refused, and nothing changed: dst not empty, p0 above 0, no such sequence.
        """
        src, dst, p0, p1 = jnp.asarray(src), jnp.asarray(dst), jnp.maximum(p0, 0), jnp.asarray(p1)
        inside = (src >= 0) & (src < self.max_seqs) & (dst >= 0) & (dst < self.max_seqs)
        src, dst = (jnp.clip(x, 0, self.max_seqs - 1) for x in (src, dst))
        length = self.lengths[src]
        length = jnp.where(p1 < 0, length, jnp.minimum(p1, length))
        length = jnp.where(p0 < length, length, 0)
        ok = inside & (self.lengths[dst] == 0) & ((p0 == 0) | (length == 0))

        def copy(pool: Array) -> Array:
            # `where` over one row, not over the pool, which then stays in place.
            row = jnp.where(ok, lax.dynamic_index_in_dim(pool, src), lax.dynamic_index_in_dim(pool, dst))
            return lax.dynamic_update_index_in_dim(pool, row, dst, 0)

        cache = dataclasses.replace(
            self,
            k=jax.tree.map(copy, self.k),
            v=jax.tree.map(copy, self.v),
            lengths=self.lengths.at[dst].set(jnp.where(ok, length, self.lengths[dst])),
        )
        return cache, ok


def _attend(
    q: Array,
    k: Pages,
    v: Pages,
    lengths: Array,
    batch: Batch,
    sinks: Array | None,
    *,
    config: Config,
    cpu: bool,
) -> Array:
    max_seqs, num_kv_heads, max_length, _ = k.shape
    chunk = min(max_length, _CHUNK_TOKENS)
    rows = min(128, power_of_two(q.shape[0]))
    if cpu:
        # One row after the other: no sequence pays for a longer one, and XLA:CPU has few cores to fill.
        dtype, tiling = jnp.dtype(jnp.float32), Tiling(decode_lanes=1, rows=rows, lanes=1)
    else:
        dtype = functools.reduce(jnp.promote_types, map(compute_dtype, (k, v)), q.dtype)
        tiling = Tiling(decode_lanes=min(max_seqs, q.shape[0]), rows=rows, lanes=4)

    def span(sequence: Array, low: Array | None, high: Array | None) -> tuple[Array, Array]:
        begin, end = jnp.zeros_like(sequence), lengths[sequence]
        if low is not None:
            begin = low // chunk
        if high is not None:
            end = jnp.minimum(high + 1, end)
        return begin, (end + chunk - 1) // chunk

    def positions(sequence: Array, unit: Array, _: Array) -> Array:
        position = unit[:, None] * chunk + jnp.arange(chunk, dtype=jnp.int32)
        return jnp.where(position < lengths[sequence][:, None], position, NOWHERE)

    def load(sequence: Array, unit: Array, _: Array) -> tuple[Array, Array]:
        def chunks(pool: Array) -> Array:
            sizes = 1, num_kv_heads, chunk, pool.shape[-1]
            slices = [
                lax.dynamic_slice(pool, (sequence[i], 0, unit[i] * chunk, 0), sizes)
                for i in range(sequence.shape[0])
            ]
            return jnp.concatenate(slices)

        def rows(pool: Pages) -> Array:
            if isinstance(pool, BlockPages):
                parts = {name: chunks(part) for name, part in pool.parts.items()}
                return pool.format.decode(parts).astype(dtype)
            return chunks(pool).astype(dtype)

        return rows(k), rows(v)

    source = Source(span, positions, load, 1, hadamard=has_hadamard(k))
    return ragged_attention(q, batch, source, num_kv_heads, config, sinks, tiling, dtype)[0]
