"""A transformer of one layer in pure jax.numpy, quick to compile, and the same in numpy without a cache."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged import ContiguousKVCache, LayerGroup, PagedKVCache, Rope

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 97, 32, 4, 2, 8
PAGE_SIZE = 8
traces = itertools.count()
"""Advanced by each trace of ``toy``."""


def toy(params: Any, tokens: jax.Array, cache: Any, batch: Any, rows: jax.Array) -> tuple[jax.Array, Any]:
    """Logits ``f32[R, VOCAB]`` and the cache: the signature that generation calls."""
    next(traces)
    x = params["embedding"][tokens] + jnp.sin(batch.rope_positions[:, None] * params["frequency"])
    q, k, v = (jnp.reshape(x @ params[name], (x.shape[0], -1, HEAD_DIM)) for name in ("q", "k", "v"))
    out, cache = cache.attend(0, q, k, v, batch)
    x = x + out.reshape(x.shape[0], -1) @ params["out"]
    return x[rows] @ params["head"], cache


WINDOW = 12
"""Tokens that the second layer of ``toy_grouped`` sees."""


def toy_grouped(
    params: Any, tokens: jax.Array, cache: Any, batch: Any, rows: jax.Array
) -> tuple[jax.Array, Any]:
    """``toy`` with its layer twice: the first sees everything, the second a window."""
    next(traces)
    x = params["embedding"][tokens] + jnp.sin(batch.rope_positions[:, None] * params["frequency"])
    for layer, window in enumerate((None, WINDOW)):
        q, k, v = (jnp.reshape(x @ params[name], (x.shape[0], -1, HEAD_DIM)) for name in ("q", "k", "v"))
        out, cache = cache.attend(layer, q, k, v, batch, window=window)
        x = x + out.reshape(x.shape[0], -1) @ params["out"]
    return x[rows] @ params["head"], cache


def toy_groups() -> list[LayerGroup]:
    """The layer groups of ``toy_grouped``."""
    return [LayerGroup((0,), KV_HEADS, HEAD_DIM), LayerGroup((1,), KV_HEADS, HEAD_DIM, window=WINDOW)]


def toy_params(seed: int = 0) -> Any:
    """float32 weights; logits differ by a few units and depend on distant tokens."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * 0.4, jnp.float32)

    return {
        "embedding": normal(VOCAB, HIDDEN),
        "frequency": jnp.asarray(rng.uniform(0.05, 1, HIDDEN), jnp.float32),
        "q": normal(HIDDEN, HEADS * HEAD_DIM),
        "k": normal(HIDDEN, KV_HEADS * HEAD_DIM),
        "v": normal(HIDDEN, KV_HEADS * HEAD_DIM),
        "out": normal(HEADS * HEAD_DIM, HIDDEN),
        "head": normal(HIDDEN, VOCAB),
    }


def toy_log_probabilities(
    params: Any, tokens: Sequence[int], windows: Sequence[int | None] = (None,)
) -> np.ndarray:
    """Log-probabilities ``f64[VOCAB]`` of the token after ``tokens``, by a layer for each of ``windows``."""
    p = {name: np.asarray(weight, np.float64) for name, weight in params.items()}
    length = len(tokens)
    at = np.arange(length)
    x = p["embedding"][list(tokens)] + np.sin(at[:, None] * p["frequency"])
    for window in windows:
        q, k, v = ((x @ p[name]).reshape(length, -1, HEAD_DIM) for name in ("q", "k", "v"))
        k, v = (np.repeat(heads, HEADS // KV_HEADS, axis=1) for heads in (k, v))
        distance = at[:, None] - at
        seen = (distance >= 0) & (distance < (window or length))
        weights = np.exp(np.einsum("qhd,khd->hqk", q, k) / np.sqrt(HEAD_DIM)) * seen
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", weights, v).reshape(length, -1) @ p["out"]
    logits = x[-1] @ p["head"]
    return logits - np.log(np.sum(np.exp(logits - logits.max()))) - logits.max()


def paged(max_seqs: int, num_pages: int, max_pages_per_seq: int | None = None) -> PagedKVCache:
    return PagedKVCache.create(
        num_layers=1,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_pages=num_pages,
        max_seqs=max_seqs,
        page_size=PAGE_SIZE,
        max_seq_len=None if max_pages_per_seq is None else (max_pages_per_seq - 1) * PAGE_SIZE,
        rope=Rope.create(()),
    )


def contiguous(max_seqs: int, max_length: int) -> ContiguousKVCache:
    return ContiguousKVCache.create(
        num_layers=1, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, max_seqs=max_seqs, max_length=max_length
    )


def rows_of(result: Any) -> list[list[int]]:
    """Tokens of each row of a result."""
    counts = np.asarray(result.num_tokens)
    return [row[:n].tolist() for row, n in zip(np.asarray(result.tokens), counts, strict=True)]
