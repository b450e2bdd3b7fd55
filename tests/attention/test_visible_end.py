"""Rows that see keys behind them: prefix-LMs, images, and what a batch may say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged import ContiguousKVCache, PagedKVCache
from jaxpaged.attention import candidates, paged_attention
from jaxpaged.attention.cases import Case
from jaxpaged.testing.conformance import build_case

S, Q_HEADS, KV_HEADS, DIM = 3, 4, 2, 32
SIZES = {"num_layers": 1, "num_kv_heads": KV_HEADS, "head_dim": DIM, "max_seqs": S}
CACHES = {
    **{
        name: functools.partial(PagedKVCache.create, **SIZES, num_pages=16, page_size=8, implementation=name)
        for name in candidates("cpu")
    },
    **{
        f"contiguous {name}": functools.partial(
            ContiguousKVCache.create, **SIZES, max_length=40, implementation=name
        )
        for name in candidates("cpu")[:-1]
    },
}
LENGTHS = np.array([13, 0, 21])


def rows(num_tokens, seed):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.standard_normal((num_tokens, heads, DIM)), jnp.float32)
        for heads in (Q_HEADS, KV_HEADS, KV_HEADS)
    )


def dense(q, k, v, visible):
    """Attention of all tokens of one sequence, in float64; ``visible bool[T, T]``."""
    k, v = (np.repeat(np.asarray(x, np.float64), Q_HEADS // KV_HEADS, axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", np.asarray(q, np.float64), k) * DIM**-0.5
    weights = np.exp(np.where(visible, scores, -np.inf))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)


@functools.partial(jax.jit, static_argnames=("num_tokens", "window"))
def step(cache, num_new, see, q, k, v, num_tokens, window=None):
    """``see(batch)`` is how far each row sees."""
    cache, batch, _ = cache.reserve(num_new, num_tokens=num_tokens)
    batch = dataclasses.replace(batch, visible_end=see(batch))
    return cache.attend(0, q, k, v, batch, window=window)


@pytest.mark.parametrize("create", CACHES.values(), ids=CACHES)
def test_a_prefix_lm_equals_dense_attention(create):
    """The prompt sees itself both ways, but for its last two tokens; what is decoded then sees all of it."""
    prefix = jax.tree_util.Partial(
        lambda ends, batch: ends[batch.sequence], jnp.asarray(np.maximum(LENGTHS - 2, 0), jnp.int32)
    )
    prompts, decoded = tuple(rows(LENGTHS.sum() + 2, 0)), tuple(rows(2, 1))
    out, cache = step(create(), LENGTHS, prefix, *prompts, num_tokens=LENGTHS.sum() + 2)
    next_out, _ = step(cache, np.array([1, 0, 1]), prefix, *decoded, num_tokens=2)
    for one, start, count in ((0, 0, 13), (1, 13, 21)):
        all_rows = (
            np.concatenate([a[start : start + count], b[one : one + 1]])
            for a, b in zip(prompts, decoded, strict=True)
        )
        at = np.arange(count + 1)
        wanted = dense(*all_rows, at < np.maximum(at + 1, count - 2)[:, None])
        np.testing.assert_allclose(out[start : start + count], wanted[:-1], rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(next_out[one], wanted[-1], rtol=2e-5, atol=2e-5)
    assert not out[LENGTHS.sum() :].any()


@pytest.mark.parametrize("create", CACHES.values(), ids=CACHES)
def test_tokens_of_an_image_see_each_other_and_a_window_limits_what_lies_before(create):
    image, window = slice(5, 17), 6
    q, k, v = rows(21, 2)
    end = np.zeros(21, np.int32)
    end[image] = image.stop
    see = jax.tree_util.Partial(lambda ends, batch: ends, jnp.asarray(end))
    out, _ = step(create(), np.array([21, 0, 0]), see, q, k, v, num_tokens=21, window=window)
    at = np.arange(21)
    visible = (at < np.maximum(at + 1, end)[:, None]) & (at > at[:, None] - window)
    np.testing.assert_allclose(out, dense(q, k, v, visible), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", candidates("cpu"))
def test_vmap_over_how_far_rows_see_equals_a_loop(implementation):
    built = build_case(Case("ahead", Q_HEADS, KV_HEADS, DIM, (37, 20), (20, 1), page_size=8, ahead=True))
    ends = jnp.stack([built.batch.visible_end, built.batch.position + 1, built.batch.visible_end - 9])

    def attend(visible_end):
        batch = dataclasses.replace(built.batch, visible_end=visible_end)
        return paged_attention(
            built.q, built.k_pages, built.v_pages, built.table, batch, implementation=implementation
        )

    found, jitted = jax.jit(jax.vmap(attend))(ends), jax.jit(attend)
    np.testing.assert_allclose(found, jnp.stack([jitted(end) for end in ends]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[0], built.out, rtol=2e-5, atol=2e-5)


def test_a_batch_says_nothing_or_one_number_for_each_row():
    built = build_case(Case("small", Q_HEADS, KV_HEADS, DIM, (9,), (3,), padding=1))
    arguments = built.q, built.k_pages, built.v_pages, built.table
    for wrong, error, message in (
        (jnp.zeros(3, jnp.int32), ValueError, r"visible_end must have shape \(4,\).*got \(3,\)"),
        (jnp.zeros(4), TypeError, "visible_end must be int32, got float32"),
    ):
        with pytest.raises(error, match=message):
            paged_attention(*arguments, dataclasses.replace(built.batch, visible_end=wrong))
    assert built.batch.last_visible is built.batch.position, "causal attention computes nothing more"
    some = dataclasses.replace(built.batch, visible_end=jnp.arange(4, dtype=jnp.int32)).first(2)
    assert some.visible_end.tolist() == [0, 1]
