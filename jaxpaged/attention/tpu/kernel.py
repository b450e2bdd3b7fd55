"""The TPU kernel itself: the stream of K/V blocks, and what is computed with each.

``mosaic_tpu`` says what it does and prepares what it reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxpaged.attention.base import NOWHERE, Config
from jaxpaged.attention.tpu.block_sizes import SLOTS_SHIFT, Heads, Items, Storage, Stored
from jaxpaged.pages.formats import LANES
from jaxpaged.pages.formats.ggml import BLOCK
from jaxpaged.pages.formats.lane_blocks import LaneBlockFormat, half_to_float

_LOWEST = -1e30
"""Where a running maximum starts: finite, so that no difference of two maxima is NaN."""
_LOG2_E = math.log2(math.e)
_ITEM_FIELDS = len(Items._fields)


class Side(NamedTuple):
    """Keys or values: where their pages are, and where those of a K/V block go."""

    storage: Storage
    lanes: int
    """Numbers of a row."""
    pools: Sequence[Any]
    """In HBM, the parts of pages ``[N, ...]``: numbers, or codes and scales."""
    buffers: Sequence[Any]
    """In VMEM, two of each: numbers ``[2, KV, rows of pages, lanes]``, or codes, in pieces of 128 lanes, and
    scales ``[2, pages, ...]``."""
    scales: Any
    """The scales of the block at hand, see ``tpu_blocks.scales_shape``."""

    @property
    def quantized(self) -> bool:
        return isinstance(self.storage, LaneBlockFormat)

    @property
    def blocks(self) -> int:
        """Quantized blocks of a row."""
        return self.lanes // BLOCK

    def part_of_block(self, packed: int) -> list[int]:
        """For each quantized block of a row the part of the packing that it belongs to."""
        return [block * packed // self.blocks for block in range(self.blocks)]

    @classmethod
    def both(
        cls, stored: Stored, heads: Heads, pools: Sequence[Any], buffers: Sequence[Any], scales: Any
    ) -> tuple[Side, Side]:
        first = 1 + stored.quantized[0]  # parts of keys
        v_scales = scales.at[scales.shape[0] - 1]
        return (
            cls(stored.k, heads.lanes, pools[:first], buffers[:first], scales.at[0]),
            cls(stored.v, heads.v_lanes, pools[first:], buffers[first:], v_scales),
        )


@dataclass(frozen=True)
class Cut:
    """The static sizes of one call."""

    heads: Heads
    config: Config
    pages: int
    """Pages of a K/V block."""
    queries: int
    """Queries of a block."""
    num_items: int
    """Length of the list; how many of them there are is known on the device."""
    dtype: np.dtype
    """Dtype of the factors of products."""
    stored: Stored

    @property
    def rows(self) -> int:
        """Rows of a block's queries, for each KV head."""
        return self.heads.packed * self.width

    @property
    def width(self) -> int:
        """Rows of one part of the packing."""
        return self.stored.rows(self.heads, self.queries)

    @property
    def split(self) -> bool:
        return self.stored.split(self.heads, self.queries)

    @property
    def columns(self) -> int:
        """Rows of a K/V block, columns of its scores."""
        return self.pages * self.heads.page_rows

    @property
    def heads_at_once(self) -> int:
        """KV heads whose products may overlap; more would only make the program longer."""
        most = 8 if self.rows <= 32 and not any(self.stored.quantized) else 2
        return max(n for n in range(1, most + 1) if self.heads.num_kv_heads % n == 0)


def kernel(*refs: Any, cut: Cut, rotated: bool, has_window_start: bool) -> None:
    """Computes one item, the one of this step of the grid; the first step also starts the stream.

    Args:
      refs: in the order of ``mosaic_tpu``'s call: how many items there are, and the layer's first
        page; the fields of ``Items``; blocks of queries and of the last positions that they see, with
        ``has_window_start`` also of their own positions, with ``rotated`` also of their rotations,
        and what turns them; the packed table and the parts of pages, in HBM; blocks of the outputs;
        scratch.
      cut: the static sizes.
      rotated: True if entries may have rotations.
      has_window_start: True if a window begins at another position than the last one seen.
    """
    scalars, *refs_of_items = refs[: 1 + _ITEM_FIELDS]
    items = Items(*refs_of_items)
    q_ref, last_visible_ref, *rest = refs[1 + _ITEM_FIELDS :]
    if has_window_start:
        position_ref, *rest = rest
    if rotated:
        own_ref, turns_ref, partner_ref, *rest = rest
        if cut.stored.turned:
            hadamard_ref, *rest = rest
    heads, pages, num_parts = cut.heads, cut.pages, len(cut.stored.parts(cut.heads))
    (table_hbm, *pools), (out_ref, lse_ref, *buffers), rest = (
        rest[: 1 + num_parts],
        rest[1 + num_parts : 3 + 2 * num_parts],
        rest[3 + 2 * num_parts :],
    )
    scales_ref, max_ref, sum_ref, weighted_ref, column_ref, turned_ref, *rest = rest
    entries, state, table_arrived, pages_arrived = rest
    sides = k_side, v_side = Side.both(cut.stored, heads, pools, buffers, scales_ref)
    page_rows, packed = heads.page_rows, heads.packed
    item = pl.program_id(0)

    # --- the stream of K/V blocks: their order, and their DMAs

    def first_chunk(i: Array) -> Array:
        return items.first_entry[i] // pages

    def end_chunk(i: Array) -> Array:
        """End of an item's chunks; an item that sees nothing has one chunk without live entries."""
        return jnp.maximum(pl.cdiv(items.end_entry[i], pages), first_chunk(i) + 1)

    def following(i: Array, chunk: Array) -> tuple[Array, Array]:
        last = chunk + 1 >= end_chunk(i)
        after = jnp.minimum(i + 1, cut.num_items - 1)
        return jnp.where(last, i + 1, i), jnp.where(last, first_chunk(after), chunk + 1)

    def live(i: Array, chunk: Array) -> tuple[Array, Array]:
        """The entries of a chunk, ``begin .. end`` of its pages, that the item sees."""
        begin, end = items.first_entry[i] - chunk * pages, items.end_entry[i] - chunk * pages
        return jnp.clip(begin, 0, pages), jnp.clip(end, 0, pages)

    def fetch_entries(i: Array, chunk: Array, number: Array) -> Any:
        slot = lax.rem(number, 3)
        return pltpu.make_async_copy(
            table_hbm.at[items.sequence[i], chunk], entries.at[slot], table_arrived.at[slot]
        )

    def field(number: Array, name: int, k: Any) -> Array:
        return entries[lax.rem(number, 3), 0, name * pages + k]

    def fetch_page(number: Array, k: Array, page: Array) -> list[Any]:
        slot = _buffer_of(number)
        copies = []
        for pool, buffer in zip(pools, buffers, strict=True):
            target = buffer.at[slot, k]
            if len(pool.shape) == 4:  # rows of each head, among those of the other pages
                rows = pool.shape[2]
                target = buffer.at[slot, :, pl.ds(pl.multiple_of(k * rows, rows), rows)]
            copies.append(pltpu.make_async_copy(pool.at[page], target, pages_arrived.at[slot]))
        return copies

    def start_pages(i: Array, chunk: Array, number: Array) -> None:
        def start(k: Array, _: None) -> None:
            page = jnp.minimum(scalars[1] + field(number, 0, k), pools[0].shape[0] - 1)
            for copy in fetch_page(number, k, page):
                copy.start()

        lax.fori_loop(*live(i, chunk), start, None)

    def wait_for_pages(i: Array, chunk: Array, number: Array) -> None:
        slot = _buffer_of(number)
        begin, end = live(i, chunk)
        whole = end - begin == pages

        @pl.when(whole)
        def wait_once() -> None:
            # A wait is for as many bytes as arrive: one for all pages.
            for buffer in buffers:
                pltpu.make_async_copy(buffer.at[slot], buffer.at[slot], pages_arrived.at[slot]).wait()

        def wait(k: Array, _: None) -> None:
            for copy in fetch_page(number, k, jnp.int32(0)):
                copy.wait()

        lax.fori_loop(begin, jnp.where(whole, begin, end), wait, None)

    @pl.when(item == 0)
    def begin_stream() -> None:
        state[0] = 0
        chunk = first_chunk(item)
        now = fetch_entries(item, chunk, jnp.int32(0))
        now.start()
        i, after = following(item, chunk)

        @pl.when(i < scalars[0])
        def second() -> None:
            fetch_entries(i, after, jnp.int32(1)).start()

        now.wait()
        start_pages(item, chunk, jnp.int32(0))

    # --- one K/V block

    def slots_of(number: Array, k: Any, begin: Array, end: Array) -> tuple[Array, Array]:
        """First slot of an entry and the first behind it; none where it is not one of ``begin ..
        end``."""
        word = field(number, 1, k)
        first = word & ((1 << SLOTS_SHIFT) - 1)
        seen = (k >= begin) & (k < end)
        return first, jnp.where(seen, first + (word >> SLOTS_SHIFT), first)

    def zero_unused_slots(number: Array, begin: Array, end: Array) -> None:
        """Makes V zero where there is no token: a weight of 0 times NaN would be NaN.

        So is K where tokens share a row, of which a query's zeros meet the other's. Only pages that
        are partly used are touched, mostly a sequence's last one. Quantized numbers are finite,
        whatever lies there.
        """
        touched = (v_side, k_side) if packed > 1 else (v_side,)
        buffers = [side.buffers[0] for side in touched if not side.quantized]
        if not buffers:
            return
        unit = max(page_rows, *(32 // buffer.dtype.itemsize for buffer in buffers))  # rows of whole tiles
        slot = _buffer_of(number)
        shape = 1, unit, heads.v_lanes  # that of keys too, where tokens share a row
        row, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 2))
        token = row % page_rows * packed + lane // heads.head_dim if packed > 1 else row % page_rows

        def clean(j: Array, _: None) -> None:
            spans = [
                slots_of(number, j * (unit // page_rows) + n, begin, end) for n in range(unit // page_rows)
            ]
            whole = jnp.bool_(True)
            for first, behind in spans:
                whole &= behind - first == heads.page_size

            @pl.when(jnp.logical_not(whole))
            def zero() -> None:
                low, high = (jnp.full(row.shape, bound, jnp.int32) for bound in spans[0])
                for n, (first, behind) in enumerate(spans[1:], 1):
                    here = row >= n * page_rows
                    low, high = jnp.where(here, first, low), jnp.where(here, behind, high)
                used = (token >= low) & (token < high)
                where = slot, slice(None), pl.ds(pl.multiple_of(j * unit, unit), unit)
                for buffer in buffers:
                    # Selected as 32 bits, as the mask is.
                    values = buffer[where].astype(jnp.float32)
                    buffer[where] = jnp.where(used, values, 0).astype(buffer.dtype)

        lax.fori_loop(0, cut.columns // unit, clean, None)

    def key_positions(number: Array, begin: Array, end: Array) -> Array:
        """i32[1 or rows, columns]: position of each key, NOWHERE where there is none."""
        pieces = []
        lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        part: Array | int = 0
        if packed > 1:
            part = lax.broadcasted_iota(jnp.int32, (cut.rows, LANES), 0) // cut.width
        for start in range(0, cut.columns, LANES):
            first = behind = base = jnp.zeros(lane.shape, jnp.int32)
            for k in range(start // page_rows, pl.cdiv(start + LANES, page_rows)):
                here = lane >= k * page_rows - start
                first_k, behind_k = slots_of(number, k, begin, end)
                base_k = field(number, 2, k) - first_k
                first, behind, base = (
                    jnp.where(here, new, old)
                    for new, old in ((first_k, first), (behind_k, behind), (base_k, base))
                )
            token = (lane + start) % page_rows * packed + part
            pieces.append(jnp.where((token >= first) & (token < behind), base + token, NOWHERE))
        return jnp.concatenate(pieces, axis=1)

    def gather_scales(number: Array) -> None:
        """Brings the scales of a block's pages to the columns of its scores."""

        def some(column: Array, _: None) -> None:
            for side in sides:
                if side.quantized:
                    _gather_scales(side.buffers[1].at[_buffer_of(number)], side.scales, column, cut)

        lax.fori_loop(0, cut.columns // LANES, some, None)

    def products_with_keys(slot: Array, h: Any, queries: Array) -> Array:
        """f32[rows, columns]: ``queries [rows, lanes]`` times the keys of a head."""
        if not k_side.quantized or not cut.split:
            return _dot(queries, _load(k_side, slot, h, cut), (1, 1))
        products = _dot(_by_block(queries, k_side, cut), _load(k_side, slot, h, cut), (1, 1))
        sums: list[Any] = [0] * packed
        for block, part in enumerate(k_side.part_of_block(packed)):
            scales = k_side.scales[pl.ds(h * k_side.blocks + block, 1)]
            sums[part] += products[block * cut.width : (block + 1) * cut.width] * scales
        return jnp.concatenate(sums, axis=0)

    def weighted_values(slot: Array, h: Any, weights: Array) -> Array:
        """f32[rows, lanes]: ``weights [rows, columns]`` times the values of a head."""
        if not v_side.quantized or not cut.split:
            return _dot(weights.astype(cut.dtype), _load(v_side, slot, h, cut), (1, 0))
        scaled = [
            weights[part * cut.width : (part + 1) * cut.width]
            * v_side.scales[pl.ds(h * v_side.blocks + block, 1)]
            for block, part in enumerate(v_side.part_of_block(packed))
        ]
        products = _dot(
            jnp.concatenate(scaled, axis=0).astype(cut.dtype), _load(v_side, slot, h, cut), (1, 0)
        )
        return _from_blocks(products, v_side, cut)

    def attend(number: Array, begin: Array, end: Array) -> None:
        """Adds the keys of the entries ``begin .. end`` of a block to the sums."""
        slot = _buffer_of(number)
        key_position = key_positions(number, begin, end)
        last_visible = column_ref[0]
        query_position = column_ref[2] if has_window_start else last_visible
        queries = turned_ref if rotated else q_ref.at[0]
        scale = cut.config.scale * _LOG2_E

        def one_head(h: Any) -> None:
            scores = products_with_keys(slot, h, queries[h])
            if cut.config.soft_cap is None:
                scores *= scale
            else:
                cap = cut.config.soft_cap
                scores = cap * _LOG2_E * jnp.tanh(scores * (cut.config.scale / cap))
            visible = key_position <= last_visible
            if cut.config.window is not None:
                visible &= key_position > query_position - cut.config.window
            scores = jnp.where(visible, scores, -jnp.inf)
            before = max_ref[h]
            maximum = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
            rescale = jnp.exp2(before - maximum)
            weights = jnp.exp2(scores - _widened(maximum, cut.columns))
            max_ref[h] = maximum
            sum_ref[h] = sum_ref[h] * rescale + jnp.sum(weights, axis=1, keepdims=True)
            weighted_ref[h] = weighted_ref[h] * _widened(rescale, heads.v_lanes) + weighted_values(
                slot, h, weights
            )

        _over_heads(heads.num_kv_heads, cut.heads_at_once, one_head)

    def rotate_queries(rotation: Array) -> None:
        """Rotates the queries from the offset of their own keys to ``rotation``, if it differs."""

        @pl.when((state[1] == 0) | (state[2] != rotation))
        def turn() -> None:
            state[1], state[2] = 1, rotation
            same = (items.own_low[item] == rotation) & (items.own_high[item] == rotation)

            @pl.when(same)
            def copy() -> None:
                turned_ref[...] = q_ref[0]

            @pl.when(jnp.logical_not(same))
            def turn_all() -> None:
                # Turns wrap as integers do, see Rope.phase_step.
                angle = (rotation - column_ref[1]) * turns_ref[...]
                radians = angle.astype(jnp.float32) * np.float32(2 * np.pi / 2**32)
                cos, sin = jnp.cos(radians), jnp.sin(radians)

                def one_head(h: Any) -> None:
                    x = q_ref[0, h].astype(jnp.float32)
                    if cut.stored.turned:  # its own inverse; queries turn as rotations know them
                        x = _dot(x, hadamard_ref[...], (1, 0))
                    x = x * cos + _dot(x, partner_ref[...], (1, 0)) * sin
                    if cut.stored.turned:
                        x = _dot(x, hadamard_ref[...], (1, 0))
                    turned_ref[h] = x.astype(cut.dtype)

                _over_heads(heads.num_kv_heads, 1, one_head)

    def attend_by_frame(number: Array, begin: Array, end: Array) -> None:
        """Runs of entries of one rotation, one after the other; mostly there is one."""

        def run(start: Array) -> Array:
            rotation = field(number, 3, start)

            def same(k: Array) -> Array:
                return (k < end) & (field(number, 3, jnp.minimum(k, pages - 1)) == rotation)

            stop = lax.while_loop(same, lambda k: k + 1, start + 1)
            rotate_queries(rotation)
            attend(number, start, stop)
            return stop

        lax.while_loop(lambda start: start < end, run, begin)

    # --- one item

    column_ref[0] = _column(last_visible_ref[0])
    if has_window_start:
        column_ref[2] = _column(position_ref[0])
    if rotated:
        column_ref[1] = _column(own_ref[0])
        state[1] = 0
    max_ref[...] = jnp.full(max_ref.shape, _LOWEST, jnp.float32)
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
    weighted_ref[...] = jnp.zeros(weighted_ref.shape, jnp.float32)

    def step(chunk: Array, _: None) -> None:
        number = state[0]
        i_1, chunk_1 = following(item, chunk)
        i_2, chunk_2 = following(jnp.minimum(i_1, cut.num_items - 1), chunk_1)

        @pl.when((i_1 < scalars[0]) & (i_2 < scalars[0]))
        def two_ahead() -> None:
            fetch_entries(i_2, chunk_2, number + 2).start()

        @pl.when(i_1 < scalars[0])
        def one_ahead() -> None:
            fetch_entries(i_1, chunk_1, number + 1).wait()
            start_pages(i_1, chunk_1, number + 1)

        wait_for_pages(item, chunk, number)
        begin, end = live(item, chunk)
        zero_unused_slots(number, begin, end)
        gather_scales(number)
        (attend_by_frame if rotated else attend)(number, begin, end)
        state[0] = number + 1

    lax.fori_loop(first_chunk(item), end_chunk(item), step, None)

    def finish(h: Any) -> None:
        total = sum_ref[h]
        seen = total > 0
        safe = jnp.where(seen, total, 1)
        out = weighted_ref[h] / _widened(safe, heads.v_lanes)
        lse = jnp.where(seen, max_ref[h] / _LOG2_E + jnp.log(safe), -jnp.inf)
        lse = _row(lse)
        if cut.queries > 1:
            # The other rows of the block are other items' or nobody's.
            def mine(shape: tuple[int, ...], axis: int) -> Array:
                row = lax.broadcasted_iota(jnp.int32, shape, axis) % cut.queries
                return (row >= items.first_row[item]) & (row < items.end_row[item])

            out = jnp.where(mine(out.shape, 0), out, out_ref[0, h])
            lse = jnp.where(mine(lse.shape, 1), lse, lse_ref[0, pl.ds(h, 1)])
        out_ref[0, h] = out
        lse_ref[0, pl.ds(h, 1)] = lse

    _over_heads(heads.num_kv_heads, 1, finish)


def _buffer_of(number: Array) -> Array:
    """Index of the buffer (of two) of K/V block ``number``."""
    return lax.rem(number, 2)


def _over_heads(num_kv_heads: int, at_once: int, body: Any) -> None:
    """``body(h)`` for each KV head: a loop, of ``at_once`` heads a step."""

    def step(i: Any, _: None) -> None:
        for n in range(at_once):
            body(i * at_once + n)

    if num_kv_heads == at_once:
        step(0, None)
    else:
        lax.fori_loop(0, num_kv_heads // at_once, step, None)


def _load(side: Side, slot: Array, h: Any, cut: Cut) -> Array:
    """``[columns, lanes]``, keys or values of a head as they are multiplied; their codes, where
    queries are split."""
    if not isinstance(side.storage, LaneBlockFormat):
        return side.buffers[0][slot, h].astype(cut.dtype)
    pieces = side.storage.pieces
    parts = [side.buffers[0][slot, h * pieces + i] for i in range(pieces)]
    numbers = parts[0] if pieces == 1 else jnp.concatenate(parts, axis=1)
    if side.storage.bits == 4:
        numbers = pltpu.bitcast(numbers, jnp.int4)
    if cut.split:
        return numbers.astype(cut.dtype)
    # One scale of each row for every 32 lanes: blocks of all heads lie along the lanes of ``scales``.
    first = h * side.blocks
    scales = side.scales[first // LANES]
    block = lax.broadcasted_iota(jnp.int32, scales.shape, 1) // BLOCK + first % LANES
    factors = [
        jnp.take_along_axis(scales, block + start // BLOCK, axis=1, mode="promise_in_bounds")
        for start in range(0, side.lanes, LANES)
    ]
    return (numbers.astype(jnp.float32) * jnp.concatenate(factors, axis=1)).astype(cut.dtype)


def _by_block(queries: Array, side: Side, cut: Cut) -> Array:
    """``queries [rows, lanes]`` once for each quantized block of their part, with zeros elsewhere."""
    queries = queries.astype(jnp.float32)
    lane = lax.broadcasted_iota(jnp.int32, (cut.width, side.lanes), 1)
    copies = [
        jnp.where(lane // BLOCK == block, queries[part * cut.width : (part + 1) * cut.width], 0)
        for block, part in enumerate(side.part_of_block(cut.heads.packed))
    ]
    return jnp.concatenate(copies, axis=0).astype(cut.dtype)


def _from_blocks(products: Array, side: Side, cut: Cut) -> Array:
    """f32[rows, lanes]: what rows of ``_by_block`` found, each in its block's lanes."""
    lane = lax.broadcasted_iota(jnp.int32, (cut.width, side.lanes), 1)
    parts: list[Any] = [0] * cut.heads.packed
    for block, part in enumerate(side.part_of_block(cut.heads.packed)):
        found = products[block * cut.width : (block + 1) * cut.width]
        parts[part] = jnp.where(lane // BLOCK == block, found, parts[part])
    return jnp.concatenate(parts, axis=0)


def _gather_scales(pages: Any, scales: Any, column: Array, cut: Cut) -> None:
    """Brings the scales of 128 columns, from ``128 * column`` on, to where products meet them.

    Args:
      pages: i16[pages, *, *], ref: as pages have them, see ``page_format.lane_blocks``.
      scales: f32, ref: see ``tpu_blocks.scales_shape``.
      column: which columns.
      cut: the sizes.
    """
    together = LANES // cut.heads.page_rows  # pages of 128 columns
    if together <= 1:
        page, start = column * LANES // cut.heads.page_rows, column * LANES % cut.heads.page_rows
        bits = pages[page, :, pl.ds(pl.multiple_of(start, LANES), LANES)].astype(jnp.int32)
    else:
        # Pages have side by side what belongs below each other, and the other way round: pairs of pages exchange
        # halves of their lanes, then quarters, and so on.
        rows = [pages[column * together + k].astype(jnp.int32) for k in range(together)]
        lane = lax.broadcasted_iota(jnp.int32, rows[0].shape, 1)
        step = 1
        while step < together:
            width = step * cut.heads.page_rows
            right = lane & width != 0
            for k in range(together):
                if k & step == 0:
                    a, b = rows[k], rows[k + step]
                    rows[k] = jnp.where(right, pltpu.roll(b, width, 1), a)
                    rows[k + step] = jnp.where(right, b, pltpu.roll(a, LANES - width, 1))
            step *= 2
        bits = jnp.concatenate(rows, axis=0)
    found = half_to_float(bits)
    columns = pl.ds(pl.multiple_of(column * LANES, LANES), LANES)
    if cut.split:
        scales[: len(found), columns] = found
        return
    found = jnp.pad(found, ((0, scales.shape[0] * LANES - len(found)), (0, 0)))
    for i in range(scales.shape[0]):
        scales[i, columns] = found[i * LANES : (i + 1) * LANES].T


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _widened(x: Array, width: int) -> Array:
    """``x [R, 128]``, of equal columns, as [R, width]."""
    if width <= LANES:
        return x[:, :width]
    return jnp.concatenate([x] * (width // LANES), axis=1)


def _column(row: Array) -> Array:
    """i32[1, R] as i32[R, 1], 128 rows at a time: what lies on the diagonal is summed."""
    pieces = []
    for start in range(0, row.shape[1], LANES):
        piece = row[:, start : start + LANES]
        n = piece.shape[1]
        diagonal = lax.broadcasted_iota(jnp.int32, (n, n), 0) == lax.broadcasted_iota(jnp.int32, (n, n), 1)
        pieces.append(jnp.sum(jnp.where(diagonal, piece, 0), axis=1, keepdims=True))
    return jnp.concatenate(pieces, axis=0)


def _row(column: Array) -> Array:
    """f32[R, 128], of equal columns, as f32[1, R]."""
    pieces = []
    for start in range(0, column.shape[0], LANES):
        piece = column[start : start + LANES]
        n = piece.shape[0]
        piece = piece[:, :n]
        diagonal = lax.broadcasted_iota(jnp.int32, (n, n), 0) == lax.broadcasted_iota(jnp.int32, (n, n), 1)
        pieces.append(jnp.sum(jnp.where(diagonal, piece, 0), axis=0, keepdims=True))
    return jnp.concatenate(pieces, axis=1)
