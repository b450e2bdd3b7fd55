"""What ``paged_attention`` would run on a platform, and why, without that platform."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxpaged.attention.api import Choice, choose
from jaxpaged.batch import Batch
from jaxpaged.block_table import BlockTable


@dataclass(frozen=True)
class Step:
    """The shapes of one attention: a decode step or a chunk of a prompt."""

    num_q_heads: int
    k_pages_shape: tuple[int, int, int, int]
    """As the platform lays pages out."""
    page_dtype: DTypeLike
    head_dim: int
    page_size: int
    max_seqs: int
    live_tokens: int
    """Tokens that each sequence holds."""
    num_tokens: int
    """T: queries of the step."""
    max_q_len: int | None
    """Queries of one sequence; 1 = a decode step, None = any number."""
    max_entries: int
    window: int | None = None


@dataclass(frozen=True)
class Explanation:
    """What a step runs."""

    choice: Choice
    details: Mapping[str, Any]
    """Block sizes and memory, in the implementation's own terms."""
    kv_bytes: int
    """Bytes of live keys and values that one layer reads in the step, each once."""


def explain(platform: str, step: Step) -> Explanation:
    """The implementation that serves a step on ``platform`` ("cpu", "gpu" or "tpu"), and its blocks.

    Nothing is computed, and no device of that platform is needed.

    Raises:
      NotImplementedError: no implementation serves it; says why each does not.
    """
    q_dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    q_shape = step.num_tokens, step.num_q_heads, step.head_dim

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    rows: Any = integers(step.max_seqs, step.max_entries)
    table = BlockTable(rows, rows, rows, rows, rows, integers(step.max_seqs))  # type: ignore[arg-type]
    tokens: Any = integers(step.num_tokens)
    batch = Batch(
        tokens, tokens, tokens, tokens, tokens, integers(step.max_seqs + 1), step.max_q_len  # type: ignore[arg-type]
    )  # fmt: skip
    pages = jax.ShapeDtypeStruct(step.k_pages_shape, step.page_dtype)
    q = jax.ShapeDtypeStruct(q_shape, q_dtype)
    choice = choose(platform, q, pages, pages, table, batch, window=step.window)
    seen = step.live_tokens if step.window is None else min(step.live_tokens, step.window + step.num_tokens)
    page_bytes = int(np.prod(step.k_pages_shape[1:])) * np.dtype(step.page_dtype).itemsize
    kv_bytes = 2 * step.max_seqs * seen * page_bytes // step.page_size
    return Explanation(choice, _details(choice.name, q_shape, q_dtype, step), kv_bytes)


def _details(name: str, q_shape: tuple[int, int, int], q_dtype: DTypeLike, step: Step) -> Mapping[str, Any]:
    shapes = q_shape, step.k_pages_shape, step.page_dtype, step.max_q_len
    table: dict[str, Any] = {"max_seqs": step.max_seqs, "max_entries": step.max_entries, "q_dtype": q_dtype}
    if name == "mosaic_tpu":
        from jaxpaged.attention import tpu_blocks

        return tpu_blocks.describe(*shapes, **table)
    if name == "mosaic_gpu":
        from jaxpaged.attention import mosaic_gpu

        return mosaic_gpu.describe(*shapes, **table, live_tokens=step.max_seqs * step.live_tokens)
    if name == "cpu_numba":
        from jaxpaged.attention import cpu_numba

        return cpu_numba.describe(*shapes)
    return {}
