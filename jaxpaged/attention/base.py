"""Shared by implementations of attention: argument checks, softmax states, loops over ragged
batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from jaxpaged.pages.batch import Batch
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.formats import BlockPages, hadamard_transform, lane_width, tokens_per_row
from jaxpaged.pages.rope import Rope

Pages = Array | BlockPages
"""Keys or values: a page array, or quantized pages; of one layer, or of several joined along the
first axis."""

_LOWEST = -1e30
"""Where a running maximum starts: finite, so that no difference of two maxima is NaN."""


@dataclass(frozen=True)
class Config:
    """Static parameters of an attention."""

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    v_head_dim: int | None = None
    """Numbers of a head of values, where they are not as many as those of keys."""

    def width_of_values(self, head_dim: int) -> int:
        """Numbers of a head of values, beside keys of ``head_dim``."""
        return head_dim if self.v_head_dim is None else self.v_head_dim


# --- checks -------------------------------------------------------------------------------------------------


def make_config(
    head_dim: int,
    scale: float | None,
    window: int | None,
    soft_cap: float | None,
    v_head_dim: int | None = None,
) -> Config:
    """Checks the scalars of an attention and fills in defaults.

    Raises:
      ValueError: a window below 1, or a soft cap that is not positive.
    """
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap must be positive, got {soft_cap}")
    other = None if v_head_dim == head_dim else v_head_dim
    return Config(head_dim**-0.5 if scale is None else scale, window, soft_cap, other)


def check_queries(
    q: Array, num_kv_heads: int, head_dim: int, batch: Batch, max_seqs: int, sinks: Array | None
) -> None:
    """Checks queries and sinks against the pages and the batch, at trace time.

    Raises:
      ValueError: shapes that do not match; names both.
      TypeError: q or sinks is not floating point, or ``batch.visible_end`` not int32.
    """
    if q.ndim != 3:
        raise ValueError(f"q must be [tokens, q_heads, head_dim], got shape {q.shape}")
    tokens, num_q_heads, dim = q.shape
    for name, array in (("q", q), ("sinks", sinks)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point, got {array.dtype}")
    if dim != head_dim:
        raise ValueError(f"head_dim of q is {dim}, of the cache {head_dim}")
    if num_q_heads == 0 or num_q_heads % num_kv_heads:
        raise ValueError(f"{num_q_heads} query heads are no multiple of {num_kv_heads} KV heads")
    if tokens != batch.num_tokens:
        raise ValueError(f"q has {tokens} tokens, the batch {batch.num_tokens}")
    if batch.max_seqs != max_seqs:
        raise ValueError(f"the batch is made for {batch.max_seqs} sequences, the cache holds {max_seqs}")
    seen = batch.visible_end
    if seen is not None and seen.shape != (tokens,):
        raise ValueError(f"batch.visible_end must have shape {(tokens,)}, one for each row, got {seen.shape}")
    if seen is not None and seen.dtype != jnp.int32:
        raise TypeError(f"batch.visible_end must be int32, got {seen.dtype}")
    if sinks is not None and sinks.shape != (num_q_heads,):
        raise ValueError(
            f"sinks must have shape {(num_q_heads,)}, one for each query head, got {sinks.shape}"
        )


def check_pages(k_pages: Pages, v_pages: Pages, table: BlockTable) -> None:
    """Checks pages and block table, at trace time.

    Raises:
      ValueError: shapes that do not match; names both.
      TypeError: pages are not floating point.
    """
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if len(pages.shape) != 4:
            raise ValueError(
                f"{name} must be [pages, kv_heads, page_size, head_dim], got shape {pages.shape}"
            )
        if 0 in pages.shape:
            raise ValueError(f"no size of {name} may be zero, got shape {pages.shape}")
        if not isinstance(pages, BlockPages) and not jnp.issubdtype(pages.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point, got {pages.dtype}")
    if k_pages.shape[:2] != v_pages.shape[:2]:
        raise ValueError(f"k_pages {k_pages.shape} and v_pages {v_pages.shape} must be alike")
    shape = table.pages.shape
    for name in ("first_slot", "num_tokens", "position", "rotation"):
        if getattr(table, name).shape != shape:
            raise ValueError(f"table.{name} has shape {getattr(table, name).shape}, table.pages {shape}")
    if table.num_entries.shape != shape[:1]:
        raise ValueError(f"table.num_entries has shape {table.num_entries.shape}, table.pages {shape}")


def check_values(k_pages: Pages, v_pages: Pages, head_dim: int, v_head_dim: int | None) -> int:
    """Numbers of a head of values: ``v_head_dim``, or what the pages say.

    Pages of values that lie as those of keys do have heads of the same size. Padding cannot be told
    from numbers: heads that are padded in a TPU's layout, next to keys of another size, need
    ``v_head_dim``.

    Raises:
      ValueError: pages of keys and of values do not have as many tokens; names both.
    """
    page_size = _page_size(k_pages, head_dim)
    if v_head_dim is None:
        alike = _page_size(v_pages, head_dim) == page_size
        v_head_dim = head_dim if alike else _least_width(v_pages, page_size)
    if v_head_dim < 1 or page_size is None or _page_size(v_pages, v_head_dim) != page_size:
        said = "" if v_head_dim == head_dim else f" but for heads of {head_dim} and {v_head_dim} numbers"
        raise ValueError(f"k_pages {k_pages.shape} and v_pages {v_pages.shape} must be alike{said}")
    return v_head_dim


def _page_size(pages: Pages, head_dim: int) -> int | None:
    """Tokens of a page, if its heads are of ``head_dim``: plain, quantized, or in a TPU's layout; else None."""
    rows, width = pages.shape[2:]
    if width == head_dim:
        return rows
    if isinstance(pages, BlockPages) or width != lane_width(head_dim):
        return None
    return rows * tokens_per_row(width, head_dim)


def _least_width(pages: Pages, page_size: int | None) -> int:
    """Numbers of a head where pages have ``page_size`` tokens."""
    rows, width = pages.shape[2:]
    if page_size is None or rows >= page_size:
        return width
    return width * rows // page_size


def compute_dtype(pages: Pages) -> DTypeLike:
    """Dtype for products with these pages: quantized numbers have about the precision of bfloat16."""
    if isinstance(pages, BlockPages) or pages.dtype.itemsize == 1:
        return jnp.bfloat16
    return pages.dtype


def has_hadamard(pages: Pages) -> bool:
    """True if rows are stored Hadamard-transformed (``formats.hadamard``)."""
    return isinstance(pages, BlockPages) and pages.format.hadamard


def described(pages: Pages) -> str:
    """Format and shape of pages, for messages."""
    kind = pages.format.name if isinstance(pages, BlockPages) else str(pages.dtype)
    return f"{kind}{pages.shape}"


def check_rope(rope: Rope | None, head_dim: int) -> None:
    """Checks a rotary embedding against the heads it rotates, at trace time.

    Raises:
      ValueError: it rotates more dimensions than a head has.
    """
    if rope is not None and rope.rotary_dim > head_dim:
        raise ValueError(f"rope rotates {rope.rotary_dim} dimensions, a head has {head_dim}")


# --- softmax states -----------------------------------------------------------------------------------------


_SHORT_STEP = 32
"""Number of tokens in a step up to which a block of queries costs little more than a single query."""


class SoftmaxState(NamedTuple):
    """Partial softmax-weighted sum (online softmax, arXiv:1805.02867)."""

    maximum: Array
    """f32[..., R]: largest score so far."""
    denominator: Array
    """f32[..., R]: sum of exp(score - maximum)."""
    weighted: Array
    """f32[..., R, D]: sum of exp(score - maximum) * value."""


def empty_state(shape: tuple[int, ...], head_dim: int) -> SoftmaxState:
    """State before the first key."""
    return SoftmaxState(
        jnp.full(shape, _LOWEST, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )


def update_state(
    state: SoftmaxState, q: Array, k: Array, v: Array, visible: Array, config: Config
) -> SoftmaxState:
    """Adds keys and values to a state.

    Args:
      state: of shape [W, KV, R].
      q: [W, KV, R, D]; k: [W, KV, C, D]; v: [W, KV, C, Dv]; of one dtype. v is finite where it is not
        visible.
      visible: bool[W, 1 or R, C].
      config: scale and soft cap.
    """
    scores = config.scale * jnp.einsum("wkrd,wkcd->wkrc", q, k, preferred_element_type=jnp.float32)
    if config.soft_cap is not None:
        scores = config.soft_cap * jnp.tanh(scores / config.soft_cap)
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    maximum = jnp.maximum(state.maximum, scores.max(-1))
    rescale = jnp.exp(state.maximum - maximum)
    weights = jnp.exp(scores - maximum[..., None])
    weighted = jnp.einsum("wkrc,wkcd->wkrd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return SoftmaxState(
        maximum,
        state.denominator * rescale + weights.sum(-1),
        state.weighted * rescale[..., None] + weighted,
    )


def finish_state(state: SoftmaxState, sinks: Array | None) -> tuple[Array, Array]:
    """``(out f32[..., R, D], lse f32[..., R])`` of a state; zeros and -inf where no key was seen.

    Args:
      state: the finished sums.
      sinks: f32[..., R] or None: an additional score that joins the denominator and has no value.
        It is included in lse, so that partial results merge exactly if one of them was given the
        sink.
    """
    maximum, denominator, weighted = state
    if sinks is not None:
        maximum = jnp.maximum(state.maximum, sinks)
        rescale = jnp.exp(state.maximum - maximum)
        denominator = denominator * rescale + jnp.exp(sinks - maximum)
        weighted = weighted * rescale[..., None]
    seen = denominator > 0
    safe = jnp.where(seen, denominator, 1)
    return weighted / safe[..., None], jnp.where(seen, maximum + jnp.log(safe), -jnp.inf)


def merge_states(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """Attention over two disjoint sets of keys, from the attention over each.

    ``lse = log(exp(lse_a) + exp(lse_b))``, ``out = exp(lse_a - lse) out_a + exp(lse_b - lse)
    out_b``: associative and commutative; a side without keys (lse = -inf) is neutral.

    Args:
      out_a, out_b: [..., head_dim].
      lse_a, lse_b: f32[...], logarithm of each side's softmax denominator.

    Returns:
      ``(out, lse)``, out in the dtype of out_a.

    Reference: FlashInfer's cascade inference; arXiv:2501.01005.
    """
    lse = jnp.logaddexp(lse_a, lse_b)
    base = jnp.where(jnp.isneginf(lse), 0.0, lse)  # -inf minus -inf would be NaN
    weight_a, weight_b = (jnp.exp(x - base)[..., None] for x in (lse_a, lse_b))
    out = weight_a * out_a.astype(jnp.float32) + weight_b * out_b.astype(jnp.float32)
    return out.astype(out_a.dtype), lse


# --- loops over ragged batches ---------------------------------------------------------------------------------------


NOWHERE = np.iinfo(np.int32).max
"""Position of a slot without a token: behind every query."""


class Source(NamedTuple):
    """Access to the keys and values of a sequence, in units: entries of a block table, or chunks."""

    span: Callable[[Array, Array | None, Array | None], tuple[Array, Array]]
    """``(sequence i32[W], low i32[W], high i32[W]) -> (begin, end) i32[W]``: range of units with
    the tokens at positions low .. high; None = no bound."""
    positions: Callable[[Array, Array, Array], Array]
    """``(sequence i32[W], unit i32[W], end i32[W]) -> i32[W, C]``: logical positions of the tokens
    in the ``stride`` units from ``unit`` on; NOWHERE where there is none, and from unit ``end`` on."""
    load: Callable[[Array, Array, Array], tuple[Array, Array]]
    """``(sequence i32[W], unit i32[W], positions i32[W, C]) -> (k, v)``, ``[W, KV, C, D]`` each:
    keys and values of those units, of values Dv numbers; v is finite everywhere."""
    stride: int
    rotation_run: Callable[[Array, Array, Array], tuple[Array, Array]] | None = None
    """``(sequence i32[W], unit i32[W], end i32[W]) -> (rotation i32[W], stop i32[W])``: rotation
    offset of the keys of ``unit``, and the first unit after it with another offset, or ``end``.
    None = keys are never shifted."""
    hadamard: bool = False
    """True if keys are stored Hadamard-transformed (``formats.hadamard``), so that queries are
    transformed too."""


class Tiling(NamedTuple):
    """Block sizes; sequences with one query are one pass, those with more another."""

    decode_width: int
    """Number of sequences with one query that are computed together."""
    rows: int
    """Queries of a block, for sequences with several queries."""
    width: int
    """Number of blocks that are computed together."""


def ragged_attention(
    q: Array,
    batch: Batch,
    source: Source,
    num_kv_heads: int,
    config: Config,
    sinks: Array | None,
    tiling: Tiling,
    dtype: jnp.dtype,
    rope: Rope | None = None,
) -> tuple[Array, Array]:
    """Attention of a step's queries to the keys of ``source``; ``(out [T, Hq, Dv], lse f32[T,
    Hq])``.

    Two passes, over the sequences with one query and over blocks of those with more. Both are loops
    with dynamic trip counts, over blocks and over the chunks that a block sees: an empty pass costs
    nothing, and the cost depends on live tokens only.

    Args:
      q: [T, Hq, D].
      batch: sequence and position of each query.
      source: keys and values.
      num_kv_heads: KV; Hq is a multiple.
      config: scale, window, soft cap, Dv.
      sinks: f32[Hq] or None.
      tiling: block sizes.
      dtype: dtype of q in products.
      rope: rotates queries to the rotation offset of keys; None = keys are never shifted.
    """
    tokens = q.shape[0]
    shape = *q.shape[:2], config.width_of_values(q.shape[2])
    state = jnp.zeros(shape, jnp.float32), jnp.full(q.shape[:2], -jnp.inf, jnp.float32)
    q = q.astype(dtype)
    single = batch.q_lens == 1
    if tokens == 1 or batch.max_q_len == 1:
        passes = [(single.astype(jnp.int32), 1, tiling.decode_width)]
    elif batch.max_seqs == 1 or batch.max_seqs < tokens <= _SHORT_STEP:
        # Few single queries, if any: as blocks they cost little more, and one pass compiles in half the time.
        passes = [(-(-batch.q_lens // tiling.rows), tiling.rows, tiling.width)]
    else:
        blocks = jnp.where(single, 0, -(-batch.q_lens // tiling.rows))
        passes = [
            (single.astype(jnp.int32), 1, tiling.decode_width),
            (blocks, tiling.rows, tiling.width),
        ]
    for blocks, rows, width in passes:
        state = _block_pass(
            state, q, batch, source, num_kv_heads, config, sinks, blocks, rows, width, dtype, rope
        )
    return state


def _block_pass(
    state: tuple[Array, Array],
    q: Array,
    batch: Batch,
    source: Source,
    num_kv_heads: int,
    config: Config,
    sinks: Array | None,
    blocks: Array,
    rows: int,
    width: int,
    dtype: jnp.dtype,
    rope: Rope | None,
) -> tuple[Array, Array]:
    """Computes ``blocks[s]`` blocks of ``rows`` queries of each sequence s, ``width`` blocks at a
    time."""
    tokens, num_q_heads, head_dim = q.shape
    v_head_dim = config.width_of_values(head_dim)
    group = num_q_heads // num_kv_heads
    ends = jnp.cumsum(blocks, dtype=jnp.int32)
    if sinks is not None:
        sinks = jnp.tile(sinks.astype(jnp.float32).reshape(num_kv_heads, group), (1, rows))

    def step(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        block = i * width + jnp.arange(width, dtype=jnp.int32)
        sequence = jnp.sum(ends <= block[:, None], axis=1, dtype=jnp.int32)  # S where there is no more block
        sequence, exists = jnp.minimum(sequence, batch.max_seqs - 1), sequence < batch.max_seqs
        first = batch.cu_q_lens[sequence] + rows * (block - ends[sequence] + blocks[sequence])
        row = first[:, None] + jnp.arange(rows, dtype=jnp.int32)
        row = jnp.where(exists[:, None] & (row < batch.cu_q_lens[sequence + 1][:, None]), row, tokens)
        low = high = None
        if config.window is not None:
            low = batch.position.at[jnp.minimum(first, tokens - 1)].get(mode="clip")
            low = jnp.maximum(low - config.window + 1, 0)
        if rows > 1:  # a single query is its sequence's last token, and sees to the end
            if batch.visible_end is None:
                high = batch.position[jnp.max(jnp.where(row < tokens, row, 0), axis=1)]
            else:
                high = jnp.max(batch.last_visible.at[row].get(mode="fill", fill_value=-1), axis=1)
        position = batch.position.at[row].get(mode="fill", fill_value=-1)

        begin, end = source.span(sequence, low, high)
        end = jnp.where(exists, end, begin)
        qs = q.at[row].get(mode="clip").reshape(width, rows, num_kv_heads, group, head_dim)
        qs = qs.transpose(0, 2, 1, 3, 4).reshape(width, num_kv_heads, rows * group, head_dim)

        def by_row(x: Array) -> Array:
            return jnp.repeat(x, group, axis=1) if rows > 1 else x

        position_of_row = last_visible = by_row(position)
        if batch.visible_end is not None:
            last_visible = by_row(batch.last_visible.at[row].get(mode="fill", fill_value=-1))

        def attend_run(softmax: SoftmaxState, qs: Array, unit: Array, stop: Array) -> SoftmaxState:
            """Adds the keys of the units ``unit .. stop``, which share a rotation offset."""

            def add(j: Array, carry: tuple[SoftmaxState, Array]) -> tuple[SoftmaxState, Array]:
                softmax, key_position = carry
                here = unit + j * source.stride
                k, v = source.load(sequence, here, key_position)
                visible = key_position[:, None] <= last_visible[..., None]
                if config.window is not None:
                    visible &= key_position[:, None] > position_of_row[..., None] - config.window
                # Positions are carried from the step before: XLA:CPU would otherwise recompute them, table lookups
                # included, for every score, a fifth of the time of prefill attention.
                return (
                    update_state(softmax, qs, k, v, visible, config),
                    source.positions(sequence, here + source.stride, stop),
                )

            trips = jnp.max(-(-(stop - unit) // source.stride))
            return lax.fori_loop(0, trips, add, (softmax, source.positions(sequence, unit, stop)))[0]

        def transformed(qs: Array) -> Array:
            return hadamard_transform(qs).astype(dtype) if source.hadamard else qs

        softmax = empty_state((width, num_kv_heads, rows * group), v_head_dim)
        rotation_run, transformed_qs = source.rotation_run, transformed(qs)
        if rope is None or rotation_run is None:
            softmax = attend_run(softmax, transformed_qs, begin, end)
        else:
            # A query has the rotation offset of its own key. Rotated by the difference to another key's offset, the
            # angle between the two is the difference of their logical positions.
            own = batch.rope_positions.at[row].get(mode="clip") - batch.position.at[row].get(mode="clip")
            own = jnp.repeat(own, group, axis=1)

            def attend_rotation(carry: tuple[Array, SoftmaxState]) -> tuple[Array, SoftmaxState]:
                unit, softmax = carry
                rotation, stop = rotation_run(sequence, unit, end)
                difference = rotation[:, None] - own

                def rotated() -> Array:
                    cos, sin = rope.cos_sin(difference)
                    return transformed(rope.rotate_by(qs, cos[:, None], sin[:, None]))

                rotated_qs = lax.cond(jnp.any(difference != 0), rotated, lambda: transformed_qs)
                return stop, attend_run(softmax, rotated_qs, unit, stop)

            _, softmax = lax.while_loop(
                lambda carry: jnp.any(carry[0] < end), attend_rotation, (begin, softmax)
            )
        out, lse = finish_state(softmax, sinks)
        out = out.reshape(width, num_kv_heads, rows, group, v_head_dim).transpose(0, 2, 1, 3, 4)
        lse = lse.reshape(width, num_kv_heads, rows, group).transpose(0, 2, 1, 3)
        return (
            state[0].at[row].set(out.reshape(width, rows, num_q_heads, v_head_dim), mode="drop"),
            state[1].at[row].set(lse.reshape(width, rows, num_q_heads), mode="drop"),
        )

    return jax.lax.fori_loop(0, -(-ends[-1] // width), step, state)


def power_of_two(n: int) -> int:
    """Smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()
