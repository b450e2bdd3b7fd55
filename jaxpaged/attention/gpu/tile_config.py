"""Tile config of the GPU kernel, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxpaged.attention.gpu.quantized import BLOCK, CODES, Code
from jaxpaged.attention.tuning import tuned
from jaxpaged.pages.formats import BlockFormat

ROWS = 64
"""Rows of an item: the M of a wgmma."""
STEP_TOKENS = 64
"""Tokens of a step: as many columns of scores as fit 32 registers a thread."""
_NUM_SMS = 132
"""Multiprocessors of an H100 or H200."""
_MAX_SPLITS = 128
_RING_BYTES = 65_536
"""Shared memory for keys and values: with it two blocks share a multiprocessor for heads up to 128."""
_SHARED_MEMORY_BYTES = 232_448
"""Shared memory of one block of a Hopper GPU."""
_SHARED_MEMORY_BYTES_PER_SM = 233_472
_BARRIER_BYTES = 1024
_REDUCTION_BYTES = 2048
"""Mosaic's own, for sums across lanes."""
_COPY_ALIGNMENT = 128
"""Bytes of shared memory, a multiple of which every copy begins at."""

PageKind = DTypeLike | tuple[BlockFormat, BlockFormat]
"""The dtype of plain pages, or the formats of quantized keys and values."""


class Plan(NamedTuple):
    """The static sizes of one call."""

    single: bool
    """True if each sequence has at most one query: an item is then a query."""
    group: int
    """Query heads of a KV head: rows of one query."""
    queries: int
    """Queries of an item."""
    num_items: int
    item_rows: int
    """Rows that an item has in memory: a whole number of tiles of 8, as copies begin at tiles."""
    num_splits: int
    """Number of parts that the steps of each item are split into."""
    page_size: int
    v_head_dim: int
    """Numbers of a head of values."""
    stages: int
    """Number of steps with pages in shared memory: one is computed, the others are in flight."""
    dtype: jnp.dtype
    """Dtype of wgmma operands: the pages', or float16 for quantized pages."""
    codes: tuple[Code, Code] | None
    """Codes of quantized keys and values."""
    terms: int
    """Numbers of that dtype that stand for one number of the queries or the weights."""
    warpgroups: int
    """Warpgroups of a block; each sums an equal share of the columns of the values."""
    swizzle: int
    """Bytes of a row of a tile in shared memory."""
    shared_memory_bytes: int
    """Shared memory of a block, without barriers."""
    blocks_per_sm: int
    """Blocks that can share a multiprocessor."""

    @property
    def unit_tokens(self) -> int:
        """Tokens of a unit, the part of a page that one copy brings: a page, or 64 tokens of a
        longer one."""
        return min(self.page_size, STEP_TOKENS)

    @property
    def units(self) -> int:
        """Units of a step."""
        return STEP_TOKENS // self.unit_tokens

    @property
    def parts(self) -> int:
        """Units of a page."""
        return self.page_size // self.unit_tokens

    @property
    def num_factors(self) -> int:
        """Factors of a block of keys and one of values together."""
        return sum(len(code.factors) for code in self.codes or ())


def make_plan(
    num_tokens: int,
    num_q_heads: int,
    k_pages_shape: tuple[int, ...],
    kind: PageKind,
    q_dtype: DTypeLike,
    *,
    max_q_len: int | None,
    max_seqs: int,
    max_pages_per_seq: int,
    v_head_dim: int | None = None,
) -> Plan:
    """The sizes of a call on static shapes; ``v_head_dim``: None = that of keys.

    Raises:
      NotImplementedError: the kernel cannot serve them; the message says why.
    """
    _, num_kv_heads, page_size, head_dim = k_pages_shape
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    q_dtype = jnp.dtype(q_dtype)
    group = num_q_heads // num_kv_heads
    codes = None
    dtype = jnp.dtype(jnp.float16 if isinstance(kind, tuple) else kind)
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"wgmma multiplies pages of bfloat16 or float16 as they lie, not of {dtype.name}"
        )
    # The columns of values are summed in registers; keys of any size leave as many.
    warpgroups = 1 if v_head_dim <= 128 else 2
    if max(head_dim, v_head_dim) > 256 or head_dim % (16 * warpgroups) or v_head_dim % (16 * warpgroups):
        other = "" if v_head_dim == head_dim else f", {v_head_dim} of values"
        raise NotImplementedError(
            f"head_dim must be a multiple of 16 up to 128, or of 32 up to 256, for wgmma; it is {head_dim}{other}"
        )
    if isinstance(kind, tuple) and v_head_dim != head_dim:
        raise NotImplementedError(
            f"quantized keys and values share a tile: heads of {head_dim} and {v_head_dim} numbers do not"
        )
    if group > ROWS:
        raise NotImplementedError(f"{group} query heads of a KV head are more than the {ROWS} rows of a tile")
    if page_size < 8 or page_size & (page_size - 1):
        raise NotImplementedError(
            f"page_size must be a power of two from 8 on, to fill steps; it is {page_size}"
        )
    columns = head_dim // warpgroups
    # Columns that a tile's rows are whole numbers of, in words as in numbers.
    multiples = [columns, v_head_dim // warpgroups]
    if isinstance(kind, tuple):
        codes = _codes(kind)
        _check_copies(codes, page_size, head_dim, columns)
        multiples = [columns // code.per_word for code in codes]
    single = num_tokens == 1 or max_q_len == 1
    queries = 1 if single else ROWS // group
    num_items = num_tokens if single else min(num_tokens, num_tokens // queries + min(max_seqs, num_tokens))
    # Words and numbers have two bytes each.
    k_bytes, v_bytes = (
        2 * STEP_TOKENS * dim // (1 if code is None else code.per_word)
        for code, dim in zip(codes or (None, None), (head_dim, v_head_dim), strict=True)
    )
    factors = sum(len(code.factors) for code in codes or ())
    factor_bytes = 2 * factors * STEP_TOKENS * head_dim // BLOCK
    sizes: Mapping[str, int] = {}
    if codes is None and v_head_dim == head_dim:  # nothing was measured for others
        measured = tuned(
            num_kv_heads=num_kv_heads,
            group=group,
            head_dim=head_dim,
            page_size=page_size,
            dtype=dtype,
            kind="decode" if single else "prefill",
        )
        sizes = measured or {}
    stages = sizes.get("stages", max(2, min(4, _RING_BYTES // (k_bytes + v_bytes + factor_bytes))))
    # A bfloat16 has no digit that a float16 has not.
    exact = q_dtype == dtype or (codes is not None and q_dtype == jnp.bfloat16)
    terms = 1 if exact else 2
    tile_bytes = 0 if codes is None else 2 * STEP_TOKENS * head_dim
    buffers = (
        terms * ROWS * head_dim * 2,  # queries
        terms * warpgroups * ROWS * STEP_TOKENS * 2,  # weights
        max(
            _padded(stages * k_bytes) + tile_bytes, 4 * ROWS * v_head_dim
        ),  # keys and their tile, or the result
        stages * v_bytes,
        stages * factor_bytes,
        warpgroups * factor_bytes,
        4 * ROWS,  # lse
    )
    shared_memory_bytes = sum(map(_padded, buffers)) + _REDUCTION_BYTES
    if shared_memory_bytes + _BARRIER_BYTES > _SHARED_MEMORY_BYTES:
        raise NotImplementedError(
            f"{q_dtype.name} queries of {dtype.name} pages and head_dim {head_dim} take {shared_memory_bytes} bytes of "
            f"shared memory and {_BARRIER_BYTES} for barriers; a block has {_SHARED_MEMORY_BYTES}"
        )
    # 255 registers a thread let 256 threads onto a multiprocessor.
    blocks_per_sm = max(
        1, min(2 // warpgroups, _SHARED_MEMORY_BYTES_PER_SM // (shared_memory_bytes + _BARRIER_BYTES))
    )
    steps = -(-max_pages_per_seq * page_size // STEP_TOKENS)
    num_splits = sizes.get("waves", 1) * _NUM_SMS * blocks_per_sm // (num_items * num_kv_heads)
    return Plan(
        single=single,
        group=group,
        queries=queries,
        num_items=num_items,
        item_rows=-(-group // 8) * 8 if single else ROWS,
        num_splits=max(1, min(num_splits, steps, _MAX_SPLITS)),
        page_size=page_size,
        v_head_dim=v_head_dim,
        stages=stages,
        dtype=dtype,
        codes=codes,
        terms=terms,
        warpgroups=warpgroups,
        swizzle=next(s for s in (128, 64, 32) if not any(m % (s // dtype.itemsize) for m in multiples)),
        shared_memory_bytes=shared_memory_bytes,
        blocks_per_sm=blocks_per_sm,
    )


def _padded(size: int) -> int:
    """Bytes of shared memory that a buffer takes: they begin at multiples of 1024."""
    return -(-size // 1024) * 1024


def _codes(formats: tuple[BlockFormat, BlockFormat]) -> tuple[Code, Code]:
    """Codes of keys and values.

    Raises:
      NotImplementedError: the kernel reads other formats.
    """
    unknown = sorted({one.name for one in formats} - set(CODES))
    if unknown:
        raise NotImplementedError(f"reads quantized pages of {', '.join(CODES)}, not of {', '.join(unknown)}")
    k_format, v_format = formats
    return CODES[k_format.name], CODES[v_format.name]


def _check_copies(codes: tuple[Code, Code], page_size: int, head_dim: int, columns: int) -> None:
    """Checks that codes and factors can be copied, and codes unpacked.

    Raises:
      NotImplementedError: one of them cannot; says which sizes can.
    """
    multiple = 16 * max(code.per_word for code in codes)  # a row of the narrowest tile, in numbers
    if columns % multiple:
        raise NotImplementedError(
            f"codes of {min(code.bits for code in codes)} bits fill rows of shared memory where head_dim is a multiple "
            f"of {multiple} up to 128, or of {2 * multiple} up to 256; it is {head_dim}"
        )
    # Where a page's factors are fewer than a copy's place in shared memory is a multiple of.
    fits = next(
        size
        for size in (8, 16, 32, 64)
        if size == STEP_TOKENS or size * head_dim // BLOCK * 2 % _COPY_ALIGNMENT == 0
    )
    if page_size < fits:
        raise NotImplementedError(
            f"scales of head_dim {head_dim} are copied {_COPY_ALIGNMENT} bytes at a time: page_size must be at "
            f"least {fits}; it is {page_size}"
        )
