"""Models without files, caches filled with random keys and values, and the rates of generating from them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxpaged_model.config import ModelConfig

from jaxpaged import ContiguousKVCache, PagedKVCache
from jaxpaged.generation.stream import GenerateStream
from jaxpaged.pages.formats import BlockPages, ResidualFormat

_QWEN3 = {"rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "qk_norm": "head"}
# vocab_size, hidden_size, intermediate_size, num_layers, num_q_heads, num_kv_heads, head_dim, context_length
_SIZES = {
    "SmolLM2-135M": (49152, 576, 1536, 30, 9, 3, 64, 8192),
    "Qwen3-0.6B": (151936, 1024, 3072, 28, 16, 8, 128, 40960),
    "Llama-3-8B": (128256, 4096, 14336, 32, 32, 8, 128, 8192),
    "Qwen3-8B": (151936, 4096, 12288, 36, 32, 8, 128, 40960),
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {"rope_theta": 100000.0, "tie_embeddings": True},
    "Qwen3-0.6B": {**_QWEN3, "tie_embeddings": True},
    "Llama-3-8B": {"rope_theta": 500000.0},
    "Qwen3-8B": _QWEN3,
}
MODEL_SHAPES = {
    name: ModelConfig(
        "qwen3" if name.startswith("Qwen3") else "llama",
        *sizes,
        name=f"{name} shape, random weights",
        **_OPTIONS[name],
    )
    for name, sizes in _SIZES.items()
}
"""Models with random weights, for benchmarks that need no file."""
SMOLLM2_135M = MODEL_SHAPES["SmolLM2-135M"]


GEMMA_3_270M = ModelConfig(
    "gemma3", 32768, 640, 2048, 18, 4, 1, 256, 32768, name="Gemma 3 270M shape, random weights",
    rms_norm_eps=1e-6, rope_theta=1e6, window_rope_theta=1e4, tie_embeddings=True, qk_norm="head", norms="both",
    activation="gelu_tanh", embedding_scale=float(np.float32(640**0.5)),
    windows=tuple(None if i % 6 == 5 else 1024 for i in range(18)),
)  # fmt: skip
"""Layers of Gemma 3 270M, with the window of its larger siblings and a smaller vocabulary."""


def write_random_model(
    path: Path, config: ModelConfig, quantization: Literal["F32", "F16", "Q8_0"] = "Q8_0"
) -> None:
    """Writes a GGUF file of random weights, with the embedded model's tokenizer."""
    from jaxpaged_model import tiny
    from jaxpaged_model.checkpoint.export import write_gguf
    from jaxpaged_model.checkpoint.gguf_file import GGUFFile
    from jaxpaged_model.llama import random_params

    metadata = {k: v for k, v in GGUFFile(tiny.PATH).metadata.items() if k.startswith("tokenizer.")}
    missing = config.vocab_size - len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += [f"<unused{i}>" for i in range(missing)]
    metadata["tokenizer.ggml.token_type"] += [5] * missing
    write_gguf(path, config, random_params(config), quantization=quantization, tokenizer_metadata=metadata)


def noise(pool: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """Array of normal random numbers in the shape of ``pool``; a block of four pages, repeated."""
    return _noise(pool.shape, pool.dtype)


@partial(jax.jit, static_argnums=(0, 1))
def _noise(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    block = jax.random.normal(jax.random.key(0), (min(shape[0], 4), *shape[1:]), jnp.float32).astype(dtype)
    repeats = -(-shape[0] // len(block))
    return jnp.broadcast_to(block, (repeats, *block.shape)).reshape(-1, *shape[1:])[: shape[0]]


def with_noise(cache: Any) -> Any:
    """Replaces all keys and values of ``cache`` by random ones; residual formats hold finalized pages alone."""
    pools = ("k_pages", "v_pages") if cache.kind == "paged" else ("k", "v")
    return dataclasses.replace(cache, **{p: _noisy(getattr(cache, p)) for p in pools})


def _noisy(pages: Any) -> Any:
    if not isinstance(pages, BlockPages):
        return noise(pages)
    num_pages, num_kv_heads, page_size, head_dim = pages.shape
    few = min(num_pages, 4)
    rows = jax.random.normal(jax.random.key(0), (few, page_size, num_kv_heads, head_dim))
    if isinstance(pages.format, ResidualFormat):
        made = pages.format.encode(rows.swapaxes(1, 2))
    else:
        page, slot = jnp.divmod(jnp.arange(few * page_size), page_size)
        block = pages.format.create(few, num_kv_heads, page_size, head_dim)
        made = pages.format.write(block, page, slot, rows.reshape(-1, *rows.shape[2:])).parts
    repeats = -(-num_pages // few)
    parts = {
        name: jnp.tile(part, (repeats,) + (1,) * (part.ndim - 1))[:num_pages] for name, part in made.items()
    }
    return dataclasses.replace(pages, parts=parts)


@partial(jax.jit, static_argnames="num_tokens", donate_argnames="cache")
def fill(cache: Any, depth: jax.Array, num_tokens: int) -> tuple[Any, jax.Array]:
    """Reserves ``depth i32[S]`` tokens in an empty cache, whose values stay; returns ``(cache, ok)``, cache donated."""
    cache, _, ok = cache.reserve(depth, num_tokens=num_tokens)
    return cache, ok


def make_cache(
    kind: str,
    config: ModelConfig,
    batch: int,
    context: int,
    page_size: int = 32,
    dtype: str = "f32",
    **formats: str,
) -> Any:
    """Creates an empty "paged" or "contiguous" cache for ``batch`` sequences of ``context`` tokens.

    ``formats``: options of ``create``, such as ``k_dtype``.
    """
    shape: dict[str, Any] = {**config.cache_spec, "max_seqs": batch, "dtype": dtype, **formats}
    if kind == "contiguous":
        return ContiguousKVCache.create(**shape, max_length=context)
    pages = -(-context // page_size)
    return PagedKVCache.create(**shape, page_size=page_size, num_pages=batch * pages, max_seq_len=context)


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays, or shapes of arrays, of a pytree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def prompts_of(config: ModelConfig, batch: int, length: int) -> list[list[int]]:
    """``batch`` equal prompts of ``length`` tokens."""
    return [(np.arange(length) % min(250, config.vocab_size)).tolist()] * batch


# --- rates --------------------------------------------------------------------------------------------------


class Pool:
    """One cache, lent to one stream after another; each leaves it empty."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def lend(self, stream: Any, measure: Callable[[Any], float]) -> float:
        stream.cache = self.cache
        rate = measure(stream)
        self.cache = stream.cache
        return rate


def generation_rate(stream: GenerateStream, depth: int) -> float:
    """Tokens per second of the decode steps of one chunk, all sequences, each behind ``depth`` tokens.

    The stream's cache is empty before and after.
    """
    batch = stream.num_samples
    stream.cache, ok = fill(stream.cache, np.full(batch, depth, np.int32), batch * depth)
    if not ok:
        raise SystemExit(f"a {stream.cache.kind} cache cannot hold {depth} tokens of {batch} sequences")
    chunks = iter(stream)
    next(chunks)
    start = time.perf_counter()
    chunk = next(chunks)
    seconds = time.perf_counter() - start
    return sum(len(t) for t in chunk.tokens) / seconds


def prompt_rate(stream: GenerateStream, length: int) -> float:
    """Tokens per second of prefilling ``length`` tokens in each sequence; the cache is empty before and after."""
    start = time.perf_counter()
    next(iter(stream))
    return stream.num_samples * length / (time.perf_counter() - start)
