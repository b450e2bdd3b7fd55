"""A step under every transformation that a JAX user composes equals the step in a Python loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax
from jax.sharding import PartitionSpec

from jaxpaged import PagedKVCache
from jaxpaged.attention import paged_attention
from jaxpaged.attention.cases import Case
from jaxpaged.testing.conformance import build_case

pytest.importorskip("numba")

Step = Callable[[Any, Array], tuple[Any, Array]]
"""``(state, row) -> (state, out)``"""
STEPS, EXAMPLES = 2, 3


def rows_like(x: Array) -> Array:
    """f32[EXAMPLES, STEPS, *x.shape]"""
    return jax.random.normal(jax.random.key(0), (EXAMPLES, STEPS, *x.shape), jnp.float32)


# --- steps --------------------------------------------------------------------------------------------------


def attention_over(dtype: str) -> tuple[Step, Any, Array]:
    """Each step attends with what the last one returned, plus its row. The state holds the pages and their table."""
    case = Case(
        dtype, num_q_heads=2, num_kv_heads=1, head_dim=32, lengths=(37, 0, 40), q_lens=(1, 0, 2), page_size=32,
        padding=1, dtype=dtype, sinks=dtype == "q8_0", rotary_dim=32,
    )  # fmt: skip
    built = build_case(case)

    def step(state: Any, row: Array) -> tuple[Any, Array]:
        q, *pages = state
        out = paged_attention(q + row, *pages, built.batch, **built.options, implementation="cpu_numba")
        return (out, *pages), out

    return step, (built.q, built.k_pages, built.v_pages, built.table), rows_like(built.q)


def product_with(name: str) -> tuple[Step, Any, Array]:
    from jaxpaged_model.quantized import panels
    from jaxpaged_model.quantized.formats import WEIGHT_FORMATS
    from jaxpaged_model.quantized.layouts import empty_parts
    from jaxpaged_model.quantized.product import product

    size, fmt = 256, WEIGHT_FORMATS[name]
    raw = np.random.default_rng(0).integers(0, 60, (size, size // fmt.file_block * fmt.file_bytes), np.uint8)
    parts = empty_parts("panels", fmt, size, size)
    panels.pack(fmt, raw, parts)
    matrix = {part: jnp.asarray(numbers) for part, numbers in parts.items()}

    def step(state: Any, row: Array) -> tuple[Any, Array]:
        x, matrix = state
        out = jnp.tanh(
            product(x + row, name, matrix, size, norm=(jnp.ones(size, jnp.float32), 1e-5), add=row)
        )
        return (out, matrix), out

    x = jnp.ones((3, size), jnp.float32)
    return step, (x, matrix), rows_like(x)


def token_of_each(dtype: str) -> tuple[Step, Any, Array]:
    """A decode step of a cache with two sequences: reserve, write, attend."""
    cache = PagedKVCache.create(
        num_layers=1, num_kv_heads=1, head_dim=32, page_size=32, num_pages=3, max_seqs=2, dtype=dtype
    )

    def step(cache: PagedKVCache, row: Array) -> tuple[PagedKVCache, Array]:
        cache, batch, _ = cache.reserve(jnp.ones(2, jnp.int32), num_tokens=2)
        out, cache = cache.attend(0, row, row[:, :1], row[:, 1:], batch)
        return cache, out

    return step, cache, rows_like(jnp.ones((2, 2, 32), jnp.float32))


# --- transformations ----------------------------------------------------------------------------------------


def loop(step: Step, state: Any, rows: Array) -> Array:
    outs = []
    for row in rows:
        state, out = step(state, row)
        outs.append(out)
    return jnp.stack(outs)


def scan(step: Step, state: Any, rows: Array) -> Array:
    return lax.scan(step, state, rows)[1]


def while_loop(step: Step, state: Any, rows: Array) -> Array:
    """The number of steps is data, so that ``vmap`` batches the condition."""
    steps = jnp.sum(jnp.isfinite(rows.reshape(len(rows), -1)[:, 0]), dtype=jnp.int32)

    def body(carry: tuple[Array, Any, Array]) -> tuple[Array, Any, Array]:
        i, state, outs = carry
        state, out = step(state, rows[i])
        return i + 1, state, outs.at[i].set(out)

    out = jax.eval_shape(step, state, rows[0])[1]
    outs = jnp.zeros((STEPS, *out.shape), out.dtype)
    return lax.while_loop(lambda carry: carry[0] < steps, body, (jnp.int32(0), state, outs))[2]


def conditional(step: Step) -> Step:
    def skip(state: Any, row: Array) -> tuple[Any, Array]:
        return state, jnp.zeros_like(jax.eval_shape(step, state, row)[1])

    return lambda state, row: lax.cond(jnp.isfinite(row.ravel()[0]), step, skip, state, row)


def mapped(step: Step, state: Any, rows: Array) -> Array:
    """``lax.map`` has no carry: it runs two equal sequences of steps."""
    return lax.map(lambda rows: loop(step, state, rows), jnp.stack([rows, rows]))[1]


def shard_map(step: Step, state: Any, rows: Array) -> Array:
    run = jax.shard_map(
        partial(scan, step),
        mesh=jax.make_mesh((1,), ("x",)),
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
    )
    return run(state, rows)


TRANSFORMED = {
    "scan": scan,
    "while": while_loop,
    "cond": lambda step, *args: loop(conditional(step), *args),
    "map": mapped,
    "jit": lambda step, *args: loop(jax.jit(step), *args),
    "checkpoint": lambda step, *args: loop(jax.checkpoint(step), *args),
    "shard_map": shard_map,
}


STEPS_OF = {
    "f32": partial(attention_over, "f32"),
    "q8_0": partial(attention_over, "q8_0"),
    "kivi4": partial(attention_over, "kivi4"),
    "weights": partial(product_with, "Q8_0"),
    "f32 cache": partial(token_of_each, "f32"),
    "q8_0 cache": partial(token_of_each, "q8_0"),
    "kivi4 cache": partial(token_of_each, "kivi4"),
}


@functools.cache
def expected(kind: str) -> np.ndarray:
    """Outputs of a loop over jitted steps, of each example; 64-bit numbers are off."""
    step, state, rows = STEPS_OF[kind]()
    jitted = jax.jit(step)
    return np.stack([loop(jitted, state, one) for one in rows])


def stacked(state: Any) -> Any:
    return jax.tree.map(lambda x: jnp.stack([x] * EXAMPLES), state)


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("kind", [kind for kind in STEPS_OF if "cache" not in kind])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_transformed_custom_call_equals_a_loop(name, kind, x64):
    wanted = expected(kind)
    with jax.enable_x64(x64):
        step, state, rows = STEPS_OF[kind]()
        run = jax.jit(partial(TRANSFORMED[name], step))
        for outs in (jax.vmap(run)(stacked(state), rows), jax.vmap(run, (None, 0))(state, rows)):
            np.testing.assert_allclose(outs, wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(run(state, rows[0]), wanted[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("kind", [kind for kind in STEPS_OF if "cache" in kind])
def test_a_transformed_step_of_a_cache_equals_a_loop(kind, x64):
    """``vmap`` of a loop of conditional, checkpointed steps that reserve, write and attend."""
    wanted = expected(kind)
    with jax.enable_x64(x64):
        step, cache, rows = STEPS_OF[kind]()
        run = jax.jit(jax.vmap(partial(while_loop, conditional(jax.checkpoint(step)))))
        np.testing.assert_allclose(run(stacked(cache), rows), wanted, rtol=1e-5, atol=1e-5)
