"""The kernel of paged attention on Hopper GPUs; ``gpu_plan.py`` has the sizes that it is built for.

Its unit of work is an *item*: up to 64 rows of one KV head, a row being one query head of one
query, so that the heads that share a KV head share its tile (GQA packing). 64 is the M of a Hopper
``wgmma``. An item walks the pages of its sequence in steps of 64 tokens; where items do not fill
the GPU, the steps of each are split over several blocks (split-KV).

A step: ask the copy engine (TMA) for the pages of a step to come, wait for this step's, ``S = q
k^T`` on the tensor cores, mask, online softmax in float32, ``sum += p v`` on the tensor cores. One
warpgroup does all of it; a second block on the same multiprocessor works while it waits. Heads
above 128 have two warpgroups, which compute the same scores and share the columns of the values.

Of quantized pages the copies bring codes, and the warpgroup makes a tile of float16 of them before
each product (``gpu_quantized.py``): of keys, and when their scores are there, in the same place, of
values.

The weights pass through shared memory, although a wgmma could take them from registers, and sums
are added to a fresh product instead of in place, although a wgmma could accumulate: Pallas' GPU
interpreter can do neither, and the kernel that is tested on a CPU is the one that ships.
``docs/internals/kernels_gpu.md`` has what that costs.

Sources: FlashAttention-3, arXiv:2407.08608 (wgmma, TMA); Flash-Decoding (split-KV); online softmax,
arXiv:1805.02867.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from jaxpaged.attention.base import NOWHERE, Config, Pages
from jaxpaged.attention.gpu.quantized import (
    BLOCK,
    WORD,
    Code,
    as_words,
    chunks,
    dequantize,
    hadamard_signs,
    load,
)
from jaxpaged.attention.gpu.tile_config import ROWS, STEP_TOKENS, Plan
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.formats import BlockPages

_LOWEST = -1e30
"""Where a running maximum starts: finite, so that no difference of two maxima is NaN."""
_COPY_LENGTH = 256
"""Elements that one copy brings along an axis, at most."""
_CHUNK = 64
"""Columns of queries or values that are in registers at a time."""
_LOG2_E = math.log2(math.e)


def split_terms(x: Array, dtype: DTypeLike, terms: int) -> list[Array]:
    """``terms`` arrays of a shorter dtype that add up to x."""
    parts = [x.astype(dtype)]
    for _ in range(terms - 1):
        x = x.astype(jnp.float32) - parts[-1].astype(jnp.float32)
        parts.append(x.astype(dtype))
    return parts


def attend(
    tiles: Array,
    k_pages: Pages,
    v_pages: Pages,
    table: BlockTable,
    items: Array,
    row_positions: Array,
    turns: Array | None,
    config: Config,
    plan: Plan,
    interpret: Any,
) -> tuple[Array, Array]:
    """Runs the kernel.

    Args:
      tiles: [terms, KV, I * item_rows + 64, D] in ``plan.dtype``, the queries; with ``turns`` [2 *
        terms, KV, ...], behind them the queries turned by 90 degrees. Where keys are stored under a
        Hadamard turn, [3 * terms, KV, ...]: the queries under it, and both without. For quantized
        pages in the order of columns (``to_columns``).
      k_pages, v_pages: [N, KV, page_size, D], of values Dv.
      items: i32[I, 5], of each item its sequence, first unit, the unit behind its last, the frame
        of its queries, and the layer's first page.
      row_positions: i32[1 or 2, I, 64], the last position that each row sees, and the row's own if
        it is another; -1 where there is no row.
      turns: i32[D], turns a position of each dimension in units of 2**-32, in the order of
        ``tiles``; None where no key was ever shifted.
      interpret: as ``plgpu.kernel`` has it.

    Returns:
      ``(out f32[splits, I, KV, item_rows, Dv], lse f32[splits, I, KV, 64])``, lse in base 2, -inf
      for a row or a split that saw nothing; its out is then undefined. The columns of out are those
      of the values' tile.
    """
    num_kv_heads, _, head_dim = k_pages.shape[1:]
    dtype = plan.dtype
    columns, v_columns = head_dim // plan.warpgroups, plan.v_head_dim // plan.warpgroups
    width = plan.swizzle // dtype.itemsize
    tiled = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(plan.swizzle))
    out_width = plan.swizzle // 4
    out_tiled = (plgpu.TilingTransform((8, out_width)), plgpu.SwizzleTransform(plan.swizzle))

    def ring(code: Code | None, columns: int) -> Any:
        """Buffers for the pages of all steps in flight, separate for each warpgroup's columns."""
        width, of = (columns, dtype) if code is None else (columns // code.per_word, WORD)
        return plgpu.SMEM((plan.stages, plan.warpgroups, STEP_TOKENS, width), of, transforms=tiled)

    k_code, v_code = plan.codes or (None, None)
    out = plgpu.SMEM((plan.warpgroups, ROWS, v_columns), jnp.float32, transforms=out_tiled)
    tile = plgpu.SMEM((1, plan.warpgroups, STEP_TOKENS, columns), dtype, transforms=tiled)
    scratch: dict[str, Any] = {
        "q": plgpu.SMEM((plan.terms, ROWS, head_dim), dtype, transforms=tiled),
        "p": plgpu.SMEM((plan.warpgroups, plan.terms, ROWS, STEP_TOKENS), dtype, transforms=tiled),
        "v": ring(v_code, v_columns),
        # The result lies where keys lay: all of them are read by then.
        "k_or_out": plgpu.RefUnion([ring(k_code, columns), *([] if plan.codes is None else [tile])], out),
        "lse": plgpu.SMEM((ROWS,), jnp.float32),
        "q_barrier": plgpu.Barrier(num_arrivals=plan.terms),
        "all_barrier": plgpu.Barrier(num_arrivals=plan.warpgroups),
    }
    pools: tuple[Any, ...] = k_pages, v_pages
    arrivals = plan.units * plan.warpgroups
    factor_arrivals, hadamard = 0, False
    if isinstance(k_pages, BlockPages) and isinstance(v_pages, BlockPages):
        assert plan.codes is not None
        hadamard = k_pages.format.hadamard
        factors = [
            pages.parts[name].reshape(*pages.shape[:2], -1)
            for pages, code in zip((k_pages, v_pages), plan.codes, strict=True)
            for name in code.factors
        ]
        pools = *(as_words(pages.parts["codes"]) for pages in (k_pages, v_pages)), *factors
        blocks = head_dim // BLOCK
        scratch["factors"] = plgpu.SMEM((plan.stages, len(factors) * STEP_TOKENS * blocks), dtype)
        scratch["block_factors"] = plgpu.SMEM((plan.warpgroups, len(factors), STEP_TOKENS, blocks), dtype)
        factor_arrivals = plan.units * len(factors) * len(chunks(plan.unit_tokens * blocks, _COPY_LENGTH))
    scratch["k_barrier"] = plgpu.Barrier(num_arrivals=arrivals + factor_arrivals, num_barriers=plan.stages)
    scratch["v_barrier"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=plan.stages)
    body = functools.partial(
        _attend_item, config=config, plan=plan, has_rope=turns is not None, hadamard=hadamard
    )
    shape = (plan.num_splits, plan.num_items, num_kv_heads)
    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((*shape, plan.item_rows, plan.v_head_dim), jnp.float32),
            jax.ShapeDtypeStruct((*shape, ROWS), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(plan.num_items, num_kv_heads, plan.num_splits),
        grid_names=("item", "kv_head", "split"),
        num_threads=plan.warpgroups,
        thread_name="warpgroup",
        kernel_name="paged_attention",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
    )
    entries = table.pages, table.first_slot, table.num_tokens, table.position, table.rotation
    with jax.enable_x64(False):  # as 64-bit integers, loop counters would not meet 32-bit ones
        return kernel(tiles, items, row_positions, *entries, *pools, *(() if turns is None else (turns,)))


def _attend_item(
    tiles: Any,
    items: Any,
    row_positions: Any,
    pages: Any,
    first_slots: Any,
    counts: Any,
    positions: Any,
    rotations: Any,
    *refs: Any,
    q: Any,
    p: Any,
    v: Any,
    k_or_out: Any,
    lse: Any,
    q_barrier: Any,
    k_barrier: Any,
    v_barrier: Any,
    all_barrier: Any,
    factors: Any = None,
    block_factors: Any = None,
    config: Config,
    plan: Plan,
    has_rope: bool,
    hadamard: bool,
) -> None:
    """One item, one KV head, one split; the body of the kernel. Arguments are references."""
    k_pages, v_pages, *factor_pages = refs[: 2 + plan.num_factors]
    *turns, out_gmem, lse_gmem = refs[2 + plan.num_factors :]
    (k, *tile), out = k_or_out
    numbers: Any = tile[0] if tile else None
    item, kv_head, split, warpgroup = (
        lax.axis_index(name) for name in ("item", "kv_head", "split", "warpgroup")
    )
    leads = warpgroup == 0
    head_dim, dtype = q.shape[-1], q.dtype
    wgmma, rows_of, columns_of = (
        plgpu.Layout.WGMMA,
        plgpu.Layout.WGMMA.reduce(1),
        plgpu.Layout.WGMMA.reduce(0),
    )
    columns, v_columns = head_dim // plan.warpgroups, plan.v_head_dim // plan.warpgroups

    sequence, begin, end, frame, first_page = (items[item, i] for i in range(5))
    rows = pl.ds(item * plan.item_rows, ROWS)
    steps = lax.div(end - begin + (plan.units - 1), plan.units)
    share = lax.div(steps + (plan.num_splits - 1), plan.num_splits)
    first_step = split * share
    num_steps = jnp.minimum(first_step + share, steps) - first_step

    def unit_of(step: Array, j: int) -> Array:
        return begin + (first_step + step) * plan.units + j

    def load_step(step: Array) -> None:
        """Starts the copies of a step's units. What a unit is in memory is known here alone."""
        slot = lax.rem(step, plan.stages)
        for j in range(plan.units):
            # Behind the last unit it is read once more, out of the cache, and masked: no copy has a condition.
            unit = jnp.minimum(unit_of(step, j), end - 1)
            page = first_page + pages[sequence, lax.div(unit, plan.parts)]
            place = lax.rem(unit, plan.parts)
            tokens = pl.ds(place * plan.unit_tokens, plan.unit_tokens)
            target = pl.ds(j * plan.unit_tokens, plan.unit_tokens)
            for pool, ring, barrier in ((k_pages, k, k_barrier), (v_pages, v, v_barrier)):
                for part, chunk in enumerate(chunks(pool.shape[-1], ring.shape[-1])):
                    source = pool.at[page, kv_head, tokens, chunk]
                    plgpu.copy_gmem_to_smem(source, ring.at[slot, part, target], barrier.at[slot])
            # Those of values come with the keys, to be laid out in one go.
            for i, pool in enumerate(factor_pages):
                size = pool.shape[-1] // plan.parts
                for chunk in chunks(size, _COPY_LENGTH):
                    source = pool.at[page, kv_head, pl.ds(place * size + chunk.start, chunk.size)]
                    place_of_unit = pl.ds((i * plan.units + j) * size + chunk.start, chunk.size)
                    plgpu.copy_gmem_to_smem(source, factors.at[slot, place_of_unit], k_barrier.at[slot])

    def join() -> None:
        """Waits until every warpgroup of the block is here."""
        if plan.warpgroups > 1:
            plgpu.barrier_arrive(all_barrier)
            plgpu.barrier_wait(all_barrier)

    def here(number: Array) -> Array:
        """0, but any number for all that the compiler knows.

        Addresses that depend on it are computed where they are needed. Those of a product's
        operands are many and stay the same from step to step: all of them were kept in registers,
        10 to 30 a thread.
        """
        return lax.optimization_barrier(number * 0)

    def sum_of(terms: list[Any]) -> Array:
        """f32[64, columns]: the sum of the terms that references hold."""
        return functools.reduce(jnp.add, [load(term, wgmma).astype(jnp.float32) for term in terms])

    def set_queries(chunk: Any, x: Array) -> None:
        for term, part in enumerate(split_terms(x, dtype, plan.terms)):
            q[term, :, chunk] = part

    def rotate_queries(angle: Array) -> None:
        """Rotates the queries by ``angle`` positions."""
        join()  # the queries' readers are done
        unturned = plan.terms if hadamard else 0
        for i, chunk in enumerate(chunks(head_dim, _CHUNK)):

            def part(first: int, chunk: Any = chunk) -> Array:
                # Rare: read from global memory, as a second tile does not fit in shared memory.
                return sum_of([tiles.at[first + term, kv_head, rows, chunk] for term in range(plan.terms)])

            @pl.when(warpgroup == i % plan.warpgroups)
            def _(chunk: Any = chunk, part: Any = part) -> None:
                straight, across = part(unturned), part(unturned + plan.terms)
                turn = load(turns[0].at[chunk], columns_of) * angle
                radians = turn.astype(jnp.float32) * (2 * math.pi / 2**32)
                cos, sin = (lax.broadcast_in_dim(f(radians), straight.shape, [1]) for f in (jnp.cos, jnp.sin))
                set_queries(chunk, straight * cos + across * sin)

        if hadamard:
            hadamard_transform_queries(angle)
        plgpu.commit_smem()
        join()

    def hadamard_transform_queries(angle: Array) -> None:
        """Multiplies the queries by Hadamard's matrix, in place.

        The matrix is a product (Kronecker's) of one for the columns of a chunk, which lies where
        weights do and is multiplied with, and of log2(head_dim / 64) for pairs of chunks, sums and
        differences. That columns are no dimensions makes no difference: their order permutes the
        bits of numbers, and the matrix stays the same then.
        """
        p[warpgroup, 0] = hadamard_signs(_CHUNK)
        plgpu.commit_smem()
        near, places = here(angle), chunks(head_dim, _CHUNK)
        for i, chunk in enumerate(places):

            def product(acc: Any, chunk: Any = chunk) -> Array:
                for term in range(plan.terms):
                    plgpu.wgmma(acc, q.at[near + term, :, chunk], p.at[warpgroup, near])
                return acc[...]

            @pl.when(warpgroup == i % plan.warpgroups)
            def _(chunk: Any = chunk, product: Any = product) -> None:
                turned = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((ROWS, _CHUNK), jnp.float32))
                set_queries(chunk, turned * _CHUNK**-0.5)

        for distance in (1, 2)[: (len(places) - 1).bit_length()]:
            join()
            pairs = [(i, i + distance) for i in range(len(places)) if not i & distance]
            for i, pair in enumerate(pairs):

                @pl.when(warpgroup == i % plan.warpgroups)
                def _(pair: tuple[int, int] = pair) -> None:
                    low, high = (
                        sum_of([q.at[term, :, places[one]] for term in range(plan.terms)]) for one in pair
                    )
                    set_queries(places[pair[0]], (low + high) * 0.5**0.5)
                    set_queries(places[pair[1]], (low - high) * 0.5**0.5)

    def dequantize_pages(which: int, ring: Any, slot: Array, live: Array | None) -> None:
        """Puts keys (0) or values (1) where ``numbers`` are, each warpgroup its columns."""
        assert plan.codes is not None
        code, first = plan.codes[which], which * len(plan.codes[0].factors)
        mine = pl.ds(warpgroup * (columns // BLOCK), columns // BLOCK)
        of_blocks = [block_factors.at[warpgroup, i, :, mine] for i in range(first, first + len(code.factors))]
        width = plan.swizzle // dtype.itemsize
        dequantize(ring.at[slot, warpgroup], of_blocks, numbers.at[here(slot), warpgroup], code, width, live)
        plgpu.commit_smem()

    def multiply_keys(slot: Array) -> Array:
        near = here(slot)
        keys = k.at[slot] if plan.codes is None else numbers.at[near]

        def product(acc: Any) -> Array:
            for term in range(plan.terms):
                for part, chunk in enumerate(chunks(head_dim, columns)):
                    plgpu.wgmma(acc, q.at[near + term, :, chunk], keys.at[part].transpose((1, 0)))
            return acc[...]

        return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((ROWS, STEP_TOKENS), jnp.float32))

    def multiply_turned_keys(step: Array, slot: Array, turned: Array) -> tuple[Array, Array]:
        """Scores of units that may have several rotation offsets; ``turned`` is that of the
        queries."""
        rotation = [
            rotations[sequence, lax.div(jnp.minimum(unit_of(step, j), end - 1), plan.parts)]
            for j in range(plan.units)
        ]
        uniform = functools.reduce(jnp.logical_and, [r == rotation[0] for r in rotation])
        column = plgpu.broadcasted_iota(jnp.int32, (ROWS, STEP_TOKENS), 1, layout=wgmma)

        def attend_unit(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            scores, turned = carry
            target = rotation[0]
            for i in range(1, plan.units):
                target = jnp.where(j == i, rotation[i], target)
            pl.when(target != turned)(lambda: rotate_queries(target - frame))
            return jnp.where(column >= j * plan.unit_tokens, multiply_keys(slot), scores), target

        zeros = plgpu.layout_cast(jnp.zeros((ROWS, STEP_TOKENS), jnp.float32), wgmma)
        return lax.fori_loop(0, jnp.where(uniform, 1, plan.units), attend_unit, (zeros, turned))

    @pl.when((num_steps > 0) & leads)
    def _() -> None:
        for step in range(plan.stages - 1):
            pl.when(step < num_steps)(functools.partial(load_step, jnp.int32(step)))
        for term in range(plan.terms):
            plgpu.copy_gmem_to_smem(tiles.at[term, kv_head, rows], q.at[term], q_barrier)

    pl.when(num_steps > 0)(lambda: plgpu.barrier_wait(q_barrier))

    last_visible, *own_position = (
        load(row_positions.at[i, item], rows_of) for i in range(row_positions.shape[0])
    )

    def attend_step(step: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        turned, maximum, denominator, weighted = carry
        slot = lax.rem(step, plan.stages)
        ahead = step + (plan.stages - 1)
        join()  # the last step's pages have been read; their buffer is free
        pl.when((ahead < num_steps) & leads)(functools.partial(load_step, ahead))

        # Which columns of the step are tokens, lower <= column < upper, and at which positions.
        spans = []
        for j in range(plan.units):
            unit = unit_of(step, j)
            entry = lax.div(jnp.minimum(unit, end - 1), plan.parts)
            # Slots of the entry's page, counted from the first column of the step.
            first = (
                first_slots[sequence, entry]
                - lax.rem(unit, plan.parts) * plan.unit_tokens
                + j * plan.unit_tokens
            )
            lower = jnp.maximum(first, j * plan.unit_tokens)
            upper = jnp.minimum(first + counts[sequence, entry], (j + 1) * plan.unit_tokens)
            spans.append((lower, jnp.where(unit < end, upper, lower), positions[sequence, entry] - first))
        column = plgpu.broadcasted_iota(jnp.int32, (STEP_TOKENS,), 0, layout=columns_of)
        key_position = jnp.full_like(column, NOWHERE)
        for lower, upper, offset in spans:
            key_position = jnp.where((column >= lower) & (column < upper), column + offset, key_position)

        plgpu.barrier_wait(k_barrier.at[slot])
        if plan.codes is not None:
            # From a row that a copy can bring to one that is read a block at a time.
            block_factors[warpgroup] = factors[slot].reshape(block_factors.shape[1:])
            dequantize_pages(0, k, slot, None)
            join()  # each has put its columns
        if has_rope:
            scores, turned = multiply_turned_keys(step, slot, turned)
        else:
            scores = multiply_keys(slot)
        if config.soft_cap is None:
            scores *= config.scale * _LOG2_E
        else:
            # tanh(x) = 1 - 2 / (1 + exp(2 x)): the GPU's own tanh is right to 11 bits.
            exponential = jnp.exp2(scores * (2 * config.scale / config.soft_cap * _LOG2_E))
            scores = (config.soft_cap * _LOG2_E) * (1 - 2 / (1 + exponential))
        key = lax.broadcast_in_dim(key_position, scores.shape, [1])
        row = lax.broadcast_in_dim(last_visible, scores.shape, [0])
        visible = key <= row
        if config.window is not None:
            if own_position:
                row = lax.broadcast_in_dim(own_position[0], scores.shape, [0])
            visible &= key > row - config.window
        scores = jnp.where(visible, scores, -jnp.inf)

        new_maximum = jnp.maximum(maximum, scores.max(axis=1))
        rescale = jnp.exp2(maximum - new_maximum)
        weights = jnp.exp2(scores - lax.broadcast_in_dim(new_maximum, scores.shape, [0]))
        denominator = denominator * rescale + weights.sum(axis=1)
        for term, part in enumerate(split_terms(weights, dtype, plan.terms)):
            p[warpgroup, term] = part
        plgpu.barrier_wait(v_barrier.at[slot])

        def live_tokens() -> Array:
            token = plgpu.broadcasted_iota(jnp.int32, (STEP_TOKENS,), 0, layout=rows_of)
            return functools.reduce(jnp.logical_or, [(token >= low) & (token < u) for low, u, _ in spans])

        # A weight of zero does not undo a NaN: the values of unused slots are 0.
        if plan.codes is None:

            @pl.when(functools.reduce(jnp.logical_or, [u - low < plan.unit_tokens for low, u, _ in spans]))
            def _() -> None:
                live = live_tokens()
                for chunk in chunks(v_columns, _CHUNK):
                    values = load(v.at[slot, warpgroup, :, chunk], wgmma)
                    v[slot, warpgroup, :, chunk] = jnp.where(
                        lax.broadcast_in_dim(live, values.shape, [0]), values, 0
                    )

        else:
            join()  # all have read the keys; the values overwrite them
            dequantize_pages(1, v, slot, live_tokens())
        plgpu.commit_smem()
        values = v.at[slot, warpgroup] if plan.codes is None else numbers.at[here(slot), warpgroup]

        def product(acc: Any) -> Array:
            for term in range(plan.terms):
                plgpu.wgmma(acc, p.at[warpgroup, term], values)
            return acc[...]

        added = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((ROWS, v_columns), jnp.float32))
        weighted = weighted * lax.broadcast_in_dim(rescale, weighted.shape, [0]) + added
        return turned, new_maximum, denominator, weighted

    nothing = (
        frame,
        plgpu.layout_cast(jnp.full((ROWS,), _LOWEST, jnp.float32), rows_of),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), rows_of),
        plgpu.layout_cast(jnp.zeros((ROWS, v_columns), jnp.float32), wgmma),
    )
    _, maximum, denominator, weighted = lax.fori_loop(0, num_steps, attend_step, nothing)
    seen = denominator > 0
    safe = jnp.where(seen, denominator, 1)

    @pl.when(leads)
    def _() -> None:
        lse[...] = jnp.where(seen, maximum + jnp.log2(safe), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(lse, lse_gmem.at[split, item, kv_head])

    @pl.when(num_steps > 0)
    def _() -> None:
        join()  # the keys have been read; the result overwrites them
        out[warpgroup] = weighted / lax.broadcast_in_dim(safe, weighted.shape, [0])
        plgpu.commit_smem()
        written = pl.ds(0, plan.item_rows)
        target = out_gmem.at[split, item, kv_head, :, pl.ds(warpgroup * v_columns, v_columns)]
        plgpu.copy_smem_to_gmem(out.at[warpgroup, written], target)

    plgpu.wait_smem_to_gmem(0)
