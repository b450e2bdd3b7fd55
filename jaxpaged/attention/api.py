"""paged_attention: one operation, and the choice of the implementation that computes it."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, overload

import jax
from jax import Array

from jaxpaged.attention.base import (
    Pages,
    check_pages,
    check_queries,
    check_rope,
    has_hadamard,
    make_config,
)
from jaxpaged.pages.batch import Batch
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.formats import BlockPages, hadamard_transform, lane_width, token_rows
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
"""What each platform tries before "xla", which runs everywhere, and the specification."""

VARIABLE = "JAXPAGED_ATTENTION"
"""The environment variable that names the only implementation to try; see ``candidates``."""

_EVERYWHERE = ("xla", "reference")
_READ_LANES = ("mosaic_tpu", *_EVERYWHERE)
"""Those that read rows of lanes (``page_format.LanePageFormat``) as they lie; others are given plain pages."""
_NEEDS = {"cpu_numba": "numba (pip install 'jaxpaged[cpu]')"}


def load(name: str) -> Callable[..., tuple[Array, Array]]:
    """An implementation by its name; its module is imported when it is first asked for.

    Raises:
      NotImplementedError: what it is built on is not here, or not as it was when it was written.
    """
    found = _find(name)
    if isinstance(found, str):
        raise NotImplementedError(found)
    return found


@functools.cache
def _find(name: str) -> Callable[..., tuple[Array, Array]] | str:
    """An implementation, or why there is none; what is broken is warned of once."""
    try:
        return importlib.import_module(f"jaxpaged.attention.{_MODULES[name]}").paged_attention
    except ModuleNotFoundError as missing:
        return f"needs {_NEEDS.get(name, missing.name)}"
    except ImportError as broken:
        warnings.warn(f"attention falls back from {name}: {broken}", RuntimeWarning, stacklevel=2)
        return str(broken)


def default_platform() -> str:
    """The platform that JAX computes on unless told otherwise: "cpu", "gpu", "tpu"."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(device, str):
        return device
    return device.platform if device is not None else jax.default_backend()


def candidates(platform: str | None = None) -> tuple[str, ...]:
    """The implementations to try on a platform, the preferred one first.

    The environment variable ``JAXPAGED_ATTENTION`` names the only one to try, on every platform: for measurements of
    whole models, one implementation after the other. It is read when a program is traced; what is compiled already, or
    names its implementation, does not follow it.

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
    """Which implementation serves an attention, and why not those before it."""

    name: str
    refusals: Mapping[str, str]
    """The reason of each one that was tried first."""


def choose(platform: str, *args: Any, **options: Any) -> Choice:
    """The implementation that ``paged_attention(*args, **options)`` takes on a platform; nothing is computed.

    Arrays may be ``jax.ShapeDtypeStruct``.

    Raises:
      NotImplementedError: none can serve.
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
    implementation: str | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Causal attention of a step's queries to the pages of their sequences.

    A query at position p sees the tokens of its sequence's entries at the positions
    ``max(0, p - window + 1) <= n <= p``, with ``weight_n = softmax_n(cap(scale * q . k_n))`` and
    ``cap(x) = soft_cap * tanh(x / soft_cap)``. The step's own keys are already written and in the table.
    Slots that no entry covers, and pages that nobody holds, may contain anything, NaN too. A row with nothing
    to see (padding, an empty table) gives zeros.

    Args:
      q: [T, Hq, D], floating point; Hq is a multiple of KV, head h reads KV head ``h // (Hq / KV)``.
      k_pages, v_pages: [N, KV, page_size, D], or rows of lanes that hold the same (``page_format.LanePageFormat``);
        floating point; or quantized pages (``page_format.BlockPages``), each of a format of its own. Sums are float32.
      table: the entries of S sequences.
      batch: sequence and position of each of the T queries.
      scale: factor of the scores, ``D ** -0.5`` if left out.
      window: tokens that a query sees, itself included; all if left out.
      soft_cap: bound of the scores; none if left out.
      sinks: f32[Hq], one more score for each head, that joins the denominator and has no value; none if left
        out.
      rope: what queries and keys were rotated with. Keys of an entry were rotated at their position plus the entry's
        rotation, queries at ``batch.rope_positions``; with it the score is that of keys and queries rotated at their
        positions, however often they were shifted. If left out, entries' rotations are ignored.
      implementation: a name of ``IMPLEMENTATIONS``. If left out, the first of ``candidates()`` that can serve; they
        follow from the platform that JAX computes on by default when this is traced, so a program that is compiled for
        another platform names its implementation.
      return_lse: also return the logarithm of each softmax denominator, for ``merge_states``.

    Returns:
      out [T, Hq, D] in the dtype of q; with ``return_lse`` also lse f32[T, Hq], -inf where nothing is seen. A
      sink counts in lse.

    Raises:
      ValueError: shapes that do not fit together; a name that is unknown.
      TypeError: arrays that are not floating point.
      NotImplementedError: the implementation asked for, or every one, cannot serve these arguments; says why.

    Example:
      >>> out = paged_attention(q, cache.k_pages[0], cache.v_pages[0], cache.table, batch)  # doctest: +SKIP

    Reference: PagedAttention, arXiv:2309.06180; the ragged form, arXiv:2604.15464.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}")
    check_pages(k_pages, v_pages, table)
    _, num_kv_heads, _, width = k_pages.shape
    # Rows of pages may be laid out for a TPU; then they are as wide as its lanes.
    head_dim = q.shape[-1] if q.ndim == 3 and width == lane_width(q.shape[-1]) else width
    check_queries(q, num_kv_heads, head_dim, batch, table.pages.shape[0], sinks)
    check_rope(rope, head_dim)
    config = make_config(head_dim, scale, window, soft_cap)
    refusals = []
    for name in candidates() if implementation is None else (implementation,):
        try:
            attend, pages = load(name), (k_pages, v_pages)
            if name not in _READ_LANES:
                pages = _plain(k_pages, head_dim), _plain(v_pages, head_dim)
            out, lse = attend(q, *pages, table, batch, config, sinks, rope)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
            continue
        if has_hadamard(v_pages):
            out = hadamard_transform(out)  # sums of turned values are turned sums
        out = out.astype(q.dtype)
        return (out, lse) if return_lse else out
    raise NotImplementedError("; ".join(refusals))


def _plain(pages: Pages, head_dim: int) -> Pages:
    return pages if isinstance(pages, BlockPages) else token_rows(pages, head_dim)
