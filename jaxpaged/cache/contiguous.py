"""ContiguousKVCache: the same interface without pages, one row of memory per sequence; the baseline."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

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
from jaxpaged.cache.checks import (
    check_layer,
    check_rows,
    check_sizes,
    check_step_rows,
    sequence_mask,
    step_rows,
    storage_formats,
    values_dim,
)
from jaxpaged.cache.interface import Integer
from jaxpaged.cache.windows import Windows, by_window
from jaxpaged.pages.batch import Batch, pack
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.formats import (
    MAX_PAGE_SIZE,
    PAGE_FORMATS,
    BlockPages,
    PageFormat,
    hadamard_transform,
)
from jaxpaged.pages.rope import Rope

_CHUNK_TOKENS = 256


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class ContiguousKVCache:
    """Keys and values of S sequences, each with memory for ``max_length`` tokens from the start.

    In a ``Batch`` of this cache the page is the sequence (S = dropped), the slot the index in it.
    """

    k: Pages
    """[L * S, KV, max_length rounded up to whole chunks, D], or quantized rows; always finite. Row s of
    layer l is ``l * S + s``."""
    v: Pages
    """Values, like ``k``, with heads of their own size."""
    lengths: Array
    """i32[S]: number of tokens of each sequence, at positions 0 .. length - 1."""
    num_layers: int = dataclasses.field(metadata={"static": True})
    """L."""
    max_length: int = dataclasses.field(metadata={"static": True})
    """Tokens per row."""
    k_format: PageFormat = dataclasses.field(metadata={"static": True})
    v_format: PageFormat = dataclasses.field(metadata={"static": True})
    implementation: str | None = dataclasses.field(default=None, metadata={"static": True})
    """Attention that ``attend`` computes, "cpu_numba" or "xla"; None = the first that serves."""

    @staticmethod
    def create(
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        max_seqs: int,
        max_length: int,
        rope: Rope | None = None,
        dtype: DTypeLike | None = None,
        k_dtype: DTypeLike | None = None,
        v_dtype: DTypeLike | None = None,
        hadamard: bool | None = None,
        implementation: str | None = None,
    ) -> ContiguousKVCache:
        """Creates an empty cache, all its memory allocated.

        Args:
          num_layers, num_kv_heads, head_dim: of the model.
          v_head_dim: dimensions of a head of values, where they are not ``head_dim``.
          max_seqs: S, rows.
          max_length: tokens per row.
          rope: ignored, since positions never change; both kinds of caches take the same arguments.
          dtype, k_dtype, v_dtype, hadamard: as for ``PagedKVCache.create``; formats with residual
            pages need pages.
          implementation: as for ``PagedKVCache.create``, "cpu_numba" or "xla".

        Raises:
          ValueError: a size below 1, a format that is unknown or does not fit, or another
            implementation.
        """
        if implementation not in (None, "cpu_numba", "xla"):
            raise ValueError(f'a cache without pages is read by "cpu_numba" or "xla", got {implementation!r}')
        check_sizes(num_layers=num_layers, num_kv_heads=num_kv_heads, head_dim=head_dim)
        v_dim = values_dim(head_dim, v_head_dim)
        check_sizes(max_seqs=max_seqs, max_length=max_length)
        k_format, v_format = storage_formats(dtype, k_dtype, v_dtype, hadamard)
        for storage, dim in ((k_format, head_dim), (v_format, v_dim)):
            if storage.has_residual:
                rows = ", ".join(name for name, one in PAGE_FORMATS.items() if not one.has_residual)
                raise ValueError(f"{storage.name} quantizes whole pages; a cache without pages stores {rows}")
            storage.check(MAX_PAGE_SIZE, dim)
        chunk = min(max_length, _CHUNK_TOKENS)
        shape = num_layers * max_seqs, num_kv_heads, -(-max_length // chunk) * chunk
        check_rows(math.prod(shape))
        k, v = k_format.create(*shape, head_dim), v_format.create(*shape, v_dim)
        lengths = jnp.zeros(max_seqs, jnp.int32)
        return ContiguousKVCache(k, v, lengths, num_layers, max_length, k_format, v_format, implementation)

    def __repr__(self) -> str:
        return (
            f"ContiguousKVCache({self.num_layers} layers, {self.max_seqs} sequences of up to {self.max_length} "
            f"tokens, k {self.k_format.title}, v {self.v_format.title})"
        )

    @property
    def kind(self) -> Literal["contiguous"]:
        """Name of this kind of cache in tables and flags."""
        return "contiguous"

    @property
    def max_seqs(self) -> int:
        """S, static."""
        return self.lengths.shape[0]

    @property
    def num_pages(self) -> int:
        """Rows count as pages, one per sequence."""
        return self.max_seqs

    @property
    def bytes_per_page(self) -> int:
        """Bytes of a row: keys and values of every layer."""
        return (self.k.nbytes + self.v.nbytes) // self.max_seqs

    @property
    def pages_used(self) -> Array:
        """i32[]: number of rows that hold a token."""
        return jnp.sum(self.lengths > 0, dtype=jnp.int32)

    @property
    def pages_free(self) -> Array:
        """i32[]: number of empty rows."""
        return self.max_seqs - self.pages_used

    def without_unseen(self) -> ContiguousKVCache:
        """The cache: what no token sees takes no memory from others."""
        return self

    def pages_needed(self, num_new: Array, *, limit: int | None = None, step: int | None = None) -> Array:
        """i32[S]: zeros, since each sequence has its row from the start."""
        return jnp.zeros(self.max_seqs, jnp.int32)

    def whole_pages(self, num_tokens: Array) -> Array:
        """Zeros, since rows are not shared."""
        return jnp.zeros_like(num_tokens)

    def seq_position_min(self) -> Array:
        """i32[S]: 0, or -1 where a sequence is empty."""
        return jnp.where(self.lengths > 0, 0, -1).astype(jnp.int32)

    def seq_position_max(self) -> Array:
        """i32[S]: largest position of each sequence; -1 when empty."""
        return self.lengths - 1

    def seq_drop_unseen(self, window: int) -> ContiguousKVCache:
        """Unchanged: rows stay whole."""
        return self

    def seq_shift(
        self, seq: Integer, p0: Integer, p1: Integer, delta: Integer
    ) -> tuple[ContiguousKVCache, Array]:
        """Refused, since positions are slots of the row."""
        return self, jnp.bool_(False)

    def can_reserve_each(self, num_new: Array) -> Array:
        """bool[S]: True for sequences that hold ``num_new i32[S]`` more tokens; rows are independent."""
        num_new = jnp.asarray(num_new, jnp.int32)
        return (num_new >= 0) & (num_new <= self.max_length - self.lengths)

    has_room = can_reserve_each

    def can_reserve(self, num_new: Array) -> Array:
        """See ``jaxpaged.can_reserve``."""
        return jnp.all(self.can_reserve_each(num_new))

    def reserve(
        self, num_new: Array, *, num_tokens: int | None = None, max_new: int | None = None
    ) -> tuple[ContiguousKVCache, Batch, Array]:
        """See ``jaxpaged.reserve``."""
        num_tokens = step_rows(num_new, self.max_seqs, num_tokens)
        num_new = jnp.asarray(num_new, jnp.int32)
        ok = self.can_reserve(num_new) & (jnp.sum(num_new, dtype=jnp.int32) <= num_tokens)
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
        layer: Array | int,
        q: Array,
        k: Array | None,
        v: Array | None,
        batch: Batch,
        *,
        scale: float | None = None,
        window: Windows = None,
        soft_cap: float | None = None,
        sinks: Array | None = None,
        rope: Rope | None = None,
        group: int | None = None,
    ) -> tuple[Array, ContiguousKVCache]:
        """Writes a step's keys and values of one layer, and attends; see ``PagedKVCache.attend``.

        Positions never change here, so ``rope`` is not needed.
        """
        del rope, group
        layer = check_layer(layer, self.num_layers)
        _, num_kv_heads, _, head_dim = self.k.shape
        v_head_dim = self.v.shape[3]
        check_queries(q, num_kv_heads, head_dim, batch, self.max_seqs, sinks)
        first_row = jnp.asarray(layer * self.max_seqs, jnp.int32)
        row = jnp.where(batch.page < self.max_seqs, first_row + batch.page, self.k.shape[0])

        def write(storage: PageFormat, pool: Any, rows: Array | None) -> Pages:
            return pool if rows is None else storage.write(pool, row, batch.slot, rows)

        if k is not None and v is not None:
            check_step_rows(k, v, batch.num_tokens, num_kv_heads, head_dim, v_head_dim)
        k_rows, v_rows = write(self.k_format, self.k, k), write(self.v_format, self.v, v)

        def attend(window: int | None) -> Array:
            config = make_config(head_dim, scale, window, soft_cap, v_head_dim)
            out = self._attend_in_place(q, k_rows, v_rows, first_row, batch, config, sinks)
            if out is not None:
                return out
            computed: Array = lax.platform_dependent(
                q,
                k_rows,
                v_rows,
                first_row,
                self.lengths,
                batch,
                sinks,
                cpu=partial(_attend, config=config, cpu=True),
                default=partial(_attend, config=config, cpu=False),
            )
            return computed

        out = by_window(window, layer, self.num_layers, attend)
        if has_hadamard(v_rows):
            out = hadamard_transform(out)
        return out.astype(q.dtype), dataclasses.replace(self, k=k_rows, v=v_rows)

    def _attend_in_place(
        self,
        q: Array,
        k: Pages,
        v: Pages,
        first_row: Array,
        batch: Batch,
        config: Config,
        sinks: Array | None,
    ) -> Array | None:
        """Attention by the CPU kernel, if available: a row is a page as long as the context, its chunks are entries."""
        names = candidates() if self.implementation is None else (self.implementation,)
        if "cpu_numba" not in names:
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
            return load("cpu_numba")(q, k, v, table, batch, config, sinks, None, first_row)[0]
        except NotImplementedError as refusal:
            if self.implementation is not None:
                raise NotImplementedError(f"cpu_numba: {refusal}") from None
            return None

    def seq_remove(self, seq: Integer, p0: Integer = 0, p1: Integer = -1) -> tuple[ContiguousKVCache, Array]:
        """See ``jaxpaged.seq_remove``; a range with tokens behind it is refused."""
        marked, seq = sequence_mask(seq, self.max_seqs), jnp.asarray(seq)
        p0, p1 = jnp.maximum(jnp.asarray(p0, jnp.int32), 0), jnp.asarray(p1, jnp.int32)
        end = jnp.where(p1 < 0, self.lengths, jnp.minimum(p1, self.lengths))
        removes = marked & (p0 < end)
        ok = ~jnp.any(removes & (end < self.lengths))
        if seq.dtype != jnp.bool_:
            ok &= seq < self.max_seqs
        return dataclasses.replace(self, lengths=jnp.where(removes & ok, p0, self.lengths)), ok

    def seq_keep(self, seq: Integer) -> tuple[ContiguousKVCache, Array]:
        """See ``jaxpaged.seq_keep``."""
        ok = (jnp.asarray(seq) >= 0) & (jnp.asarray(seq) < self.max_seqs)
        kept = ~ok | (jnp.arange(self.max_seqs, dtype=jnp.int32) == seq)
        return dataclasses.replace(self, lengths=jnp.where(kept, self.lengths, 0)), ok

    def clear(self, *, scrub: bool = False) -> ContiguousKVCache:
        """See ``jaxpaged.clear``."""
        k, v = jax.tree.map(jnp.zeros_like, (self.k, self.v)) if scrub else (self.k, self.v)
        return dataclasses.replace(self, k=k, v=v, lengths=jnp.zeros_like(self.lengths))

    def seq_reorder(self, source: Array) -> ContiguousKVCache:
        """See ``jaxpaged.seq_reorder``; every row moves."""
        source = jnp.asarray(source, jnp.int32)
        rows = self._rows(jnp.clip(source, 0, self.max_seqs - 1)).reshape(-1)
        known = (source >= 0) & (source < self.max_seqs)
        lengths = jnp.where(known, self.lengths.at[source].get(mode="clip"), 0)
        k, v = jax.tree.map(lambda pool: pool[rows], (self.k, self.v))
        return dataclasses.replace(self, k=k, v=v, lengths=lengths)

    def _rows(self, sequence: Array) -> Array:
        """i32[L, ...]: rows of sequences ``i32[...]`` in every layer."""
        layer = jnp.arange(self.num_layers, dtype=jnp.int32)
        return layer.reshape(-1, *(1 for _ in sequence.shape)) * self.max_seqs + sequence

    def seq_copy(
        self, src: Integer, dst: Integer, p0: Integer = 0, p1: Integer = -1
    ) -> tuple[ContiguousKVCache, Array]:
        """See ``jaxpaged.seq_copy``; the row moves, and ``p0`` above 0 is refused."""
        src, dst, p0, p1 = (jnp.asarray(x, jnp.int32) for x in (src, dst, p0, p1))
        p0 = jnp.maximum(p0, 0)
        inside = (src >= 0) & (src < self.max_seqs) & (dst >= 0) & (dst < self.max_seqs)
        src, dst = (jnp.clip(x, 0, self.max_seqs - 1) for x in (src, dst))
        length = self.lengths[src]
        length = jnp.where(p1 < 0, length, jnp.minimum(p1, length))
        length = jnp.where(p0 < length, length, 0)
        ok = inside & (self.lengths[dst] == 0) & ((p0 == 0) | (length == 0))

        def copy(pool: Array) -> Array:
            # Dropped, not selected: the pool stays in place.
            target = jnp.where(ok, self._rows(dst), len(pool))
            return pool.at[target].set(pool[self._rows(src)], mode="drop")

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
    first_row: Array,
    lengths: Array,
    batch: Batch,
    sinks: Array | None,
    *,
    config: Config,
    cpu: bool,
) -> Array:
    _, num_kv_heads, max_length, _ = k.shape
    max_seqs = len(lengths)
    chunk = min(max_length, _CHUNK_TOKENS)
    rows = min(128, power_of_two(q.shape[0]))
    if cpu:
        # One row after the other: no sequence pays for a longer one, and XLA:CPU has few cores to fill.
        dtype, tiling = jnp.dtype(jnp.float32), Tiling(decode_width=1, rows=rows, width=1)
    else:
        dtype = functools.reduce(jnp.promote_types, map(compute_dtype, (k, v)), q.dtype)
        tiling = Tiling(decode_width=min(max_seqs, q.shape[0]), rows=rows, width=4)

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
                lax.dynamic_slice(pool, (first_row + sequence[i], 0, unit[i] * chunk, 0), sizes)
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
