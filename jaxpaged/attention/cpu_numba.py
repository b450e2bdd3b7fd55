"""Paged attention on CPUs through XLA's foreign function interface: the work around the kernel of ``cpu_kernel.py``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jaxpaged.attention import cpu_kernel
from jaxpaged.attention.base import Config, Pages, described
from jaxpaged.attention.cpu_kernel import (
    FEW_ROWS,
    FORMATS,
    LEAST_TOKENS,
    ROWS,
    TILE,
    handler,
    scratch_bytes,
    task,
)
from jaxpaged.batch import Batch
from jaxpaged.block_table import BlockTable
from jaxpaged.native.ffi import register
from jaxpaged.native.tiles import WIDTH, padded
from jaxpaged.page_format import BlockPages
from jaxpaged.rope import Rope


@functools.cache
def _target() -> str:
    """The name of the custom call, compiled on first use."""
    name = "jaxpaged_paged_attention"
    register(name, handler, task, [Path(cpu_kernel.__file__)])
    return name


def describe(
    q_shape: tuple[int, int, int],
    k_pages_shape: tuple[int, ...],
    page_dtype: DTypeLike,
    max_q_len: int | None,
) -> dict[str, Any]:
    """What a call with these shapes runs, for people to read.

    Args:
      q_shape: ``(T, Hq, D)``.
      k_pages_shape: ``(N, KV, page_size, D)``.
      page_dtype: of the pages.
      max_q_len: as ``Batch`` has it.

    Returns:
      ``vector_width`` in float32; ``keys_per_tile``; ``rows_per_piece``, query heads counted; ``keys_read`` "in place",
      "converted" or "transposed"; ``least_tokens_per_piece``, below which a sequence is not cut; ``scratch_bytes`` of
      each thread.
    """
    tokens, num_q_heads, head_dim = q_shape
    group = num_q_heads // k_pages_shape[1]
    rows = min(max(ROWS // group, 1), max_q_len or tokens) * group
    wide = padded(head_dim)
    in_place = np.dtype(page_dtype).itemsize == 4 and wide == head_dim
    return {
        "vector_width": WIDTH,
        "keys_per_tile": TILE,
        "rows_per_piece": rows,
        "keys_read": "transposed" if rows > FEW_ROWS else "in place" if in_place else "converted",
        "least_tokens_per_piece": LEAST_TOKENS,
        "scratch_bytes": scratch_bytes(rows, head_dim, wide),
    }


def paged_attention(
    q: Array,
    k_pages: Pages,
    v_pages: Pages,
    table: BlockTable,
    batch: Batch,
    config: Config,
    sinks: Array | None,
    rope: Rope | None,
) -> tuple[Array, Array]:
    """``(out f32[T, Hq, D], lse f32[T, Hq])``; arguments as checked by ``api.paged_attention``.

    Raises:
      NotImplementedError: heads of half-size floats whose number is no multiple of 8.
    """
    if isinstance(k_pages, BlockPages) or isinstance(v_pages, BlockPages):
        raise NotImplementedError(f"pages {described(k_pages)} and {described(v_pages)}; reads plain numbers")
    tokens, num_q_heads, head_dim = q.shape
    if k_pages.dtype.itemsize == 2 and head_dim % 8:
        raise NotImplementedError(
            f"reads {k_pages.dtype} pages with a head_dim that is a multiple of 8, got {head_dim}"
        )
    numbers = np.asarray([config.scale, config.soft_cap or 0], np.float32)
    interleaved = rope is not None and rope.interleaved
    options = np.asarray([config.window or 0, interleaved, FORMATS[k_pages.dtype.name]], np.int32)
    out = jax.ShapeDtypeStruct((tokens, num_q_heads, head_dim), jnp.float32)
    lse = jax.ShapeDtypeStruct((tokens, num_q_heads), jnp.float32)
    attended, log_sums = jax.ffi.ffi_call(_target(), (out, lse))(
        q.astype(jnp.float32),
        k_pages,
        v_pages,
        table.pages,
        table.first_slot,
        table.num_tokens,
        table.position,
        table.rotation,
        table.num_entries,
        batch.cu_q_lens,
        batch.position,
        batch.rope_positions,
        jnp.full(num_q_heads, -jnp.inf) if sinks is None else sinks.astype(jnp.float32),
        jnp.zeros(0, jnp.uint32) if rope is None else rope.turns,
        numbers,
        options,
    )
    return attended, log_sums
