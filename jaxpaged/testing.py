"""The conformance kit: states that provoke mistakes, and an oracle to compare any attention with.

Everything here is numpy on the host; the oracle shares no line with ``jaxpaged.attention``.

Example:
  >>> from jaxpaged.attention.cases import CASES
  >>> for case in CASES:  # doctest: +SKIP
  ...     check_conformance(my_paged_attention, case)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpaged.attention.cases import Case
from jaxpaged.batch import Batch
from jaxpaged.block_table import BlockTable
from jaxpaged.page_format import page_format
from jaxpaged.rope import Rope


@dataclass(frozen=True)
class Built:
    """A case with its arrays, and what comes out of it."""

    case: Case
    q: Array
    """[T, Hq, D]"""
    k_pages: Array
    """[N, KV, page_size, D]; NaN wherever no entry points."""
    v_pages: Array
    table: BlockTable
    batch: Batch
    sinks: Array | None
    rope: Rope | None
    out: np.ndarray
    """f64[T, Hq, D], by the oracle."""
    lse: np.ndarray
    """f64[T, Hq]"""

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for ``paged_attention``."""
        case = self.case
        options = {"scale": case.scale, "window": case.window, "soft_cap": case.soft_cap, "sinks": self.sinks}
        return options if self.rope is None else options | {"rope": self.rope}


def build_case(case: Case, *, seed: int = 0) -> Built:
    """Makes the arrays of a case.

    Pages are permuted; slots that no entry covers and pages that nobody holds are NaN; table rows behind
    ``num_entries`` hold what a former owner left there: live pages, free pages, and the sentinel N.
    """
    rng = np.random.default_rng(seed)
    size, max_seqs = case.page_size, len(case.lengths)
    # The tokens of each sequence, cut into entries: (position, first_slot, num_tokens), pages numbered later.
    entries: list[list[tuple[int, int, int]]] = []
    for length in case.lengths:
        row, position, left = [], 0, length
        while left:
            first = int(rng.integers(0, size)) if case.slices else 0
            count = min(left, int(rng.integers(1, size - first + 1)) if case.slices else size)
            if case.gaps:
                position += int(rng.integers(0, 5))
            row.append((position, first, count))
            position, left = position + count, left - count
        entries.append(row)
    shared = [
        case.shared and s > 0 and e < len(entries[0]) - 1 and entries[0][e] == row[e]
        for s, row in enumerate(entries)
        for e in range(len(row))
    ]
    num_pages = len(shared) - sum(shared) + 3
    max_entries = max(map(len, entries)) + 3
    free = list(rng.permutation(num_pages))
    pages = rng.integers(0, num_pages + 1, (max_seqs, max_entries))
    first_slot, num_tokens, position_of = (rng.integers(0, size, pages.shape) for _ in range(3))
    dtype = page_format(case.dtype).dtype
    shape = num_pages, case.num_kv_heads, size, case.head_dim
    k_pages, v_pages = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    # Keys lie rotated at their position plus their entry's rotation; the oracle has them rotated at their position.
    rotation = rng.integers(-300, 300, pages.shape) if case.rotary_dim else np.zeros(pages.shape, int)
    rotation[:, 1::3] = rotation[:, 0:-1:3][:, : rotation[:, 1::3].shape[1]]  # neighbours shifted together
    oracle_k = np.full(shape, np.nan)
    is_shared = iter(shared)
    for s, row in enumerate(entries):
        for e, (position, first, count) in enumerate(row):
            first_slot[s, e], num_tokens[s, e], position_of[s, e] = first, count, position
            if next(is_shared):
                pages[s, e], rotation[s, e] = pages[0, e], rotation[0, e]
                continue
            pages[s, e] = page = free.pop()
            where, at = (
                (page, slice(None), slice(first, first + count)),
                np.arange(position, position + count),
            )
            key, value = rng.standard_normal((2, case.num_kv_heads, count, case.head_dim))
            k_pages[where], v_pages[where] = _rotated(case, key, at + rotation[s, e]), value
            oracle_k[where] = _rotated(case, key, at)
    sinks = rng.standard_normal(case.num_q_heads).astype(np.float32) * 2 if case.sinks else None

    q_lens = np.asarray(case.q_lens)
    rows = int(q_lens.sum())
    tokens = max(rows + case.padding, 1)
    sequence, asked = np.full(tokens, max_seqs), np.zeros(tokens, int)
    sequence[:rows] = np.repeat(np.arange(max_seqs), q_lens)
    for s, row in enumerate(entries):
        held = np.concatenate([np.arange(p, p + n) for p, _, n in row]) if row else np.zeros(0, int)
        asked[:rows][sequence[:rows] == s] = held[len(held) - q_lens[s] :]
    raw_q = rng.standard_normal((case.num_q_heads, tokens, case.head_dim)) * 2
    own = np.array([rotation[s, len(row) - 1] if row else 0 for s, row in enumerate(entries)] + [0])
    rope_positions = asked + own[sequence]
    q, oracle_q = (
        _rotated(case, raw_q, at).transpose(1, 0, 2).astype(np.float32) for at in (rope_positions, asked)
    )

    def integers(x: Any) -> Array:
        return jnp.asarray(x, jnp.int32)

    table = BlockTable(
        pages=integers(pages),
        first_slot=integers(first_slot),
        num_tokens=integers(num_tokens),
        position=integers(position_of),
        rotation=integers(rotation),
        num_entries=integers([len(row) for row in entries]),
    )
    batch = Batch(
        sequence=integers(sequence),
        position=integers(asked),
        rope_positions=integers(rope_positions),
        page=jnp.full(tokens, num_pages, jnp.int32),
        slot=jnp.zeros(tokens, jnp.int32),
        cu_q_lens=integers(np.concatenate([[0], np.cumsum(q_lens)])),
    )
    k, v = jnp.asarray(k_pages, dtype), jnp.asarray(v_pages, dtype)
    # The oracle reads what the pages hold after rounding.
    out, lse = _oracle(
        case,
        oracle_q,
        oracle_k if case.rotary_dim else np.asarray(k, np.float64),
        np.asarray(v, np.float64),
        pages,
        entries,
        sequence,
        asked,
        sinks,
    )
    rope = Rope.create(_frequencies(case), interleaved=case.interleaved) if case.rotary_dim else None
    sinks_or_none = None if sinks is None else jnp.asarray(sinks)
    return Built(case, jnp.asarray(q), k, v, table, batch, sinks_or_none, rope, out, lse)


def _frequencies(case: Case) -> np.ndarray:
    return 10_000.0 ** (-np.arange(0, case.rotary_dim, 2) / case.rotary_dim)


def _rotated(case: Case, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """``x [heads, tokens, D]`` with each pair of its first dimensions, as a complex number, turned."""
    if not case.rotary_dim:
        return x
    half = case.rotary_dim // 2
    real, imaginary = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        if case.interleaved
        else (
            slice(0, half),
            slice(half, 2 * half),
        )
    )
    pairs = (x[..., real] + 1j * x[..., imaginary]) * np.exp(1j * positions[:, None] * _frequencies(case))
    x = x.copy()
    x[..., real], x[..., imaginary] = pairs.real, pairs.imag
    return x


def _oracle(
    case: Case,
    q: np.ndarray,
    k_pages: np.ndarray,
    v_pages: np.ndarray,
    pages: np.ndarray,
    entries: list[list[tuple[int, int, int]]],
    sequence: np.ndarray,
    position: np.ndarray,
    sinks: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention one query and one head at a time, in float64."""
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    group = case.num_q_heads // case.num_kv_heads
    held = []
    for s, row in enumerate(entries):
        where, keys, values = [np.zeros(0, int)], [], []
        for e, (start, first, count) in enumerate(row):
            where.append(np.arange(start, start + count))
            keys.append(k_pages[pages[s, e], :, first : first + count])
            values.append(v_pages[pages[s, e], :, first : first + count])
        held.append((np.concatenate(where), keys, values))
    joined = [(w, np.concatenate(k, 1), np.concatenate(v, 1)) if k else None for w, k, v in held]
    for t in range(q.shape[0]):
        found = joined[sequence[t]] if sequence[t] < len(entries) else None
        if found is None:
            continue
        where, keys, values = found
        see = where <= position[t]
        if case.window is not None:
            see &= where > position[t] - case.window
        for h in range(case.num_q_heads):
            scores = scale * (keys[h // group, see] @ q[t, h].astype(np.float64))
            if case.soft_cap is not None:
                scores = case.soft_cap * np.tanh(scores / case.soft_cap)
            every = scores if sinks is None else np.append(scores, sinks[h])
            if not every.size:
                continue
            top = every.max()
            total = np.exp(every - top).sum()
            lse[t, h] = top + np.log(total)
            out[t, h] = np.exp(scores - top) / total @ values[h // group, see]
    return out, lse


def check_conformance(
    attention: Callable[..., Any],
    case: Case | Built,
    *,
    rtol: float = 2e-5,
    atol: float = 2e-5,
    lse: bool = True,
) -> None:
    """Compares an attention with the oracle.

    Args:
      attention: called as ``attention(q, k_pages, v_pages, table, batch, scale=, window=, soft_cap=, sinks=)``, with
        ``rope=`` where the case has one, and with ``return_lse=True`` if ``lse``; see
        ``jaxpaged.attention.paged_attention``.
      case: a case, or what ``build_case`` made of it.
      rtol, atol: tolerances of the output; pages of any dtype, sums in float32.
      lse: whether it returns the logarithm of its denominators too.

    Raises:
      AssertionError: another shape, dtype or value; the message names the case.
    """
    built = case if isinstance(case, Built) else build_case(case)
    options = built.options | ({"return_lse": True} if lse else {})
    result = attention(built.q, built.k_pages, built.v_pages, built.table, built.batch, **options)
    name = built.case.name
    out = result[0] if lse else result
    assert out.shape == built.q.shape, f"{name}: out has shape {out.shape}, q {built.q.shape}"
    assert out.dtype == built.q.dtype, f"{name}: out has dtype {out.dtype}, q {built.q.dtype}"
    np.testing.assert_allclose(np.asarray(out, np.float64), built.out, rtol, atol, err_msg=f"{name}: out")
    if lse:
        np.testing.assert_allclose(
            np.asarray(result[1], np.float64), built.lse, rtol, atol, err_msg=f"{name}: lse"
        )
