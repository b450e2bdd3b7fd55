"""Attention with heads of values of another size than those of keys, on one device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp

from jaxpaged.attention.base import make_config
from jaxpaged.pages.formats import page_format
from tpu_scripts.compile_check.devices import Compiler

HEADS = (
    (32, 32, 192, 128),
    (64, 4, 192, 128),
    (16, 1, 576, 512),
    (8, 2, 256, 128),
    (8, 2, 64, 128),
    (32, 8, 128, 64),
    (8, 4, 128, 256),
)
"""Query heads, KV heads, numbers of a head of keys and of values."""
STEPS = {"decode": (8, 1), "prompt": (512, None)}
"""Tokens, and the most queries of a sequence."""
NUM_PAGES, PAGE_SIZE, MAX_SEQS = 4096, 32, 8


def value_head_rows(
    compiler: Compiler, compile: Callable[..., Any], quick: bool
) -> Iterator[tuple[dict[str, Any], str, str, str]]:
    """``(row, heads, format of pages, step)`` of each attention that the platform's kernel serves."""
    kernel = import_module(f"jaxpaged.attention.{'gpu' if compiler.platform == 'cuda' else 'tpu'}.backend")
    formats = ("bf16",) if compiler.platform == "cuda" else ("bf16", "q8_0")
    for sizes, pages, kind in itertools.product(HEADS[: 1 if quick else None], formats, STEPS):
        row = _row(compiler, compile, kernel.paged_attention, sizes, pages, *STEPS[kind])
        if not row["result"].startswith("NotImplementedError"):
            yield row, "{} / {} x {}, {}".format(*sizes), pages, kind


def _row(
    compiler: Compiler,
    compile: Callable[..., Any],
    paged_attention: Callable[..., Any],
    sizes: tuple[int, int, int, int],
    pages: str,
    tokens: int,
    max_q_len: int | None,
) -> dict[str, Any]:
    num_q_heads, num_kv_heads, head_dim, v_head_dim = sizes
    config = make_config(head_dim, None, None, None, v_head_dim)

    def pool(dim: int) -> Any:
        storage = page_format(pages)
        storage = storage if compiler.platform == "cuda" else storage.on_lanes(dim)
        create = partial(storage.create, NUM_PAGES, num_kv_heads, PAGE_SIZE, dim)
        return compiler.arrays(jax.eval_shape(create))

    def attend(q: Any, k_pages: Any, v_pages: Any, table: Any, batch: Any, rope: Any) -> Any:
        return paged_attention(q, k_pages, v_pages, table, batch, config, None, rope)

    q = compiler.array(tokens, num_q_heads, head_dim, dtype=jnp.bfloat16)
    # As in DeepSeek-V2, part of a head is rotated.
    step = compiler.step(tokens, max_q_len, MAX_SEQS, PAGE_SIZE, min(head_dim, 64))
    row: dict[str, Any] = compile(attend, q, pool(head_dim), pool(v_head_dim), *step)[1]
    return row
