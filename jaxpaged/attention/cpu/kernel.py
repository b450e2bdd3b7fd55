"""The kernel of paged attention on CPUs: numba functions that read pages in place.

This module computes one work item; ``job.py`` divides a call into items, ``pages.py`` reads pages
of each format. Query heads of a KV head are rows of one tile, so a key is read once for all of
them. An item goes through its entries, ``TILE`` keys at a time, with an online softmax. A few rows
are multiplied with keys in place; many rows with a transposed copy of the tile, as an ordinary
matrix product.

An entry's tokens have consecutive positions, so a row sees one run of its slots, and no other slot
is ever read: NaN in unused slots cannot leak.
"""

from __future__ import annotations

import math

import numpy as np
from numba.extending import register_jitable

from jaxpaged.attention.cpu.job import (
    BEGIN,
    COUNT,
    DIM,
    END,
    ENTRIES,
    FIRST,
    FIRST_SLOT,
    HADAMARD,
    HALF,
    HEAD,
    INTERLEAVED,
    ITEM,
    ITEMS,
    JOB_SIZE,
    K_KIND,
    KV_HEADS,
    MAX_ROWS,
    NOTHING,
    NUM_PAGES,
    NUM_STAGING_SLOTS,
    NUM_TOKENS,
    NUMBERS,
    PAGE_SIZE,
    PAGES,
    PART,
    PHASE_STEPS,
    POSITION,
    Q_HEADS,
    Q_LAST_VISIBLE,
    Q_POSITION,
    Q_ROPE,
    RESIDUAL,
    ROTATION,
    ROW,
    SEQ,
    SPLITS,
    STAGING_SLOT,
    V_DIM,
    V_KIND,
    WINDOW,
    K,
    Q,
    V,
    finish_row,
    merge,
    plan,
)
from jaxpaged.attention.cpu.pages import (
    F16,
    FIRST_RESIDUAL,
    add_codes,
    bytes_of_row,
    bytes_of_scales,
    dots_of_codes,
    load_plain_rows,
    load_rows,
    reads_codes,
)
from jaxpaged.native.ffi import (
    batch_size,
    is_version_query,
    item_done,
    new_job,
    next_item,
    num_batch_axes,
    num_threads,
    release,
    result,
    run_items,
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
    dots,
    f32,
    i32,
    i64,
    njit,
    padded,
    product,
    row_cap,
    row_exp,
    row_fill,
    row_max,
    row_scale,
    transpose,
)

QUANTIZED = __name__.endswith("_quantized")
"""True if this module reads quantized pages: ``backend`` makes a second kernel of the file for them,
because their code takes as long to compile as all other code. numba omits branches that a constant
excludes."""
_TASK = f"jaxpaged_paged_attention{'_quantized' if QUANTIZED else ''}_task"
"""Symbol of ``task`` in the kernel's object code."""
TILE = 64
"""Number of keys in a tile."""
FEW_ROWS = 8
"""Number of rows up to which keys are read in place; a transposed copy costs more than it saves."""
_STRIDE = 4
"""Number of float32 keys between two prefetches, more of shorter keys: with more lines at a time,
computing waits."""

# A run of keys in a tile, by index of 64-bit numbers.
_RUN_K, _RUN_V, _RUN_K_STRIDE, _RUN_V_STRIDE, _RUN_COLUMN, _RUN_COUNT, _RUN_POSITION = range(7)
_RUN = 7


@register_jitable
def scratch_bytes(rows: int, dim: int, v_dim: int) -> int:
    """Size of a thread's scratch memory, for keys of ``dim`` numbers and values of ``v_dim``."""
    wide, v_wide = padded(dim), padded(v_dim)
    of_rows = rows * (2 * wide + v_wide + TILE + 2)
    of_keys = TILE * (2 * wide + v_wide)
    return 4 * (of_rows + of_keys + 2 * (dim + max(dim, v_dim))) + 8 * (_RUN * TILE + _WORK + 1)


@njit
def _rotate_queries(job: int, work: int) -> bool:
    """Rotates the queries to the current rotation offset; returns False, and writes nothing, if
    they have it.

    A query has the rotation offset of its own key. Rotated by the difference of the two offsets,
    the angle to a key is the difference of their logical positions.
    """
    half = load_i64(job, HALF)
    if half == 0:
        return False
    positions, rotated = load_i64(job, Q_POSITION), load_i64(job, Q_ROPE)
    group = load_i64(job, Q_HEADS) // load_i64(job, KV_HEADS)
    phase_steps, table = load_i64(job, PHASE_STEPS), load_i64(work, _ANGLES)
    rows, first, wide = load_i64(work, _NUM_ROWS), load_i64(work, _FIRST), load_i64(work, _WIDE)
    rotation = load_i64(work, _ROTATION)
    interleaved = load_i64(job, INTERLEAVED) != 0
    anywhere = False
    for r in range(rows):
        token = first + r // group
        if rotation != load_i32(rotated, token) - load_i32(positions, token):
            anywhere = True
            break
    if not anywhere:
        return False
    known = False
    angle_of = i64(0)
    for r in range(rows):
        token = first + r // group
        difference = i64(rotation - (load_i32(rotated, token) - load_i32(positions, token)))
        if not known or difference != angle_of:
            for i in range(half):
                # Angles are 32-bit integers that wrap as phase_steps do.
                angle = i32(difference * load_i32(phase_steps, i)) * f32(2 * np.pi / 2**32)
                store_f32(table, 2 * i, f32(math.cos(angle)))
                store_f32(table, 2 * i + 1, f32(math.sin(angle)))
            known, angle_of = True, difference
        source = load_i64(work, _QUERIES) + 4 * r * wide
        target = load_i64(work, _TRANSFORMED) + 4 * r * wide
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
def _hadamard(x: int, n: int) -> None:
    """Hadamard transform of n numbers, a power of two, in place; see ``formats.hadamard``."""
    half = i64(1)
    while half < n:
        for start in range(0, n, 2 * half):
            for i in range(start, start + half):
                a, b = load_f32(x, i), load_f32(x, i + half)
                store_f32(x, i, a + b)
                store_f32(x, i + half, a - b)
        half *= 2
    scale = f32(1) / f32(math.sqrt(n))
    for i in range(n):
        store_f32(x, i, load_f32(x, i) * scale)


@njit
def _transform_queries(job: int, work: int) -> bool:
    """Transforms the queries as the keys are stored; returns False, and writes nothing, if they
    already match."""
    anywhere = _rotate_queries(job, work)
    size = load_i64(job, HADAMARD)
    if size == 0:
        return anywhere
    rows, wide = load_i64(work, _NUM_ROWS), load_i64(work, _WIDE)
    queries, transformed = load_i64(work, _QUERIES), load_i64(work, _TRANSFORMED)
    if not anywhere:
        for i in range(rows * wide):
            store_f32(transformed, i, load_f32(queries, i))
    for r in range(rows):
        for start in range(0, load_i64(job, DIM), size):
            _hadamard(transformed + 4 * (r * wide + start), size)
    return True


# --- one work item ----------------------------------------------------------------------------------------------

# Scratch memory of a thread, by index of 64-bit numbers: addresses, then its state.
(
    _QUERIES,
    _TRANSFORMED,
    _SUMS,
    _SCORES,
    _TRANSPOSED,
    _WIDE_K,
    _WIDE_V,
    _MAXIMA,
    _TOTALS,
    _ANGLES,
    _RUNS,
    _FIRST,
    _KV_HEAD,
    _NUM_ROWS,
    _WIDE,
    _V_WIDE,
    _TABLE_ROW,
    _ENTRY,
    _TOKENS_DONE,
    _LAST,
    _ROTATION,
    _TILE_QUERIES,
    _USED,
    _NUM_RUNS,
    _CHANNELS,
) = range(25)
_WORK = (25 + 7) // 8 * 8
"""Numbers of 64 bits before the arrays, which begin at a line of the cache, as scratch does."""


@njit
def _begin(job: int, item: int, work: int) -> None:
    """Lays out the scratch memory at ``work``, and loads the item's queries, times the scale."""
    dim, q_heads = load_i64(job, DIM), load_i64(job, Q_HEADS)
    group = q_heads // load_i64(job, KV_HEADS)
    first, head = load_i64(item, ROW), load_i64(item, HEAD)
    rows, wide = load_i64(item, COUNT) * group, padded(dim)
    v_dim = load_i64(job, V_DIM)
    v_wide = padded(v_dim)
    queries = work + 8 * _WORK
    transformed = queries + 4 * rows * wide
    sums = transformed + 4 * rows * wide
    scores = sums + 4 * rows * v_wide
    transposed = scores + 4 * rows * TILE
    wide_k = transposed + 4 * TILE * wide
    wide_v = wide_k + 4 * TILE * wide
    maxima = wide_v + 4 * TILE * v_wide
    totals = maxima + 4 * rows
    angles = totals + 4 * rows
    store_i64(work, _QUERIES, queries)
    store_i64(work, _TRANSFORMED, transformed)
    store_i64(work, _SUMS, sums)
    store_i64(work, _SCORES, scores)
    store_i64(work, _TRANSPOSED, transposed)
    store_i64(work, _WIDE_K, wide_k)
    store_i64(work, _WIDE_V, wide_v)
    store_i64(work, _MAXIMA, maxima)
    store_i64(work, _TOTALS, totals)
    store_i64(work, _ANGLES, angles)
    store_i64(work, _CHANNELS, angles + 8 * dim)
    store_i64(work, _RUNS, (angles + 8 * dim + 8 * max(dim, v_dim) + 7) // 8 * 8)
    store_i64(work, _FIRST, first)
    store_i64(work, _KV_HEAD, head)
    store_i64(work, _NUM_ROWS, rows)
    store_i64(work, _WIDE, wide)
    store_i64(work, _V_WIDE, v_wide)
    store_i64(work, _TABLE_ROW, 4 * load_i64(item, SEQ) * load_i64(job, ENTRIES))
    store_i64(work, _ENTRY, load_i64(item, BEGIN))
    store_i64(work, _TOKENS_DONE, 0)
    store_i64(work, _LAST, load_i64(item, END))
    store_i64(work, _TILE_QUERIES, 0)
    scale = load_f32(load_i64(job, NUMBERS), 0)
    for r in range(rows):
        source = load_i64(job, Q) + 4 * ((first + r // group) * q_heads + head * group + r % group) * dim
        for i in range(wide):
            store_f32(queries, r * wide + i, scale * load_f32(source, i) if i < dim else f32(0))
        row_fill((sums + 4 * r * v_wide, v_wide, f32(0)))
        store_f32(maxima, r, NOTHING)
        store_f32(totals, r, f32(0))


@njit
def _gather(job: int, work: int) -> None:
    """Collects the runs of the next tile, up to ``TILE`` keys of one rotation offset, converting
    rows if necessary."""
    row, last = load_i64(work, _TABLE_ROW), load_i64(work, _LAST)
    counts, positions = load_i64(job, NUM_TOKENS) + row, load_i64(job, POSITION) + row
    rotations = load_i64(job, ROTATION) + row
    wide, v_wide = load_i64(work, _WIDE), load_i64(work, _V_WIDE)
    entry, done = load_i64(work, _ENTRY), load_i64(work, _TOKENS_DONE)
    offset = i64(load_i32(rotations, entry))
    if load_i64(work, _TILE_QUERIES) == 0 or offset != load_i64(work, _ROTATION):
        store_i64(work, _ROTATION, offset)
        store_i64(
            work, _TILE_QUERIES, load_i64(work, _TRANSFORMED if _transform_queries(job, work) else _QUERIES)
        )
    used, num_runs = i64(0), i64(0)
    while used < TILE and entry < last and load_i32(rotations, entry) == offset:
        left = i64(load_i32(counts, entry)) - done
        count = min(left, TILE - used)
        k, k_stride = _rows(job, work, K, entry, done, count, load_i64(work, _WIDE_K) + 4 * used * wide)
        v, v_stride = _rows(job, work, V, entry, done, count, load_i64(work, _WIDE_V) + 4 * used * v_wide)
        run = load_i64(work, _RUNS) + 8 * _RUN * num_runs
        store_i64(run, _RUN_K, k)
        store_i64(run, _RUN_V, v)
        store_i64(run, _RUN_K_STRIDE, k_stride)
        store_i64(run, _RUN_V_STRIDE, v_stride)
        store_i64(run, _RUN_COLUMN, used)
        store_i64(run, _RUN_COUNT, count)
        store_i64(run, _RUN_POSITION, load_i32(positions, entry) + done)
        num_runs += 1
        used += count
        if count == left:
            entry, done = entry + 1, i64(0)
        else:
            done += count
    store_i64(work, _ENTRY, entry)
    store_i64(work, _TOKENS_DONE, done)
    store_i64(work, _USED, used)
    store_i64(work, _NUM_RUNS, num_runs)


@njit
def _page_of(job: int, work: int, entry: int) -> int:
    """Index in the pool of the page of an entry, clipped to the pool."""
    page = i64(load_i32(load_i64(job, PAGES) + load_i64(work, _TABLE_ROW), entry))
    page += load_i32(load_i64(job, FIRST), 0)
    return min(max(page, 0), load_i64(job, NUM_PAGES) - 1)


@njit
def _coded(job: int, side: int, row: int, count: int) -> tuple[int, int, int, int, int, int, int]:
    """Arguments of ``pages.dots_of_codes`` for ``count`` keys or values from row ``row`` of the
    pool."""
    blocks = load_i64(job, DIM if side == K else V_DIM) // 32
    parts = (load_i64(job, side), load_i64(job, side + 1), load_i64(job, side + 2), load_i64(job, side + 3))
    return (*parts, row * blocks, blocks, count)


@njit
def _rows(job: int, work: int, side: int, entry: int, token: int, count: int, target: int) -> tuple[int, int]:
    """Address of ``count`` keys or values (``side``: K, V) of an entry, and the stride of rows.

    As float32, see ``pages.load_rows``; for few rows of queries and codes, the row of the pool, and
    0.
    """
    page, heads = _page_of(job, work, entry), load_i64(job, KV_HEADS)
    slot = load_i32(load_i64(job, FIRST_SLOT) + load_i64(work, _TABLE_ROW), entry) + token
    kind = load_i64(job, K_KIND if side == K else V_KIND)
    dim, wide = load_i64(job, DIM if side == K else V_DIM), load_i64(work, _WIDE if side == K else _V_WIDE)
    codes = load_i64(job, side)
    if not QUANTIZED:
        return load_plain_rows(
            kind, codes, page * heads + load_i64(work, _KV_HEAD), load_i64(job, PAGE_SIZE), slot, count,
            dim, wide, target,
        )  # fmt: skip
    if kind >= FIRST_RESIDUAL:
        first = load_i64(job, FIRST)
        staging_slot = i64(load_i32(load_i64(job, STAGING_SLOT), page - load_i32(first, 0)))
        if staging_slot < load_i64(job, NUM_STAGING_SLOTS):
            page, kind, codes = staging_slot + load_i32(first, 1), i64(F16), load_i64(job, side + RESIDUAL)
    if load_i64(work, _NUM_ROWS) <= FEW_ROWS and reads_codes(kind):
        row = page * heads + load_i64(work, _KV_HEAD)
        return row * load_i64(job, PAGE_SIZE) + slot, i64(0)
    return load_rows(
        kind, codes, load_i64(job, side + 1), load_i64(job, side + 2), load_i64(job, side + 3),
        page * heads + load_i64(work, _KV_HEAD), load_i64(job, PAGE_SIZE), slot, count, dim, wide,
        target, load_i64(work, _CHANNELS),
    )  # fmt: skip


@njit
def _ahead(job: int, work: int, run: int) -> int:
    """Approximate row of the pool of run ``run`` in the next tile, to prefetch it during this one.

    Pages are anywhere in memory, which no hardware prefetcher predicts.
    """
    entry, last = load_i64(work, _ENTRY), load_i64(work, _LAST)
    done = load_i64(work, _TOKENS_DONE) if run == 0 else i64(0)
    entry = min(entry + run, last - 1)
    slot = load_i32(load_i64(job, FIRST_SLOT) + load_i64(work, _TABLE_ROW), entry) + done
    row = _page_of(job, work, entry) * load_i64(job, KV_HEADS) + load_i64(work, _KV_HEAD)
    return row * load_i64(job, PAGE_SIZE) + slot


@njit
def _prefetch_scales(job: int, side: int, row: int, count: int) -> None:
    """Prefetches scales, minima and block scales of ``count`` rows from row ``row`` of the pool."""
    kind = load_i64(job, K_KIND if side == K else V_KIND)
    dim = load_i64(job, DIM if side == K else V_DIM)
    for part in range(1, 4):
        begin = load_i64(job, side + part) + bytes_of_scales(kind, part, row * dim)
        prefetch(begin, bytes_of_scales(kind, part, count * dim))


@njit
def _score(job: int, work: int) -> None:
    """Scores of the tile, ``[rows, TILE]``, up to its last key."""
    rows, wide = load_i64(work, _NUM_ROWS), load_i64(work, _WIDE)
    scores, transposed = load_i64(work, _SCORES), load_i64(work, _TRANSPOSED)
    q, columns = load_i64(work, _TILE_QUERIES), padded(load_i64(work, _USED))
    kind = load_i64(job, K_KIND)
    width = bytes_of_row(kind, load_i64(job, DIM))
    stride_keys = _STRIDE * 4 * load_i64(job, DIM) // width
    for i in range(load_i64(work, _NUM_RUNS)):
        run = load_i64(work, _RUNS) + 8 * _RUN * i
        k, stride = load_i64(run, _RUN_K), load_i64(run, _RUN_K_STRIDE)
        column, count = load_i64(run, _RUN_COLUMN), load_i64(run, _RUN_COUNT)
        if rows > FEW_ROWS:
            transpose(k, stride, transposed + 4 * column, TILE, count, wide)
            continue
        direct, ahead = stride == 0, _ahead(job, work, i)
        if QUANTIZED and direct:
            _prefetch_scales(job, K, ahead, count)
        ahead = load_i64(job, K) + ahead * width
        for key in range(0, count, stride_keys):
            here = min(count - key, stride_keys)
            prefetch(ahead + key * width, here * width)
            out = scores + 4 * (column + key)
            if QUANTIZED and direct:
                dots_of_codes(kind, rows, _coded(job, K, k + key, here), q, wide, out, TILE)
            else:
                dots(q, wide, k + 4 * key * stride, stride, out, TILE, rows, here, wide)
    if rows > FEW_ROWS:
        for r in range(rows):
            row_fill((scores + 4 * r * TILE, columns, f32(0)))
        product(q, wide, transposed, TILE, scores, TILE, rows, columns, wide)
    cap = load_f32(load_i64(job, NUMBERS), 1)
    if cap > 0:
        for r in range(rows):
            row_cap((scores + 4 * r * TILE, columns, cap))


@njit
def _mask(job: int, work: int) -> None:
    """Sets scores to -inf where a row does not see a key, and beyond the last key."""
    rows, first, scores = load_i64(work, _NUM_ROWS), load_i64(work, _FIRST), load_i64(work, _SCORES)
    used = load_i64(work, _USED)
    positions, last_visible = load_i64(job, Q_POSITION), load_i64(job, Q_LAST_VISIBLE)
    group = load_i64(job, Q_HEADS) // load_i64(job, KV_HEADS)
    window = load_i64(job, WINDOW)
    nowhere = f32(-np.inf)
    for r in range(rows):
        for column in range(used, padded(used)):
            store_f32(scores + 4 * r * TILE, column, nowhere)
    lowest = load_i32(positions, first)
    highest = load_i32(positions, first + (rows - 1) // group)
    for i in range(load_i64(work, _NUM_RUNS)):
        run = load_i64(work, _RUNS) + 8 * _RUN * i
        start, count = load_i64(run, _RUN_POSITION), load_i64(run, _RUN_COUNT)
        if start + count - 1 <= lowest and (window == 0 or start > highest - window):
            continue
        for r in range(rows):
            token = first + r // group
            row = scores + 4 * (r * TILE + load_i64(run, _RUN_COLUMN))
            begin = max(load_i32(positions, token) - window + 1 - start, 0) if window > 0 else i64(0)
            for c in range(min(begin, count)):
                store_f32(row, c, nowhere)
            for c in range(max(i64(load_i32(last_visible, token)) - start + 1, 0), count):
                store_f32(row, c, nowhere)


@njit
def _weigh(work: int) -> None:
    """Converts scores to weights, and rescales totals and sums to the new maxima."""
    rows, wide, columns = load_i64(work, _NUM_ROWS), load_i64(work, _V_WIDE), padded(load_i64(work, _USED))
    maxima, totals = load_i64(work, _MAXIMA), load_i64(work, _TOTALS)
    for r in range(rows):
        row = load_i64(work, _SCORES) + 4 * r * TILE
        maximum, total = load_f32(maxima, r), load_f32(totals, r)
        highest = row_max((row, columns))
        if highest > maximum:
            rescale = f32(math.exp(maximum - highest))
            row_scale((load_i64(work, _SUMS) + 4 * r * wide, wide, rescale))
            total *= rescale
            maximum = highest
            store_f32(maxima, r, maximum)
        store_f32(totals, r, total + row_exp((row, columns, maximum)))


@njit
def _add_values(job: int, work: int) -> None:
    """Adds the values of the tile, times their weights, to the sums."""
    rows, wide, sums = load_i64(work, _NUM_ROWS), load_i64(work, _V_WIDE), load_i64(work, _SUMS)
    kind, dim = load_i64(job, V_KIND), load_i64(job, V_DIM)
    width = bytes_of_row(kind, dim)
    stride_keys = _STRIDE * 4 * dim // width
    for i in range(load_i64(work, _NUM_RUNS)):
        run = load_i64(work, _RUNS) + 8 * _RUN * i
        v, stride = load_i64(run, _RUN_V), load_i64(run, _RUN_V_STRIDE)
        weights, count = load_i64(work, _SCORES) + 4 * load_i64(run, _RUN_COLUMN), load_i64(run, _RUN_COUNT)
        if rows > FEW_ROWS:
            product(weights, TILE, v, stride, sums, wide, rows, wide, count)
            continue
        direct, ahead = stride == 0, _ahead(job, work, i)
        if QUANTIZED and direct:
            _prefetch_scales(job, V, ahead, count)
        ahead = load_i64(job, V) + ahead * width
        for key in range(0, count, stride_keys):
            here = min(count - key, stride_keys)
            prefetch(ahead + key * width, here * width)
            if QUANTIZED and direct:
                add_codes(kind, rows, _coded(job, V, v + key, here), weights + 4 * key, TILE, sums, wide)
            else:
                product(weights + 4 * key, TILE, v + 4 * key * stride, stride, sums, wide, rows, wide, here)


@njit
def _end(job: int, item: int, work: int) -> None:
    """Writes the item's output, or its partial sums for ``merge``."""
    rows, wide, sums = load_i64(work, _NUM_ROWS), load_i64(work, _V_WIDE), load_i64(work, _SUMS)
    maxima, totals = load_i64(work, _MAXIMA), load_i64(work, _TOTALS)
    if load_i64(item, SPLITS) > 1:
        part = load_i64(item, PART)
        for i in range(rows * wide):
            store_f32(part, i, load_f32(sums, i))
        for r in range(rows):
            store_f32(part, rows * wide + r, load_f32(maxima, r))
            store_f32(part, rows * wide + rows + r, load_f32(totals, r))
        return
    group = load_i64(job, Q_HEADS) // load_i64(job, KV_HEADS)
    for r in range(rows):
        token, q_head = load_i64(work, _FIRST) + r // group, load_i64(work, _KV_HEAD) * group + r % group
        finish_row(job, token, q_head, load_f32(maxima, r), load_f32(totals, r), sums + 4 * r * wide)


@njit
def _attend(job: int, index: int, work: int) -> None:
    """Computes one item: its queries, KV head and range of entries."""
    item = load_i64(job, ITEMS) + 8 * ITEM * index
    _begin(job, item, work)
    while load_i64(work, _ENTRY) < load_i64(work, _LAST):
        _gather(job, work)
        _score(job, work)
        _mask(job, work)
        _weigh(work)
        _add_values(job, work)
    _end(job, item, work)


def task(job: int) -> int:
    """Processes items until none is left."""
    index = next_item(job)
    if index >= 0:
        dims = load_i64(job, DIM), load_i64(job, V_DIM)
        memory = malloc(scratch_bytes(load_i64(job, MAX_ROWS), dims[0], dims[1]) + 64)
        scratch = (memory + 63) // 64 * 64  # a line of the cache, and a whole vector
        while index >= 0:
            _attend(job, index, scratch)
            item_done(job)
            index = next_item(job)
        free(memory)
    release(job)
    return 0


def handler(call: int) -> int:
    """Entry point of the custom call."""
    if is_version_query(call):
        return 0
    threads, out = num_threads(call), result(call, 0)
    for example in range(batch_size(out, num_batch_axes(out, 3))):
        job = new_job(JOB_SIZE)
        run_items(call, job, plan(call, job, threads, example), threads, symbol(_TASK))
        merge(job)
        release(job)
    return 0
