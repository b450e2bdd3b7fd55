"""``paged_attention``, and the choice of its implementation."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax import Array

from jaxpaged.attention import tuning
from jaxpaged.attention.base import (
    Config,
    Pages,
    check_pages,
    check_queries,
    check_rope,
    check_values,
    has_hadamard,
    make_config,
)
from jaxpaged.pages.batch import Batch
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.formats import BlockPages, PageFormat, hadamard_transform, lane_width, token_rows
from jaxpaged.pages.rope import Rope

_MODULES = {
    "cpu_numba": "cpu.backend",
    "mosaic_gpu": "gpu.backend",
    "mosaic_tpu": "tpu.backend",
    "xla": "xla",
    "reference": "reference",
}
IMPLEMENTATIONS = tuple(_MODULES)
"""The name of every implementation."""

PREFERENCES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"cpu": ("cpu_numba",), "gpu": ("mosaic_gpu",), "tpu": ("mosaic_tpu",)}
)
"""Implementations that each platform prefers to "xla", which runs everywhere, and to the reference."""

VARIABLE = "JAXPAGED_ATTENTION"
"""Environment variable with the name of the only implementation to try; see ``candidates``."""

_EVERYWHERE = ("xla", "reference")
_READ_LANES = ("mosaic_tpu", *_EVERYWHERE)
"""Implementations that read ``LanePageFormat`` pages in their own layout; the others get plain
pages."""
_NEEDS = {"cpu_numba": "numba (pip install 'jaxpaged[cpu]')"}


def load(name: str) -> Callable[..., tuple[Array, Array]]:
    """Imports an implementation by its name.

    Raises:
      NotImplementedError: a library that it needs is missing, or of an unsupported version.
    """
    found = _find(name)
    if isinstance(found, str):
        raise NotImplementedError(found)
    return found


@functools.cache
def _find(name: str) -> Callable[..., tuple[Array, Array]] | str:
    """Implementation, or the reason why it is missing; a broken import is a warning, once."""
    try:
        return importlib.import_module(f"jaxpaged.attention.{_MODULES[name]}").paged_attention
    except ModuleNotFoundError as missing:
        return f"needs {_NEEDS.get(name, missing.name)}"
    except ImportError as broken:
        warnings.warn(f"attention falls back from {name}: {broken}", RuntimeWarning, stacklevel=2)
        return str(broken)


def prepare(k_format: PageFormat, v_format: PageFormat) -> None:
    """Starts to compile what attention over pages of these formats needs beside XLA's programs; it
    may be called as soon as the formats are known, and need not be."""
    with contextlib.suppress(NotImplementedError):
        if candidates()[0] == "cpu_numba":
            load("cpu_numba")
            importlib.import_module("jaxpaged.attention.cpu.backend").prepare(k_format, v_format)


def check_implementation(name: str | None) -> None:
    """Checks the name of an implementation; None = choose one.

    Raises:
      ValueError: it is none of ``IMPLEMENTATIONS``.
    """
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {name!r}; there are {', '.join(IMPLEMENTATIONS)}")


def default_platform() -> str:
    """JAX's default platform: "cpu", "gpu" or "tpu"."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(device, str):
        return device
    return device.platform if device is not None else jax.default_backend()


def candidates(platform: str | None = None) -> tuple[str, ...]:
    """Implementations to try on a platform, in order of preference.

    The environment variable ``JAXPAGED_ATTENTION`` names the only one to try, on every platform, to
    measure whole models with one implementation after another. It is read when a program is traced;
    compiled programs, and calls with ``implementation=``, ignore it.

    Raises:
      ValueError: ``JAXPAGED_ATTENTION`` names none of ``IMPLEMENTATIONS``.
    """
    forced = os.environ.get(VARIABLE)
    if forced:
        if forced not in IMPLEMENTATIONS:
            raise ValueError(f"{VARIABLE} is {forced!r}; allowed are {', '.join(IMPLEMENTATIONS)}")
        return (forced,)
    platform = default_platform() if platform is None else platform
    return (*PREFERENCES.get({"cuda": "gpu"}.get(platform, platform), ()), *_EVERYWHERE)


@dataclass(frozen=True)
class Choice:
    """Implementation that serves an attention."""

    name: str
    refusals: Mapping[str, str]
    """Reason why each implementation before it does not, by name."""


def choose(platform: str, *args: Any, **options: Any) -> Choice:
    """Finds the implementation of ``paged_attention(*args, **options)`` on a platform, without
    computing anything.

    Arrays may be ``jax.ShapeDtypeStruct``.

    Raises:
      NotImplementedError: no implementation supports the arguments.
    """
    refusals: dict[str, str] = {}
    for name in candidates(platform):
        try:
            jax.eval_shape(functools.partial(paged_attention, implementation=name, **options), *args)
        except NotImplementedError as refusal:
            refusals[name] = str(refusal).removeprefix(f"{name}: ")
            continue
        return Choice(name, refusals)
    raise NotImplementedError("; ".join(f"{name}: {reason}" for name, reason in refusals.items()))


@overload
def paged_attention(
    q: Array,
    k_pages: Pages,
    v_pages: Pages,
    table: BlockTable,
    batch: Batch,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    rope: Rope | None = None,
    first_page: Array | int = 0,
    v_head_dim: int | None = None,
    implementation: str | None = None,
    return_lse: Literal[False] = False,
) -> Array: ...


@overload
def paged_attention(
    q: Array,
    k_pages: Pages,
    v_pages: Pages,
    table: BlockTable,
    batch: Batch,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    rope: Rope | None = None,
    first_page: Array | int = 0,
    v_head_dim: int | None = None,
    implementation: str | None = None,
    return_lse: Literal[True],
) -> tuple[Array, Array]: ...


def paged_attention(
    q: Array,
    k_pages: Pages,
    v_pages: Pages,
    table: BlockTable,
    batch: Batch,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    rope: Rope | None = None,
    first_page: Array | int = 0,
    v_head_dim: int | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Attention of a step's queries to the pages of their sequences, causal by default.

    A query at position p sees the tokens of its sequence at the positions ``max(0, p - window + 1)
    <= n <= p``, and those at ``p < n < batch.visible_end`` where that is given, with ``weight_n =
    softmax_n(cap(scale * q . k_n))`` and ``cap(x) = soft_cap * tanh(x / soft_cap)``. The step's own
    keys are already written and in the table. Slots that no entry covers, and free pages, may contain
    anything, NaN included. A row that sees no token (padding, an empty table) is zero. Works under
    ``jit``, ``vmap``, ``scan``, ``while_loop``, ``cond``, ``checkpoint`` and ``shard_map``; it has no
    derivative.

    Args:
      q: [T, Hq, D], floating point; Hq is a multiple of KV, head h reads KV head ``h // (Hq /
        KV)``.
      k_pages, v_pages: [N, KV, page_size, D], or the same numbers in a TPU's layout
        (``LanePageFormat``), floating point; or quantized pages (``BlockPages``). Formats of keys
        and values may differ, and heads of values may have another size, Dv. Sums are float32. Pages
        of several layers may be joined along the first axis, see ``first_page``.
      table: block table of S sequences.
      batch: sequence and position of each of the T queries, and how far it sees.
      scale: factor of the scores; default ``D ** -0.5``.
      window: number of tokens that a query sees, itself included; default all.
      soft_cap: bound of the scores; default none.
      sinks: f32[Hq], an additional score of each head that joins the denominator and has no value;
        default none.
      rope: rotary embedding of queries and keys. Keys of an entry are stored rotated at their
        position plus the entry's rotation, queries come rotated at ``batch.rope_positions``; with
        it, scores are those of keys and queries rotated at their positions, however often they were
        shifted. By default, rotations of entries are ignored.
      first_page: i32[], index in ``k_pages`` and ``v_pages`` of the table's page 0. In a pool of
        several layers it is ``layer * num_pages``, and may be traced: layers can run in a scan.
      v_head_dim: Dv; by default what the pages say, which cannot tell the padding of a TPU's layout from
        numbers.
      implementation: one of ``IMPLEMENTATIONS``; default the first of ``candidates()`` that
        supports the arguments. These depend on JAX's default platform at trace time, so a program
        for another platform names its implementation.
      return_lse: also return the logarithm of each softmax denominator, for ``merge_states``.

    Returns:
      out [T, Hq, Dv] in the dtype of q; with ``return_lse`` also lse f32[T, Hq], sinks included,
      -inf where no token is seen.

    Raises:
      ValueError: shapes that do not match, or an unknown implementation.
      TypeError: wrong dtypes.
      NotImplementedError: the given implementation, or every one, does not support the arguments;
        says why.

    Example:
      >>> first = layer * cache.num_pages  # doctest: +SKIP
      >>> out = paged_attention(
      ...     q, cache.k_pages, cache.v_pages, cache.table, batch, first_page=first
      ... )  # doctest: +SKIP

    Reference: PagedAttention, arXiv:2309.06180; the ragged form, arXiv:2604.15464.
    """
    check_implementation(implementation)
    check_pages(k_pages, v_pages, table)
    _, num_kv_heads, _, width = k_pages.shape
    # Pages in a TPU's layout are as wide as its lanes.
    head_dim = q.shape[-1] if q.ndim == 3 and width == lane_width(q.shape[-1]) else width
    check_queries(q, num_kv_heads, head_dim, batch, table.pages.shape[0], sinks)
    check_rope(rope, head_dim)
    v_head_dim = check_values(k_pages, v_pages, head_dim, v_head_dim)
    config = make_config(head_dim, scale, window, soft_cap, v_head_dim)
    # Under trial, a program traced before would have other block sizes.
    run = _attend if tuning.under_trial() else _jitted_attend
    refusals = []
    for name in candidates() if implementation is None else (implementation,):
        try:
            out, lse = run(
                load(name),
                name in _READ_LANES,
                config,
                q,
                k_pages,
                v_pages,
                table,
                batch,
                sinks,
                rope,
                first_page,
            )
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
            continue
        return (out, lse) if return_lse else out
    raise NotImplementedError("; ".join(refusals))


def _attend(
    attend: Callable[..., tuple[Array, Array]],
    reads_lanes: bool,
    config: Config,
    q: Array,
    k_pages: Pages,
    v_pages: Pages,
    table: BlockTable,
    batch: Batch,
    sinks: Array | None,
    rope: Rope | None,
    first_page: Array | int,
) -> tuple[Array, Array]:
    """Attention by one implementation."""
    dim = q.shape[-1]
    pages = (k_pages, v_pages)
    if not reads_lanes:
        pages = _plain(k_pages, dim), _plain(v_pages, config.width_of_values(dim))
    first_page = jnp.asarray(first_page, jnp.int32)
    out, lse = attend(q, *pages, table, batch, config, sinks, rope, first_page)
    if has_hadamard(v_pages):
        out = hadamard_transform(out)  # the transform is its own inverse, and linear
    return out.astype(q.dtype), lse


_jitted_attend = jax.jit(_attend, static_argnums=(0, 1, 2))
"""Traced once for all layers that are alike."""


def _plain(pages: Pages, head_dim: int) -> Pages:
    return pages if isinstance(pages, BlockPages) else token_rows(pages, head_dim)
