"""Paged attention on CPUs: the custom call of ``kernel.py``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpaged.attention.base import Config, Pages, has_hadamard
from jaxpaged.attention.cpu.kinds import KINDS
from jaxpaged.compilation.executable_cache import register_target_loader
from jaxpaged.native.kernels import Kernel, register
from jaxpaged.pages.batch import Batch
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.formats import BlockFormat, BlockPages, Float8Format, PageFormat, ResidualPages
from jaxpaged.pages.formats.ggml import BLOCK
from jaxpaged.pages.formats.hadamard import size as hadamard_size
from jaxpaged.pages.rope import Rope

_FOLDER = Path(__file__).parent


@functools.cache
def _target(quantized: bool) -> str:
    """Name of the custom call, registered on first use; see ``kernel.QUANTIZED``."""
    variant = "_quantized" if quantized else ""
    sources = tuple(_FOLDER / file for file in ("job.py", "pages.py", "kinds.py"))
    name = f"jaxpaged_paged_attention{variant}"
    register(Kernel(name, _FOLDER / "kernel.py", f"{__package__}.kernel{variant}", sources))
    register_target_loader(name, _target, quantized)
    return name


def prepare(k_format: PageFormat, v_format: PageFormat) -> None:
    """Registers the kernel for pages of these formats before a program is traced, so that its
    compilation, if it is not in the cache, goes on beside what follows."""
    _target(any(isinstance(one, BlockFormat) for one in (k_format, v_format)))


def describe(
    q_shape: tuple[int, int, int], k_pages: Pages, v_pages: Pages, max_q_len: int | None
) -> dict[str, Any]:
    """Describes a call with these shapes, for people to read.

    Args:
      q_shape: ``(T, Hq, D)``.
      k_pages, v_pages: pages, with ``jax.ShapeDtypeStruct`` or arrays.
      max_q_len: see ``Batch``.

    Returns:
      ``vector_width`` in float32; ``keys_per_tile``; ``rows_per_item``, counting query heads;
      ``keys_read`` and ``values_read``, "in place", "as codes" (multiplied with few rows),
      "converted" to float32, or "transposed"; ``min_tokens_per_item``, below which a sequence is
      not split; ``scratch_bytes`` of each thread.
    """
    from jaxpaged.attention.cpu import kernel, pages
    from jaxpaged.attention.cpu.job import MIN_ITEM_TOKENS, ROWS
    from jaxpaged.native.tiles import WIDTH, padded

    tokens, num_q_heads, head_dim = q_shape
    group = num_q_heads // k_pages.shape[1]
    rows = min(max(ROWS // group, 1), max_q_len or tokens) * group
    v_head_dim = v_pages.shape[3]

    def read(given: Pages, dim: int) -> str:
        kind = _kind(given, dim)
        if rows <= kernel.FEW_ROWS and pages.reads_codes.py_func(kind):
            return "as codes"
        return "in place" if KINDS[kind] == "f32" and padded(dim) == dim else "converted"

    return {
        "vector_width": WIDTH,
        "keys_per_tile": kernel.TILE,
        "rows_per_item": rows,
        "keys_read": "transposed" if rows > kernel.FEW_ROWS else read(k_pages, head_dim),
        "values_read": read(v_pages, v_head_dim),
        "min_tokens_per_item": MIN_ITEM_TOKENS,
        "scratch_bytes": kernel.scratch_bytes(rows, head_dim, v_head_dim),
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
    first_page: Array | int = 0,
) -> tuple[Array, Array]:
    """``(out f32[T, Hq, Dv], lse f32[T, Hq])``; arguments as checked by ``api.paged_attention``.

    Raises:
      NotImplementedError: the kernel does not read the format, or not with this head_dim.
    """
    tokens, num_q_heads, head_dim = q.shape
    num_pages, num_kv_heads, page_size, _ = k_pages.shape
    v_head_dim = config.width_of_values(head_dim)
    kinds = _kind(k_pages, head_dim), _kind(v_pages, v_head_dim)
    hadamard = hadamard_size(head_dim) if has_hadamard(k_pages) else 0
    numbers = np.asarray([config.scale, config.soft_cap or 0], np.float32)
    interleaved = rope is not None and rope.interleaved
    slot_of_page, slots = _staging_slots(k_pages, v_pages)
    first_slot = first_page // len(slot_of_page) * slots if slots else 0
    sizes = num_kv_heads, page_size, num_pages, slots
    options = np.asarray([config.window or 0, interleaved, *kinds, hadamard, *sizes], np.int32)
    out = jax.ShapeDtypeStruct((tokens, num_q_heads, v_head_dim), jnp.float32)
    lse = jax.ShapeDtypeStruct((tokens, num_q_heads), jnp.float32)
    quantized = isinstance(k_pages, BlockPages) or isinstance(v_pages, BlockPages)
    attended, log_sums = jax.ffi.ffi_call(_target(quantized), (out, lse), vmap_method="expand_dims")(
        q.astype(jnp.float32),
        *_parts(k_pages),
        *_parts(v_pages),
        slot_of_page,
        jnp.stack([jnp.asarray(first_page, jnp.int32), jnp.asarray(first_slot, jnp.int32)]),
        table.pages,
        table.first_slot,
        table.num_tokens,
        table.position,
        table.rotation,
        table.num_entries,
        batch.cu_q_lens,
        batch.position,
        batch.last_visible,
        batch.rope_positions,
        jnp.full(num_q_heads, -jnp.inf, jnp.float32) if sinks is None else sinks.astype(jnp.float32),
        jnp.zeros(0, jnp.uint32) if rope is None else rope.phase_step,
        numbers,
        options,
    )
    return attended, log_sums


def _kind(pages: Pages, head_dim: int) -> int:
    """Index of the pages' kind in ``KINDS``.

    Raises:
      NotImplementedError: the kernel does not read it, or not with this head_dim.
    """
    if isinstance(pages, BlockPages):
        if type(pages) not in (BlockPages, ResidualPages):  # other subclasses have another layout
            raise NotImplementedError(f"does not read {pages.format.name} pages laid out for a TPU")
        kind, multiple = pages.format.name, 16 if isinstance(pages.format, Float8Format) else BLOCK
        if isinstance(pages, ResidualPages) and getattr(pages.format.code, "by_channel", True) is False:
            kind += "_by_token"
    else:
        kind = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float8_e4m3fn": "fp8_e4m3"}.get(
            pages.dtype.name, pages.dtype.name
        )
        multiple = {4: 1, 2: 8, 1: 16}.get(pages.dtype.itemsize, 1)
    if kind not in KINDS:
        raise NotImplementedError(f"does not read pages of {kind}")
    if head_dim % multiple:
        raise NotImplementedError(
            f"reads {kind} pages with a head_dim that is a multiple of {multiple}, got {head_dim}"
        )
    return KINDS.index(kind)


def _parts(pages: Pages) -> list[Array]:
    """Codes, scales, minima, other parts, and residual pages; empty where the format has none."""
    if not isinstance(pages, BlockPages):
        return [pages, *(jnp.zeros(0, jnp.uint8) for _ in range(4))]
    parts = dict(pages.parts)
    more = parts.pop("fifth_bits", parts.pop("block_scales", None))
    opened = pages.residual if isinstance(pages, ResidualPages) else None
    found = parts.get("codes"), parts.get("scales"), parts.get("minima"), more, opened
    return [jnp.zeros(0, jnp.uint8) if part is None else part for part in found]


def _staging_slots(k_pages: Pages, v_pages: Pages) -> tuple[Array, int]:
    """``(i32[N] staging slot of each page of a layer, number of slots of a layer)``; ``([], 0)``
    without residual pages."""
    for pages in (k_pages, v_pages):
        if isinstance(pages, ResidualPages):
            return pages.staging_slots()
    return jnp.zeros(0, jnp.int32), 0
