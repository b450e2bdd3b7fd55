"""Paged attention in portable XLA: online softmax over chunks of pages, with dynamic trip counts."""

from __future__ import annotations

import functools
from functools import partial

import jax.numpy as jnp
from jax import Array, lax

from jaxpaged.attention.base import (
    NOWHERE,
    Config,
    Pages,
    Source,
    Tiling,
    compute_dtype,
    has_hadamard,
    power_of_two,
    ragged_attention,
)
from jaxpaged.pages.batch import Batch
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.formats import BlockPages, token_rows, tokens_per_row
from jaxpaged.pages.rope import Rope

_CHUNK_TOKENS = 512
_CPU_CHUNK_TOKENS = 256
_CPU_CHUNK_PAGES = 8
"""On two cores, concatenating 16 pages or more takes 3 times as long a token as concatenating 8."""


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
) -> tuple[Array, Array]:
    """``(out f32[T, Hq, Dv], lse f32[T, Hq])``; arguments as checked by ``api.paged_attention``."""
    return lax.platform_dependent(
        q,
        k_pages,
        v_pages,
        table,
        batch,
        sinks,
        rope,
        jnp.asarray(first_page, jnp.int32),
        cpu=partial(_attend, config=config, cpu=True),
        default=partial(_attend, config=config, cpu=False),
    )


def _attend(
    q: Array,
    k_pages: Pages,
    v_pages: Pages,
    table: BlockTable,
    batch: Batch,
    sinks: Array | None,
    rope: Rope | None,
    first_page: Array,
    *,
    config: Config,
    cpu: bool,
) -> tuple[Array, Array]:
    head_dim = q.shape[2]
    num_kv_heads, page_size = k_pages.shape[1], k_pages.shape[2] * tokens_per_row(k_pages.shape[3], head_dim)
    if cpu:
        # One sequence at a time, pages sliced out of the pool one by one: XLA:CPU is slow at gathers and at batches of
        # small dots, and its float32 dots are 9 times as fast as those of shorter formats.
        dtype = jnp.dtype(jnp.float32)
        tiling = Tiling(decode_width=1, rows=min(128, power_of_two(q.shape[0])), width=1)
        stride = min(max(_CPU_CHUNK_TOKENS // page_size, 1), _CPU_CHUNK_PAGES)
    else:
        dtype = functools.reduce(jnp.promote_types, map(compute_dtype, (k_pages, v_pages)), q.dtype)
        tiling = Tiling(
            decode_width=min(batch.max_seqs, q.shape[0]), rows=min(128, power_of_two(q.shape[0])), width=4
        )
        stride = max(_CHUNK_TOKENS // page_size, 1)
    stride = min(stride, table.max_pages_per_seq)
    dims = head_dim, config.width_of_values(head_dim)
    source = _paged_source(k_pages, v_pages, table, first_page, dims, stride, dtype, slices=cpu)
    return ragged_attention(q, batch, source, num_kv_heads, config, sinks, tiling, dtype, rope)


def _paged_source(
    k_pages: Pages,
    v_pages: Pages,
    table: BlockTable,
    first_page: Array,
    head_dims: tuple[int, int],
    stride: int,
    dtype: jnp.dtype,
    *,
    slices: bool,
) -> Source:
    """Keys and values, with heads of ``head_dims``, of a block table; a unit is an entry."""
    head_dim, v_head_dim = head_dims
    num_pages, num_kv_heads, page_rows, width = k_pages.shape
    page_size = page_rows * tokens_per_row(width, head_dim)

    def span(sequence: Array, low: Array | None, high: Array | None) -> tuple[Array, Array]:
        begin, end = jnp.zeros_like(sequence), table.num_entries[sequence]
        live = jnp.arange(table.max_pages_per_seq, dtype=jnp.int32) < end[:, None]
        position = table.position[sequence]
        if low is not None:
            gone = live & (position + table.num_tokens[sequence] <= low[:, None])
            begin = jnp.sum(gone, axis=1, dtype=jnp.int32)
        if high is not None:
            end = jnp.sum(live & (position <= high[:, None]), axis=1, dtype=jnp.int32)
        return begin, jnp.maximum(begin, end)

    def window(field: Array, sequence: Array, unit: Array) -> Array:
        """``stride`` entries of a field, i32[W, stride]: as slices, since each gather is a kernel."""
        first = jnp.minimum(unit, table.max_pages_per_seq - stride)
        return jnp.concatenate(
            [lax.dynamic_slice(field, (sequence[w], first[w]), (1, stride)) for w in range(len(unit))]
        )

    def rotation_run(sequence: Array, unit: Array, end: Array) -> tuple[Array, Array]:
        rotation = table.rotation[sequence]
        entry = jnp.arange(table.max_pages_per_seq, dtype=jnp.int32)
        ours = jnp.take_along_axis(rotation, jnp.minimum(unit, table.max_pages_per_seq - 1)[:, None], axis=1)
        others = (rotation != ours) & (entry > unit[:, None]) & (entry < end[:, None])
        return ours[:, 0], jnp.min(jnp.where(others, entry, end[:, None]), axis=1)

    def positions(sequence: Array, unit: Array, end: Array) -> Array:
        first_slot, num_tokens, position = (
            window(field, sequence, unit)[..., None]
            for field in (table.first_slot, table.num_tokens, table.position)
        )
        entry = jnp.minimum(unit, table.max_pages_per_seq - stride)[:, None] + jnp.arange(
            stride, dtype=jnp.int32
        )
        slot = jnp.arange(page_size, dtype=jnp.int32)
        live = (slot >= first_slot) & (slot < first_slot + num_tokens)
        # Near the end of the row the window begins earlier, with entries that were read before.
        live &= ((entry >= unit[:, None]) & (entry < end[:, None]))[..., None]
        return jnp.where(live, position + slot - first_slot, NOWHERE).reshape(len(unit), -1)

    def load(sequence: Array, unit: Array, position: Array) -> tuple[Array, Array]:
        pages = jnp.clip(window(table.pages, sequence, unit) + first_page, 0, num_pages - 1)

        def rows(pool: Pages, head_dim: int) -> Array:
            if isinstance(pool, BlockPages):
                # Dequantizes one chunk of pages at a time.
                x = pool.format.load(pool, pages, slices=slices).transpose(0, 2, 1, 3, 4)
                x = x.reshape(len(pages), num_kv_heads, -1, head_dim)
            elif slices:
                x = jnp.stack(
                    [
                        jnp.concatenate(
                            [
                                token_rows(lax.dynamic_index_in_dim(pool, p, keepdims=False), head_dim)
                                for p in lane
                            ],
                            axis=1,
                        )
                        for lane in pages
                    ]
                )
            else:
                x = token_rows(pool[pages], head_dim).transpose(0, 2, 1, 3, 4)
                x = x.reshape(len(pages), num_kv_heads, -1, head_dim)
            return x.astype(dtype)

        # A masked value has weight zero, and 0 * NaN is NaN.
        keys, values = rows(k_pages, head_dim), rows(v_pages, v_head_dim)
        return keys, jnp.where(position[:, None, :, None] < NOWHERE, values, 0)

    return Source(span, positions, load, stride, rotation_run, has_hadamard(k_pages))
