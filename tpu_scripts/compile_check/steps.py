"""Whole steps of a model on one device: the pool stays where it is, and no stack of weights is copied.

Llama-3-8B's sizes and fewer layers, dense and with stored weights; a token of each of 8 sequences, once and in a loop
as in ``generate``, and 512 tokens of prompts. The pool has more than 2**31 numbers and 2**32 bytes, of keys and of
values.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxpaged import PagedKVCache
from tpu_scripts.compile_check.devices import CONTEXT, Compiler, num_bytes, trace_models_for
from tpu_scripts.compile_check.hlo import unfused

LAYERS, PAGES, PAGE_SIZE, MAX_SEQS, PROMPT = 5, 13312, 32, 8, 512
WEIGHTS = ("bf16", "Q8_0", "Q4_0")
STEPS = {"decode": (MAX_SEQS, 1), "looped decode": (MAX_SEQS, 16), "prompt": (PROMPT, 1)}
"""Tokens of a step, and how often it runs."""
ROOM = 5 << 20
"""Bytes of temporaries beside activations and logits."""
COPIES = ("copy", "transpose", "convert", "bitcast-convert")
"""Operations that write a whole array; the last two may belong to a product, if they are of one layer."""
GPU_ROWS = 64
"""Rows of a product with stored weights on GPUs; with more of them XLA multiplies, and dequantizes a matrix."""


def step_rows(compiler: Compiler, compile: Callable[..., Any], quick: bool) -> Iterator[dict[str, Any]]:
    """Rows of all steps; ``compile`` as ``compiler.compile``."""
    trace_models_for("gpu" if compiler.platform == "cuda" else "tpu")
    for weights, kind in itertools.product(WEIGHTS[: 2 if quick else None], STEPS):
        yield {"weights": weights, "kind": kind} | step_row(compiler, compile, weights, *STEPS[kind])


def step_row(
    compiler: Compiler, compile: Callable[..., Any], weights: str, tokens: int, times: int
) -> dict[str, Any]:
    """Row of one step."""
    from jaxpaged_model.config import ModelConfig
    from jaxpaged_model.layers import SLOTS
    from jaxpaged_model.llama import abstract_params, functional
    from jaxpaged_model.quantized.linear import WeightPlan

    # vocab_size, hidden_size, intermediate_size, num_layers, num_q_heads, num_kv_heads, head_dim, ...
    config = ModelConfig("llama", 128256, 4096, 14336, LAYERS, 32, 8, 128, CONTEXT, rope_theta=500000.0)
    paths = ["embedding", "head", *(f"blocks.{i}.{slot}" for i in range(LAYERS) for slot in SLOTS)]
    stored = () if weights == "bf16" else tuple((path, weights) for path in paths)
    plan = WeightPlan(stored, layout="lanes")
    model = functional(config, jnp.bfloat16, plan)
    sizes = {"num_pages": PAGES, "page_size": PAGE_SIZE, "max_seqs": MAX_SEQS, "dtype": "bf16"}
    layout = "plain" if compiler.platform == "cuda" else "lanes"

    def make_cache() -> Any:
        longest = CONTEXT - PAGE_SIZE
        return PagedKVCache.create(**config.cache_spec, **sizes, max_seq_len=longest, layout=layout)

    def step(params: Any, cache: Any, ids: Any, num_new: Any) -> Any:
        cache, batch, _ = cache.reserve(num_new, num_tokens=tokens, max_new=max(tokens // MAX_SEQS, 1))
        logits, cache = model(params, ids, cache, batch, batch.last_rows)
        return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def steps(params: Any, cache: Any, ids: Any, num_new: Any) -> Any:
        if times == 1:
            return step(params, cache, ids, num_new)
        return jax.lax.fori_loop(0, times, lambda _, state: step(params, *state, num_new), (cache, ids))

    params = compiler.arrays(abstract_params(config, jnp.bfloat16, plan))
    cache = compiler.arrays(jax.eval_shape(make_cache))
    given = params, cache, compiler.array(tokens), compiler.array(MAX_SEQS)
    program, row = compile(steps, *given, donate=(1,))
    if program is None:
        return row
    row["pool_bytes"] = num_bytes((cache.k_pages, cache.v_pages))
    row["most_bytes"] = ROOM + activations(config, tokens)
    if stored:
        row["most_bytes"] += gpu_products(config, tokens) if compiler.platform == "cuda" else scales(config)
    smallest = math.prod((config.hidden_size, config.num_kv_heads * config.head_dim))
    problems = [row["result"]] if row["result"] != "ok" else []
    if row["alias_bytes"] < row["pool_bytes"]:
        problems.append(f"pool not in place: {row['alias_bytes']} of {row['pool_bytes']} bytes aliased")
    if row["temp_bytes"] > row["most_bytes"]:
        problems.append(f"{row['temp_bytes']} bytes of temporaries, more than {row['most_bytes']}")
    problems += [f"copies {shape}" for shape in copies(program.as_text(), smallest, tokens)]
    return row | {"result": "; ".join(problems) or "ok"}


def activations(config: Any, tokens: int) -> int:
    """Bytes of the activations of one layer and of the logits, in bfloat16."""
    c = config
    heads = c.head_dim * (2 * c.num_q_heads + 2 * c.num_kv_heads)
    widths = heads + 2 * c.intermediate_size + 2 * c.hidden_size
    return 2 * (tokens * widths + MAX_SEQS * c.vocab_size)


def gpu_products(config: Any, tokens: int) -> int:
    """Bytes that products with stored weights add on a GPU.

    Rows of logits up to ``GPU_ROWS``; with more rows of activations a dequantized matrix.
    """
    c = config
    if tokens > GPU_ROWS:
        return 2 * 2 * c.intermediate_size * c.hidden_size
    return 2 * GPU_ROWS * (c.vocab_size + 2 * c.intermediate_size)


def scales(config: Any) -> int:
    """Bytes of the scales of the head and of a layer's largest matrix: for TPUs XLA copies them to show their bits."""
    return 2 * config.hidden_size // 32 * (config.vocab_size + 2 * config.intermediate_size)


def copies(text: str, smallest: int, tokens: int) -> list[str]:
    """Shapes that a program copies: of ``smallest`` numbers and more, in another layout; or stacks in another dtype.

    Without activations, which have an axis of ``tokens``.
    """
    copied = []
    for shape, operation in dict.fromkeys(unfused(text)):
        if operation not in COPIES or (found := re.match(r"\w+\[([\d,]+)\]", shape)) is None:
            continue
        sizes = [int(dim) for dim in found[1].split(",")]
        moved = operation in COPIES[:2] or sizes[0] == LAYERS
        if moved and math.prod(sizes) >= smallest and tokens not in sizes:
            copied.append(f"{found[0]} ({operation})")
    return copied
