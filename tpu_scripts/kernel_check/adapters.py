"""The kernels that ``kernel_check.other_kernels`` tests, each called like ``paged_attention``."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.attention import merge_states, paged_attention
from jaxpaged.attention.base import make_config

Arrays = tuple[Any, ...]
Prepared = tuple[Callable[..., Any], Arrays, Callable[[Any], Any]]
"""A function of arrays in the kernel's own layout, those arrays, and a function from its result to [T, Hq, D]."""


class CannotExpress(Exception):
    """A call that the kernel's arguments cannot express."""


@dataclass(frozen=True)
class Call:
    """Arguments of one call of ``paged_attention``."""

    q: Any
    k_pages: Any
    v_pages: Any
    table: Any
    batch: Any
    scale: float | None
    window: int | None
    soft_cap: float | None
    sinks: Any
    rope: Any = None
    return_lse: bool = False

    @property
    def softmax_scale(self) -> float:
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def options(self) -> dict[str, Any]:
        """Arguments behind the table and the batch, except sinks."""
        return {
            "scale": self.scale,
            "window": self.window,
            "soft_cap": self.soft_cap,
            "rope": self.rope,
            "return_lse": self.return_lse,
        }


@dataclass(frozen=True)
class Kernel:
    """Column of the table."""

    name: str
    group: str
    prepare: Callable[[Call], Prepared]
    how: str = "run"
    """"run"; "interpret", in the interpreter of TPU kernels; or, without running it, "v5e", compile for that TPU, or
    "cuda", lower for GPUs."""
    dtype: str = "f32"
    """Format of pages, unless a check sets one."""
    tolerance: float = 2e-5
    missing: Callable[[], str] = lambda: ""
    """Returns why the kernel is not available, or ""."""
    documented: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Checks that the kernel's documentation excludes, and its words."""

    @property
    def runs(self) -> bool:
        return self.how in ("run", "interpret")


def _whole_pages(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """``(pages i32[S, P], lengths i32[S])`` of a table without shifts, slices and gaps."""
    table, page_size = call.table, call.k_pages.shape[2]
    start = page_size * np.arange(table.max_pages_per_seq)
    live = np.arange(table.max_pages_per_seq) < np.asarray(table.num_entries)[:, None]
    counts = np.where(live, table.num_tokens, 0)
    lengths = counts.sum(1)
    full = np.clip(lengths[:, None] - start, 0, page_size)
    if (live & (np.asarray(table.first_slot) != 0)).any() or (counts != full).any():
        raise CannotExpress("its sequences fill their pages from the first slot on")
    if (live & (np.asarray(table.position) != start)).any():
        raise CannotExpress("a token's position is its index in the pages")
    if call.rope is not None:
        raise CannotExpress("it takes no rotation: keys would have to be rotated in copies")
    if call.sinks is not None:
        raise CannotExpress("it takes no sinks")
    if call.return_lse:
        raise CannotExpress("it returns none")
    return np.asarray(table.pages), lengths.astype(np.int32)


def _padded(pages: np.ndarray, multiple: int) -> np.ndarray:
    """Pads columns to a multiple by repeating the last one."""
    return np.pad(pages, ((0, 0), (0, -pages.shape[1] % multiple)), mode="edge")


def _one_query_each(
    call: Call, *, window: bool = False
) -> tuple[Any, np.ndarray, np.ndarray, Callable[[Any], Any]]:
    """``(q [S, Hq, D], pages, lengths, back)`` for kernels of one query per sequence.

    Sequences without queries are passed with length 0; their outputs become the padding rows.
    """
    pages, lengths = _whole_pages(call)
    counts = np.asarray(call.batch.q_lens)
    if counts.max(initial=0) > 1:
        raise CannotExpress("it takes one query a sequence")
    if call.window is not None and not window:
        raise CannotExpress("it takes no window")
    q, lengths = call.q, np.where(counts > 0, lengths, 0)
    # Row t of the step belongs to sequence order[t]; rows beyond all sequences are padding.
    order = np.argsort(counts == 0, kind="stable")[: q.shape[0]]
    by_sequence = np.zeros((len(counts), *q.shape[1:]), q.dtype)
    by_sequence[order] = q[: len(order)]
    rest = ((0, q.shape[0] - len(order)), (0, 0), (0, 0))
    return by_sequence, pages, lengths.astype(np.int32), lambda out: np.pad(np.asarray(out)[order], rest)


def _heads_first(call: Call, q: Any) -> list[Any]:
    """Scaled queries, for kernels without a scale, and pages as [Hkv, N, page_size, D]."""
    pages = (np.asarray(x).transpose(1, 0, 2, 3) for x in (call.k_pages, call.v_pages))
    return [(q * call.softmax_scale).astype(q.dtype), *pages]


def _jax_tpu_paged(call: Call) -> Prepared:
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as kernel

    q, pages, lengths, back = _one_query_each(call)
    run = partial(kernel, pages_per_compute_block=4, attn_logits_soft_cap=call.soft_cap)
    return run, (*_heads_first(call, q), lengths, _padded(pages, 4)), back


def _jax_tpu_ragged(call: Call, *, reference: bool = False) -> Prepared:
    from jax.experimental.pallas.ops.tpu import ragged_paged_attention as module

    pages, lengths = _whole_pages(call)
    num_pages, num_kv_heads, page_size, head_dim = call.k_pages.shape
    # K and V of a head side by side: [N, page_size, 2 * KV, D].
    pair = np.stack([call.k_pages, call.v_pages], 2)
    combined = pair.reshape(num_pages, 2 * num_kv_heads, page_size, head_dim).transpose(0, 2, 1, 3)
    options = {"sm_scale": call.softmax_scale, "sliding_window": call.window, "soft_cap": call.soft_cap}
    counts = np.asarray(call.batch.cu_q_lens), np.array([call.batch.max_seqs], np.int32)
    arrays = call.q, combined, lengths, pages, *counts
    if reference:
        rows = call.q.shape[0]
        run = partial(module.ref_ragged_paged_attention, **options)
        return run, arrays, lambda out: np.pad(out, ((0, rows - out.shape[0]), (0, 0), (0, 0)))
    blocks = {"num_kv_pages_per_block": min(4, pages.shape[1]), "num_queries_per_block": 8}
    run = partial(module.ragged_paged_attention, **options, **blocks, vmem_limit_bytes=64 * 2**20)
    return run, arrays, lambda out: out


def _jax_gpu_paged(call: Call, *, interpret: bool = False) -> Prepared:
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as kernel

    q, pages, lengths, back = _one_query_each(call)
    options = {"k_splits": 2, "pages_per_compute_block": 2, "attn_logits_soft_cap": call.soft_cap}
    run = partial(kernel, **options, interpret=interpret)
    return run, (*_heads_first(call, q), _padded(pages, 4), lengths), back


def gather_and_softmax(q, k_pages, v_pages, pages, lengths, *, scale, window, soft_cap):
    """Paged decode as written by hand: ``q [S, Hq, D]``, ``pages i32[S, P]``, ``lengths i32[S]``."""
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


def _gather(call: Call) -> Prepared:
    q, pages, lengths, back = _one_query_each(call, window=True)
    options = {"scale": call.softmax_scale, "window": call.window, "soft_cap": call.soft_cap}
    run = jax.jit(partial(gather_and_softmax, **options))
    return run, (q, call.k_pages, call.v_pages, pages, lengths), back


def _dot_product(call: Call) -> Prepared:
    """Gathers every page of every row; a mask says what is visible."""
    q, table, batch, window = call.q, call.table, call.batch, call.window
    if call.soft_cap is not None:
        raise CannotExpress("it takes no soft cap")
    if call.rope is not None:
        raise CannotExpress("it takes no rotation: keys would have to be rotated in copies")
    num_seqs, page_size = table.max_seqs, call.k_pages.shape[2]
    slot = np.arange(page_size)
    first, count, position = (
        np.asarray(x)[..., None] for x in (table.first_slot, table.num_tokens, table.position)
    )
    live = (slot >= first) & (slot < first + count)
    live &= (np.arange(table.max_pages_per_seq) < np.asarray(table.num_entries)[:, None])[..., None]
    key_at = np.where(live, position + slot - first, np.iinfo(np.int32).max).reshape(num_seqs, -1)
    # Queries by sequence, [S, Tq, Hq, D]; padding rows are one more sequence, which sees nothing.
    sequence, offsets = np.asarray(batch.sequence), np.asarray(batch.cu_q_lens)
    rows = np.arange(q.shape[0])
    column = np.where(
        sequence < num_seqs, rows - offsets[np.minimum(sequence, num_seqs - 1)], rows - offsets[-1]
    )
    shape = num_seqs + 1, int(column.max()) + 1
    query_at = np.full(shape, -1)
    query_at[sequence, column] = np.where(sequence < num_seqs, np.asarray(batch.position), -1)
    by_sequence = np.zeros((*shape, *q.shape[1:]), q.dtype)
    by_sequence[sequence, column] = q
    key_at = np.concatenate([key_at, np.full_like(key_at[:1], np.iinfo(np.int32).max)])
    mask = key_at[:, None, :] <= query_at[..., None]
    if window is not None:
        mask &= key_at[:, None, :] > query_at[..., None] - window
    pages = np.concatenate([np.asarray(table.pages), np.asarray(table.pages)[:1]])

    def run(q, k_pages, v_pages, pages, mask):
        k, v = (
            x[pages].transpose(0, 1, 3, 2, 4).reshape(len(pages), -1, x.shape[1], x.shape[3]).astype(q.dtype)
            for x in (k_pages, v_pages)
        )
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask[:, None], scale=call.scale, return_residual=True
        )

    def back(result):
        out, lse = (np.asarray(x)[sequence, column] for x in result)
        if call.sinks is not None:
            out, lse = merge_states(out, lse, jnp.zeros_like(out), jnp.broadcast_to(call.sinks, lse.shape))
        return (out, lse) if call.return_lse else out

    return jax.jit(run), (by_sequence, call.k_pages, call.v_pages, pages, mask), back


def _own(name: str, call: Call) -> Prepared:
    def run(*arrays: Any) -> Any:
        *arrays, sinks = arrays
        return paged_attention(*arrays, sinks=sinks, implementation=name, **call.options)

    return (
        jax.jit(run),
        (call.q, call.k_pages, call.v_pages, call.table, call.batch, call.sinks),
        lambda out: out,
    )


def _own_on_gpu(call: Call) -> Prepared:
    """Below ``paged_attention``, which cannot interpret a GPU kernel."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from jaxpaged.attention.gpu import backend as mosaic_gpu

    config = make_config(call.q.shape[-1], call.scale, call.window, call.soft_cap)
    interpret = plgpu.InterpretGPUParams()

    def run(*arrays: Any) -> Any:
        *arrays, sinks = arrays
        out, lse = mosaic_gpu.paged_attention(*arrays, config, sinks, call.rope, interpret=interpret)
        return (out.astype(call.q.dtype), lse) if call.return_lse else out.astype(call.q.dtype)

    return (
        jax.jit(run),
        (call.q, call.k_pages, call.v_pages, call.table, call.batch, call.sinks),
        lambda out: out,
    )


def _without_libtpu() -> str:
    return "" if importlib.util.find_spec("libtpu") else 'needs libtpu (pip install "jax[tpu]")'


def _without_gpu_interpreter() -> str:
    from jax.experimental.pallas import mosaic_gpu

    has_interpreter = hasattr(mosaic_gpu, "InterpretGPUParams")
    return "" if has_interpreter else "needs jax 0.11.2 or newer: no interpreter before"


def _without(name: str) -> str:
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # not even its package
        found = None
    return "" if found else f"there is no {name}"


_TPU, _OTHERS, _OURS = "Pallas kernels of JAX, TPU", "Other kernels", "jaxpaged"
_IN_RANGE = {
    "stale table row: N, one past the last page": "Each entry should be in the range of [0, total_num_pages)"
}
_JAX_GPU = partial(_without, "jax.experimental.pallas.ops.gpu.paged_attention")
_NUMBA, _MOSAIC_TPU = partial(_without, "numba"), partial(_without, "jaxpaged.attention.tpu.backend")


def _without_mosaic_gpu() -> str:
    return _without("jaxpaged.attention.gpu.backend") or _without_gpu_interpreter()


_V5E: dict[str, Any] = {"how": "v5e", "dtype": "bf16", "missing": _without_libtpu}
_IN_GPU_INTERPRETER: dict[str, Any] = {"dtype": "bf16", "tolerance": 1e-4, "missing": _without_mosaic_gpu}

KERNELS: tuple[Kernel, ...] = (
    Kernel(
        "tpu paged_attention, interpreted", _TPU, _jax_tpu_paged, "interpret", "bf16", documented=_IN_RANGE
    ),
    Kernel("tpu paged_attention, compiled for v5e", _TPU, _jax_tpu_paged, **_V5E),
    Kernel("tpu ragged_paged_attention, compiled for v5e", _TPU, _jax_tpu_ragged, **_V5E),
    Kernel("tpu ref_ragged_paged_attention", _TPU, partial(_jax_tpu_ragged, reference=True)),
    Kernel(
        "gpu paged_attention, interpreted",
        _OTHERS,
        partial(_jax_gpu_paged, interpret=True),
        missing=_JAX_GPU,
        documented=_IN_RANGE,
    ),
    Kernel(
        "gpu paged_attention, lowered for CUDA", _OTHERS, _jax_gpu_paged, "cuda", "bf16", missing=_JAX_GPU
    ),
    Kernel("gather and softmax", _OTHERS, _gather),
    Kernel("jax.nn.dot_product_attention", _OTHERS, _dot_product),
    Kernel("reference", _OURS, partial(_own, "reference")),
    Kernel("xla", _OURS, partial(_own, "xla")),
    Kernel("cpu_numba", _OURS, partial(_own, "cpu_numba"), missing=_NUMBA),
    Kernel("mosaic_tpu, interpreted", _OURS, partial(_own, "mosaic_tpu"), "interpret", missing=_MOSAIC_TPU),
    Kernel("mosaic_gpu, interpreted", _OURS, _own_on_gpu, **_IN_GPU_INTERPRETER),
)
