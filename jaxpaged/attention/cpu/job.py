"""Work items of a call of the CPU kernel, and the merge of their results.

A work item is some rows of queries, a KV head and a range of entries. Long sequences are split over
several items, to balance the threads, and partial results merged by their log-sum-exp
(FlashDecoding, arXiv:2311.01282).
"""

from __future__ import annotations

import math

import numpy as np

from jaxpaged.native.ffi import JOB, argument, example_data, num_batch_axes, result, size
from jaxpaged.native.memory import free, load_f32, load_i32, load_i64, malloc, store_f32, store_i64
from jaxpaged.native.tiles import f32, i64, njit, padded

ROWS = 192
"""Rows of an item, counting query heads: a tile of that many rows and its sums stay in the
second-level cache."""
ITEMS_PER_THREAD = 4
"""Number of items per thread, so that threads end together."""
MIN_ITEM_TOKENS = 128
"""Minimum number of tokens of an item: each part of a sequence has to be merged."""
NOTHING = f32(-1e30)
"""Where a running maximum starts: finite, so that no difference of two maxima is NaN."""

# Numbers of a job, by index: addresses of buffers, then sizes.
INPUTS = 27
(
    Q,
    K,
    K_SCALES,
    K_MINIMA,
    K_MORE,
    K_RESIDUAL,
    V,
    V_SCALES,
    V_MINIMA,
    V_MORE,
    V_RESIDUAL,
    STAGING_SLOT,
    FIRST,
    PAGES,
    FIRST_SLOT,
    NUM_TOKENS,
    POSITION,
    ROTATION,
    NUM_ENTRIES,
    CU_Q_LENS,
    Q_POSITION,
    Q_LAST_VISIBLE,
    Q_ROPE,
    SINKS,
    PHASE_STEPS,
    NUMBERS,
    OPTIONS,
) = range(JOB, JOB + INPUTS)
(
    OUT,
    LSE,
    ITEMS,
    PARTS,
    NUM_ITEMS,
    Q_HEADS,
    KV_HEADS,
    DIM,
    V_DIM,
    NUM_PAGES,
    PAGE_SIZE,
    NUM_STAGING_SLOTS,
    ENTRIES,
    HALF,
    WINDOW,
    INTERLEAVED,
    K_KIND,
    V_KIND,
    HADAMARD,
    MAX_ROWS,
) = range(JOB + INPUTS, JOB + INPUTS + 20)
JOB_SIZE = INPUTS + 20
RESIDUAL = K_RESIDUAL - K
"""Index of residual pages relative to the codes of keys or values."""

# Numbers of an item, by index.
SEQ, HEAD, ROW, COUNT, BEGIN, END, SPLITS, PART = range(8)
ITEM = 8


@njit
def visible_entries(job: int, seq: int, first: int, last: int) -> tuple[int, int]:
    """Range of entries of a sequence that queries in rows ``first .. last`` see."""
    entries = load_i64(job, ENTRIES)
    window = load_i64(job, WINDOW)
    positions = load_i64(job, POSITION) + 4 * seq * entries
    counts = load_i64(job, NUM_TOKENS) + 4 * seq * entries
    high = load_i32(load_i64(job, Q_LAST_VISIBLE), last)
    for row in range(first, last):
        high = max(high, load_i32(load_i64(job, Q_LAST_VISIBLE), row))
    end = i64(load_i32(load_i64(job, NUM_ENTRIES), seq))
    while end > 0 and load_i32(positions, end - 1) > high:
        end -= 1
    begin = i64(0)
    if window > 0:
        low = load_i32(load_i64(job, Q_POSITION), first) - window + 1
        while begin < end and load_i32(positions, begin) + load_i32(counts, begin) <= low:
            begin += 1
    return begin, end


@njit
def plan(call: int, job: int, threads: int, example: int) -> int:
    """Reads one example of the call, divides it into items of similar work, and returns their
    number."""
    q, table = argument(call, Q - JOB), argument(call, PAGES - JOB)
    axes = num_batch_axes(q, 3)
    for i in range(INPUTS):
        store_i64(job, JOB + i, example_data(argument(call, i), result(call, 0), axes, example))
    tokens, q_heads, dim = size(q, -3), size(q, -2), size(q, -1)
    v_dim = size(result(call, 0), -1)
    max_seqs, entries = size(table, -2), size(table, -1)
    options = load_i64(job, OPTIONS)
    kv_heads, page_size = i64(load_i32(options, 5)), i64(load_i32(options, 6))
    out = example_data(result(call, 0), result(call, 0), axes, example)
    lse = example_data(result(call, 1), result(call, 0), axes, example)
    store_i64(job, OUT, out)
    store_i64(job, LSE, lse)
    store_i64(job, Q_HEADS, q_heads)
    store_i64(job, KV_HEADS, kv_heads)
    store_i64(job, DIM, dim)
    store_i64(job, V_DIM, v_dim)
    store_i64(job, NUM_PAGES, load_i32(options, 7))
    store_i64(job, PAGE_SIZE, page_size)
    store_i64(job, ENTRIES, entries)
    store_i64(job, HALF, size(argument(call, PHASE_STEPS - JOB), -1))
    store_i64(job, WINDOW, load_i32(options, 0))
    store_i64(job, INTERLEAVED, load_i32(options, 1))
    store_i64(job, K_KIND, load_i32(options, 2))
    store_i64(job, V_KIND, load_i32(options, 3))
    store_i64(job, HADAMARD, load_i32(options, 4))
    store_i64(job, NUM_STAGING_SLOTS, load_i32(options, 8))

    group = q_heads // kv_heads
    block = max(ROWS // group, 1)
    max_rows = min(block, tokens) * group
    store_i64(job, MAX_ROWS, max_rows)

    # Two passes over the blocks: the first sums up the work, the second makes the items.
    cu = load_i64(job, CU_Q_LENS)
    work = i64(0)
    blocks = i64(0)
    for seq in range(max_seqs):
        stop = load_i32(cu, seq + 1)
        for row in range(load_i32(cu, seq), stop, block):
            count = min(block, stop - row)
            begin, end = visible_entries(job, seq, row, row + count - 1)
            work += count * (end - begin)
            blocks += 1
    # Rounded up, so that the memory below holds all items.
    share = max(-(-work * kv_heads // (threads * ITEMS_PER_THREAD)), 1)
    most = blocks * kv_heads + threads * ITEMS_PER_THREAD + 1
    part_floats = max_rows * (padded(v_dim) + 2)
    items = malloc(8 * ITEM * most)
    store_i64(job, ITEMS, items)
    store_i64(job, PARTS, malloc(4 * part_floats * most))
    number = i64(0)
    for seq in range(max_seqs):
        stop = load_i32(cu, seq + 1)
        for row in range(load_i32(cu, seq), stop, block):
            count = min(block, stop - row)
            begin, end = visible_entries(job, seq, row, row + count - 1)
            most_splits = min(end - begin, (end - begin) * page_size // MIN_ITEM_TOKENS)
            splits = max(min(count * (end - begin) // share, most_splits), 1)
            for head in range(kv_heads):
                for split in range(splits):
                    item = items + 8 * ITEM * number
                    store_i64(item, SEQ, seq)
                    store_i64(item, HEAD, head)
                    store_i64(item, ROW, row)
                    store_i64(item, COUNT, count)
                    store_i64(item, BEGIN, begin + (end - begin) * split // splits)
                    store_i64(item, END, begin + (end - begin) * (split + 1) // splits)
                    store_i64(item, SPLITS, splits)
                    store_i64(item, PART, load_i64(job, PARTS) + 4 * part_floats * number)
                    number += 1
    store_i64(job, NUM_ITEMS, number)
    # Padding attends to nothing.
    for row in range(i64(load_i32(cu, max_seqs)), tokens):
        for i in range(row * q_heads * v_dim, (row + 1) * q_heads * v_dim):
            store_f32(out, i, f32(0))
        for i in range(row * q_heads, (row + 1) * q_heads):
            store_f32(lse, i, f32(-np.inf))
    return number


@njit
def finish_row(job: int, token: int, q_head: int, maximum: float, total: float, weighted: int) -> None:
    """Writes a row's output and the logarithm of its denominator from its sums."""
    dim, q_heads = load_i64(job, V_DIM), load_i64(job, Q_HEADS)
    sink = load_f32(load_i64(job, SINKS), q_head)
    scale = f32(1)
    if sink > maximum:
        scale = f32(math.exp(maximum - sink))
        total = total * scale
        maximum = sink
    if sink > f32(-np.inf):
        total = total + f32(math.exp(sink - maximum))
    out = load_i64(job, OUT) + 4 * (token * q_heads + q_head) * dim
    factor = scale / total if total > 0 else f32(0)
    for i in range(dim):
        store_f32(out, i, load_f32(weighted, i) * factor)
    lse = maximum + f32(math.log(total)) if total > 0 else f32(-np.inf)
    store_f32(load_i64(job, LSE), token * q_heads + q_head, lse)


@njit
def merge(job: int) -> None:
    """Merges the parts of split sequences, and frees the memory of ``plan``."""
    items, dim = load_i64(job, ITEMS), load_i64(job, V_DIM)
    group = load_i64(job, Q_HEADS) // load_i64(job, KV_HEADS)
    wide = padded(dim)
    number = i64(0)
    while number < load_i64(job, NUM_ITEMS):
        item = items + 8 * ITEM * number
        splits = load_i64(item, SPLITS)
        number += splits
        if splits == 1:
            continue
        rows = load_i64(item, COUNT) * group
        into = load_i64(item, PART)
        for r in range(rows):
            maximum = NOTHING
            for split in range(splits):
                part = load_i64(item + 8 * ITEM * split, PART)
                maximum = max(maximum, load_f32(part, rows * wide + r))
            total = f32(0)
            for split in range(splits):
                part = load_i64(item + 8 * ITEM * split, PART)
                weight = f32(math.exp(load_f32(part, rows * wide + r) - maximum))
                total += weight * load_f32(part, rows * wide + rows + r)
                for i in range(dim):
                    value = weight * load_f32(part, r * wide + i)
                    if split > 0:
                        value += load_f32(into, r * wide + i)
                    store_f32(into, r * wide + i, value)
            finish_row(
                job,
                load_i64(item, ROW) + r // group,
                load_i64(item, HEAD) * group + r % group,
                maximum,
                total,
                into + 4 * r * wide,
            )
    free(load_i64(job, PARTS))
    free(items)
