"""Paged attention on Hopper GPUs, in Pallas' Mosaic GPU dialect: the work around the kernel of
``gpu_kernel.py``.

XLA cuts the queries of a step into items, lays them out in tiles of rows, finds the entries that
each item sees, and afterwards joins the parts of the items. All of that has the size of the step's
queries and of a row of the table; no key and no value is touched outside the kernel.

Sources: PagedAttention, arXiv:2309.06180; the merge of parts, Flash-Decoding (Dao et al., 2023).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxpaged.attention.base import Config, Pages, described, has_hadamard
from jaxpaged.attention.gpu.kernel import attend
from jaxpaged.attention.gpu.quantized import BLOCK, CODES, to_columns, to_numbers
from jaxpaged.attention.gpu.tile_config import ROWS, STEP_TOKENS, PageKind, Plan, make_plan
from jaxpaged.pages.batch import Batch
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.formats import BlockPages, hadamard_transform
from jaxpaged.pages.rope import Rope

_LOG2_E = math.log2(math.e)


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
    interpret: Any = None,
) -> tuple[Array, Array]:
    """``(out f32[T, Hq, Dv], lse f32[T, Hq])``; arguments as checked by ``api.paged_attention``.

    Queries of the pages' dtype are multiplied as they are, and weights are rounded to it, as in
    FlashAttention. Other queries and their weights become two terms of that dtype each, which keeps
    16 bits and more of them, for one more pass over the tensor cores.

    Args:
      interpret: ``plgpu.InterpretGPUParams()`` runs the kernel on a CPU (jax 0.11.2 and later).

    Raises:
      NotImplementedError: pages, heads, queries or a GPU that the kernel is not written for; the
        message says why.
    """
    if interpret is None:
        _check_device()
    kind = _kind_of(k_pages, v_pages)
    tokens, num_q_heads, head_dim = q.shape
    plan = make_plan(
        tokens,
        num_q_heads,
        k_pages.shape,
        kind,
        q.dtype,
        max_q_len=batch.max_q_len,
        max_seqs=table.max_seqs,
        max_pages_per_seq=table.max_pages_per_seq,
        v_head_dim=config.v_head_dim,
    )
    items, row_positions, first, place = _make_items(table, batch, config, plan, first_page)
    hadamard = has_hadamard(k_pages)
    parts, turns = [q], None
    if rope is not None:
        if hadamard and (head_dim < 64 or head_dim & (head_dim - 1)):
            raise NotImplementedError(
                f"rotates queries for Hadamard-transformed keys where head_dim is 64, 128 or 256; it is {head_dim}"
            )
        # Queries of an item are rotated to the offset of its first query, which they nearly always have.
        own = batch.rope_positions - batch.position
        cos, sin = rope.cos_sin(items[place[0], _FRAME] - own)
        q = rope.rotate_by(q, cos[:, None], sin[:, None])
        parts, turns = [q, _quarter_turn(rope, q)], _turns_by_dimension(rope, head_dim)
    if hadamard:
        # If the kernel rotates, it starts from the untransformed queries.
        parts = [hadamard_transform(q), *(parts if rope is not None else ())]
    if plan.codes is not None:
        k_code, v_code = plan.codes
        parts = [to_columns(x, k_code, plan.warpgroups) for x in parts]
        turns = None if turns is None else to_columns(turns, k_code, plan.warpgroups)
    tiles = jnp.concatenate([_pack_queries(x, first, plan) for x in parts])
    out, lse = attend(tiles, k_pages, v_pages, table, items, row_positions, turns, config, plan, interpret)
    out, lse = _merge(out, lse, place, batch, sinks, plan)
    return out if plan.codes is None else to_numbers(out, v_code, plan.warpgroups), lse


def _kind_of(k_pages: Pages, v_pages: Pages) -> PageKind:
    """Format of pages, for ``make_plan``.

    Raises:
      NotImplementedError: only one pool is quantized, or the kernel does not read the format.
    """
    if not isinstance(k_pages, BlockPages) and not isinstance(v_pages, BlockPages):
        if k_pages.dtype != v_pages.dtype:
            raise NotImplementedError(
                f"keys of {k_pages.dtype} and values of {v_pages.dtype}; reads one dtype"
            )
        return k_pages.dtype
    # Not a subclass: its parts lie otherwise.
    if type(k_pages) is BlockPages and type(v_pages) is BlockPages:
        return k_pages.format, v_pages.format
    raise NotImplementedError(
        f"reads plain pages, or {', '.join(CODES)} of keys and of values; these are {described(k_pages)} and "
        f"{described(v_pages)}"
    )


def describe(
    q_shape: tuple[int, int, int],
    k_pages_shape: tuple[int, int, int, int],
    kind: PageKind,
    max_q_len: int | None,
    max_seqs: int,
    max_pages_per_seq: int,
    *,
    q_dtype: DTypeLike | None = None,
    live_tokens: int = 0,
    v_head_dim: int | None = None,
) -> dict[str, Any]:
    """Describes a call with these shapes.

    Args:
      q_shape: ``(T, Hq, D)``.
      k_pages_shape: ``(N, KV, page_size, D)``.
      kind: the dtype of the pages, or the formats of quantized keys and values.
      q_dtype: of the queries; that of the pages if left out, bfloat16 of quantized ones.
      max_q_len: as ``Batch`` has it.
      max_seqs, max_pages_per_seq: S and P of the table.
      live_tokens: tokens that the sequences of the step hold together.
      v_head_dim: numbers of a head of values, where they are not those of keys.

    Returns:
      Names and numbers: the sizes of ``Plan``, ``blocks`` of the grid, ``shared_memory_bytes`` of a
      block, ``blocks_per_sm``, and of one layer's step ``kv_bytes`` (every live key and value
      once), ``q_bytes`` (tiles written and read) and ``out_bytes`` (parts written and read, result
      written).

    Raises:
      NotImplementedError: the kernel cannot serve them.
    """
    tokens, num_q_heads, head_dim = q_shape
    num_kv_heads = k_pages_shape[1]
    if q_dtype is None:
        q_dtype = jnp.bfloat16 if isinstance(kind, tuple) else kind
    plan = make_plan(
        tokens,
        num_q_heads,
        k_pages_shape,
        kind,
        q_dtype,
        max_q_len=max_q_len,
        max_seqs=max_seqs,
        max_pages_per_seq=max_pages_per_seq,
        v_head_dim=v_head_dim,
    )
    if isinstance(kind, tuple):
        token_bytes = head_dim // BLOCK * sum(one.code.bytes for one in kind)
    else:
        token_bytes = (head_dim + plan.v_head_dim) * plan.dtype.itemsize
    rows = plan.num_items * plan.item_rows * num_kv_heads
    return {
        "implementation": "mosaic_gpu",
        "mode": "one query a sequence" if plan.single else "ragged",
        "queries_per_item": plan.queries,
        "step_tokens": STEP_TOKENS,
        "stages": plan.stages,
        "splits": plan.num_splits,
        "blocks": plan.num_items * num_kv_heads * plan.num_splits,
        "warpgroups": plan.warpgroups,
        "terms": plan.terms,
        "shared_memory_bytes": plan.shared_memory_bytes,
        "blocks_per_sm": plan.blocks_per_sm,
        "kv_bytes": num_kv_heads * token_bytes * live_tokens,
        "q_bytes": 2 * rows * plan.terms * head_dim * plan.dtype.itemsize,
        "out_bytes": 4 * plan.v_head_dim * (2 * rows * plan.num_splits + tokens * num_q_heads),
    }


def _check_device() -> None:
    """Looks at the GPU that is here, if there is one; without, the program is compiled for another
    machine.

    Raises:
      NotImplementedError: it is no Hopper.
    """
    if jax.default_backend() == "gpu" and (found := jax.devices()[0].compute_capability) != "9.0":
        raise NotImplementedError(
            f"wgmma is Hopper's, compute capability 9.0; this GPU has compute capability {found}"
        )


_SEQUENCE, _BEGIN, _END, _FRAME = range(4)


def _make_items(
    table: BlockTable, batch: Batch, config: Config, plan: Plan, first_page: Array | int
) -> tuple[Array, Array, Array, tuple[Array, Array]]:
    """Cuts the queries of a step into items.

    Returns:
      ``(items i32[I, 5], row_positions i32[1 or 2, I, 64], first i32[I], (item i32[T], row
      i32[T]))``: of each item its sequence, the first unit that it sees, the one behind the last, its
      frame, and ``first_page``; the last position that each of its rows sees, and the row's own
      where a window needs it too, -1 where there is no row; its first query; and where each query of
      the step is found.
    """
    tokens, max_seqs = batch.num_tokens, batch.max_seqs
    item = jnp.arange(plan.num_items, dtype=jnp.int32)
    if plan.single:
        sequence, first = jnp.minimum(batch.sequence, max_seqs - 1), item
        count = batch.valid.astype(jnp.int32)
        place = item, jnp.zeros_like(item)
    else:
        blocks = -(-batch.q_lens // plan.queries)
        ends = jnp.cumsum(blocks, dtype=jnp.int32)
        starts = ends - blocks
        sequence = jnp.sum(ends <= item[:, None], axis=1, dtype=jnp.int32)  # S where there is no more item
        exists, sequence = sequence < max_seqs, jnp.minimum(sequence, max_seqs - 1)
        first = batch.cu_q_lens[sequence] + plan.queries * (item - starts[sequence])
        count = jnp.where(exists, jnp.minimum(batch.cu_q_lens[sequence + 1] - first, plan.queries), 0)
        first = jnp.clip(first, 0, tokens - 1)
        owner = jnp.minimum(batch.sequence, max_seqs - 1)
        offset = jnp.arange(tokens, dtype=jnp.int32) - batch.cu_q_lens[owner]
        place = (
            jnp.clip(starts[owner] + offset // plan.queries, 0, plan.num_items - 1),
            offset % plan.queries * plan.group,
        )
    query = jnp.arange(ROWS, dtype=jnp.int32) // plan.group
    positions = [batch.last_visible]
    if config.window is not None and batch.visible_end is not None:
        positions.append(batch.position)
    row = jnp.minimum(first[:, None] + query, tokens - 1)
    row_positions = jnp.stack([jnp.where(query < count[:, None], x[row], -1) for x in positions])

    # The entries that some row sees.
    live = jnp.arange(table.max_pages_per_seq, dtype=jnp.int32) < table.num_entries[sequence][:, None]
    position = table.position[sequence]
    end = jnp.sum(live & (position <= row_positions[0].max(1)[:, None]), axis=1, dtype=jnp.int32)
    begin = jnp.zeros_like(end)
    if config.window is not None:
        low = batch.position[first] - config.window + 1
        gone = live & (position + table.num_tokens[sequence] <= low[:, None])
        begin = jnp.minimum(jnp.sum(gone, axis=1, dtype=jnp.int32), end)
    frame = batch.rope_positions[first] - batch.position[first]
    layer = jnp.full_like(sequence, first_page)
    items = jnp.stack([sequence, begin * plan.parts, end * plan.parts, frame, layer], axis=1)
    return items, row_positions, first, place


def _pack_queries(q: Array, first: Array, plan: Plan) -> Array:
    """``[terms, KV, I * item_rows + 64, D]`` of ``q [T, Hq, D]``: the rows of an item lie together,
    a query's heads side by side, and behind every item there are the 64 rows that one copy brings."""
    tokens, num_q_heads, head_dim = q.shape
    q = q.reshape(tokens, num_q_heads // plan.group, plan.group, head_dim)
    if plan.single:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, plan.item_rows - plan.group), (0, 0)))
        rows = q.swapaxes(0, 1).reshape(q.shape[1], -1, head_dim)
    else:
        row = jnp.arange(ROWS, dtype=jnp.int32)
        token = jnp.minimum(first[:, None] + row // plan.group, tokens - 1)
        # Indices on both sides of a slice: [I, 64, KV, D].
        rows = q[token, :, row % plan.group].reshape(-1, q.shape[1], head_dim).swapaxes(0, 1)
    rows = jnp.pad(rows, ((0, 0), (0, ROWS), (0, 0)))
    if plan.terms == 1:
        return rows.astype(plan.dtype)[None]
    # Not split_terms: XLA may leave out a conversion there and back (xla_allow_excess_precision, on by default), after
    # which nothing is left for the second term. Seen on an H100: errors of 0.01 instead of 1e-5.
    finfo = jnp.finfo(plan.dtype)
    terms, left = [], rows.astype(jnp.float32)
    for _ in range(plan.terms):
        term = lax.reduce_precision(left, exponent_bits=finfo.nexp, mantissa_bits=finfo.nmant)
        terms.append(term.astype(plan.dtype))
        left = left - term
    return jnp.stack(terms)


def _quarter_turn(rope: Rope, q: Array) -> Array:
    """q with each pair rotated by 90 degrees, and 0 in other dimensions: rotated by an angle, q is
    then ``cos * q + sin * quarter_turn(q)``, each dimension by itself."""
    one = jnp.ones(rope.phase_step.shape, jnp.float32)
    turned = rope.rotate_by(q, 0 * one, one)
    return jnp.where(jnp.arange(q.shape[-1], dtype=jnp.int32) < rope.rotary_dim, turned, 0).astype(q.dtype)


def _turns_by_dimension(rope: Rope, head_dim: int) -> Array:
    """i32[D]: the turns of each dimension, in units of 2**-32; 0 where it has none."""
    turns = jnp.asarray(rope.phase_step.view("int32"))
    turns = jnp.repeat(turns, 2) if rope.interleaved else jnp.tile(turns, 2)
    return jnp.pad(turns, (0, head_dim - rope.rotary_dim))


def _merge(
    out: Array, lse: Array, place: tuple[Array, Array], batch: Batch, sinks: Array | None, plan: Plan
) -> tuple[Array, Array]:
    """Joins the splits of each item and brings its rows to their queries.

    Args:
      out: f32[splits, I, KV, item_rows, Dv], undefined where nothing was seen.
      lse: f32[splits, I, KV, 64], in base 2; -inf where nothing was seen.
      place: item and row of each query.
    """
    item, row = place
    # To [T, group, splits, KV] and [T, group, splits, KV, D].
    if plan.single:
        lse = lse[..., : plan.group].transpose(1, 3, 0, 2)
        out = out[:, :, :, : plan.group].transpose(1, 3, 0, 2, 4)
    else:
        rows = row[:, None] + jnp.arange(plan.group, dtype=jnp.int32)
        out, lse = (x[:, item[:, None], :, rows] for x in (out, lse))
    valid = batch.valid[:, None, None]
    lse = jnp.where(valid[..., None], lse, -jnp.inf)
    highest = lse.max(2)
    sink = jnp.float32(-jnp.inf)
    if sinks is not None:
        sink = jnp.where(valid, sinks.astype(jnp.float32).reshape(-1, plan.group).T * _LOG2_E, -jnp.inf)
        highest = jnp.maximum(highest, sink)
    base = jnp.where(jnp.isneginf(highest), 0, highest)
    weights = jnp.exp2(lse - base[:, :, None])
    total = weights.sum(2) + jnp.exp2(sink - base)
    seen = total > 0
    safe = jnp.where(seen, total, 1)
    share = (weights / safe[:, :, None])[..., None]
    out = jnp.sum(jnp.where(share > 0, share * out, 0), axis=2).swapaxes(1, 2)
    lse = jnp.where(seen, (base + jnp.log2(safe)) / _LOG2_E, -jnp.inf).swapaxes(1, 2)
    return out.reshape(out.shape[0], -1, out.shape[-1]), lse.reshape(lse.shape[0], -1)
