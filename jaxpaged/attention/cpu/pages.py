"""Rows of pages of each format as float32, for the CPU kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxpaged.attention.cpu.kinds import KINDS
from jaxpaged.native.codes import (
    BYTES,
    NIBBLES,
    NIBBLES_LESS_8,
    Q4_K,
    codebook_run,
    dots_with_codes,
    expand_bytes,
    expand_fives,
    expand_fives_less_16,
    expand_nibbles,
    expand_nibbles_by_channel,
    expand_nibbles_less_8,
    expand_q4_k,
    expand_twos,
    expand_twos_by_channel,
    product_with_codes,
    widen_fp8,
)
from jaxpaged.native.memory import load_f32, store_f32
from jaxpaged.native.tiles import f32, i64, njit, widen_bf16, widen_f16
from jaxpaged.pages.formats.codebooks import IQ4_NL_VALUES

(
    _F32, _BF16, _F16, _FP8, _Q8_0, _Q5_1, _Q5_0, _Q4_1, _Q4_0, _IQ4_NL, _Q4_K, _KIVI4, _KIVI2, _KIVI4_BY_TOKEN,
    _KIVI2_BY_TOKEN,
) = range(len(KINDS))  # fmt: skip
F16 = _F16
"""Kind of residual pages."""
FIRST_RESIDUAL = _Q4_K
"""First kind with residual pages; all later ones have them too."""

_expand_iq4_nl = codebook_run(IQ4_NL_VALUES)


@njit
def bytes_of_row(kind: int, dim: int) -> int:
    """Bytes of the codes of one token and head."""
    if kind == _F32:
        return 4 * dim
    if kind in (_BF16, _F16):
        return 2 * dim
    if kind in (_FP8, _Q8_0):
        return dim
    if kind in (_KIVI2, _KIVI2_BY_TOKEN):
        return dim // 4
    return dim // 2


@njit
def _load_plain(kind: int, source: int, count: int, dim: int, wide: int, target: int) -> None:
    for c in range(count):
        row = target + 4 * c * wide
        if kind == _F32:
            for i in range(dim):
                store_f32(row, i, load_f32(source, c * dim + i))
        elif kind == _FP8:
            for i in range(0, dim, 16):
                widen_fp8((source + c * dim + i, row + 4 * i))
        else:
            for i in range(0, dim, 8):
                if kind == _BF16:
                    widen_bf16((source + 2 * (c * dim + i), row + 4 * i))
                else:
                    widen_f16((source + 2 * (c * dim + i), row + 4 * i))
        for i in range(dim, wide):
            store_f32(row, i, f32(0))


@njit
def _load_blocks(
    kind: int, codes: int, scales: int, minima: int, more: int, target: int, first: int, count: int
) -> None:
    """``count`` blocks of 32 numbers, from block ``first`` of the pool."""
    run = (codes, scales, minima, more, target, first, count)
    if kind == _Q8_0:
        expand_bytes(run)
    elif kind == _Q4_0:
        expand_nibbles_less_8(run)
    elif kind == _IQ4_NL:
        _expand_iq4_nl(run)
    elif kind == _Q5_0:
        expand_fives_less_16(run)
    elif kind == _Q5_1:
        expand_fives(run)
    elif kind == _Q4_K:
        expand_q4_k(run)
    elif kind == _KIVI2_BY_TOKEN:
        expand_twos(run)
    else:  # q4_1, and kivi4 by token
        expand_nibbles(run)


@njit
def _load_by_channel(
    kind: int, codes: int, scales: int, minima: int, page: int, row: int, count: int, dim: int, target: int,
    channels: int,
) -> None:  # fmt: skip
    """``count`` rows from row ``row`` of the pool, with the page's scales of each channel."""
    widened = channels + 4 * dim
    for i in range(0, dim, 8):
        widen_f16((scales + 2 * (page * dim + i), channels + 4 * i))
        widen_f16((minima + 2 * (page * dim + i), widened + 4 * i))
    blocks = dim // 32
    for c in range(count):
        run = (codes, channels, widened, i64(0), target + 4 * c * dim, (row + c) * blocks, blocks)
        if kind == _KIVI4:
            expand_nibbles_by_channel(run)
        else:
            expand_twos_by_channel(run)


@njit
def load_plain_rows(
    kind: int, source: int, page: int, page_size: int, slot: int, count: int, dim: int, wide: int, target: int
) -> tuple[int, int]:
    """``load_rows`` of numbers that are not quantized."""
    source += bytes_of_row(kind, dim) * (page * page_size + slot)
    if kind == _F32 and dim == wide:
        return source, dim
    _load_plain(kind, source, count, dim, wide, target)
    return target, wide


@njit
def load_rows(
    kind: int, codes: int, scales: int, minima: int, more: int, page: int, page_size: int, slot: int, count: int,
    dim: int, wide: int, target: int, channels: int,
) -> tuple[int, int]:  # fmt: skip
    """``count`` rows of a page as float32 with ``wide`` readable numbers each: ``(address, distance
    of rows)``.

    Rows that need no conversion are not copied; others are written to ``target``.

    Args:
      kind: index into ``KINDS``.
      codes, scales, minima, more: addresses of the parts; plain numbers are codes, more are fifth
        bits or q4_k's block scales.
      page: page and KV head, ``page * num_kv_heads + head``.
      slot: first row.
      dim: numbers of a row; a multiple of 8, of 16 for fp8, of 32 for blocks, unless the numbers
        are float32.
      wide: dim rounded up to whole vectors.
      channels: memory for ``2 * dim`` numbers.
    """
    if kind <= _FP8:
        return load_plain_rows(kind, codes, page, page_size, slot, count, dim, wide, target)
    row = page * page_size + slot
    if kind in (_KIVI4, _KIVI2):
        _load_by_channel(kind, codes, scales, minima, page, row, count, dim, target, channels)
    else:
        _load_blocks(kind, codes, scales, minima, more, target, row * dim // 32, count * dim // 32)
    return target, wide


# --- products of few rows with codes --------------------------------------------------------------------


@njit
def reads_codes(kind: int) -> bool:
    """True if few rows are multiplied with codes of this kind directly; other kinds are converted
    in ``load_rows``."""
    return kind in (_Q8_0, _Q4_0, _Q4_1, _Q4_K, _KIVI4_BY_TOKEN)


@njit
def bytes_of_scales(kind: int, part: int, count: int) -> int:
    """Bytes of the scales (``part`` 1), minima (2) and other parts (3) of ``count`` numbers of such
    a kind."""
    if kind == _Q4_K:  # a super-block has 16 bits, 16 bits and 12 bytes
        return count * (12 if part == 3 else 2) // 256
    return count // 16 if part == 1 or (part == 2 and kind in (_Q4_1, _KIVI4_BY_TOKEN)) else 0


def _of_codes(product: Callable[..., Any]) -> Any:
    """``(kind, rows, keys, a, lda, out, ldo)``: ``product`` for any number of rows of ``a``, and
    any such kind."""
    of_bytes, of_nibbles_less_8, of_nibbles, of_q4_k = map(product, (BYTES, NIBBLES_LESS_8, NIBBLES, Q4_K))

    @njit
    def run(kind: int, rows: int, keys: tuple[int, ...], a: int, lda: int, out: int, ldo: int) -> None:
        for r in range(0, rows, 4):
            args = (*keys, a + 4 * r * lda, lda, out + 4 * r * ldo, ldo)
            if kind == _Q8_0:
                of_bytes(rows - r, args)
            elif kind == _Q4_0:
                of_nibbles_less_8(rows - r, args)
            elif kind == _Q4_K:
                of_q4_k(rows - r, args)
            else:
                of_nibbles(rows - r, args)

    return run


dots_of_codes = _of_codes(dots_with_codes)
"""``out[rows, count] = a @ keys.T``, with keys ``(codes, scales, minima, more, first block, blocks,
count)``."""
add_codes = _of_codes(product_with_codes)
"""``out[rows, 32 * blocks] += a[rows, count] @ keys``."""
