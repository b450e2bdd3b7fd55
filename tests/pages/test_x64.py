"""64-bit types change neither the types of a cache nor what is computed from it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpaged as ops
from jaxpaged.cache.defragment import seq_defragment
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.pages import allocator, block_table
from jaxpaged.pages.batch import pack
from jaxpaged.pages.formats import PAGE_FORMATS
from jaxpaged.pages.rope import Rope

S, N, PAGE_SIZE, D = 2, 6, 8, 32
INT = np.int64(1)  # what a user's own program passes where 64-bit types are enabled

OPERATIONS: dict[str, Callable[[PagedKVCache], Any]] = {
    "reserve": lambda c: ops.reserve(c, np.array([9, 1]), num_tokens=12),
    "can_reserve": lambda c: (ops.can_reserve(c, np.array([9, 1])), c.can_reserve_each(np.array([9, 1]))),
    "seq_remove": lambda c: ops.seq_remove(c, INT, INT, 2 * INT),
    "seq_copy": lambda c: ops.seq_copy(c, 0 * INT, INT, INT, -INT),
    "seq_keep": lambda c: ops.seq_keep(c, INT),
    "seq_shift": lambda c: ops.seq_shift(c, INT, INT, -INT, INT),
    "seq_reorder": lambda c: ops.seq_reorder(c, np.array([1, 0])),
    "seq_defragment": lambda c: seq_defragment(c, INT),
    "clear": lambda c: ops.clear(c, scrub=True),
    "lengths": lambda c: (c.lengths, ops.seq_position_min(c), ops.seq_position_max(c), c.pages_used),
}


def create(dtype: str) -> PagedKVCache:
    return PagedKVCache.create(
        num_layers=1, num_kv_heads=1, head_dim=D, num_pages=N, max_seqs=S, page_size=PAGE_SIZE, dtype=dtype,
        rope=Rope.create(np.ones(D // 2)),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["f32", "q8_0", "q4_k"])
def test_a_cache_has_the_same_types_with_64_bit_types_enabled(dtype: str) -> None:
    def types() -> Any:
        cache = jax.eval_shape(lambda: create(dtype))
        made = {"create": cache} | {
            name: jax.eval_shape(operation, cache) for name, operation in OPERATIONS.items()
        }
        return jax.tree.map(lambda x: (x.shape, x.dtype), made)

    expected = types()
    with jax.enable_x64(True):
        assert types() == expected


def lines_of_64_bits(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """Lines of the traced program that name an array of 64-bit numbers."""
    with jax.enable_x64(True):
        program = str(jax.make_jaxpr(function)(*arguments))
    return [line.strip() for line in program.splitlines() if re.search(r"\b[iuf]64\[\d", line)]


def test_bookkeeping_makes_no_64_bit_numbers() -> None:
    pages, counts = jnp.zeros(3, jnp.int32), jnp.ones(S, jnp.int32)
    pool, table = allocator.create(N), block_table.create(S, 4, N)
    row, at = block_table.get_row(table, jnp.int32(0)), jnp.int32(1)
    for function, *arguments in (
        (lambda: (allocator.create(N), block_table.create(S, 4, N)),),
        (lambda pool, count: allocator.allocate(pool, count, max_count=3), pool, at),
        (allocator.retain, pool, pages),
        (allocator.release, pool, pages),
        (lambda counts: pack(counts, 9), counts),
        (block_table.position_max, table),
        (block_table.lengths, table),
        (lambda row, at: block_table.remove_range(row, at, at, N), row, at),
        (lambda row, at: block_table.shift_range(row, at, at, at, N), row, at),
        (lambda row, at: block_table.slice_range(row, at, at, N), row, at),
    ):
        assert lines_of_64_bits(function, *arguments) == []


@pytest.mark.parametrize("name", PAGE_FORMATS)
def test_formats_make_no_64_bit_numbers(name: str) -> None:
    storage: Any = PAGE_FORMATS[name]
    rows, at = jnp.ones((3, 1, D)), jnp.zeros(3, jnp.int32)
    slots = jnp.arange(PAGE_SIZE, dtype=jnp.int32)
    for one in (storage, storage.on_lanes(D)):
        pages = one.create(N, 1, PAGE_SIZE, D)
        assert lines_of_64_bits(one.gather, pages, 0 * slots, slots, jnp.int32(1)) == []
        if one.has_residual:
            assert lines_of_64_bits(one.encode, jnp.ones((1, PAGE_SIZE, D))) == []
        else:
            assert lines_of_64_bits(one.write, pages, at, at, rows) == []
            assert lines_of_64_bits(one.read, pages, at, at) == []


@pytest.mark.parametrize("name", ["q8_0", "q4_k"])
def test_codes_are_the_same_with_64_bit_types_enabled(name: str) -> None:
    storage: Any = PAGE_FORMATS[name]
    rows = np.random.default_rng(0).standard_normal((64, PAGE_SIZE, D)).astype(np.float32)
    expected = jax.jit(storage.encode)(rows)
    with jax.enable_x64(True):
        jax.tree.map(np.testing.assert_array_equal, jax.jit(storage.encode)(rows), expected)
