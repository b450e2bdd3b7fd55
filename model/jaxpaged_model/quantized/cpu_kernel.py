"""CPU kernel of products with stored matrices: scheduling, and the operations before and after the products.

A call computes ``f(norm(x) @ W.T)``, so that a transformer layer is a few calls: optionally an RMSNorm of
``x`` first, and afterwards a sum, or ``activation(gate) * up`` if the matrix is the concatenation of gate and up.
A work item is a range of panels times some rows; each weight is read once for all of these rows.

The module is loaded once for each format and exactness, see ``cpu.py``; its ``__name__`` selects the variant.
"""

from __future__ import annotations

import math
from typing import Any

from jaxpaged.native.ffi import (
    JOB,
    argument,
    data,
    element,
    is_version_query,
    item_done,
    new_job,
    next_item,
    num_threads,
    rank,
    release,
    result,
    run_items,
    size,
)
from jaxpaged.native.memory import (
    free,
    load_f32,
    load_i32,
    load_i64,
    malloc,
    store_f32,
    store_i64,
    symbol,
)
from jaxpaged.native.tiles import f32, i64, njit
from jaxpaged_model.quantized.cpu_vectors import (
    ROW_SIZES,
    added,
    copied,
    gated,
    gated_by_gelu,
    group_sums,
    pair_product,
    panel_product,
    quantize_row,
    scaled,
    square_sum,
)
from jaxpaged_model.quantized.formats import BLOCK, ROWS, STORED_FORMATS, SUPER_BLOCK, FloatFormat

_VARIANT = __name__.rpartition(".")[2].removeprefix("cpu_kernel_").split("__")
FORMAT = STORED_FORMATS.get(_VARIANT[0], STORED_FORMATS["Q8_0"])
IS_FLOAT = isinstance(FORMAT, FloatFormat)
EXACT = _VARIANT[-1] == "exact"
_TASK = f"jaxpaged_product_{FORMAT.name}{'_exact' if EXACT else ''}_task"
"""Symbol of ``task`` in the kernel's object code."""

_ITEM_ROWS = 128 if IS_FLOAT else 64
"""Rows of a work item: with 2,000 columns, they and a panel fit into the second-level cache. With numbers
instead of codes a panel is larger, and is worth more rows."""
_SHARED_ROWS = 16
"""Number of rows up to which the calling thread prepares them alone: other threads would start too late."""
_ITEMS_PER_THREAD = 8 if IS_FLOAT else 4
_SMALL = 1 << 18
"""Bytes of codes, times rows, below which one thread computes all: starting another takes microseconds."""

# Indices of a job's numbers: addresses of inputs, then the rest.
INPUTS = 12
(
    X, NORM, ADD, CODES, SCALES, STEPS, MINIMA, MIN_STEPS, NUMBERS, OPTIONS, LAYER, NUM_ROWS,
) = range(JOB, JOB + INPUTS)  # fmt: skip
(
    OUT, TOKENS, COLUMNS, OUTPUTS, PANELS, GATED, NORMED, ADDED, STAGE, RUN, RUNS, ACTIVATIONS, WIDTH_A, FACTORS,
    STARTS, SUMS,
) = range(JOB + INPUTS, JOB + INPUTS + 16)  # fmt: skip
JOB_SIZE = INPUTS + 16
_PREPARE, _MULTIPLY = 0, 1
_STACKED = 4
_GELU = 2
"""Rank of a part of a stack of matrices."""

_CODE_BYTES = 4 * ROWS * FORMAT.bits
_GROUP, _HAS_MINIMA, _HAS_STEPS = FORMAT.group, FORMAT.has_minima, FORMAT.has_steps
_MOST_ROWS = ROW_SIZES[-1]
_TILE_PANELS = 2 if IS_FLOAT else 1
"""Panels of a tile, or pairs of gate and up."""
_quantize: Any = None
_group_sums: Any = None
if isinstance(FORMAT, FloatFormat):
    _products = [pair_product(FORMAT, rows) for rows in ROW_SIZES]
else:
    _products = [panel_product(FORMAT, rows, EXACT) for rows in ROW_SIZES]
    _quantize, _group_sums = quantize_row(FORMAT), group_sums(FORMAT)
_one, _two, _four = _products[:3]
_most = _products[-1]


@njit
def _prepare(job: int, first: int, count: int) -> None:
    """Normalizes and quantizes rows of ``x``."""
    columns = load_i64(job, COLUMNS)
    blocks, groups = columns // BLOCK, columns // _GROUP
    for t in range(first, first + count):
        row = load_i64(job, X) + 4 * t * columns
        into = load_i64(job, ACTIVATIONS) + t * load_i64(job, WIDTH_A)
        sums = load_i64(job, SUMS) + 4 * t * groups
        space = i64(0)
        if load_i64(job, NORMED) != 0:
            mean = square_sum((row, columns)) / f32(columns)
            factor = f32(1) / f32(math.sqrt(mean + load_f32(load_i64(job, NUMBERS), 0)))
            if EXACT:
                scaled((row, load_i64(job, NORM), factor, into, columns))
                row = into
            else:
                space = malloc(4 * columns)
                scaled((row, load_i64(job, NORM), factor, space, columns))
                row = space
        if EXACT:
            if _HAS_MINIMA:
                _group_sums((row, blocks, sums))
        else:
            factors, starts = load_i64(job, FACTORS) + 4 * t * blocks, load_i64(job, STARTS) + 4 * t * groups
            _quantize((row, blocks, into, factors, starts, sums))
            if space != 0:
                free(space)


@njit
def _times(rows: int, args: tuple[int, ...]) -> None:
    """Runs the product of as many rows as ``_rows_at_once`` has given."""
    if rows >= 8:
        _most(args)
    elif rows >= 4:
        _four(args)
    elif rows >= 2:
        _two(args)
    else:
        _one(args)


@njit
def _times_panel(job: int, panel: int, first: int, rows: int, out: int) -> None:
    """Multiplies some rows with one panel: ``out[rows, 16]``."""
    columns = load_i64(job, COLUMNS)
    blocks, groups = columns // BLOCK, columns // _GROUP
    scales_in_row = columns // SUPER_BLOCK if _HAS_STEPS else groups
    args = (
        load_i64(job, CODES) + panel * blocks * _CODE_BYTES,
        load_i64(job, SCALES) + panel * scales_in_row * 2 * ROWS,
        load_i64(job, STEPS) + panel * groups * ROWS,
        load_i64(job, MINIMA) + panel * scales_in_row * 2 * ROWS,
        load_i64(job, MIN_STEPS) + panel * groups * ROWS,
        blocks,
        load_i64(job, ACTIVATIONS) + first * load_i64(job, WIDTH_A),
        load_i64(job, WIDTH_A),
        load_i64(job, FACTORS) + 4 * first * blocks,
        load_i64(job, STARTS) + 4 * first * groups,
        load_i64(job, SUMS) + 4 * first * groups,
        groups,
        out,
    )
    _times(rows, args)


@njit
def _times_pair(job: int, panel: int, other: int, first: int, rows: int, out: int, out_other: int) -> None:
    """Multiplies some rows with two panels of floating-point numbers."""
    columns, width = load_i64(job, COLUMNS), load_i64(job, WIDTH_A)
    codes, size = load_i64(job, CODES), columns // BLOCK * _CODE_BYTES
    a = load_i64(job, ACTIVATIONS) + first * width
    _times(rows, (codes + panel * size, codes + other * size, columns, a, width, out, out_other))


@njit
def _rows_at_once(rows: int) -> int:
    """Number of rows of the next product, of ``rows`` that are left."""
    if rows >= _MOST_ROWS:
        return _MOST_ROWS
    return 4 if rows >= 4 else (2 if rows >= 2 else 1)


@njit
def _write(job: int, panel: int, first: int, rows: int, sums: int) -> None:
    """Writes a tile's sums, after gate or addition; the sums of up follow those of gate."""
    outputs = load_i64(job, OUTPUTS)
    here = min(outputs - panel * ROWS, ROWS)
    gate, is_added = load_i64(job, GATED), load_i64(job, ADDED) != 0
    for r in range(rows):
        at = (first + r) * outputs + panel * ROWS
        mine, out = sums + 4 * ROWS * r, load_i64(job, OUT) + 4 * at
        if gate == _GELU:
            gated_by_gelu((mine, sums + 4 * ROWS * (_MOST_ROWS + r), mine))
        elif gate != 0:
            gated((mine, sums + 4 * ROWS * (_MOST_ROWS + r), mine))
        if here < ROWS:
            for i in range(here):
                value = load_f32(mine, i)
                if is_added:
                    value += load_f32(load_i64(job, ADD), at + i)
                store_f32(out, i, value)
        elif is_added:
            added((mine, load_i64(job, ADD) + 4 * at, out))
        else:
            copied((mine, out))


@njit
def _tile_of_codes(job: int, panel: int, first: int, rows: int, sums: int) -> None:
    """Computes and writes the products of a panel, or of two of gate and up."""
    _times_panel(job, panel, first, rows, sums)
    if load_i64(job, GATED) != 0:
        _times_panel(job, load_i64(job, PANELS) + panel, first, rows, sums + 4 * ROWS * _MOST_ROWS)
    _write(job, panel, first, rows, sums)


@njit
def _tile_of_numbers(job: int, panel: int, first: int, rows: int, sums: int) -> None:
    """Computes and writes the products of two panels, of which the last one may be the first again."""
    panels, is_gated = load_i64(job, PANELS), load_i64(job, GATED) != 0
    other = panels + panel if is_gated else min(panel + 1, panels - 1)
    others = sums + 4 * ROWS * _MOST_ROWS
    _times_pair(job, panel, other, first, rows, sums, others)
    _write(job, panel, first, rows, sums)
    if not is_gated and other > panel:
        _write(job, other, first, rows, others)


_tile = _tile_of_numbers if IS_FLOAT else _tile_of_codes


@njit
def _multiply(job: int, index: int, sums: int) -> None:
    """Computes one work item: a range of panels, some rows."""
    runs, run = load_i64(job, RUNS), load_i64(job, RUN)
    panels, tokens = load_i64(job, PANELS), load_i64(job, TOKENS)
    begin = index // runs * _ITEM_ROWS
    end = min(begin + _ITEM_ROWS, tokens)
    step = 1 if load_i64(job, GATED) != 0 else _TILE_PANELS
    for panel in range(index % runs * run, min((index % runs + 1) * run, panels), step):
        row = begin
        while row < end:
            rows = _rows_at_once(end - row)
            _tile(job, panel, row, rows, sums)
            row += rows


def task(job: int) -> int:
    """Computes work items until none is left."""
    index = next_item(job)
    if index >= 0:
        memory = malloc(8 * ROWS * _MOST_ROWS + 64)
        sums = (memory + 63) // 64 * 64
        while index >= 0:
            if load_i64(job, STAGE) == _PREPARE:
                first = index * _SHARED_ROWS
                _prepare(job, first, min(load_i64(job, TOKENS) - first, _SHARED_ROWS))
            else:
                _multiply(job, index, sums)
            item_done(job)
            index = next_item(job)
        free(memory)
    release(job)
    return 0


@njit
def _read_call(call: int, job: int) -> None:
    for i in range(INPUTS):
        store_i64(job, JOB + i, data(argument(call, i)))
    layer = i64(load_i32(load_i64(job, LAYER), 0))
    for i in range(CODES, MIN_STEPS + 1):
        part = argument(call, i - JOB)
        if rank(part) == _STACKED:
            store_i64(job, i, element(part, layer))
    x, codes, out = argument(call, X - JOB), argument(call, CODES - JOB), result(call, 0)
    is_gated = i64(load_i32(load_i64(job, OPTIONS), 0))
    store_i64(job, OUT, data(out))
    tokens = min(max(i64(load_i32(load_i64(job, NUM_ROWS), 0)), i64(0)), size(x, 0))
    store_i64(job, TOKENS, tokens)
    for i in range(tokens * size(out, 1), size(x, 0) * size(out, 1)):
        store_f32(data(out), i, f32(0))
    store_i64(job, COLUMNS, size(x, 1))
    store_i64(job, OUTPUTS, size(out, 1))
    store_i64(job, GATED, is_gated)
    panels = size(codes, -3)
    store_i64(job, PANELS, panels // 2 if is_gated != 0 else panels)
    store_i64(job, NORMED, size(argument(call, NORM - JOB), 0))
    store_i64(job, ADDED, size(argument(call, ADD - JOB), 0))


@njit
def _allocate_activations(job: int) -> int:
    """Allocates memory for quantized activations; returns the address to be freed."""
    tokens, columns = load_i64(job, TOKENS), load_i64(job, COLUMNS)
    groups = columns // _GROUP
    own = not EXACT or load_i64(job, NORMED) != 0
    store_i64(job, WIDTH_A, (4 if EXACT else 2) * columns)
    width = load_i64(job, WIDTH_A) if own else 0
    memory = malloc(tokens * (width + 4 * (columns // BLOCK) + 8 * groups) + 64)
    place = (memory + 63) // 64 * 64
    store_i64(job, ACTIVATIONS, place if own else load_i64(job, X))
    place += tokens * width
    store_i64(job, FACTORS, place)
    place += 4 * tokens * (columns // BLOCK)
    store_i64(job, STARTS, place)
    store_i64(job, SUMS, place + 4 * tokens * groups)
    return memory


def handler(call: int) -> int:
    """Entry point of the custom call."""
    if is_version_query(call):
        return 0
    job = new_job(JOB_SIZE)
    _read_call(call, job)
    memory = _allocate_activations(job)
    tokens, panels, columns = load_i64(job, TOKENS), load_i64(job, PANELS), load_i64(job, COLUMNS)
    threads = num_threads(call)
    if tokens <= _SHARED_ROWS:
        _prepare(job, 0, tokens)
    else:
        # A separate job: a late thread may still read it when the multiplication has begun.
        first = new_job(JOB_SIZE)
        for i in range(JOB, JOB + JOB_SIZE):
            store_i64(first, i, load_i64(job, i))
        store_i64(first, STAGE, _PREPARE)
        run_items(call, first, -(-tokens // _SHARED_ROWS), threads, symbol(_TASK))
        release(first)
    if panels * (columns // BLOCK) * _CODE_BYTES * tokens < _SMALL:
        threads = 1
    blocks_of_rows = -(-tokens // _ITEM_ROWS)
    wanted = max(threads * _ITEMS_PER_THREAD // blocks_of_rows, 1) if threads > 1 else 1
    run = -(-panels // (wanted * _TILE_PANELS)) * _TILE_PANELS
    runs = -(-panels // run)
    store_i64(job, STAGE, _MULTIPLY)
    store_i64(job, RUN, run)
    store_i64(job, RUNS, runs)
    run_items(call, job, runs * blocks_of_rows, threads, symbol(_TASK))
    free(memory)
    release(job)
    return 0
