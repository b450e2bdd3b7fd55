"""Paged attention on CPUs: a numba kernel that reads pages in place, on XLA's threads.

Work is cut into pieces of (rows of queries, KV head, run of entries); query heads of a KV head are rows of one tile, so
a key is read once for all of them. A piece goes through its entries, ``_TILE`` keys at a time, and keeps an online
softmax. Few rows meet keys where they lie; many rows meet a transposed copy of the tile, which then is an ordinary
matrix product. Long sequences are cut so that every thread has its share, and the parts are merged by their
log-sum-exp (FlashDecoding, arXiv:2311.01282).

An entry's tokens have consecutive positions. What a row sees of it is therefore one run of slots, and no other slot is
ever read: NaN in unused slots cannot leak.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from numba.extending import register_jitable

from jaxpaged.attention.base import Config
from jaxpaged.batch import Batch
from jaxpaged.block_table import BlockTable
from jaxpaged.native.ffi import (
    JOB,
    answers_query,
    argument,
    data,
    new_job,
    next_piece,
    num_threads,
    piece_done,
    register,
    release,
    result,
    run_pieces,
    size,
)
from jaxpaged.native.memory import (
    free,
    load_f32,
    load_i32,
    load_i64,
    malloc,
    prefetch,
    store_f32,
    store_i64,
    symbol,
)
from jaxpaged.native.tiles import (
    WIDTH,
    dots,
    inlined,
    njit,
    product,
    row_cap,
    row_exp,
    row_fill,
    row_max,
    row_scale,
    transpose,
    widen_bf16,
    widen_f16,
)
from jaxpaged.rope import Rope

_TILE = 64
"""Keys of a tile."""
_ROWS = 192
"""Rows of a piece, query heads counted: a tile of that many rows and its sums stay in the second-level cache."""
_FEW_ROWS = 8
"""Up to so many rows, keys are read in place; a transposed copy costs more than it saves."""
_STRIDE = 16
"""Keys between two requests for memory that comes later."""
_PIECES_A_THREAD = 4
"""Pieces that a long sequence is cut into, so that threads end together."""
_LEAST_TOKENS = 128
"""Tokens of a piece at least: each part of a sequence has to be merged."""
_NOTHING = np.float32(-1e30)
"""Where a running maximum starts: finite, so that no difference of two maxima is NaN."""

# What a job holds, by index: addresses of buffers, then sizes.
_INPUTS = 16
(
    _Q,
    _K,
    _V,
    _PAGES,
    _FIRST_SLOT,
    _NUM_TOKENS,
    _POSITION,
    _ROTATION,
    _NUM_ENTRIES,
    _CU_Q_LENS,
    _Q_POSITION,
    _Q_ROPE,
    _SINKS,
    _TURNS,
    _NUMBERS,
    _OPTIONS,
) = range(JOB, JOB + _INPUTS)
(
    _OUT,
    _LSE,
    _PIECES,
    _PARTS,
    _NUM_PIECES,
    _Q_HEADS,
    _KV_HEADS,
    _DIM,
    _PAGE_SIZE,
    _ENTRIES,
    _HALF,
    _WINDOW,
    _INTERLEAVED,
    _KIND,
    _SCRATCH,
) = range(JOB + _INPUTS, JOB + _INPUTS + 15)
_JOB_SIZE = _INPUTS + 15

# A piece, by index of 64-bit numbers.
_SEQ, _HEAD, _ROW, _COUNT, _BEGIN, _END, _SPLITS, _PART = range(8)
_PIECE = 8

# A run of keys in a tile, by index of 64-bit numbers.
_RUN_K, _RUN_V, _RUN_STRIDE, _RUN_COLUMN, _RUN_COUNT, _RUN_POSITION = range(6)
_RUN = 6


@njit
def _visible_entries(job: int, seq: int, first: int, last: int) -> tuple[int, int]:
    """The entries that queries in rows ``first .. last`` of one sequence see some token of."""
    entries = load_i64(job, _ENTRIES)
    window = load_i64(job, _WINDOW)
    positions = load_i64(job, _POSITION) + 4 * seq * entries
    counts = load_i64(job, _NUM_TOKENS) + 4 * seq * entries
    high = load_i32(load_i64(job, _Q_POSITION), last)
    end = np.int64(load_i32(load_i64(job, _NUM_ENTRIES), seq))
    while end > 0 and load_i32(positions, end - 1) > high:
        end -= 1
    begin = np.int64(0)
    if window > 0:
        low = load_i32(load_i64(job, _Q_POSITION), first) - window + 1
        while begin < end and load_i32(positions, begin) + load_i32(counts, begin) <= low:
            begin += 1
    return begin, end


@register_jitable
def _scratch_bytes(rows: int, dim: int, wide: int) -> int:
    """Memory that a thread works in."""
    return 4 * (rows * (3 * wide + _TILE + 2) + 3 * _TILE * wide + 2 * dim) + 8 * (_RUN * _TILE + 1)


@inlined
def _plan(call: int, job: int, threads: int) -> int:
    """Reads the call, cuts it into pieces of about the same work, and says how many they are."""
    for i in range(_INPUTS):
        store_i64(job, JOB + i, data(argument(call, i)))
    q, k, table = argument(call, _Q - JOB), argument(call, _K - JOB), argument(call, _PAGES - JOB)
    tokens, q_heads, dim = size(q, 0), size(q, 1), size(q, 2)
    kv_heads, page_size, max_seqs, entries = size(k, 1), size(k, 2), size(table, 0), size(table, 1)
    out, lse = data(result(call, 0)), data(result(call, 1))
    store_i64(job, _OUT, out)
    store_i64(job, _LSE, lse)
    store_i64(job, _Q_HEADS, q_heads)
    store_i64(job, _KV_HEADS, kv_heads)
    store_i64(job, _DIM, dim)
    store_i64(job, _PAGE_SIZE, page_size)
    store_i64(job, _ENTRIES, entries)
    store_i64(job, _HALF, size(argument(call, _TURNS - JOB), 0))
    options = load_i64(job, _OPTIONS)
    store_i64(job, _WINDOW, load_i32(options, 0))
    store_i64(job, _INTERLEAVED, load_i32(options, 1))
    store_i64(job, _KIND, load_i32(options, 2))

    group = q_heads // kv_heads
    block = max(_ROWS // group, 1)
    most_rows = min(block, tokens) * group
    wide = -(-dim // WIDTH) * WIDTH
    store_i64(job, _SCRATCH, _scratch_bytes(most_rows, dim, wide))

    # Twice over the blocks: how much work there is, then the pieces.
    cu = load_i64(job, _CU_Q_LENS)
    work = np.int64(0)
    blocks = np.int64(0)
    for seq in range(max_seqs):
        stop = load_i32(cu, seq + 1)
        for row in range(load_i32(cu, seq), stop, block):
            count = min(block, stop - row)
            begin, end = _visible_entries(job, seq, row, row + count - 1)
            work += count * (end - begin)
            blocks += 1
    share = max(work * kv_heads // (threads * _PIECES_A_THREAD), 1)
    most = blocks * kv_heads + threads * _PIECES_A_THREAD + 1
    part_floats = most_rows * (wide + 2)
    pieces = malloc(8 * _PIECE * most)
    store_i64(job, _PIECES, pieces)
    store_i64(job, _PARTS, malloc(4 * part_floats * most))
    number = np.int64(0)
    for seq in range(max_seqs):
        stop = load_i32(cu, seq + 1)
        for row in range(load_i32(cu, seq), stop, block):
            count = min(block, stop - row)
            begin, end = _visible_entries(job, seq, row, row + count - 1)
            splits = max(min(count * (end - begin) // share, (end - begin) * page_size // _LEAST_TOKENS), 1)
            for head in range(kv_heads):
                for split in range(splits):
                    piece = pieces + 8 * _PIECE * number
                    store_i64(piece, _SEQ, seq)
                    store_i64(piece, _HEAD, head)
                    store_i64(piece, _ROW, row)
                    store_i64(piece, _COUNT, count)
                    store_i64(piece, _BEGIN, begin + (end - begin) * split // splits)
                    store_i64(piece, _END, begin + (end - begin) * (split + 1) // splits)
                    store_i64(piece, _SPLITS, splits)
                    store_i64(piece, _PART, load_i64(job, _PARTS) + 4 * part_floats * number)
                    number += 1
    store_i64(job, _NUM_PIECES, number)
    # Padding attends to nothing.
    for row in range(np.int64(load_i32(cu, max_seqs)), tokens):
        for i in range(row * q_heads * dim, (row + 1) * q_heads * dim):
            store_f32(out, i, np.float32(0))
        for i in range(row * q_heads, (row + 1) * q_heads):
            store_f32(lse, i, np.float32(-np.inf))
    return number


@njit
def _turn(job: int, q: int, turned: int, wide: int, table: int, first: int, rows: int, rotation: int) -> bool:
    """Queries turned to keys of another frame, to ``turned``; False, and nothing written, where none has to turn.

    A query is rotated for the frame of its own key. Turned by the difference of the two frames, the angle to a key is
    the difference of their logical positions.
    """
    half = load_i64(job, _HALF)
    if half == 0:
        return False
    positions, rotated = load_i64(job, _Q_POSITION), load_i64(job, _Q_ROPE)
    group = load_i64(job, _Q_HEADS) // load_i64(job, _KV_HEADS)
    turns = load_i64(job, _TURNS)
    interleaved = load_i64(job, _INTERLEAVED) != 0
    anywhere = False
    for r in range(rows):
        token = first + r // group
        if rotation != load_i32(rotated, token) - load_i32(positions, token):
            anywhere = True
            break
    if not anywhere:
        return False
    known = False
    angle_of = np.int64(0)
    for r in range(rows):
        token = first + r // group
        difference = np.int64(rotation - (load_i32(rotated, token) - load_i32(positions, token)))
        if not known or difference != angle_of:
            for i in range(half):
                # Angles are 32-bit integers that wrap as turns do.
                angle = np.int32(difference * load_i32(turns, i)) * np.float32(2 * np.pi / 2**32)
                store_f32(table, 2 * i, np.float32(math.cos(angle)))
                store_f32(table, 2 * i + 1, np.float32(math.sin(angle)))
            known, angle_of = True, difference
        source, target = q + 4 * r * wide, turned + 4 * r * wide
        for i in range(2 * half, wide):
            store_f32(target, i, load_f32(source, i))
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            x, y = load_f32(source, a), load_f32(source, b)
            cos, sin = load_f32(table, 2 * i), load_f32(table, 2 * i + 1)
            store_f32(target, a, x * cos - y * sin)
            store_f32(target, b, y * cos + x * sin)
    return True


@njit
def _mask(
    job: int, scores: int, runs: int, num_runs: int, used: int, padded: int, first: int, rows: int
) -> None:
    """-inf where a row does not see a key, and behind the last key."""
    positions = load_i64(job, _Q_POSITION)
    group = load_i64(job, _Q_HEADS) // load_i64(job, _KV_HEADS)
    window = load_i64(job, _WINDOW)
    nowhere = np.float32(-np.inf)
    for r in range(rows):
        for column in range(used, padded):
            store_f32(scores + 4 * r * _TILE, column, nowhere)
    lowest = load_i32(positions, first)
    highest = load_i32(positions, first + (rows - 1) // group)
    for i in range(num_runs):
        run = runs + 8 * _RUN * i
        start, count, column = (
            load_i64(run, _RUN_POSITION),
            load_i64(run, _RUN_COUNT),
            load_i64(run, _RUN_COLUMN),
        )
        if start + count - 1 <= lowest and (window == 0 or start > highest - window):
            continue
        for r in range(rows):
            position = np.int64(load_i32(positions, first + r // group))
            row = scores + 4 * (r * _TILE + column)
            begin = max(position - window + 1 - start, 0) if window > 0 else np.int64(0)
            for c in range(min(begin, count)):
                store_f32(row, c, nowhere)
            for c in range(max(position - start + 1, 0), count):
                store_f32(row, c, nowhere)


@njit
def _finish_row(job: int, token: int, q_head: int, maximum: float, total: float, weighted: int) -> None:
    """One row's output from its sums, and the logarithm of its denominator."""
    dim, q_heads = load_i64(job, _DIM), load_i64(job, _Q_HEADS)
    sink = load_f32(load_i64(job, _SINKS), q_head)
    scale = np.float32(1)
    if sink > maximum:
        scale = np.float32(math.exp(maximum - sink))
        total = total * scale
        maximum = sink
    if sink > np.float32(-np.inf):
        total = total + np.float32(math.exp(sink - maximum))
    out = load_i64(job, _OUT) + 4 * (token * q_heads + q_head) * dim
    factor = scale / total if total > 0 else np.float32(0)
    for i in range(dim):
        store_f32(out, i, load_f32(weighted, i) * factor)
    lse = maximum + np.float32(math.log(total)) if total > 0 else np.float32(-np.inf)
    store_f32(load_i64(job, _LSE), token * q_heads + q_head, lse)


@inlined
def _merge(job: int) -> None:
    """Joins the parts of what was cut, and frees what the plan took."""
    pieces, dim = load_i64(job, _PIECES), load_i64(job, _DIM)
    group = load_i64(job, _Q_HEADS) // load_i64(job, _KV_HEADS)
    wide = -(-dim // WIDTH) * WIDTH
    number = np.int64(0)
    while number < load_i64(job, _NUM_PIECES):
        piece = pieces + 8 * _PIECE * number
        splits = load_i64(piece, _SPLITS)
        number += splits
        if splits == 1:
            continue
        rows = load_i64(piece, _COUNT) * group
        into = load_i64(piece, _PART)
        for r in range(rows):
            maximum = _NOTHING
            for split in range(splits):
                part = load_i64(piece + 8 * _PIECE * split, _PART)
                maximum = max(maximum, load_f32(part, rows * wide + r))
            total = np.float32(0)
            for split in range(splits):
                part = load_i64(piece + 8 * _PIECE * split, _PART)
                weight = np.float32(math.exp(load_f32(part, rows * wide + r) - maximum))
                total += weight * load_f32(part, rows * wide + rows + r)
                for i in range(dim):
                    value = weight * load_f32(part, r * wide + i)
                    if split > 0:
                        value += load_f32(into, r * wide + i)
                    store_f32(into, r * wide + i, value)
            _finish_row(
                job,
                load_i64(piece, _ROW) + r // group,
                load_i64(piece, _HEAD) * group + r % group,
                maximum,
                total,
                into + 4 * r * wide,
            )
    free(load_i64(job, _PARTS))
    free(pieces)


_FORMATS = {"float32": 0, "bfloat16": 1, "float16": 2}
"""The kind of a page, by its dtype."""


@njit
def _load_rows(
    kind: int, pages: int, row: int, count: int, dim: int, wide: int, target: int
) -> tuple[int, int]:
    """``count`` rows of a page as float32 with ``wide`` readable numbers each: ``(address, distance of rows)``.

    What need not be converted stays where it is; else the rows go to ``target``.
    """
    if kind == 0:
        source = pages + 4 * row * dim
        if dim == wide:
            return source, dim
        for c in range(count):
            for i in range(wide):
                value = load_f32(source, c * dim + i) if i < dim else np.float32(0)
                store_f32(target, c * wide + i, value)
        return target, wide
    source = pages + 2 * row * dim
    for c in range(count):
        for i in range(0, dim, 8):
            if kind == 1:
                widen_bf16((source + 2 * (c * dim + i), target + 4 * (c * wide + i)))
            else:
                widen_f16((source + 2 * (c * dim + i), target + 4 * (c * wide + i)))
        for i in range(dim, wide):
            store_f32(target, c * wide + i, np.float32(0))
    return target, wide


@njit
def _ahead(job: int, row_of_table: int, entry: int, done: int, run: int, last: int, head: int) -> int:
    """The row, counted from the pool's first, of the entry that the next tile has as its run ``run``, more or less.

    Pages lie anywhere, which no hardware foresees: what the next tile reads is asked for while this one is computed.
    """
    if run > 0:
        entry, done = min(entry + run, last - 1), np.int64(0)
    entry = min(entry, last - 1)
    page = np.int64(load_i32(load_i64(job, _PAGES) + row_of_table, entry))
    slot = load_i32(load_i64(job, _FIRST_SLOT) + row_of_table, entry) + done
    return (page * load_i64(job, _KV_HEADS) + head) * load_i64(job, _PAGE_SIZE) + slot


@inlined
def _attend(job: int, index: int, scratch: int) -> None:
    """One piece: its queries, its KV head, its run of entries."""
    piece = load_i64(job, _PIECES) + 8 * _PIECE * index
    seq, head, first = load_i64(piece, _SEQ), load_i64(piece, _HEAD), load_i64(piece, _ROW)
    entry, last = load_i64(piece, _BEGIN), load_i64(piece, _END)
    dim, page_size, q_heads = load_i64(job, _DIM), load_i64(job, _PAGE_SIZE), load_i64(job, _Q_HEADS)
    kv_heads = load_i64(job, _KV_HEADS)
    group = q_heads // kv_heads
    rows = load_i64(piece, _COUNT) * group
    wide = -(-dim // WIDTH) * WIDTH

    own = scratch
    turned = own + 4 * rows * wide
    sums = turned + 4 * rows * wide
    scores = sums + 4 * rows * wide
    transposed = scores + 4 * rows * _TILE
    wide_k = transposed + 4 * _TILE * wide
    wide_v = wide_k + 4 * _TILE * wide
    maxima = wide_v + 4 * _TILE * wide
    totals = maxima + 4 * rows
    angles = totals + 4 * rows
    runs = (angles + 8 * dim + 7) // 8 * 8

    scale = load_f32(load_i64(job, _NUMBERS), 0)
    cap = load_f32(load_i64(job, _NUMBERS), 1)
    for r in range(rows):
        source = load_i64(job, _Q) + 4 * ((first + r // group) * q_heads + head * group + r % group) * dim
        for i in range(wide):
            store_f32(own, r * wide + i, scale * load_f32(source, i) if i < dim else np.float32(0))
        row_fill((sums + 4 * r * wide, wide, np.float32(0)))
        store_f32(maxima, r, _NOTHING)
        store_f32(totals, r, np.float32(0))

    row_of_table = 4 * seq * load_i64(job, _ENTRIES)
    pages = load_i64(job, _PAGES) + row_of_table
    first_slots = load_i64(job, _FIRST_SLOT) + row_of_table
    counts = load_i64(job, _NUM_TOKENS) + row_of_table
    positions = load_i64(job, _POSITION) + row_of_table
    rotations = load_i64(job, _ROTATION) + row_of_table
    k_pages, v_pages, kind = load_i64(job, _K), load_i64(job, _V), load_i64(job, _KIND)
    bytes_of_row = (4 if kind == 0 else 2) * dim

    done = np.int64(0)  # tokens of the entry that were seen to
    frame = np.int64(0)
    q = own
    begun = False
    while entry < last:
        rotation = np.int64(load_i32(rotations, entry))
        if not begun or rotation != frame:
            q = turned if _turn(job, own, turned, wide, angles, first, rows, rotation) else own
            begun, frame = True, rotation
        used, num_runs = np.int64(0), np.int64(0)
        while used < _TILE and entry < last and load_i32(rotations, entry) == frame:
            left = np.int64(load_i32(counts, entry)) - done
            count = min(left, _TILE - used)
            slot = np.int64(load_i32(first_slots, entry)) + done
            where = (np.int64(load_i32(pages, entry)) * kv_heads + head) * page_size + slot
            run = runs + 8 * _RUN * num_runs
            k, stride = _load_rows(kind, k_pages, where, count, dim, wide, wide_k + 4 * used * wide)
            v, _ = _load_rows(kind, v_pages, where, count, dim, wide, wide_v + 4 * used * wide)
            store_i64(run, _RUN_K, k)
            store_i64(run, _RUN_V, v)
            store_i64(run, _RUN_STRIDE, stride)
            store_i64(run, _RUN_COLUMN, used)
            store_i64(run, _RUN_COUNT, count)
            store_i64(run, _RUN_POSITION, load_i32(positions, entry) + done)
            num_runs += 1
            used += count
            if count == left:
                entry, done = entry + 1, np.int64(0)
            else:
                done += count

        padded = -(-used // WIDTH) * WIDTH
        for i in range(num_runs):
            run = runs + 8 * _RUN * i
            k, stride, column, count = (
                load_i64(run, _RUN_K),
                load_i64(run, _RUN_STRIDE),
                load_i64(run, _RUN_COLUMN),
                load_i64(run, _RUN_COUNT),
            )
            if rows > _FEW_ROWS:
                transpose(k, stride, transposed + 4 * column, _TILE, count, wide)
                continue
            ahead = _ahead(job, row_of_table, entry, done, i, last, head)
            for key in range(0, count, _STRIDE):
                here = min(count - key, _STRIDE)
                prefetch(k_pages + (ahead + key) * bytes_of_row, here * bytes_of_row)
                dots(
                    q,
                    wide,
                    k + 4 * key * stride,
                    stride,
                    scores + 4 * (column + key),
                    _TILE,
                    rows,
                    here,
                    wide,
                )
        if rows > _FEW_ROWS:
            for r in range(rows):
                row_fill((scores + 4 * r * _TILE, padded, np.float32(0)))
            product(q, wide, transposed, _TILE, scores, _TILE, rows, padded, wide)
        if cap > 0:
            for r in range(rows):
                row_cap((scores + 4 * r * _TILE, padded, cap))
        _mask(job, scores, runs, num_runs, used, padded, first, rows)

        for r in range(rows):
            row = scores + 4 * r * _TILE
            maximum = load_f32(maxima, r)
            highest = row_max((row, padded))
            if highest > maximum:
                rescale = np.float32(math.exp(maximum - highest))
                row_scale((sums + 4 * r * wide, wide, rescale))
                store_f32(totals, r, load_f32(totals, r) * rescale)
                store_f32(maxima, r, highest)
                maximum = highest
            store_f32(totals, r, load_f32(totals, r) + row_exp((row, padded, maximum)))
        for i in range(num_runs):
            run = runs + 8 * _RUN * i
            column, count = load_i64(run, _RUN_COLUMN), load_i64(run, _RUN_COUNT)
            v, stride = load_i64(run, _RUN_V), load_i64(run, _RUN_STRIDE)
            if rows > _FEW_ROWS:
                product(scores + 4 * column, _TILE, v, stride, sums, wide, rows, wide, count)
                continue
            ahead = _ahead(job, row_of_table, entry, done, i, last, head)
            for key in range(0, count, _STRIDE):
                here = min(count - key, _STRIDE)
                prefetch(v_pages + (ahead + key) * bytes_of_row, here * bytes_of_row)
                product(
                    scores + 4 * (column + key),
                    _TILE,
                    v + 4 * key * stride,
                    stride,
                    sums,
                    wide,
                    rows,
                    wide,
                    here,
                )

    if load_i64(piece, _SPLITS) > 1:
        part = load_i64(piece, _PART)
        for i in range(rows * wide):
            store_f32(part, i, load_f32(sums, i))
        for r in range(rows):
            store_f32(part, rows * wide + r, load_f32(maxima, r))
            store_f32(part, rows * wide + rows + r, load_f32(totals, r))
    else:
        for r in range(rows):
            _finish_row(
                job,
                first + r // group,
                head * group + r % group,
                load_f32(maxima, r),
                load_f32(totals, r),
                sums + 4 * r * wide,
            )


def _task(job: int) -> int:
    """Does pieces until there is none left."""
    index = next_piece(job)
    if index >= 0:
        memory = malloc(load_i64(job, _SCRATCH) + 64)
        scratch = (memory + 63) // 64 * 64  # a line of the cache, and a whole vector
        while index >= 0:
            _attend(job, index, scratch)
            piece_done(job)
            index = next_piece(job)
        free(memory)
    release(job)
    return 0


def _handler(call: int) -> int:
    """What XLA calls."""
    if answers_query(call):
        return 0
    job = new_job(_JOB_SIZE)
    threads = num_threads(call)
    run_pieces(call, job, _plan(call, job, threads), threads, symbol("jaxpaged_paged_attention_task"))
    _merge(job)
    release(job)
    return 0


@functools.cache
def _target() -> str:
    """The name of the custom call, compiled on first use."""
    name = "jaxpaged_paged_attention"
    register(name, _handler, _task, [Path(__file__)])
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
    rows = min(max(_ROWS // group, 1), max_q_len or tokens) * group
    wide = -(-head_dim // WIDTH) * WIDTH
    in_place = np.dtype(page_dtype).itemsize == 4 and wide == head_dim
    return {
        "vector_width": WIDTH,
        "keys_per_tile": _TILE,
        "rows_per_piece": rows,
        "keys_read": "transposed" if rows > _FEW_ROWS else "in place" if in_place else "converted",
        "least_tokens_per_piece": _LEAST_TOKENS,
        "scratch_bytes": _scratch_bytes(rows, head_dim, wide),
    }


def paged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
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
    tokens, num_q_heads, head_dim = q.shape
    if k_pages.dtype.itemsize == 2 and head_dim % 8:
        raise NotImplementedError(
            f"reads {k_pages.dtype} pages with a head_dim that is a multiple of 8, got {head_dim}"
        )
    numbers = np.asarray([config.scale, config.soft_cap or 0], np.float32)
    interleaved = rope is not None and rope.interleaved
    options = np.asarray([config.window or 0, interleaved, _FORMATS[k_pages.dtype.name]], np.int32)
    out = jax.ShapeDtypeStruct((tokens, num_q_heads, head_dim), jnp.float32)
    lse = jax.ShapeDtypeStruct((tokens, num_q_heads), jnp.float32)
    call = jax.ffi.ffi_call(_target(), (out, lse))
    return tuple(
        call(
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
    )
