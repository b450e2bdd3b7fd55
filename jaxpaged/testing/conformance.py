"""Conformance kit: cases with adversarial memory contents, and an oracle to compare any attention
with.

It runs in numpy on the host; the oracle shares no code with ``jaxpaged.attention``.
``docs/internals/conformance.md`` tests a kernel of your own with it, and shows results of other kernels.

Example:
  >>> for case in CASES:  # doctest: +SKIP
  ...     check_conformance(my_paged_attention, case)
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpaged.attention.base import Pages
from jaxpaged.attention.cases import CASES as CASES
from jaxpaged.attention.cases import QUANTIZED_CASES as QUANTIZED_CASES
from jaxpaged.attention.cases import Case as Case
from jaxpaged.pages.batch import Batch
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.formats import (
    BlockFormat,
    BlockPages,
    PageFormat,
    ResidualFormat,
    ResidualPages,
    formats_of,
    hadamard_transform,
)
from jaxpaged.pages.rope import Rope


@dataclass(frozen=True)
class Built:
    """Arrays of a case, and the expected results."""

    case: Case
    q: Array
    """[T, Hq, D]"""
    k_pages: Pages
    """[N, KV, page_size, D], of values Dv, or quantized; NaN, or scales of NaN, in slots of no entry."""
    v_pages: Pages
    table: BlockTable
    batch: Batch
    sinks: Array | None
    rope: Rope | None
    out: np.ndarray
    """f64[T, Hq, Dv], from the oracle."""
    lse: np.ndarray
    """f64[T, Hq]"""
    rows: tuple[np.ndarray, np.ndarray]
    """f32[N, KV, page_size, D]: keys and values before storage, of values Dv; NaN in slots of no entry."""

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for ``paged_attention``."""
        case = self.case
        options = {"scale": case.scale, "window": case.window, "soft_cap": case.soft_cap, "sinks": self.sinks}
        return options if self.rope is None else options | {"rope": self.rope}


def build_case(case: Case, *, seed: int = 0) -> Built:
    """Builds the arrays of a case, with adversarial fill.

    Pages are permuted; slots that no entry covers and free pages are NaN; table rows beyond
    ``num_entries`` hold stale numbers: live pages, free pages, and the sentinel N.
    """
    rng = np.random.default_rng(seed)
    size, max_seqs = case.page_size, len(case.lengths)
    # Entries of each sequence: (position, first_slot, num_tokens), pages numbered later.
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
    max_pages_per_seq = max(map(len, entries)) + 3
    free = list(rng.permutation(num_pages))
    pages = rng.integers(0, num_pages + 1, (max_seqs, max_pages_per_seq))
    first_slot, num_tokens, position_of = (rng.integers(0, size, pages.shape) for _ in range(3))
    v_head_dim = case.head_dim if case.v_head_dim is None else case.v_head_dim
    shape = num_pages, case.num_kv_heads, size
    k_pages, v_pages = (np.full((*shape, dim), np.nan, np.float32) for dim in (case.head_dim, v_head_dim))
    # Keys are stored rotated at position + rotation of their entry; the oracle uses them rotated at their position.
    rotation = rng.integers(-300, 300, pages.shape) if case.rotary_dim else np.zeros(pages.shape, int)
    rotation[:, 1::3] = rotation[:, 0:-1:3][:, : rotation[:, 1::3].shape[1]]  # neighbours shifted together
    written: list[tuple[Any, int]] = []
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
            # One draw for both, so that cases with heads of one size keep their numbers.
            widest = max(case.head_dim, v_head_dim)
            key, value = rng.standard_normal((2, case.num_kv_heads, count, widest))
            key, value = key[..., : case.head_dim], value[..., :v_head_dim]
            k_pages[where], v_pages[where] = _rotated(case, key, at + rotation[s, e]), value
            written.append((where, rotation[s, e]))
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
    visible_end = asked + 1
    if case.ahead:
        visible_end = rng.integers(0, max(case.lengths) + 9, tokens)
        visible_end[::5], visible_end[1::7] = np.iinfo(np.int32).max, np.iinfo(np.int32).min
        batch = replace(batch, visible_end=integers(visible_end))
        visible_end = np.maximum(asked + 1, visible_end)
    k, v = _stored(case, k_pages, v_pages, ~np.isnan(k_pages[:, 0, :, 0]))
    # The oracle reads the stored, rounded numbers; keys are rotated back exactly.
    oracle_k = _numbers(k)
    for where, rotated_by in written:
        oracle_k[where] = _rotated(case, oracle_k[where], np.full(oracle_k[where].shape[1], -rotated_by))
    out, lse = _oracle(
        case,
        oracle_q,
        oracle_k,
        _numbers(v),
        pages,
        entries,
        sequence,
        asked,
        visible_end,
        sinks,
    )
    rope = Rope.create(_frequencies(case), interleaved=case.interleaved) if case.rotary_dim else None
    sinks_or_none = None if sinks is None else jnp.asarray(sinks)
    rows_as_written = k_pages, v_pages
    return Built(case, jnp.asarray(q), k, v, table, batch, sinks_or_none, rope, out, lse, rows_as_written)


def _stored(case: Case, keys: np.ndarray, values: np.ndarray, used: np.ndarray) -> tuple[Pages, Pages]:
    """Pages that hold ``f32[N, KV, page_size, D]``, with garbage codes where it is NaN.

    In residual formats, every third page with tokens (``used bool[N, page_size]``) is a residual
    page.
    """
    live = np.flatnonzero(used.any(axis=1))
    opened = live[::3]
    place = np.full(len(keys), len(opened), np.int32)
    place[opened] = np.arange(len(opened))

    def stored(storage: PageFormat, rows: np.ndarray) -> Pages:
        if not isinstance(storage, BlockFormat):
            return storage.round(jnp.asarray(rows))
        # Tokens that share a scale: unused slots repeat the numbers of a used one.
        first = np.argmax(used, axis=1)
        filled = np.where(used[:, None, :, None], rows, rows[np.arange(len(rows)), :, first][:, :, None])
        nothing = np.isnan(rows[:, 0, :, 0])
        if isinstance(storage, ResidualFormat):
            nothing = nothing.all(axis=1)
        parts = {}
        for name, encoded in storage.encode(jnp.asarray(np.nan_to_num(filled))).items():
            part = np.array(encoded)
            garbage = (
                np.nan if part.dtype == np.float16 else -103 if part.dtype == np.int8 else 127
            )  # NaN of 8 bits
            (part if nothing.ndim == 1 else part.swapaxes(1, 2))[nothing] = garbage
            parts[name] = jnp.asarray(part)
        sizes = rows.shape[2:]
        if not isinstance(storage, ResidualFormat):
            return BlockPages(parts, storage, *sizes)
        turned = np.asarray(hadamard_transform(jnp.asarray(rows)) if storage.hadamard else rows)
        waiting = jnp.asarray(turned[opened], jnp.float16)
        return ResidualPages(parts, storage, *sizes, residual=waiting, slot_of_page=jnp.asarray(place))

    k_format, v_format = formats_of(case.dtype, None, case.v_dtype, case.hadamard)
    return stored(k_format, keys), stored(v_format, values)


def _numbers(pages: Pages) -> np.ndarray:
    """f64[N, KV, page_size, D]: stored numbers."""
    if not isinstance(pages, BlockPages):
        return np.asarray(pages, np.float64)
    numbers = pages.format.load(pages, jnp.arange(pages.shape[0]))
    return np.array(hadamard_transform(numbers) if pages.format.hadamard else numbers, np.float64)


ADVERSARIAL_FILLS = ("unused_slots", "free_pages", "stale_entries")
"""Memory contents that ``build_case`` makes adversarial, and ``benign_fill`` replaces."""


def benign_fill(built: Built, *, keep: Collection[str] = ()) -> Built:
    """Replaces adversarial memory contents, to find out which of them an attention depends on.

    Args:
      built: result of ``build_case``; the expected results stay the same.
      keep: those of ``ADVERSARIAL_FILLS`` to leave unchanged. Without "unused_slots" and
        "free_pages", slots of live pages that no entry covers and free pages get random numbers
        instead of NaN; without "stale_entries", table rows beyond ``num_entries`` get a live page.

    Raises:
      ValueError: an unknown name in ``keep``.
    """
    if unknown := set(keep) - set(ADVERSARIAL_FILLS):
        raise ValueError(f"unknown fills {sorted(unknown)}; there are {', '.join(ADVERSARIAL_FILLS)}")
    table = built.table
    pages, first_slot, num_tokens, num_entries = (
        np.asarray(x) for x in (table.pages, table.first_slot, table.num_tokens, table.num_entries)
    )
    rows, entries = np.nonzero(np.arange(pages.shape[1]) < num_entries[:, None])
    live = pages[rows, entries]
    if "stale_entries" not in keep:
        stale = np.arange(pages.shape[1]) >= num_entries[:, None]
        table = replace(table, pages=jnp.asarray(np.where(stale, live[0] if live.size else 0, pages)))
    num_pages, _, size, _ = built.k_pages.shape
    covered, free = np.zeros((num_pages, size), bool), np.ones(num_pages, bool)
    for page, row, entry in zip(live, rows, entries, strict=True):
        first = first_slot[row, entry]
        covered[page, first : first + num_tokens[row, entry]] = True
    free[live] = False
    kept = np.zeros((num_pages, size), bool)
    if "unused_slots" in keep:
        kept |= ~free[:, None]
    if "free_pages" in keep:
        kept |= free[:, None]
    ordinary = (~covered & ~kept)[:, None, :, None]
    rng = np.random.default_rng(1)
    keys, values = (
        np.where(ordinary, rng.standard_normal(rows.shape) * 3, rows).astype(np.float32)
        for rows in built.rows
    )
    k_pages, v_pages = _stored(built.case, keys, values, covered)
    return replace(built, table=table, k_pages=k_pages, v_pages=v_pages)


def _frequencies(case: Case) -> np.ndarray:
    return 10_000.0 ** (-np.arange(0, case.rotary_dim, 2) / case.rotary_dim)


def _rotated(case: Case, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """``x [heads, tokens, D]`` with each pair of its first dimensions rotated, as a complex number."""
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
    visible_end: np.ndarray,
    sinks: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention one query and one head at a time, in float64."""
    out, lse = np.zeros((*q.shape[:2], v_pages.shape[3])), np.full(q.shape[:2], -np.inf)
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
        see = where < visible_end[t]
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
      attention: called as ``attention(q, k_pages, v_pages, table, batch, scale=, window=,
        soft_cap=, sinks=)``, with ``rope=`` where the case has one, and with ``return_lse=True`` if
        ``lse``; see ``jaxpaged.attention.paged_attention``.
      case: a case, or the result of ``build_case``.
      rtol, atol: tolerances of the output; pages of any dtype, sums in float32.
      lse: True if the attention also returns the logarithm of its denominators.

    Raises:
      AssertionError: wrong shape, dtype or value; the message names the case.
    """
    built = case if isinstance(case, Built) else build_case(case)
    options = built.options | ({"return_lse": True} if lse else {})
    result = attention(built.q, built.k_pages, built.v_pages, built.table, built.batch, **options)
    name = built.case.name
    out = result[0] if lse else result
    assert out.shape == built.out.shape, f"{name}: out has shape {out.shape}, expected {built.out.shape}"
    assert out.dtype == built.q.dtype, f"{name}: out has dtype {out.dtype}, q {built.q.dtype}"
    np.testing.assert_allclose(np.asarray(out, np.float64), built.out, rtol, atol, err_msg=f"{name}: out")
    if lse:
        np.testing.assert_allclose(
            np.asarray(result[1], np.float64), built.lse, rtol, atol, err_msg=f"{name}: lse"
        )


@dataclass(frozen=True)
class Verdict:
    """Result of one case."""

    kind: str
    """"ok", "wrong", "nan" (wrong, and not a number where the oracle has one), or "refused"."""
    max_error: float = 0.0
    """Largest difference of outputs, NaN excluded."""
    reason: str = ""
    """Reason of a refusal, or of a mismatch other than in the output's values."""

    def __str__(self) -> str:
        if self.kind == "wrong":
            return f"wrong: {self.reason or f'max error {self.max_error:.2g}'}"
        return {"ok": "ok", "nan": "NaN leaks"}.get(self.kind, f"refused: {self.reason}")


def judge(
    attention: Callable[..., Any],
    case: Case | Built,
    *,
    rtol: float = 2e-5,
    atol: float = 2e-5,
    lse: bool = True,
) -> Verdict:
    """Runs ``check_conformance`` and returns a verdict instead of raising, for tables.

    A ``NotImplementedError`` of the attention is a refusal; its other errors are raised.
    """
    built = case if isinstance(case, Built) else build_case(case)
    results: list[Any] = []

    def observed(*args: Any, **options: Any) -> Any:
        results.append(attention(*args, **options))
        return results[-1]

    try:
        check_conformance(observed, built, rtol=rtol, atol=atol, lse=lse)
    except NotImplementedError as refusal:
        return Verdict("refused", reason=str(refusal))
    except AssertionError as difference:
        if not results:  # the attention's own
            raise
        out = _out_of(results[0], lse)
        if out.shape != built.out.shape:
            return Verdict("wrong", reason=str(difference))
        errors = np.abs(out - built.out)
        if np.isnan(out).any():
            return Verdict("nan", float(np.nanmax(errors, initial=0)))
        if np.allclose(out, built.out, rtol, atol):
            said = (line for line in str(difference).splitlines() if line.startswith(f"{built.case.name}: "))
            return Verdict("wrong", reason=next(said))
        return Verdict("wrong", float(errors.max(initial=0)))
    return Verdict("ok", float(np.abs(_out_of(results[0], lse) - built.out).max(initial=0)))


def _out_of(result: Any, lse: bool) -> np.ndarray:
    return np.asarray(result[0] if lse else result, np.float64)
