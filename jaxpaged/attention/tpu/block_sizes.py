"""Block sizes of the TPU kernel, and its work items."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jaxpaged.attention.base import power_of_two
from jaxpaged.attention.tuning import tuned
from jaxpaged.pages.batch import Batch
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.formats import LANES, tokens_per_row
from jaxpaged.pages.formats.ggml import BLOCK
from jaxpaged.pages.formats.lane_blocks import LaneBlockFormat

_BUFFER_BYTES = 4 << 20
"""Most VMEM for the K/V blocks: two of each, as one is computed while the other arrives."""
_DECODE_BLOCK_BYTES = 1 << 20
"""A K/V block for single queries: it takes longer to arrive than a DMA takes to start, and short
sequences fill it."""
_MAX_LANES = 512
"""Columns of a tile of scores; wider ones leave the registers without helping the matrix unit."""
_MAX_ROWS = 256
"""Rows of a tile of scores: at 256 a K/V byte is used for as many operations as a v5e does while it
arrives."""
_STATE_BYTES = 8 << 20
"""Most VMEM for a block's queries, sums and output."""
_MAX_SPLIT_ROWS = 32
"""Rows of queries up to which they meet quantized blocks one by one; see ``Stored.split``."""

Storage = DTypeLike | LaneBlockFormat
"""Storage of keys or values: a dtype, or a quantized format."""


@dataclass(frozen=True)
class Blocks:
    """Block sizes of a call; static."""

    pages: int
    """Pages of a K/V block, fetched and computed together. Rows of ``pages`` pages are a
    multiple of 128."""
    queries: int
    """Queries of a block; 1 if each sequence has one."""


class Heads(NamedTuple):
    """Sizes that block sizes depend on, from shapes; static."""

    num_kv_heads: int
    group: int
    """Query heads that read one KV head."""
    head_dim: int
    lanes: int
    """Numbers in a row of a page array."""
    page_rows: int
    """Rows of a page, for each head."""
    v_lanes: int
    """Numbers in a row of an array of pages of values."""

    @classmethod
    def of(
        cls,
        q_shape: tuple[int, ...],
        pages_shape: tuple[int, ...],
        storage: Storage,
        v_lanes: int | None = None,
    ) -> Heads:
        """From ``q_shape [T, Hq, D]``, and the shape of pages: ``[N, KV, rows of a page, lanes]``
        of plain numbers, and ``[N, KV, page_size, D]`` where ``storage`` quantizes them.

        ``v_lanes``: those of pages of values, where heads of values are of another size.
        """
        _, num_kv_heads, page_rows, lanes = pages_shape
        if isinstance(storage, LaneBlockFormat):
            page_rows, lanes = page_rows // tokens_per_row(storage.width, lanes), storage.width
        sizes = num_kv_heads, q_shape[1] // num_kv_heads, q_shape[2], lanes, page_rows
        return cls(*sizes, lanes if v_lanes is None else v_lanes)

    @property
    def packed(self) -> int:
        """Tokens side by side in a row."""
        return tokens_per_row(self.lanes, self.head_dim)

    @property
    def page_size(self) -> int:
        return self.page_rows * self.packed


class Stored(NamedTuple):
    """Storage of keys and values; static."""

    k: Storage
    v: Storage

    @property
    def quantized(self) -> tuple[bool, bool]:
        return isinstance(self.k, LaneBlockFormat), isinstance(self.v, LaneBlockFormat)

    @property
    def turned(self) -> bool:
        """True if keys are stored Hadamard-transformed, and queries come transformed."""
        return isinstance(self.k, LaneBlockFormat) and self.k.hadamard

    def parts(self, heads: Heads) -> list[tuple[tuple[int, ...], DTypeLike]]:
        """Shape and dtype of what one page is made of, keys and then values: each part is one DMA."""
        found: list[tuple[tuple[int, ...], DTypeLike]] = []
        for storage, lanes in ((self.k, heads.lanes), (self.v, heads.v_lanes)):
            if isinstance(storage, LaneBlockFormat):
                found += storage.page_parts(heads.num_kv_heads, heads.page_size).values()
            else:
                found.append(((heads.num_kv_heads, heads.page_rows, lanes), storage))
        return found

    def page_bytes(self, heads: Heads) -> int:
        """Bytes of a page, keys and values, that a kernel reads."""
        return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self.parts(heads))

    def rows(self, heads: Heads, queries: int) -> int:
        """Rows of one part of the packing, those among them that pad it."""
        rows = queries * heads.group
        return _padded(rows, 8) if any(self.quantized) else rows

    def split(self, heads: Heads, queries: int) -> bool:
        """True if scales are applied to scores and weights, not to keys and values.

        A score is the sum over blocks of ``scale * (query . codes)``: codes alone are multiplied,
        and a scale is for a score of each row of queries, not for 32 numbers of a key. The products
        take as many times the rows as a row has blocks, which costs nothing while they are fewer
        than the codes that the matrix unit loads for them.
        """
        return any(self.quantized) and heads.packed * self.rows(heads, queries) <= _MAX_SPLIT_ROWS


def compute_dtype(q_dtype: DTypeLike, *stored: Storage) -> np.dtype:
    """Dtype of products: bfloat16 if queries and plain pages have it, else float32."""
    dtypes = {jnp.dtype(q_dtype), *(jnp.dtype(x) for x in stored if not isinstance(x, LaneBlockFormat))}
    return jnp.dtype(jnp.bfloat16 if dtypes == {jnp.dtype(jnp.bfloat16)} else jnp.float32)


def choose_blocks(
    q_shape: tuple[int, ...],
    k_pages_shape: tuple[int, ...],
    page_dtype: Storage,
    max_q_len: int | None,
    *,
    v_dtype: Storage | None = None,
    v_lanes: int | None = None,
) -> Blocks:
    """Blocks that fit the VMEM that every TPU gives a kernel (16 MiB), from shapes alone.

    A K/V block is as long as the memory needs to be busy (1 MiB) and a tile of scores stands (512
    columns); a block of queries has the rows at which the matrix unit, not the memory, limits a
    prompt (256).

    Args:
      q_shape: [T, Hq, D].
      k_pages_shape: as ``Heads.of`` has it.
      page_dtype: dtype or format of the pages.
      max_q_len: static bound on the queries of one sequence; None = T.
      v_dtype: that of pages of values, where it is another one.
      v_lanes: numbers of their rows, where heads of values are of another size.
    """
    heads = Heads.of(q_shape, k_pages_shape, page_dtype, v_lanes)
    stored = Stored(page_dtype, v_dtype or page_dtype)
    tokens = q_shape[0] if max_q_len is None else min(max_q_len, q_shape[0])
    sizes = None
    if not any(stored.quantized) and v_lanes is None:  # nothing was measured for others
        sizes = tuned(
            num_kv_heads=heads.num_kv_heads,
            group=heads.group,
            head_dim=heads.head_dim,
            page_size=heads.page_size,
            dtype=page_dtype,  # type: ignore[arg-type]
            kind="decode" if tokens == 1 else "prefill",
        )
    if sizes is not None:  # a step of few queries has no larger blocks than them
        return Blocks(sizes["pages"], min(sizes["queries"], power_of_two(tokens)))
    row_bytes = _buffer_bytes(heads, stored) // heads.page_rows
    block_bytes = _DECODE_BLOCK_BYTES if tokens == 1 else _BUFFER_BYTES // 2
    rows = max(LANES, min(_MAX_LANES, block_bytes // row_bytes // LANES * LANES))
    pages = max(1, rows // heads.page_rows)
    widest = _padded(max(heads.lanes, heads.v_lanes), LANES)
    row_state = heads.num_kv_heads * widest * (3 * 4 + 4) + heads.num_kv_heads * 1024
    queries = 1
    while (
        queries < tokens
        and 2 * queries * heads.group * heads.packed <= _MAX_ROWS
        and 2 * queries * heads.group * heads.packed * row_state <= _STATE_BYTES
    ):
        queries *= 2
    return Blocks(pages, queries)


def vmem_bytes(
    blocks: Blocks, heads: Heads, queries: int, stored: Stored, dtype: DTypeLike, rope: bool
) -> int:
    """VMEM of one call's blocks and scratch, as its tiles of (8, 128) words are laid out.

    What the compiler adds for values that leave its registers is not in it.
    """
    lanes, v_lanes = _padded(heads.lanes, LANES), _padded(heads.v_lanes, LANES)
    rows = heads.packed * stored.rows(heads, queries)
    item, padded, columns = np.dtype(dtype).itemsize, _padded(rows, 8), blocks.pages * heads.page_rows
    kv = 2 * blocks.pages * _buffer_bytes(heads, stored)
    q = heads.num_kv_heads * _padded(rows, 32 // item) * lanes * item
    out = heads.num_kv_heads * padded * v_lanes * 4
    lse = _padded(heads.num_kv_heads, 8) * _padded(rows, LANES) * 4
    sums = heads.num_kv_heads * padded * (v_lanes + 2 * LANES) * 4
    by_row = 2 * padded * LANES * 4 + 2 * 2 * 8 * _padded(rows, LANES) * 4
    turning = q + 2 * (1 + stored.turned) * lanes * lanes * 4 if rope else 0
    scales = 4 * math.prod(scales_shape(heads, stored, queries, columns))
    return kv + 2 * (q + out + lse) + sums + by_row + turning + scales


def scales_shape(heads: Heads, stored: Stored, queries: int, columns: int) -> tuple[int, ...]:
    """Shape, in VMEM, of the scales of a K/V block of ``columns`` rows, of keys and of values.

    Where they meet scores, f32[2, blocks of all heads, columns]; where they meet keys, transposed,
    with blocks along the lanes, f32[2, *, columns, 128].
    """
    if not any(stored.quantized):
        return 1, 8, LANES
    blocks = max(  # with what pads them in their pages
        math.prod(shape) // heads.page_rows for shape, dtype in stored.parts(heads) if dtype == jnp.int16
    )
    if stored.split(heads, queries):
        return 2, blocks, columns
    return 2, -(-blocks // LANES), columns, LANES


def _buffer_bytes(heads: Heads, stored: Stored) -> int:
    """VMEM of a page's parts, padded as they lie there."""
    total = 0
    for (*outer, rows, lanes), dtype in stored.parts(heads):
        if not outer:  # scales, of which each page has tiles of its own
            rows = _padded(rows, 16)
        total += math.prod(outer) * rows * _padded(lanes, LANES) * np.dtype(dtype).itemsize
    return total


def describe(
    q_shape: tuple[int, ...],
    k_pages_shape: tuple[int, ...],
    page_dtype: Storage,
    max_q_len: int | None,
    *,
    v_dtype: Storage | None = None,
    v_lanes: int | None = None,
    v_head_dim: int | None = None,
    q_dtype: DTypeLike = jnp.bfloat16,
    max_seqs: int = 1,
    max_pages_per_seq: int = 1,
    rope: bool = False,
) -> dict[str, Any]:
    """Describes a call with these shapes, for people to read.

    Args:
      q_shape, k_pages_shape, page_dtype, max_q_len, v_dtype, v_lanes: as ``choose_blocks`` has them.
      v_head_dim: numbers of a head of values, where they are not those of keys.
      q_dtype: of the queries.
      max_seqs, max_pages_per_seq: S and P of the block table.
      rope: True if entries may be shifted.

    Returns:
      ``implementation``; ``blocks``; ``dtype`` of the products; ``packed`` tokens in a row;
      ``padding``, the share of K/V bytes that is none; ``tokens_per_block`` and
      ``bytes_per_block``, a K/V block's; ``query_rows``, rows of a tile of scores; ``scales``, what
      those of quantized pages are applied to; ``vmem_bytes`` and ``smem_bytes`` of the larger of
      the call's kernels; ``bytes_per_token``, K/V bytes, codes and scales, that are read for each
      live token of a sequence, by each of its blocks of queries; ``table_bytes``, read and written
      once a step to pack the table; ``relayout``, True if XLA copies the whole pool before every
      call.
    """
    heads = Heads.of(q_shape, k_pages_shape, page_dtype, v_lanes)
    stored = Stored(page_dtype, v_dtype or page_dtype)
    blocks = choose_blocks(q_shape, k_pages_shape, page_dtype, max_q_len, v_dtype=v_dtype, v_lanes=v_lanes)
    dtype = compute_dtype(q_dtype, *stored)
    page_bytes = stored.page_bytes(heads)
    items = -(-q_shape[0] // blocks.queries) + min(max_seqs, q_shape[0])
    entry_words = _padded(FIELDS * blocks.pages, LANES)
    split = stored.split(heads, blocks.queries)
    return {
        "implementation": "mosaic_tpu",
        "blocks": blocks,
        "dtype": dtype.name,
        "packed": heads.packed,
        "padding": 1 - _least_bytes(heads, stored, v_head_dim or heads.head_dim) / page_bytes,
        "tokens_per_block": blocks.pages * heads.page_size,
        "bytes_per_block": blocks.pages * page_bytes,
        "query_rows": stored.rows(heads, blocks.queries) * heads.packed,
        "scales": ("scores" if split else "keys") if any(stored.quantized) else "none",
        "vmem_bytes": vmem_bytes(blocks, heads, blocks.queries, stored, dtype, rope),
        "smem_bytes": 4 * (3 * entry_words + len(Items._fields) * items + 4),
        "bytes_per_token": page_bytes // heads.page_size,
        "table_bytes": 8 * max_seqs * -(-max_pages_per_seq // blocks.pages) * entry_words,
        "relayout": heads.lanes % LANES != 0 or heads.v_lanes % LANES != 0,
    }


def _least_bytes(heads: Heads, stored: Stored, v_head_dim: int) -> float:
    """Bytes of a page without what pads its rows."""
    return sum(
        heads.num_kv_heads
        * heads.page_size
        * dim
        * (x.code.bytes / BLOCK if isinstance(x, LaneBlockFormat) else np.dtype(x).itemsize)
        for x, dim in zip(stored, (heads.head_dim, v_head_dim), strict=True)
    )


def _padded(n: int, unit: int) -> int:
    return -(-n // unit) * unit


# --- what is computed ---------------------------------------------------------------------------------------


class Items(NamedTuple):
    """Work items in order of computation, ``i32[I]`` each; those from ``count`` on do not exist.

    An item is the queries of one sequence in one block of queries. Items of a block follow each
    other.
    """

    block: Array
    sequence: Array
    first_row: Array
    """First row of the block that belongs to the sequence."""
    end_row: Array
    """End of these rows."""
    first_entry: Array
    """First entry of the sequence that one of the queries sees."""
    end_entry: Array
    """End of these entries."""
    own_low: Array
    """Smallest rotation that one of the queries carries, and"""
    own_high: Array
    """the largest; equal wherever a cache made the batch."""


def single_items(table: BlockTable, batch: Batch, rows: Array, window: int | None) -> Items:
    """One item for each of ``rows i32[I]``, rows of the step that are their sequences' only
    queries."""
    row = jnp.minimum(rows, batch.num_tokens - 1)
    sequence = jnp.minimum(batch.sequence[row], batch.max_seqs - 1)
    first, end = _entries(table, sequence, batch.position[row], None, window)
    own = batch.rope_positions[row] - batch.position[row]
    zero = jnp.zeros_like(row)
    block = jnp.arange(len(rows), dtype=jnp.int32)
    return Items(block, sequence, zero, zero + 1, first, end, own, own)


def block_items(
    table: BlockTable, batch: Batch, chosen: Array, queries: int, window: int | None
) -> tuple[Items, Array]:
    """The items of the sequences ``chosen bool[S]`` in blocks of ``queries`` consecutive rows, and
    their count."""
    begin, end = batch.cu_q_lens[:-1], batch.cu_q_lens[1:]
    counts = jnp.where(chosen & (end > begin), (end - 1) // queries - begin // queries + 1, 0)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    # Each block holds one item more than there are boundaries of sequences in it.
    most = -(-batch.num_tokens // queries) + min(batch.max_seqs, batch.num_tokens)
    item = jnp.arange(most, dtype=jnp.int32)
    sequence = jnp.minimum(jnp.sum(ends <= item[:, None], axis=1, dtype=jnp.int32), batch.max_seqs - 1)
    block = begin[sequence] // queries + item - ends[sequence] + counts[sequence]
    block = jnp.minimum(block, -(-batch.num_tokens // queries) - 1)
    first_row = jnp.maximum(begin[sequence] - block * queries, 0)
    end_row = jnp.minimum(end[sequence] - block * queries, queries)
    row = block[:, None] * queries + jnp.arange(queries, dtype=jnp.int32)
    ours = (row >= begin[sequence][:, None]) & (row < end[sequence][:, None])
    row = jnp.minimum(row, batch.num_tokens - 1)
    position = last_visible = batch.position[row]
    if batch.visible_end is not None:
        last_visible = batch.last_visible[row]
    own = batch.rope_positions[row] - position
    most_int = np.iinfo(np.int32).max
    first, last = _entries(
        table,
        sequence,
        jnp.min(jnp.where(ours, position, most_int), axis=1),
        jnp.max(jnp.where(ours, last_visible, -1), axis=1),
        window,
    )
    low = jnp.min(jnp.where(ours, own, most_int), axis=1)
    high = jnp.max(jnp.where(ours, own, -most_int), axis=1)
    return Items(block, sequence, first_row, end_row, first, last, low, high), ends[-1]


def _entries(
    table: BlockTable, sequence: Array, low: Array, high: Array | None, window: int | None
) -> tuple[Array, Array]:
    """The entries that queries from position ``low`` on see up to ``high``; None = to the last."""
    first, end = jnp.zeros_like(sequence), table.num_entries[sequence]
    if window is not None or high is not None:
        live = jnp.arange(table.max_pages_per_seq, dtype=jnp.int32) < end[:, None]
        position = table.position[sequence]
        if window is not None:
            gone = live & (position + table.num_tokens[sequence] <= low[:, None] - window + 1)
            # Where all are gone, the last one is looked at, and masked: there is no chunk behind a full row.
            first = jnp.minimum(jnp.sum(gone, axis=1, dtype=jnp.int32), table.max_pages_per_seq - 1)
        if high is not None:
            end = jnp.sum(live & (position <= high[:, None]), axis=1, dtype=jnp.int32)
    return first, jnp.maximum(first, end)


# --- the table, as the kernel fetches it ---------------------------------------------------------------------

FIELDS = 4
"""Words of an entry: page, slots, position, rotation."""
SLOTS_SHIFT = 9
"""The slots of an entry in one word: ``first_slot + (num_tokens << 9)``; a page has at most 256."""


def pack_table(table: BlockTable, pages: int, num_pages: int) -> Array:
    """i32[S, chunks, 1, W]: the entries of ``pages`` consecutive pages side by side, field by
    field.

    One row is one DMA into scalar memory, so that the kernel holds three of them and no table,
    however long contexts may grow. The same for every layer of a step: XLA makes it once.
    """
    chunks = -(-table.max_pages_per_seq // pages)
    fields = (
        jnp.clip(table.pages, 0, num_pages - 1),
        table.first_slot + (table.num_tokens << SLOTS_SHIFT),
        table.position,
        table.rotation,
    )
    padding = ((0, 0), (0, chunks * pages - table.max_pages_per_seq))
    packed = jnp.stack(
        [jnp.pad(field, padding).reshape(table.max_seqs, chunks, pages) for field in fields], axis=2
    ).reshape(table.max_seqs, chunks, 1, FIELDS * pages)
    width = _padded(FIELDS * pages, LANES)
    return jnp.pad(packed, ((0, 0), (0, 0), (0, 0), (0, width - FIELDS * pages)))
