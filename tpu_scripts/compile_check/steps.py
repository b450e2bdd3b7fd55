"""Whole steps of models on one device: pools stay where they are, and no stack of weights is copied.

Llama-3-8B's sizes and fewer layers, dense and with stored weights, over a pool of more than 2**31 numbers and 2**32
bytes, of keys and of values; and families whose layers are of several groups, or have heads of other sizes, dense, over
pages of several formats. A token of each of 8 sequences, once and in a loop as in ``generate``, and 512 tokens of
prompts.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxpaged.cache.groups import create_cache, parts_of
from tpu_scripts.compile_check.devices import CONTEXT, Compiler, num_bytes, trace_models_for
from tpu_scripts.compile_check.hlo import unfused

LAYERS, PAGES, PAGE_SIZE, MAX_SEQS, PROMPT = 5, 13312, 32, 8, 512
WEIGHTS = ("bf16", "Q8_0", "Q4_0")
STEPS = {"decode": (MAX_SEQS, 1), "looped decode": (MAX_SEQS, 16), "prompt": (PROMPT, 1)}
"""Tokens of a step, and how often it runs."""
_GEMMA: dict[str, Any] = {
    "norms": "both",
    "activation": "gelu_tanh",
    "tie_embeddings": True,
    "rms_norm_eps": 1e-6,
    "context_length": CONTEXT,
}
_GEMMA_3: dict[str, Any] = _GEMMA | {
    "architecture": "gemma3",
    "vocab_size": 262144,
    "num_layers": 16,
    "head_dim": 256,
    "qk_norm": "head",
    "rope_theta": 1e6,
    "window_rope_theta": 10000.0,
}
_PHI_3: dict[str, Any] = {
    "architecture": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_layers": 5,
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3-8B": {
        "architecture": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_layers": LAYERS,
        "num_q_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "context_length": CONTEXT,
        "rope_theta": 500000.0,
    },
    # Two periods of five layers with a window and one without, which are a scan, and four layers with one behind them.
    "Gemma-3-1B": _GEMMA_3
    | {
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_q_heads": 4,
        "num_kv_heads": 1,
        "windows": tuple(None if i % 6 == 5 else 512 for i in range(16)),
    },
    "Gemma-3-4B": _GEMMA_3
    | {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_q_heads": 8,
        "num_kv_heads": 4,
        "windows": tuple(None if i % 6 == 5 else 1024 for i in range(16)),
    },
    "Gemma-2-9B": _GEMMA
    | {
        "architecture": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_layers": 6,
        "num_q_heads": 16,
        "num_kv_heads": 8,
        "head_dim": 256,
        "attention_soft_cap": 50.0,
        "logit_soft_cap": 30.0,
        "windows": (4096, None) * 3,
    },
    "Phi-4-mini": _PHI_3
    | {
        "vocab_size": 200064,
        "num_q_heads": 24,
        "num_kv_heads": 8,
        "head_dim": 128,
        "context_length": CONTEXT,
        "rope_dim": 96,
        "tie_embeddings": True,
    },
    "Phi-3-mini": _PHI_3
    | {"vocab_size": 32064, "num_q_heads": 32, "num_kv_heads": 32, "head_dim": 96, "context_length": CONTEXT},
}
"""Sizes of models, with fewer layers, by ``ModelConfig``'s names."""
FAMILIES = ("Gemma-3-1B", "Gemma-3-4B", "Gemma-2-9B", "Phi-4-mini", "Phi-3-mini")
FORMATS = ("bf16", "q8_0", "fp8_e4m3")
"""Formats of pages of the families; the last one is read by XLA's attention alone."""
FAMILY_POOL_TOKENS = 1 << 17
"""Tokens of a family's pool."""
_XLA_CHUNK = 512
"""Tokens of a sequence that XLA's attention reads at a time."""
NOT_SERVED = (
    ("Phi-3-mini", "q8_0", "cuda"),  # scales of head_dim 96 want pages of 64 tokens
)
"""Model, format and platform that a platform's kernel refuses in pages of 32 tokens."""
ROOM = 5 << 20
"""Bytes of temporaries beside activations and logits."""
COPIES = ("copy", "transpose", "convert", "bitcast-convert")
"""Operations that write a whole array; the last two may belong to a product, if they are of one layer."""
GPU_ROWS = 64
"""Rows of a product with stored weights on GPUs; with more of them XLA multiplies, and dequantizes a matrix."""


def step_rows(compiler: Compiler, compile: Callable[..., Any], quick: bool) -> Iterator[dict[str, Any]]:
    """Rows of all steps; ``compile`` as ``compiler.compile``."""
    trace_models_for("gpu" if compiler.platform == "cuda" else "tpu")
    kinds = [("Llama-3-8B", weights, "bf16") for weights in WEIGHTS[: 2 if quick else None]]
    names, formats = (("Gemma-3-4B",), FORMATS[:1]) if quick else (FAMILIES, FORMATS)
    kinds += [(name, "bf16", pages) for name, pages in itertools.product(names, formats)]
    for (name, weights, pages), kind in itertools.product(kinds, STEPS):
        if (name, pages, compiler.platform) in NOT_SERVED:
            continue
        row = step_row(compiler, compile, name, weights, pages, *STEPS[kind])
        yield {"model": name, "weights": weights, "pages": pages, "kind": kind} | row


def step_row(
    compiler: Compiler,
    compile: Callable[..., Any],
    name: str,
    weights: str,
    pages: str,
    tokens: int,
    times: int,
) -> dict[str, Any]:
    """Row of one step."""
    from jaxpaged_model.config import ModelConfig
    from jaxpaged_model.layers import SLOTS
    from jaxpaged_model.llama import abstract_params, functional
    from jaxpaged_model.quantized.linear import WeightPlan

    config = ModelConfig(**MODELS[name])
    paths = ["embedding", "head", *(f"blocks.{i}.{slot}" for i in range(config.num_layers) for slot in SLOTS)]
    stored = () if weights == "bf16" else tuple((path, weights) for path in paths)
    plan = WeightPlan(stored, layout="lanes")
    model = functional(config, jnp.bfloat16, plan)
    num_pages = FAMILY_POOL_TOKENS // PAGE_SIZE if name in FAMILIES else PAGES
    sizes = {"num_pages": num_pages, "page_size": PAGE_SIZE, "max_seqs": MAX_SEQS, "dtype": pages}
    layout = "plain" if compiler.platform == "cuda" else "lanes"
    by_xla = pages == FORMATS[-1]
    if by_xla:
        sizes["implementation"] = "xla"

    def make_cache() -> Any:
        longest = CONTEXT - PAGE_SIZE
        return create_cache(config.groups, **sizes, rope=config.rope, max_seq_len=longest, layout=layout)

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
    row["pool_bytes"] = num_bytes([(part.k_pages, part.v_pages) for part in parts_of(cache)])
    row["most_bytes"] = ROOM + activations(config, tokens)
    if compiler.platform == "cuda" and not by_xla:
        row["most_bytes"] += gpu_attention(config, tokens)
    elif by_xla:
        row["most_bytes"] += 4 * 4 * MAX_SEQS * _XLA_CHUNK * config.num_kv_heads * config.head_dim
    if stored:
        row["most_bytes"] += gpu_products(config, tokens) if compiler.platform == "cuda" else scales(config)
    smallest = math.prod((config.hidden_size, config.num_kv_heads * config.head_dim))
    problems = [row["result"]] if row["result"] != "ok" else []
    if row["alias_bytes"] < row["pool_bytes"]:
        problems.append(f"pool not in place: {row['alias_bytes']} of {row['pool_bytes']} bytes aliased")
    if row["temp_bytes"] > row["most_bytes"]:
        problems.append(f"{row['temp_bytes']} bytes of temporaries, more than {row['most_bytes']}")
    # Queries and results in an order of their own, and what XLA's attention has of keys or values at a time.
    ordered = {tokens * config.num_q_heads * config.head_dim}
    ordered |= {MAX_SEQS * _XLA_CHUNK * config.num_kv_heads * config.head_dim} if by_xla else set()
    found = copies(program.as_text(), smallest, tokens, config.num_layers, ordered)
    problems += [f"copies {shape}" for shape in found]
    return row | {"result": "; ".join(problems) or "ok"}


def activations(config: Any, tokens: int) -> int:
    """Bytes of the activations of one layer and of the logits, in bfloat16."""
    c = config
    heads = c.head_dim * (2 * c.num_q_heads + 2 * c.num_kv_heads)
    widths = heads + 2 * c.intermediate_size + 2 * c.hidden_size
    return 2 * (tokens * widths + MAX_SEQS * c.vocab_size)


def gpu_attention(config: Any, tokens: int) -> int:
    """Bytes of the tiles of queries, and of the same turned by 90 degrees, and of the parts of results, on a GPU."""
    from jaxpaged.attention.gpu.backend import describe

    c = config
    longest = max(tokens // MAX_SEQS, 1)
    shapes = (tokens, c.num_q_heads, c.head_dim), (1, c.num_kv_heads, PAGE_SIZE, c.head_dim)
    found = describe(*shapes, jnp.bfloat16, longest, MAX_SEQS, CONTEXT // PAGE_SIZE)
    return found["q_bytes"] + (found["out_bytes"] - 4 * math.prod(shapes[0])) // 2


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


def copies(
    text: str, smallest: int, tokens: int, layers: int = LAYERS, ordered: Collection[int] = ()
) -> list[str]:
    """Shapes that a program copies: of ``smallest`` numbers and more, in another layout; or stacks of ``layers`` in
    another dtype.

    Without activations, which have an axis of ``tokens``, or as many numbers as one of ``ordered``.
    """
    copied = []
    for shape, operation in dict.fromkeys(unfused(text)):
        if operation not in COPIES or (found := re.match(r"\w+\[([\d,]+)\]", shape)) is None:
            continue
        sizes = [int(dim) for dim in found[1].split(",")]
        moved = operation in COPIES[:2] or sizes[0] == layers
        count = math.prod(sizes)
        if moved and count >= smallest and tokens not in sizes and count not in ordered:
            copied.append(f"{found[0]} ({operation})")
    return copied
