"""The kernels that ``check_other_kernels`` asks, each called as the conformance kit calls an attention."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.attention import merge_states, paged_attention
from jaxpaged.attention.base import make_config

Arrays = tuple[Any, ...]
Prepared = tuple[Callable[..., Any], Arrays, Callable[[Any], Any]]
"""A function of arrays in the kernel's own layout, those arrays, and what makes [T, Hq, D] of its result."""


class CannotExpress(Exception):
    """The kernel's arguments have no way to say it."""


@dataclass(frozen=True)
class Kernel:
    """One column of the table."""

    name: str
    group: str
    prepare: Callable[..., Prepared]
    """Called as the kit calls an attention."""
    how: str = "run"
    """"run"; "interpret", in the interpreter of TPU kernels; or, without running it, "v5e", compile for that TPU, or
    "cuda", lower for GPUs."""
    dtype: str = "f32"
    """Of pages, where a check does not say."""
    tolerance: float = 2e-5
    missing: Callable[[], str] = lambda: ""
    """Why it is not here."""
    documented: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Checks that the kernel's documentation excludes, and its words."""


def _whole_pages(table: Any, page_size: int, rope: Any, sinks: Any) -> tuple[np.ndarray, np.ndarray]:
    """``(pages i32[S, P], lengths i32[S])`` of a table that is no more than that."""
    live = np.arange(table.max_pages_per_seq) < np.asarray(table.num_entries)[:, None]
    counts = np.where(live, table.num_tokens, 0)
    lengths = counts.sum(1)
    full = np.clip(lengths[:, None] - page_size * np.arange(table.max_pages_per_seq), 0, page_size)
    if (live & (np.asarray(table.first_slot) != 0)).any() or (counts != full).any():
        raise CannotExpress("its sequences fill their pages from the first slot on")
    if (live & (np.asarray(table.position) != page_size * np.arange(table.max_pages_per_seq))).any():
        raise CannotExpress("a token's position is its place in the pages")
    if rope is not None:
        raise CannotExpress("it takes no rotation: keys would have to be rotated in copies")
    if sinks is not None:
        raise CannotExpress("it takes no sinks")
    return np.asarray(table.pages), lengths.astype(np.int32)


def _filled(pages: np.ndarray, multiple: int) -> np.ndarray:
    """More columns, to a multiple; they hold what the last one holds."""
    return np.pad(pages, ((0, 0), (0, -pages.shape[1] % multiple)), mode="edge")


def _one_query_each(q: Any, lengths: np.ndarray, batch: Any) -> tuple[Any, np.ndarray, Callable[[Any], Any]]:
    """``(q [S, Hq, D], lengths, back)`` for kernels that take one query a sequence.

    Sequences without queries are passed with length 0; what comes out of them stands in the padding rows.
    """
    counts = np.asarray(batch.q_lens)
    if counts.max(initial=0) > 1:
        raise CannotExpress("it takes one query a sequence")
    lengths = np.where(counts > 0, lengths, 0)
    # Row t of the step belongs to sequence order[t]; rows beyond all sequences are padding alone.
    order = np.argsort(counts == 0, kind="stable")[: q.shape[0]]
    by_sequence = np.zeros((len(counts), *q.shape[1:]), q.dtype)
    by_sequence[order] = q[: len(order)]
    rest = ((0, q.shape[0] - len(order)), (0, 0), (0, 0))
    return by_sequence, lengths.astype(np.int32), lambda out: np.pad(np.asarray(out)[order], rest)


def _no_lse(return_lse: bool) -> None:
    if return_lse:
        raise CannotExpress("it returns none")


_NO_WINDOW = "it takes no window"


def _jax_tpu_paged(
    q, k_pages, v_pages, table, batch, *, scale, window, soft_cap, sinks, rope=None, return_lse=False
) -> Prepared:
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as kernel

    pages, lengths = _whole_pages(table, k_pages.shape[2], rope, sinks)
    q, lengths, back = _one_query_each(q, lengths, batch)
    if window is not None:
        raise CannotExpress(_NO_WINDOW)
    _no_lse(return_lse)
    scale = q.shape[-1] ** -0.5 if scale is None else scale  # the kernel has none: it is the caller's
    blocks = 4
    run = functools.partial(kernel, pages_per_compute_block=blocks, attn_logits_soft_cap=soft_cap)
    heads_first = [np.asarray(x).transpose(1, 0, 2, 3) for x in (k_pages, v_pages)]
    return run, ((q * scale).astype(q.dtype), *heads_first, lengths, _filled(pages, blocks)), back


def _jax_tpu_ragged(
    q,
    k_pages,
    v_pages,
    table,
    batch,
    *,
    scale,
    window,
    soft_cap,
    sinks,
    rope=None,
    return_lse=False,
    reference=False,
) -> Prepared:
    from jax.experimental.pallas.ops.tpu import ragged_paged_attention as module

    pages, lengths = _whole_pages(table, k_pages.shape[2], rope, sinks)
    _no_lse(return_lse)
    num_pages, num_kv_heads, page_size, head_dim = k_pages.shape
    # K and V of a head side by side: [N, page_size, 2 * KV, D].
    combined = np.stack([k_pages, v_pages], 2).reshape(num_pages, 2 * num_kv_heads, page_size, head_dim)
    options = {
        "sm_scale": head_dim**-0.5 if scale is None else scale,
        "sliding_window": window,
        "soft_cap": soft_cap,
    }
    arrays = (
        q,
        combined.transpose(0, 2, 1, 3),
        lengths,
        pages,
        np.asarray(batch.cu_q_lens),
        np.array([batch.max_seqs], np.int32),
    )
    if reference:
        rows = q.shape[0]
        run = functools.partial(module.ref_ragged_paged_attention, **options)
        return run, arrays, lambda out: np.pad(out, ((0, rows - out.shape[0]), (0, 0), (0, 0)))
    blocks = {"num_kv_pages_per_block": min(4, pages.shape[1]), "num_queries_per_block": 8}
    run = functools.partial(module.ragged_paged_attention, **options, **blocks, vmem_limit_bytes=64 * 2**20)
    return run, arrays, lambda out: out


def _jax_gpu_paged(
    q,
    k_pages,
    v_pages,
    table,
    batch,
    *,
    scale,
    window,
    soft_cap,
    sinks,
    rope=None,
    return_lse=False,
    interpret=False,
) -> Prepared:
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as kernel

    pages, lengths = _whole_pages(table, k_pages.shape[2], rope, sinks)
    q, lengths, back = _one_query_each(q, lengths, batch)
    if window is not None:
        raise CannotExpress(_NO_WINDOW)
    _no_lse(return_lse)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = {"k_splits": 2, "pages_per_compute_block": 2, "attn_logits_soft_cap": soft_cap}
    run = functools.partial(kernel, **options, interpret=interpret)
    heads_first = [np.asarray(x).transpose(1, 0, 2, 3) for x in (k_pages, v_pages)]
    return run, ((q * scale).astype(q.dtype), *heads_first, _filled(pages, 4), lengths), back


def gather_and_softmax(q, k_pages, v_pages, pages, lengths, *, scale, window, soft_cap):
    """Paged decode as one writes it by hand: ``q [S, Hq, D]``, ``pages i32[S, P]``, ``lengths i32[S]``."""
    num_seqs, _, head_dim = q.shape
    num_kv_heads = k_pages.shape[1]
    k, v = (
        x[pages].transpose(0, 2, 1, 3, 4).reshape(num_seqs, num_kv_heads, -1, head_dim)
        for x in (k_pages, v_pages)
    )
    scores = jnp.einsum("skgd,sknd->skgn", q.reshape(num_seqs, num_kv_heads, -1, head_dim), k) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    position = jnp.arange(k.shape[2])
    seen = position < lengths[:, None]
    if window is not None:
        seen &= position >= lengths[:, None] - window
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("skgn,sknd->skgd", weights, v).reshape(q.shape)


def _gather(
    q, k_pages, v_pages, table, batch, *, scale, window, soft_cap, sinks, rope=None, return_lse=False
) -> Prepared:
    pages, lengths = _whole_pages(table, k_pages.shape[2], rope, sinks)
    q, lengths, back = _one_query_each(q, lengths, batch)
    _no_lse(return_lse)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    run = functools.partial(gather_and_softmax, scale=scale, window=window, soft_cap=soft_cap)
    return jax.jit(run), (q, k_pages, v_pages, pages, lengths), back


def _dot_product(
    q, k_pages, v_pages, table, batch, *, scale, window, soft_cap, sinks, rope=None, return_lse=False
) -> Prepared:
    """Every page of every row is gathered; what may be seen is said by a mask."""
    if soft_cap is not None:
        raise CannotExpress("it takes no soft cap")
    if rope is not None:
        raise CannotExpress("it takes no rotation: keys would have to be rotated in copies")
    num_seqs, page_size = table.max_seqs, k_pages.shape[2]
    slot = np.arange(page_size)
    first, count, position = (
        np.asarray(x)[..., None] for x in (table.first_slot, table.num_tokens, table.position)
    )
    live = (slot >= first) & (slot < first + count)
    live &= (np.arange(table.max_pages_per_seq) < np.asarray(table.num_entries)[:, None])[..., None]
    keys_at = np.where(live, position + slot - first, np.iinfo(np.int32).max).reshape(num_seqs, -1)
    # Queries by sequence, [S, Tq, Hq, D]; padding rows are a sequence of their own that sees nothing.
    sequence, offsets = np.asarray(batch.sequence), np.asarray(batch.cu_q_lens)
    rows = np.arange(q.shape[0])
    column = np.where(
        sequence < num_seqs, rows - offsets[np.minimum(sequence, num_seqs - 1)], rows - offsets[-1]
    )
    shape = num_seqs + 1, int(column.max()) + 1
    asked_at = np.full(shape, -1)
    asked_at[sequence, column] = np.where(sequence < num_seqs, np.asarray(batch.position), -1)
    by_sequence = np.zeros((*shape, *q.shape[1:]), q.dtype)
    by_sequence[sequence, column] = q
    keys_at = np.concatenate([keys_at, np.full_like(keys_at[:1], np.iinfo(np.int32).max)])
    mask = keys_at[:, None, :] <= asked_at[..., None]
    if window is not None:
        mask &= keys_at[:, None, :] > asked_at[..., None] - window
    pages = np.concatenate([np.asarray(table.pages), np.asarray(table.pages)[:1]])

    def run(q, k_pages, v_pages, pages, mask):
        k, v = (
            x[pages].transpose(0, 1, 3, 2, 4).reshape(len(pages), -1, x.shape[1], x.shape[3]).astype(q.dtype)
            for x in (k_pages, v_pages)
        )
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale, return_residual=True)

    def back(result):
        out, lse = (np.asarray(x)[sequence, column] for x in result)
        if sinks is not None:
            out, lse = merge_states(out, lse, jnp.zeros_like(out), jnp.broadcast_to(sinks, lse.shape))
        return (out, lse) if return_lse else out

    return jax.jit(run), (by_sequence, k_pages, v_pages, pages, mask), back


def _own(name: str, q, k_pages, v_pages, table, batch, *, sinks, **options) -> Prepared:
    def run(q, k_pages, v_pages, table, batch, sinks):
        return paged_attention(q, k_pages, v_pages, table, batch, sinks=sinks, implementation=name, **options)

    return jax.jit(run), (q, k_pages, v_pages, table, batch, sinks), lambda out: out


def _own_on_gpu(
    q, k_pages, v_pages, table, batch, *, scale, window, soft_cap, sinks, rope=None, return_lse=False
) -> Prepared:
    """Below ``paged_attention``, which cannot be told to interpret a GPU kernel."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from jaxpaged.attention.gpu import backend as mosaic_gpu

    config = make_config(q.shape[-1], scale, window, soft_cap)
    interpret = plgpu.InterpretGPUParams()

    def run(q, k_pages, v_pages, table, batch, sinks):
        return mosaic_gpu.paged_attention(
            q, k_pages, v_pages, table, batch, config, sinks, rope, interpret=interpret
        )

    return (
        jax.jit(run),
        (q, k_pages, v_pages, table, batch, sinks),
        lambda result: (result[0].astype(q.dtype), result[1]) if return_lse else result[0].astype(q.dtype),
    )


def _without_libtpu() -> str:
    return "" if importlib.util.find_spec("libtpu") else 'needs libtpu (pip install "jax[tpu]")'


def _without_gpu_interpreter() -> str:
    from jax.experimental.pallas import mosaic_gpu

    return (
        ""
        if hasattr(mosaic_gpu, "InterpretGPUParams")
        else "needs jax 0.11.2 or newer: no interpreter before"
    )


def _without_module(name: str) -> str:
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # not even the package that it was in
        found = None
    return "" if found else f"there is no {name}"


_IN_RANGE = "stale table row: N, one past the last page"
_TPU, _OTHERS, _OURS = "Pallas kernels of JAX, TPU", "Other kernels", "jaxpaged"

KERNELS: tuple[Kernel, ...] = (
    Kernel(
        "tpu paged_attention, interpreted",
        _TPU,
        _jax_tpu_paged,
        "interpret",
        dtype="bf16",
        documented={_IN_RANGE: "Each entry should be in the range of [0, total_num_pages)"},
    ),
    Kernel(
        "tpu paged_attention, compiled for v5e", _TPU, _jax_tpu_paged, "v5e", "bf16", missing=_without_libtpu
    ),
    Kernel(
        "tpu ragged_paged_attention, compiled for v5e",
        _TPU,
        _jax_tpu_ragged,
        "v5e",
        "bf16",
        missing=_without_libtpu,
    ),
    Kernel(
        "tpu ref_ragged_paged_attention",
        _TPU,
        functools.partial(_jax_tpu_ragged, reference=True),
    ),
    Kernel(
        "gpu paged_attention, interpreted",
        _OTHERS,
        functools.partial(_jax_gpu_paged, interpret=True),
        missing=functools.partial(_without_module, "jax.experimental.pallas.ops.gpu.paged_attention"),
        documented={_IN_RANGE: "Each entry should be in the range of [0, total_num_pages)"},
    ),
    Kernel(
        "gpu paged_attention, lowered for CUDA",
        _OTHERS,
        _jax_gpu_paged,
        "cuda",
        "bf16",
        missing=functools.partial(_without_module, "jax.experimental.pallas.ops.gpu.paged_attention"),
    ),
    Kernel("gather and softmax", _OTHERS, _gather),
    Kernel("jax.nn.dot_product_attention", _OTHERS, _dot_product),
    Kernel("reference", _OURS, functools.partial(_own, "reference")),
    Kernel("xla", _OURS, functools.partial(_own, "xla")),
    Kernel(
        "cpu_numba",
        _OURS,
        functools.partial(_own, "cpu_numba"),
        missing=functools.partial(_without_module, "numba"),
    ),
    Kernel(
        "mosaic_tpu, interpreted",
        _OURS,
        functools.partial(_own, "mosaic_tpu"),
        "interpret",
        missing=functools.partial(_without_module, "jaxpaged.attention.tpu.backend"),
    ),
    Kernel(
        "mosaic_gpu, interpreted",
        _OURS,
        _own_on_gpu,
        dtype="bf16",
        tolerance=1e-4,
        missing=lambda: _without_module("jaxpaged.attention.gpu.backend") or _without_gpu_interpreter(),
    ),
)
