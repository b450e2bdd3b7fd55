"""Paged attention on TPU: one Pallas kernel for decode and prefill, that reads pages where they
lie.

Pages stay in HBM. The kernel runs through a list of items (``tpu_blocks.Items``: the queries of one
sequence in one block of queries), and for each through the K/V blocks that it sees, several pages
each. Two DMAs run ahead of the computation: entries of the block table into scalar memory, two K/V
blocks ahead, and the pages that they name into VMEM, one block ahead, all KV heads of a page at
once. They run ahead across items too, so that short sequences keep the memory busy. The grid is as
long as the list, the loops as long as the sequences: cost follows live tokens.

Where heads are packed (``page_format.LanePageFormat``), a row of keys is ``[even token | odd
token]``. Queries come as ``[q | 0]`` and ``[0 | q]``, and each of them is the softmax of its own
half of the tokens; the halves are merged as split-KV merges its parts. The matrix unit contracts
128 lanes at once anyway.

Source of the ideas: ragged paged attention (arXiv:2604.15464), FlashAttention-2 (arXiv:2307.08691).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxpaged.attention.base import Config, Pages, described
from jaxpaged.attention.tpu.block_sizes import (
    Blocks,
    Heads,
    Items,
    Storage,
    Stored,
    block_items,
    choose_blocks,
    compute_dtype,
    pack_table,
    scales_shape,
    single_items,
)
from jaxpaged.attention.tpu.kernel import Cut, kernel
from jaxpaged.pages.batch import Batch
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.formats import LANES, MAX_PAGE_SIZE, BlockPages, hadamard
from jaxpaged.pages.formats.ggml import BLOCK
from jaxpaged.pages.formats.lane_blocks import LaneBlockFormat
from jaxpaged.pages.rope import Rope

_MIN_ROWS_OF_BYTES = 4
"""Rows of a TPU's memory that share 32-bit words; a DMA moves no less."""


def paged_attention(
    q: Array,
    k_pages: Pages,
    v_pages: Pages,
    table: BlockTable,
    batch: Batch,
    config: Config,
    sinks: Array | None,
    rope: Rope | None,
    first_page: Array | int = 0,
    *,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """``(out f32[T, Hq, Dv], lse f32[T, Hq])``; arguments as checked by ``api.paged_attention``.

    Args:
      blocks: block sizes; default ``choose_blocks``.
      interpret: see ``pl.pallas_call``; ``pltpu.InterpretParams()`` runs the kernel without a
        TPU.

    Raises:
      NotImplementedError: the kernel cannot serve these shapes; the message says why.
      ValueError: ``blocks`` do not fill whole rows of 128 scores.
    """
    stored = Stored(_storage(k_pages), _storage(v_pages))
    of_keys = Heads.of(q.shape, k_pages.shape, stored.k)
    of_values = Heads.of((*q.shape[:2], config.width_of_values(q.shape[2])), v_pages.shape, stored.v)
    if (of_keys.packed, of_keys.page_rows) != (of_values.packed, of_values.page_rows):
        raise NotImplementedError(
            f"keys {described(k_pages)} and values {described(v_pages)} in other rows: {of_keys.packed} tokens of "
            f"keys and {of_values.packed} of values in one"
        )
    v_lanes = None if of_values.lanes == of_keys.lanes else of_values.lanes
    heads = of_keys._replace(v_lanes=of_values.lanes)
    if heads.page_rows & (heads.page_rows - 1) or heads.page_size > MAX_PAGE_SIZE:
        raise NotImplementedError(
            f"pages of {heads.page_size} tokens; the kernel reads powers of two up to {MAX_PAGE_SIZE}"
        )
    for one, quantized in zip((of_keys, of_values), stored.quantized, strict=True):
        if quantized and LANES % (one.lanes // BLOCK):
            raise NotImplementedError(
                f"quantized heads of {one.head_dim} are {one.lanes // BLOCK} blocks; the kernel reads 4, 8, 16 or 32"
            )
    for pages in (k_pages, v_pages):
        if isinstance(pages, BlockPages) and pages.parts["codes"].shape[2] < _MIN_ROWS_OF_BYTES:
            fits = heads.page_size * _MIN_ROWS_OF_BYTES // pages.parts["codes"].shape[2]
            raise NotImplementedError(
                f"{pages.format.name} pages of {heads.page_size} tokens with heads of {heads.head_dim}; "
                f"the kernel reads them from {fits} tokens on"
            )
    if blocks is None:
        sizes = q.shape, k_pages.shape, stored.k, batch.max_q_len
        blocks = choose_blocks(*sizes, v_dtype=stored.v, v_lanes=v_lanes)
    if blocks.pages * heads.page_rows % LANES:
        raise ValueError(
            f"{blocks.pages} pages of {heads.page_rows} rows are no multiple of {LANES} rows; "
            f"{LANES // math.gcd(LANES, heads.page_rows)} pages are"
        )
    dtype = compute_dtype(q.dtype, *stored)
    if stored.turned:
        q = hadamard.transform(q)
    entries = pack_table(table, blocks.pages, k_pages.shape[0])
    run = partial(
        _run,
        q.astype(dtype),
        [*_parts(k_pages), *_parts(v_pages)],
        entries,
        batch,
        rope,
        jnp.asarray(first_page, jnp.int32),
        heads=heads,
        stored=stored,
        config=config,
        pages=blocks.pages,
        interpret=interpret,
    )
    tokens = q.shape[0]
    if tokens == 1 or batch.max_q_len == 1:
        items = single_items(table, batch, jnp.arange(tokens, dtype=jnp.int32), config.window)
        out, lse = run(items, batch.cu_q_lens[-1], None, queries=1)
    else:
        single = (batch.q_lens == 1) & (batch.max_seqs > 1)
        items, count = block_items(table, batch, ~single, blocks.queries, config.window)
        out, lse = run(items, count, None, queries=blocks.queries)
        if batch.max_seqs > 1:
            # Sequences with one query are a pass of their own: as rows of a block they would cost a block each.
            most = min(batch.max_seqs, tokens)
            place = jnp.where(single, jnp.cumsum(single, dtype=jnp.int32) - 1, most)
            rows = jnp.full(most, tokens, jnp.int32).at[place].set(batch.cu_q_lens[:-1], mode="drop")
            items = single_items(table, batch, rows, config.window)
            out_1, lse_1 = run(items, jnp.sum(single, dtype=jnp.int32), rows, queries=1)
            out, lse = out.at[rows].set(out_1, mode="drop"), lse.at[rows].set(lse_1, mode="drop")
    # Rows that no item computed hold whatever lay in their memory.
    valid = batch.valid[:, None]
    out, lse = jnp.where(valid[..., None], out, 0), jnp.where(valid, lse, -jnp.inf)
    if sinks is not None:
        with_sinks = jnp.logaddexp(lse, jnp.where(valid, sinks.astype(jnp.float32), -jnp.inf))
        weight = jnp.exp(lse - jnp.where(jnp.isneginf(with_sinks), 0, with_sinks))
        out, lse = out * weight[..., None], with_sinks
    return out, lse


def _storage(pages: Pages) -> Storage:
    """Storage of pages, if the kernel reads it."""
    if isinstance(pages, BlockPages):
        if not isinstance(pages.format, LaneBlockFormat):
            raise NotImplementedError(
                f"pages {described(pages)}; of quantized ones the kernel reads q8_0 and q4_0 in rows of lanes "
                '(layout="lanes")'
            )
        return pages.format
    if pages.dtype not in (jnp.float32, jnp.bfloat16):
        # Mosaic has no float16, and XLA copies a pool to show its bits as integers.
        raise NotImplementedError(f"pages of {pages.dtype}; the kernel reads float32 and bfloat16")
    return pages.dtype


def _parts(pages: Pages) -> list[Array]:
    """Arrays of pages, in the order of ``Stored.parts``."""
    return [pages.parts["codes"], pages.parts["scales"]] if isinstance(pages, BlockPages) else [pages]


def _run(
    q: Array,
    pools: list[Array],
    entries: Array,
    batch: Batch,
    rope: Rope | None,
    first_page: Array,
    items: Items,
    count: Array,
    rows: Array | None,
    *,
    queries: int,
    heads: Heads,
    stored: Stored,
    config: Config,
    pages: int,
    interpret: Any,
) -> tuple[Array, Array]:
    """Computes ``count`` items; block b is ``queries`` consecutive ones of ``rows``, of all rows if
    left out.

    Returns:
      ``(out f32[R, Hq, Dv], lse f32[R, Hq])`` of the R rows.
    """
    num_kv_heads, group, head_dim, lanes, page_rows, v_lanes = heads
    v_head_dim = config.width_of_values(head_dim)
    packed, rows_of_group = heads.packed, queries * group
    width = stored.rows(heads, queries)
    num_rows = len(q) if rows is None else len(rows)
    num_blocks = -(-num_rows // queries)

    def chosen(x: Array) -> Array:
        """The rows, in blocks of queries."""
        if rows is not None:
            x = x.at[rows].get(mode="clip")
        x = jnp.pad(x, ((0, num_blocks * queries - num_rows),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(num_blocks, queries, *x.shape[1:])

    # Queries as the kernel reads them, [blocks, KV, packed * group * queries, lanes].
    x = chosen(q).swapaxes(1, 2).reshape(num_blocks, num_kv_heads, rows_of_group, head_dim)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, width - rows_of_group), (0, 0)))
    if packed > 1:
        halves = [((0, 0),) * 3 + ((i * head_dim, lanes - (i + 1) * head_dim),) for i in range(packed)]
        x = jnp.concatenate([jnp.pad(x, half) for half in halves], axis=2)
    elif lanes > head_dim:
        x = jnp.pad(x, ((0, 0),) * 3 + ((0, lanes - head_dim),))

    def by_row(values: Array) -> Array:
        """i32[T] as i32[blocks, 1, packed * group * queries]."""
        of_part = jnp.pad(jnp.tile(chosen(values), (1, group)), ((0, 0), (0, width - rows_of_group)))
        return jnp.tile(of_part, (1, packed))[:, None]

    inputs = [x, by_row(batch.last_visible)]
    has_window_start = config.window is not None and batch.visible_end is not None
    if has_window_start:
        inputs.append(by_row(batch.position))
    if rope is not None:
        inputs.append(by_row(batch.rope_positions - batch.position))
    rows_of_block, num_by_item = packed * width, len(inputs)
    if rope is not None:
        inputs += _turning(rope, head_dim, lanes, packed)
        if stored.turned:
            inputs.append(_hadamard(head_dim, lanes, packed))
    if not interpret:
        # XLA would otherwise move a small pool to faster memory as a whole, for the few pages that are read.
        pools = [pltpu.with_memory_space_constraint(pool, pltpu.HBM) for pool in pools]

    def of_item(block_shape: tuple[int, ...]) -> pl.BlockSpec:
        """The block of an array ``[blocks, ...]`` that belongs to an item."""
        return pl.BlockSpec(
            block_shape, lambda i, scalars, block, *_: (block[i], *(0,) * (len(block_shape) - 1))
        )

    in_specs = [
        of_item((1, num_kv_heads, rows_of_block, lanes)),
        *(of_item((1, 1, rows_of_block)) for _ in inputs[1:num_by_item]),
        *(pl.BlockSpec(memory_space=pltpu.VMEM) for _ in inputs[num_by_item:]),
    ]
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    out_shapes = (num_kv_heads, rows_of_block, v_lanes), (num_kv_heads, rows_of_block)
    buffers = [
        (2, shape[0], pages * shape[1], shape[2]) if len(shape) == 3 else (2, pages, *shape)
        for shape, _ in stored.parts(heads)
    ]
    state = (num_kv_heads, rows_of_block)
    scratch = [
        *(pltpu.VMEM(buffer, pool.dtype) for buffer, pool in zip(buffers, pools, strict=True)),
        pltpu.VMEM(scales_shape(heads, stored, queries, pages * page_rows), jnp.float32),
        pltpu.VMEM((*state, LANES), jnp.float32),
        pltpu.VMEM((*state, LANES), jnp.float32),
        pltpu.VMEM((*state, v_lanes), jnp.float32),
        pltpu.VMEM((2 + has_window_start, rows_of_block, 1), jnp.int32),
        pltpu.VMEM(x.shape[1:] if rope is not None else (8, LANES), x.dtype),
        pltpu.SMEM((3, *entries.shape[2:]), jnp.int32),
        pltpu.SMEM((3,), jnp.int32),
        pltpu.SemaphoreType.DMA((3,)),
        pltpu.SemaphoreType.DMA((2,)),
    ]
    run = pl.pallas_call(
        partial(
            kernel,
            cut=Cut(heads, config, pages, queries, len(items.block), jnp.dtype(q.dtype), stored),
            rotated=rope is not None,
            has_window_start=has_window_start,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(Items._fields),
            grid=(count,),
            in_specs=[*in_specs, hbm, *(hbm for _ in pools)],
            out_specs=[of_item((1, *shape)) for shape in out_shapes],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct((num_blocks, *shape), jnp.float32) for shape in out_shapes],
        # The kernel clips pages to the pool; checking each DMA again doubles its cost.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), disable_bounds_checks=True),
        interpret=interpret,
        name=f"paged_attention_{queries}x{pages}",
    )
    with jax.enable_x64(False):  # Mosaic has no 64-bit integers, which loop counters would be
        out, lse = run(jnp.stack([count, first_page]), *items, *inputs, entries, *pools)

    if packed > 1:
        # Each part of a row is a softmax over its own tokens; they merge as those of disjoint sets of keys.
        parts = lse.reshape(num_blocks, num_kv_heads, packed, width)
        lse = jax.nn.logsumexp(parts, axis=2)
        weight = jnp.exp(parts - jnp.where(jnp.isneginf(lse), 0, lse)[:, :, None])[..., None]
        out = sum(
            out[:, :, i * width : (i + 1) * width, i * v_head_dim : (i + 1) * v_head_dim] * weight[:, :, i]
            for i in range(packed)
        )
    out = out[:, :, :rows_of_group, :v_head_dim]
    out = out.reshape(num_blocks, num_kv_heads * group, queries, v_head_dim).swapaxes(1, 2)
    lse = lse[:, :, :rows_of_group].reshape(num_blocks, num_kv_heads * group, queries).swapaxes(1, 2)
    return (
        out.reshape(num_blocks * queries, -1, v_head_dim)[:num_rows],
        lse.reshape(num_blocks * queries, -1)[:num_rows],
    )


def _turning(rope: Rope, head_dim: int, lanes: int, packed: int) -> list[Array]:
    """Arrays that rotate a row of queries: ``turns i32[1, lanes]`` of each lane, and ``partner
    f32[lanes, lanes]``.

    ``x @ partner`` has in each lane the other number of its pair, with the sign that it is turned
    with; a product with zeros and ones is exact, and no lane has to be shifted.
    """
    dims, half = np.arange(rope.rotary_dim), rope.rotary_dim // 2
    pair = dims // 2 if rope.interleaved else dims % half
    other = dims ^ 1 if rope.interleaved else (dims + half) % rope.rotary_dim
    sign = np.where(other > dims, -1, 1)
    turns = jnp.asarray(rope.phase_step.view(np.int32)[pair])
    turns = jnp.pad(turns, (0, head_dim - rope.rotary_dim))
    turns = jnp.pad(jnp.tile(turns, packed), (0, lanes - packed * head_dim))
    partner = np.zeros((lanes, lanes), np.float32)
    for i in range(packed):
        partner[other + i * head_dim, dims + i * head_dim] = sign
    return [turns[None], jnp.asarray(partner, jnp.float32)]


def _hadamard(head_dim: int, lanes: int, packed: int) -> Array:
    """f32[lanes, lanes]: ``x @ it`` is the Hadamard transform of each head of a row."""
    n = hadamard.size(head_dim)
    blocks = np.kron(np.eye(packed * head_dim // n, dtype=np.float32), hadamard.matrix(n))
    return jnp.asarray(np.pad(blocks, (0, lanes - len(blocks))), jnp.float32)
