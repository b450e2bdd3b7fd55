"""The conformance kit over other people's paged attention, and over the project's own: which serves what.

    python -m tpu_scripts.check_other_kernels [--json FILE] [--only NAME]
    pip install "jax[tpu]"   # for the kernels that are compiled for a TPU; without it those are left out, and named

No TPU and no GPU is needed: kernels run in Pallas' interpreters, or are compiled or lowered without being run. Each
kernel runs in a process of its own, with a limit on every check, so that one that hangs or crashes is a cell of the
table. ``docs/conformance.md`` has the table and explains its rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.attention import merge_states, paged_attention
from jaxpaged.attention.base import make_config
from jaxpaged.attention.cases import MODELS
from jaxpaged.testing import CASES, Built, Case, build_case, calm, judge

# --- what is asked ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One row of the table: a question, and the states that ask it."""

    name: str
    builds: Mapping[str, Callable[[str], Built]]
    """By label; each is given the dtype of pages that the kernel prefers."""
    of_values: bool = False
    """The arrays' values ask it, not their shapes: a compiler cannot tell."""
    lse: bool = False


_SIZES: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 4, "head_dim": 128, "page_size": 16}


def _case(dtype: str, **changes: Any) -> Case:
    lengths = changes.setdefault("lengths", (64, 32, 16))
    changes.setdefault("q_lens", (1,) * len(lengths))
    return Case("check", **_SIZES | {"dtype": dtype} | changes)


def _calm(**changes: Any) -> Callable[[str], Built]:
    """A state that provokes nothing but what ``changes`` say."""
    keep = changes.pop("keep", ())
    return lambda dtype: calm(build_case(_case(**{"dtype": dtype} | changes)), keep=keep)


def _stale(choose: Callable[[Built, np.ndarray], int], keep: tuple[str, ...] = ()) -> Callable[[str], Built]:
    """Table rows hold, behind their sequences' entries, the page that ``choose`` names from the live ones."""

    def build(dtype: str) -> Built:
        built = calm(build_case(_case(dtype, lengths=(75, 32, 16))), keep=keep)
        pages = np.array(built.table.pages)
        live = np.arange(pages.shape[1]) < np.asarray(built.table.num_entries)[:, None]
        stale = np.where(live, pages, choose(built, pages[live]))
        return dataclasses.replace(
            built, table=dataclasses.replace(built.table, pages=jnp.asarray(stale, jnp.int32))
        )

    return build


def _a_free_page(built: Built, live: np.ndarray) -> int:
    return int(np.setdiff1d(np.arange(built.k_pages.shape[0]), live)[0])


def _as_the_kit_has_it(case: Case, dtype: str) -> Built:
    return build_case(dataclasses.replace(case, dtype=dtype) if case.dtype == "f32" else case)


def _models() -> dict[str, Callable[[str], Built]]:
    labels: dict[tuple[int, ...], list[str]] = {}
    for name, heads in MODELS.items():
        labels.setdefault(tuple(heads.values()), []).append(name)
    return {" / ".join(names): _calm(**MODELS[names[0]], lengths=(32, 16)) for names in labels.values()}


_MIXED: dict[str, Any] = {"lengths": (40, 37, 70), "q_lens": (1, 37, 9)}

CHECKS: tuple[Check, ...] = (
    Check("decode, whole pages", {"": _calm()}),
    Check("lengths that end inside a page", {"": _calm(lengths=(61, 33, 7))}, of_values=True),
    *(Check(f"head_dim {d}", {"": _calm(head_dim=d, lengths=(61, 33))}) for d in (64, 80, 96, 128, 256)),
    Check(
        "query heads to a KV head",
        {str(g): _calm(num_q_heads=4 * g, lengths=(32, 16)) for g in range(1, 17)},
    ),
    Check(
        "KV heads",
        {str(kv): _calm(num_q_heads=2 * kv, num_kv_heads=kv, lengths=(32, 16)) for kv in (1, 2, 3, 5, 8, 12)},
    ),
    Check("heads of", _models()),
    Check("page size", {str(n): _calm(page_size=n, lengths=(300, 33)) for n in (8, 16, 32, 64, 128, 256)}),
    Check("pages of", {name: _calm(dtype=name) for name in ("f32", "bf16", "f16")}),
    Check(
        "NaN in unused slots of a live page",
        {"": _calm(lengths=(61, 33, 7), keep=("unused_slots",))},
        of_values=True,
    ),
    Check("NaN in pages that nobody holds", {"": _calm(keep=("free_pages",))}, of_values=True),
    Check("stale table row: pages of others", {"": _stale(lambda _, live: live[-1])}, of_values=True),
    Check(
        "stale table row: free pages that hold NaN",
        {"": _stale(_a_free_page, ("free_pages",))},
        of_values=True,
    ),
    Check(
        "stale table row: N, one past the last page",
        {"": _stale(lambda built, _: built.k_pages.shape[0])},
        of_values=True,
    ),
    Check(
        "a sequence of length 0 gives zeros",
        {
            label: _calm(lengths=lengths, q_lens=tuple(map(bool, lengths)), padding=lengths.count(0))
            for label, lengths in {
                "first": (0, 40, 48),
                "between": (40, 0, 48),
                "last": (40, 48, 0),
                "all": (0, 0, 0),
            }.items()
        },
        of_values=True,
    ),
    Check("pages shared by sequences", {"": _calm(lengths=(64, 48, 40), shared=True)}, of_values=True),
    Check("window", {"": _calm(lengths=(100, 33, 7), window=40)}),
    Check("soft cap", {"": _calm(soft_cap=5.0)}),
    Check("window and soft cap", {"": _calm(lengths=(100, 33, 7), window=40, soft_cap=5.0)}),
    Check("prompts alone", {"": _calm(lengths=(37, 70), q_lens=(37, 70))}),
    Check("a part of a prompt", {"": _calm(lengths=(90,), q_lens=(33,))}),
    Check("prompts beside decode", {"": _calm(**_MIXED)}),
    Check("prompts beside decode, window", {"": _calm(**_MIXED, window=20)}),
    Check(
        "a sequence without queries, padding rows",
        {"": _calm(lengths=(40, 37, 70, 0), q_lens=(1, 0, 9, 0), padding=3)},
        of_values=True,
    ),
    Check("entries that start or end inside a page", {"": _calm(lengths=(90, 40), slices=True)}),
    Check("positions that nothing covers", {"": _calm(lengths=(90, 40), gaps=True)}),
    Check("keys rotated for other positions", {"": _calm(lengths=(90, 40), rotary_dim=128)}),
    Check("sinks", {"": _calm(sinks=True)}),
    Check("log-sum-exp", {"": _calm()}, lse=True),
    Check(
        "the kit's cases, every provocation at once",
        {case.name: functools.partial(_as_the_kit_has_it, case) for case in CASES},
        of_values=True,
    ),
)

# --- who is asked -------------------------------------------------------------------------------------------

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
    live = np.arange(table.max_entries) < np.asarray(table.num_entries)[:, None]
    counts = np.where(live, table.num_tokens, 0)
    lengths = counts.sum(1)
    full = np.clip(lengths[:, None] - page_size * np.arange(table.max_entries), 0, page_size)
    if (live & (np.asarray(table.first_slot) != 0)).any() or (counts != full).any():
        raise CannotExpress("its sequences fill their pages from the first slot on")
    if (live & (np.asarray(table.position) != page_size * np.arange(table.max_entries))).any():
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
    live &= (np.arange(table.max_entries) < np.asarray(table.num_entries)[:, None])[..., None]
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

    from jaxpaged.attention import mosaic_gpu

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
        missing=functools.partial(_without_module, "jaxpaged.attention.mosaic_tpu"),
    ),
    Kernel(
        "mosaic_gpu, interpreted",
        _OURS,
        _own_on_gpu,
        dtype="bf16",
        tolerance=1e-4,
        missing=lambda: _without_module("jaxpaged.attention.mosaic_gpu") or _without_gpu_interpreter(),
    ),
)

# --- asking -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """What came of one variant of one check."""

    kind: str
    """"ok", "wrong", "NaN", "NaN leaks", "compiles", "lowers", "refused", "cannot be expressed", "not run" or "not
    asked"."""
    detail: str = ""


_WORDS = 220
"""Characters of a message that are short."""


def _in_its_own_words(error: Exception) -> str:
    """The line of an error's message that says what is wrong; of an assertion without one, the assertion."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        line = traceback.extract_tb(error.__traceback__)[-1].line or ""
        return f"{type(error).__name__}: {line}"
    said = lines[0]
    if "callback" in said:  # an interpreter's own error stands last
        said = lines[-1]
    said = re.sub(r"( at)? /\S+", "", said)  # where a file lies on this machine
    said = re.sub(r"\s+", " ", said)
    # Whole sentences, as many as are short together, and the first one in any case.
    end = max(said.rfind(". ", 0, _WORDS), said.find(". ")) if len(said) > _WORDS else -1
    return said[: end + 1] if end >= 0 else said[:300]


def _compile(kernel: Kernel, prepared: Prepared) -> None:
    """As far as one comes without the device.

    Raises:
      Exception: whatever the compilers of TPUs and GPUs raise.
    """
    run, arrays, _ = prepared
    if kernel.how == "cuda":
        from jax.sharding import AbstractDevice, AbstractMesh

        device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
            jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",))
        return
    from jax.experimental import topologies

    topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
    # Kernels that ask for the chip find it in the mesh.
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arrays]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jax.jit(run).trace(*shapes).lower(lowering_platforms=("tpu",)).compile()


def _interpret_for_tpu(run: Callable[..., Any], arrays: Arrays) -> Any:
    from jax.experimental.pallas import tpu as pltpu

    parameters = pltpu.InterpretParams(
        detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan"
    )
    pltpu.reset_tpu_interpret_mode_state()
    with pltpu.force_tpu_interpret_mode(parameters):
        return jax.block_until_ready(run(*arrays))


def _race_was_found() -> bool:
    """Whether the interpreter saw a race since it was reset; jax has no public name for it."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races is not None and interpret_pallas_call.races.races_found


def ask(kernel: Kernel, check: Check, label: str) -> Cell:
    """One variant of a check, put to a kernel."""
    runs = kernel.how in ("run", "interpret")
    if check.of_values and not runs:
        return Cell("not asked")
    built = check.builds[label](kernel.dtype)

    def attention(*args: Any, **options: Any) -> Any:
        run, arrays, back = kernel.prepare(*args, **options)
        return back(_interpret_for_tpu(run, arrays) if kernel.how == "interpret" else run(*arrays))

    try:
        if not runs:
            # Queries of the pages' dtype, as these kernels are used.
            q = built.q.astype(built.k_pages.dtype)
            options = built.options | ({"return_lse": True} if check.lse else {})
            _compile(
                kernel, kernel.prepare(q, built.k_pages, built.v_pages, built.table, built.batch, **options)
            )
            return Cell("compiles" if kernel.how == "v5e" else "lowers")
        verdict = judge(attention, built, rtol=kernel.tolerance, atol=kernel.tolerance, lse=check.lse)
    except CannotExpress as reason:
        return Cell("cannot be expressed", str(reason))
    except Exception as error:
        return Cell("refused", _in_its_own_words(error))
    if verdict.kind == "ok":
        return Cell("ok", "but a race" if kernel.how == "interpret" and _race_was_found() else "")
    if verdict.kind == "nan":
        return Cell("NaN leaks" if jnp.isnan(built.v_pages).any() else "NaN")
    if verdict.kind == "refused":
        return Cell("refused", verdict.reason)
    if not verdict.reason and verdict.max_error <= 2 * float(jnp.finfo(built.k_pages.dtype).eps):
        return Cell(
            "ok", f"to {verdict.max_error:.1g}"
        )  # weights in the pages' dtype, as flash attention has them
    return Cell("wrong", verdict.reason or f"{verdict.max_error:.1g}")


_PLACES = [(check.name, label) for check in CHECKS for label in check.builds]
_MARK = "CELL "


def _child(name: str, skip: int) -> None:
    """Asks one kernel everything from the place ``skip`` on; a line for each start and each answer."""
    kernel = next(k for k in KERNELS if k.name == name)
    checks = {check.name: check for check in CHECKS}
    for place in range(skip, len(_PLACES)):
        print(f"{_MARK}{json.dumps([place])}", flush=True)
        check, label = _PLACES[place]
        cell = ask(kernel, checks[check], label)
        print(f"{_MARK}{json.dumps([place, cell.kind, cell.detail])}", flush=True)
        jax.clear_caches()


_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # What libtpu asks for on a machine without a TPU.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


_FASTER_TO_COMPILE = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
"""Where a kernel is run: results are compared, not timed."""


def answers(name: str, limit: float) -> Iterator[tuple[tuple[str, str], Cell]]:
    """Every place and its cell; a process that hangs or dies is followed by another, behind the place it was at."""
    place = 0
    kernel = next(k for k in KERNELS if k.name == name)
    environment = (
        os.environ | _ENVIRONMENT | (_FASTER_TO_COMPILE if kernel.how in ("run", "interpret") else {})
    )
    while place < len(_PLACES):
        command = [
            sys.executable,
            "-m",
            "tpu_scripts.check_other_kernels",
            "--child",
            name,
            "--from",
            str(place),
        ]
        with tempfile.TemporaryFile("w+") as complaints:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=complaints, text=True, env=environment
            )
            lines: queue.Queue[str | None] = queue.Queue()

            def read(stream: Any, lines: queue.Queue[str | None] = lines) -> None:
                for line in stream:
                    lines.put(line)
                lines.put(None)

            threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
            why = ""
            while True:
                try:
                    line = lines.get(timeout=limit)
                except queue.Empty:
                    process.kill()
                    why = f"no end within {limit:.0f} s"
                    break
                if line is None:
                    break
                if line.startswith(_MARK):
                    at, *cell = json.loads(line.removeprefix(_MARK))
                    if cell:
                        yield _PLACES[at], Cell(*cell)
                        place = at + 1
            status = process.wait()
            if place == len(_PLACES):
                return
            if not why:
                complaints.seek(0)
                last = ["", *complaints.read().strip().splitlines()][-1]
                signalled = signal.Signals(-status).name if status < 0 else f"status {status}"
                why = f"the process ended with {signalled}: {last}"[:300]
        yield _PLACES[place], Cell("not run", why)
        place += 1


# --- telling ------------------------------------------------------------------------------------------------

_SHOWN = {"NaN": "**NaN**", "NaN leaks": "**NaN leaks**", "not asked": ""}


class Notes:
    """Numbered notes under a table, each said once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def _say(cell: Cell, notes: Notes) -> str:
    shown = _SHOWN.get(cell.kind, cell.kind)
    if cell.kind == "wrong":
        return f"**wrong** ({cell.detail})"
    if cell.kind == "ok" and cell.detail:
        return f"ok {cell.detail}"
    return f"{shown} [{notes.number(cell.detail)}]" if cell.detail else shown


def _summary(cells: Mapping[str, Cell], notes: Notes) -> str:
    said: dict[str, list[str]] = {}
    for label, cell in cells.items():
        said.setdefault(_say(cell, notes), []).append(label)
    if len(said) == 1:
        return next(iter(said))
    return "; ".join(f"{', '.join(labels)}: {text}" for text, labels in said.items())


def _count(cells: Mapping[str, Cell]) -> str:
    kinds = Counter(cell.kind for cell in cells.values())
    return ", ".join(
        f"{number} {_SHOWN.get(kind, kind)}" for kind, number in kinds.items() if kind != "not asked"
    )


def table(group: str, results: Mapping[str, Mapping[tuple[str, str], Cell]]) -> str:
    """The kernels of a group, a column each, and the notes below."""
    kernels = [kernel for kernel in KERNELS if kernel.group == group and kernel.name in results]
    notes = Notes()
    rows = [["", *(kernel.name for kernel in kernels)], ["---"] * (len(kernels) + 1)]
    for check in CHECKS:
        row = [check.name]
        for kernel in kernels:
            cells = {
                label: results[kernel.name].get((check.name, label), Cell("not run"))
                for label in check.builds
            }
            text = _count(cells) if check is CHECKS[-1] else _summary(cells, notes)
            if check.name in kernel.documented and text != "ok":
                text += f" (documented [{notes.number(kernel.documented[check.name])}])"
            row.append(text)
        rows.append(row)
    lines = [f"### {group}", "", *("| " + " | ".join(row) + " |" for row in rows), ""]
    lines += [f"{number}. {text}" for number, text in enumerate(notes.texts, 1)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAME", help="kernels whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every cell there too")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for one check of one kernel")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--from", dest="skip", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return _child(args.child, args.skip)
    chosen = [kernel for kernel in KERNELS if args.only is None or args.only in kernel.name]
    if not chosen:
        parser.error(f"no kernel is called {args.only!r}; there are {'; '.join(k.name for k in KERNELS)}")
    results: dict[str, dict[tuple[str, str], Cell]] = {}
    for kernel in chosen:
        if why := kernel.missing():
            print(f"left out: {kernel.name}: {why}", file=sys.stderr)
            continue
        results[kernel.name] = {}
        for place, cell in answers(kernel.name, args.limit):
            results[kernel.name][place] = cell
            print(
                f"{kernel.name} | {' '.join(place)} | {cell.kind} {cell.detail}", file=sys.stderr, flush=True
            )
    print(f"jax {jax.__version__}\n")
    for group in dict.fromkeys(kernel.group for kernel in chosen if kernel.name in results):
        print(table(group, results))
    if args.json:
        cells = [
            {"kernel": name, "check": check, "variant": label, **dataclasses.asdict(cell)}
            for name, found in results.items()
            for (check, label), cell in found.items()
        ]
        args.json.write_text(json.dumps({"jax": jax.__version__, "cells": cells}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
