"""Implementation and block sizes of ``paged_attention`` on a platform, without that platform."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxpaged.attention.api import Choice, choose
from jaxpaged.attention.base import Pages
from jaxpaged.pages.batch import Batch
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.formats import BlockFormat, BlockPages, ResidualPages
from jaxpaged.pages.formats.lane_blocks import LaneBlockFormat


@dataclass(frozen=True)
class Step:
    """Shapes of one attention: a decode step or a prefill chunk."""

    num_q_heads: int
    k_pages: Pages
    """Pages of one layer in the platform's layout, with ``jax.ShapeDtypeStruct`` instead of arrays."""
    v_pages: Pages
    head_dim: int
    page_size: int
    max_seqs: int
    live_tokens: int
    """Number of tokens of each sequence."""
    num_tokens: int
    """T, number of queries of the step."""
    max_q_len: int | None
    """Bound on the queries of one sequence; 1 = a decode step, None = no bound."""
    max_pages_per_seq: int
    window: int | None = None
    v_head_dim: int | None = None
    """Numbers of a head of values, where they are not ``head_dim``."""


@dataclass(frozen=True)
class Explanation:
    """Implementation of a step, with its sizes."""

    choice: Choice
    details: Mapping[str, Any]
    """Block sizes and memory, by the implementation's names."""
    kv_bytes: int
    """Bytes of live keys and values, scales included, that one layer reads in the step, each once."""


def explain(platform: str, step: Step) -> Explanation:
    """Finds the implementation of a step on ``platform`` ("cpu", "gpu" or "tpu"), and its block
    sizes.

    Computes nothing and needs no device of that platform.

    Raises:
      NotImplementedError: no implementation supports it; gives the reason of each.
    """
    q_dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    q_shape = step.num_tokens, step.num_q_heads, step.head_dim

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    rows: Any = integers(step.max_seqs, step.max_pages_per_seq)
    table = BlockTable(rows, rows, rows, rows, rows, integers(step.max_seqs))  # type: ignore[arg-type]
    tokens: Any = integers(step.num_tokens)
    batch = Batch(
        tokens, tokens, tokens, tokens, tokens, integers(step.max_seqs + 1), max_q_len=step.max_q_len  # type: ignore[arg-type]
    )  # fmt: skip
    q: Any = jax.ShapeDtypeStruct(q_shape, q_dtype)
    given = q, step.k_pages, step.v_pages, table, batch
    choice = choose(platform, *given, window=step.window, v_head_dim=step.v_head_dim)
    kv_bytes = sum(_bytes_read(pages, step) for pages in (step.k_pages, step.v_pages))
    return Explanation(choice, _details(choice.name, q_shape, q_dtype, step), kv_bytes)


def _bytes_read(pages: Pages, step: Step) -> int:
    """Bytes of the visible keys or values; residual pages have 16 bits a number."""
    seen = step.live_tokens if step.window is None else min(step.live_tokens, step.window + step.num_tokens)
    parts = pages.parts.values() if isinstance(pages, BlockPages) else [pages]
    page_bytes = sum(_page_bytes(part) for part in parts)
    if not isinstance(pages, ResidualPages):
        return step.max_seqs * seen * page_bytes // step.page_size
    residual = min(seen, step.live_tokens % step.page_size)
    return (
        step.max_seqs
        * ((seen - residual) * page_bytes + residual * _page_bytes(pages.residual))
        // step.page_size
    )


def _page_bytes(part: Array) -> int:
    return math.prod(part.shape[1:]) * part.dtype.itemsize


def _details(name: str, q_shape: tuple[int, int, int], q_dtype: DTypeLike, step: Step) -> Mapping[str, Any]:
    k: Any
    v: Any
    k, v = (x.format if isinstance(x, BlockPages) else x.dtype for x in (step.k_pages, step.v_pages))
    shape: Any = step.k_pages.shape
    table: dict[str, Any] = {
        "max_seqs": step.max_seqs,
        "max_pages_per_seq": step.max_pages_per_seq,
        "q_dtype": q_dtype,
    }
    if name == "mosaic_tpu":
        from jaxpaged.attention.tpu import block_sizes as tpu_blocks

        other = step.v_head_dim not in (None, step.head_dim)
        lanes = step.v_pages.shape[3] if not isinstance(v, LaneBlockFormat) else v.width
        table |= {"v_lanes": lanes if other else None, "v_head_dim": step.v_head_dim}
        return tpu_blocks.describe(q_shape, shape, k, step.max_q_len, v_dtype=v, **table)
    if name == "mosaic_gpu":
        from jaxpaged.attention.gpu import backend as mosaic_gpu

        kind = (k, v) if isinstance(k, BlockFormat) or isinstance(v, BlockFormat) else k
        live_tokens = step.max_seqs * step.live_tokens
        table |= {"live_tokens": live_tokens, "v_head_dim": step.v_head_dim}
        return mosaic_gpu.describe(q_shape, shape, kind, step.max_q_len, **table)
    if name == "cpu_numba":
        from jaxpaged.attention.cpu import backend as cpu_numba

        return cpu_numba.describe(q_shape, step.k_pages, step.v_pages, step.max_q_len)
    return {}
