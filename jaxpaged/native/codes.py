"""Quantized numbers to float32 on vectors, for numba functions: runs of blocks of 32 codes with
their scales.

``jaxpaged.pages.formats`` says how codes lie. A run is ``(codes, scales, minima, more, target,
first, count)``: the addresses of a pool's parts, where float32 numbers go, and which blocks,
counted from the pool's first. A few rows of a matrix are multiplied with codes directly
(``dots_with_codes``, ``product_with_codes``), which become float32 in registers only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types

from jaxpaged.native.memory import pointer
from jaxpaged.native.tiles import Code, any_rows, instructions

_I8, _I16, _I32, _I64, _F32 = (*(ir.IntType(n) for n in (8, 16, 32, 64)), ir.FloatType())
_HALF = 16
"""Codes that are widened together: half a block."""
_BYTES, _WORDS, _FLOATS = (ir.VectorType(kind, _HALF) for kind in (_I8, _I32, _F32))
_MACHINE = llvm.get_process_triple().split("-")[0]


def _element(c: Code, address: Any, index: Any, kind: Any, size: int) -> Any:
    at = c.b.add(address, c.b.mul(index, _I64(size)))
    return c.b.load(pointer(c.b, at, kind), align=1, typ=kind)


def _f16(c: Code, address: Any, index: Any) -> Any:
    return c.b.fpext(_element(c, address, index, ir.HalfType(), 2), _F32)


def _bytes_at(c: Code, address: Any, offset: int = 0) -> Any:
    """16 bytes."""
    return _element(c, address, _I64(offset), _BYTES, 1)


def _all(kind: Any, value: int) -> Any:
    return ir.Constant(kind, [value] * _HALF)


def _nibbles(c: Code, codes: Any) -> list[Any]:
    packed = _bytes_at(c, codes)
    return [c.b.and_(packed, _all(_BYTES, 15)), c.b.lshr(packed, _all(_BYTES, 4))]


def _signed(c: Code, codes: Any) -> Any:
    return c.b.sitofp(c.b.sext(codes, _WORDS), _FLOATS)


def _unsigned(c: Code, codes: Any) -> Any:
    return c.b.sitofp(c.b.zext(codes, _WORDS), _FLOATS)


def _looked_up(c: Code, table: Any, index: Any) -> Any:
    """``table[index]`` for 16 bytes, index below 16."""
    name = {
        "x86_64": "llvm.x86.ssse3.pshuf.b.128",
        "aarch64": "llvm.aarch64.neon.tbl1.v16i8",
        "arm64": "llvm.aarch64.neon.tbl1.v16i8",
    }.get(_MACHINE)
    if name is None:
        found = ir.Constant(_BYTES, ir.Undefined)
        for i in range(_HALF):
            byte = c.b.extract_element(table, c.b.extract_element(index, _I32(i)))
            found = c.b.insert_element(found, byte, _I32(i))
        return found
    kind = ir.FunctionType(_BYTES, [_BYTES, _BYTES])
    function = c.b.module.globals.get(name) or ir.Function(c.b.module, kind, name)
    return c.b.call(function, [table, index])


# --- the codes of a block, as two vectors of float32 ----------------------------------------------------------------


def _expand_bytes(c: Code, codes: Any, more: Any, at: Any) -> list[Any]:
    return [_signed(c, _bytes_at(c, codes, offset)) for offset in (0, _HALF)]


def _expand_nibbles(c: Code, codes: Any, more: Any, at: Any) -> list[Any]:
    return [_unsigned(c, half) for half in _nibbles(c, codes)]


def _expand_fives(c: Code, codes: Any, more: Any, at: Any) -> list[Any]:
    bits = _element(c, more, at, _I32, 4)
    halves = []
    for i, half in enumerate(_nibbles(c, codes)):
        mask = c.b.trunc(c.b.lshr(bits, _I32(_HALF * i)), _I16)
        fifth = c.b.zext(c.b.bitcast(mask, ir.VectorType(ir.IntType(1), _HALF)), _BYTES)
        halves.append(_unsigned(c, c.b.or_(half, c.b.shl(fifth, _all(_BYTES, 4)))))
    return halves


def _expand_twos(c: Code, codes: Any, more: Any, at: Any) -> list[Any]:
    # Eight bytes hold 32 codes; twice side by side they are the bytes of 16.
    packed = _element(c, codes, _I64(0), ir.VectorType(_I8, 8), 1)
    words = c.b.zext(c.shuffle(packed, packed, [*range(8), *range(8)]), _WORDS)
    halves = []
    for shift in (0, 4):
        shifts = ir.Constant(_WORDS, [shift] * 8 + [shift + 2] * 8)
        halves.append(c.b.sitofp(c.b.and_(c.b.lshr(words, shifts), _all(_WORDS, 3)), _FLOATS))
    return halves


def _expand_codebook(values: Sequence[int]) -> Callable[[Code, Any, Any, Any], list[Any]]:
    def expand(c: Code, codes: Any, more: Any, at: Any) -> list[Any]:
        table = ir.Constant(_BYTES, [value & 255 for value in values])
        return [_signed(c, _looked_up(c, table, half)) for half in _nibbles(c, codes)]

    return expand


# --- runs -----------------------------------------------------------------------------------------------------------


def _write_run(block: Callable[..., list[Any]]) -> Callable[..., None]:
    """The numbers of each block, one after the other."""

    def write(
        c: Code, codes: Any, scales: Any, minima: Any, more: Any, target: Any, first: Any, count: Any
    ) -> None:
        with c.loop(count, 1) as i:
            out = c.at(target, c.b.mul(i, _I64(2 * _HALF)))
            for half, numbers in enumerate(block(c, codes, scales, minima, more, c.b.add(first, i))):
                c.store(numbers, c.at(out, _HALF * half))

    return write


def _block_of(
    expand: Callable[[Code, Any, Any, Any], list[Any]], size: int, zero: float | None
) -> Callable[..., list[Any]]:
    """``scale * code + offset`` of block ``at``, as two vectors; the offset is its minimum, or
    ``zero * scale``.

    Args:
      expand: the codes of a block.
      size: bytes of its codes.
      zero: the code that stands for 0, negated; None where blocks have minima.
    """

    def block(c: Code, codes: Any, scales: Any, minima: Any, more: Any, at: Any) -> list[Any]:
        scale = _f16(c, scales, at)
        if zero is None:
            offset = _f16(c, minima, at)
        else:
            offset = c.b.fmul(scale, ir.Constant(_F32, zero))
        factor, start = c.spread(scale, _FLOATS), c.spread(offset, _FLOATS)
        halves = expand(c, c.b.add(codes, c.b.mul(at, _I64(size))), more, at)
        return [c.b.fmul(half, factor) if zero == 0 else c.fma(half, factor, start) for half in halves]

    return block


def _q4_k_block(c: Code, codes: Any, scales: Any, minima: Any, more: Any, at: Any) -> list[Any]:
    """Block ``at`` of a super-block of 8, with scales and minima of 6 bits; see
    ``formats.k_quants``."""

    def integer(value: Any) -> Any:
        return c.b.zext(value, _I32)

    super_block, j = c.b.lshr(at, _I64(3)), c.b.and_(at, _I64(7))
    bits = c.b.add(more, c.b.mul(super_block, _I64(12)))
    tail = c.b.icmp_unsigned(">=", j, _I64(4))
    head_scale, head_minimum, both = (
        integer(_element(c, bits, c.b.add(c.b.and_(j, _I64(3)), _I64(offset)), _I8, 1))
        for offset in (0, 4, 8)
    )

    def six_bits(head: Any, low: Any) -> Any:
        upper = c.b.shl(c.b.lshr(head, _I32(6)), _I32(4))
        return c.b.select(tail, c.b.or_(low, upper), c.b.and_(head, _I32(63)))

    scale = six_bits(head_scale, c.b.and_(both, _I32(15)))
    minimum = six_bits(head_minimum, c.b.lshr(both, _I32(4)))
    scale, minimum = (
        c.b.fmul(_f16(c, big, super_block), c.b.sitofp(small, _F32))
        for big, small in ((scales, scale), (minima, minimum))
    )
    factor, start = c.spread(scale, _FLOATS), c.spread(minimum, _FLOATS)
    source = c.b.add(codes, c.b.mul(super_block, _I64(128)))
    source = c.b.add(source, c.b.mul(c.b.lshr(j, _I64(1)), _I64(32)))
    # Two blocks share 32 bytes: one has their low halves.
    shift = c.spread(c.b.trunc(c.b.shl(c.b.and_(j, _I64(1)), _I64(2)), _I32), _WORDS)
    halves = []
    for half in (0, 1):
        words = c.b.zext(_bytes_at(c, source, _HALF * half), _WORDS)
        numbers = c.b.sitofp(c.b.and_(c.b.lshr(words, shift), _all(_WORDS, 15)), _FLOATS)
        halves.append(c.b.fsub(c.b.fmul(numbers, factor), start))
    return halves


def _write_by_channel(expand: Callable[[Code, Any, Any, Any], list[Any]], size: int) -> Callable[..., None]:
    """``scale * code + minimum`` for the blocks of one row; scales and minima are 32 float32
    numbers a block."""

    def write(
        c: Code, codes: Any, scales: Any, minima: Any, more: Any, target: Any, first: Any, count: Any
    ) -> None:
        with c.loop(count, 1) as i:
            at = c.b.add(first, i)
            begin = c.b.mul(i, _I64(2 * _HALF))
            for half, numbers in enumerate(expand(c, c.b.add(codes, c.b.mul(at, _I64(size))), more, at)):
                factor, start, out = (c.at(x, begin, _HALF * half) for x in (scales, minima, target))
                c.store(c.fma(numbers, c.load(factor, _FLOATS), c.load(start, _FLOATS)), out)

    return write


BYTES = _block_of(_expand_bytes, 32, 0)
NIBBLES_LESS_8 = _block_of(_expand_nibbles, 16, -8)
NIBBLES = _block_of(_expand_nibbles, 16, None)
Q4_K = _q4_k_block


# --- products with codes --------------------------------------------------------------------------------------------


def _sums_of_lanes(c: Code, vectors: list[Any]) -> list[Any]:
    """The sum of the lanes of each of four vectors; two by two they share the lanes of one."""

    def joined(a: Any, b: Any) -> Any:
        n = a.type.count // 2
        low, high = [*range(n), *range(2 * n, 3 * n)], [*range(n, 2 * n), *range(3 * n, 4 * n)]
        return c.add(c.shuffle(a, b, low), c.shuffle(a, b, high))

    pairs = joined(vectors[0], vectors[1]), joined(vectors[2], vectors[3])
    quarter = _HALF // 4

    def quarters(k: int) -> list[int]:
        """Every second or every other quarter of both."""
        return [q * quarter + i for q in (k, k + 2, k + 4, k + 6) for i in range(quarter)]

    four = c.add(c.shuffle(*pairs, quarters(0)), c.shuffle(*pairs, quarters(1)))
    for width in (2, 1):
        lanes = [i ^ width for i in range(_HALF)]
        four = c.add(four, c.shuffle(four, four, lanes))
    return [c.b.extract_element(four, _I32(i * quarter)) for i in range(4)]


def _write_dots(block: Callable[..., list[Any]], rows: int) -> Callable[..., None]:
    """``out[rows, keys] = a[rows, 32 * blocks] @ keys.T``, two keys at a time, whose blocks follow
    one another."""

    def write(
        c: Code, codes: Any, scales: Any, minima: Any, more: Any, first: Any, blocks: Any, keys: Any, a: Any,
        lda: Any, out: Any, ldo: Any,
    ) -> None:  # fmt: skip
        zero = ir.Constant(_FLOATS, [0.0] * _HALF)
        sums = c.variables(2 * rows, zero)
        with c.loop(keys, 2) as key:
            # The last key of an odd number is computed twice.
            second = c.b.sub(keys, _I64(1))
            next_key = c.b.add(key, _I64(1))
            pair = key, c.b.select(c.b.icmp_signed("<", next_key, keys), next_key, second)
            for cell in sums:
                c.b.store(zero, cell)
            with c.loop(blocks, 1) as i:
                numbers = [
                    block(c, codes, scales, minima, more, c.b.add(first, c.b.add(c.b.mul(k, blocks), i)))
                    for k in pair
                ]
                begin = c.b.mul(i, _I64(2 * _HALF))
                for r in range(rows):
                    row = c.at(a, c.b.mul(lda, _I64(r)), begin)
                    for half in (0, 1):
                        factor = c.load(c.at(row, _HALF * half), _FLOATS)
                        for k in (0, 1):
                            cell = sums[2 * r + k]
                            c.b.store(c.fma(factor, numbers[k][half], c.get(cell)), cell)
            totals: list[Any] = []
            filled = [c.get(cell) for cell in sums] + [zero] * (-2 * rows % 4)
            for i in range(0, len(filled), 4):
                totals += _sums_of_lanes(c, filled[i : i + 4])
            for r in range(rows):
                for k in (0, 1):
                    c.store(totals[2 * r + k], c.at(out, c.b.mul(ldo, _I64(r)), pair[k]))

    return write


def _write_product(block: Callable[..., list[Any]], rows: int) -> Callable[..., None]:
    """``out[rows, 32 * blocks] += a[rows, keys] @ keys``; blocks of keys as for ``_write_dots``."""

    def write(
        c: Code, codes: Any, scales: Any, minima: Any, more: Any, first: Any, blocks: Any, keys: Any, a: Any,
        lda: Any, out: Any, ldo: Any,
    ) -> None:  # fmt: skip
        zero = ir.Constant(_FLOATS, [0.0] * _HALF)
        sums = c.variables(2 * rows, zero)
        with c.loop(blocks, 1) as i:
            for cell in sums:
                c.b.store(zero, cell)
            with c.loop(keys, 1) as key:
                at = c.b.add(first, c.b.add(c.b.mul(key, blocks), i))
                numbers = block(c, codes, scales, minima, more, at)
                for r in range(rows):
                    factor = c.spread(c.load(c.at(a, c.b.mul(lda, _I64(r)), key), _F32), _FLOATS)
                    for half in (0, 1):
                        cell = sums[2 * r + half]
                        c.b.store(c.fma(factor, numbers[half], c.get(cell)), cell)
            begin = c.b.mul(i, _I64(2 * _HALF))
            for r in range(rows):
                for half in (0, 1):
                    where = c.at(out, c.b.mul(ldo, _I64(r)), begin, _HALF * half)
                    c.store(c.add(c.load(where, _FLOATS), c.get(sums[2 * r + half])), where)

    return write


def _any_rows(write: Callable[..., Callable[..., None]], block: Callable[..., list[Any]]) -> Any:
    return any_rows(
        [instructions(write(block, rows), types.void, *(types.int64,) * 11) for rows in (1, 2, 3, 4)]
    )


def dots_with_codes(kind: Callable[..., list[Any]]) -> Any:
    """``(rows, (codes, scales, minima, more, first, blocks, keys, a, lda, out, ldo))``: up to four
    rows of ``a`` times each of ``keys`` keys, of ``blocks`` blocks each, the first one at
    ``first``."""
    return _any_rows(_write_dots, kind)


def product_with_codes(kind: Callable[..., list[Any]]) -> Any:
    """``out[rows, 32 * blocks] += a[rows, keys] @ keys``, with the arguments of
    ``dots_with_codes``."""
    return _any_rows(_write_product, kind)


# --- what is not quantized by blocks --------------------------------------------------------------------------------


def _write_fp8(c: Code, source: Any, target: Any) -> None:
    """Exponent and mantissa moved to where float32 has them, and the difference of their biases
    added.

    Numbers without an exponent are whole multiples of 2**-9: made of bits they would be too small
    for float32 as XLA sets it, which takes them for zero.
    """
    wide = c.b.zext(_bytes_at(c, source), _WORDS)
    magnitude = c.b.and_(wide, _all(_WORDS, 0x7F))
    bits = c.b.add(c.b.shl(magnitude, _all(_WORDS, 20)), _all(_WORDS, 120 << 23))
    tiny = c.b.fmul(c.b.sitofp(magnitude, _FLOATS), ir.Constant(_FLOATS, [2.0**-9] * _HALF))
    has_exponent = c.b.icmp_unsigned(">=", magnitude, _all(_WORDS, 8))
    bits = c.b.select(has_exponent, bits, c.b.bitcast(tiny, _WORDS))
    sign = c.b.shl(c.b.and_(wide, _all(_WORDS, 0x80)), _all(_WORDS, 24))
    c.store(c.b.bitcast(c.b.or_(bits, sign), _FLOATS), target)


def _run(write: Callable[..., None]) -> Any:
    return instructions(write, types.void, *(types.int64,) * 7)


expand_bytes = _run(_write_run(BYTES))
"""Signed bytes."""
expand_nibbles_less_8 = _run(_write_run(NIBBLES_LESS_8))
"""Halves of 16 bytes, the low ones first."""
expand_nibbles = _run(_write_run(NIBBLES))
expand_fives_less_16 = _run(_write_run(_block_of(_expand_fives, 16, -16)))
"""Halves of bytes, and fifth bits in ``more``."""
expand_fives = _run(_write_run(_block_of(_expand_fives, 16, None)))
expand_twos = _run(_write_run(_block_of(_expand_twos, 8, None)))
"""Quarters of 8 bytes."""
expand_q4_k = _run(_write_run(Q4_K))
expand_nibbles_by_channel = _run(_write_by_channel(_expand_nibbles, 16))
"""One row, with a float32 scale and minimum for each channel."""
expand_twos_by_channel = _run(_write_by_channel(_expand_twos, 8))
widen_fp8 = instructions(_write_fp8, types.void, *(types.int64,) * 2)
"""``((source, target))``: 16 floats of e4m3; what stands for NaN there becomes 480."""


def codebook_run(values: Sequence[int]) -> Any:
    """Halves of bytes, that stand for 16 signed bytes."""
    return _run(_write_run(_block_of(_expand_codebook(values), 16, 0)))
