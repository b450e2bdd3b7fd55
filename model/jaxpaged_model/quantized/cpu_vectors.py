"""Products of a panel with rows of activations, as LLVM vector instructions for numba functions.

The sixteen elements of a vector are sixteen rows of the matrix, see ``panels.py``. Activations are rounded to
16-bit integers with a scale for each block of 32, and an integer sum accumulates four columns at a time, with
two instructions of AVX-512 VNNI or Arm's dot product. (ggml's kernels round activations to 8 bits, which needs
one instruction; the mean KL divergence of a small model is 2e-4 with 8 bits and 1e-8 with 16:
docs/guides/weights.md.) A sum starts at ``-zero`` times the sum of the activations, so that codes stay unsigned. Exact
products use float32 activations and convert codes in registers.

A floating-point matrix is multiplied with float32 activations, too: a column of a panel is one vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config, types

from jaxpaged.native.memory import pointer
from jaxpaged.native.tiles import WIDTH, Code, instructions, write_exp
from jaxpaged_model.quantized.formats import BLOCK, QUADS, ROWS, FloatFormat, WeightFormat

_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_F16, _F32 = ir.HalfType(), ir.FloatType()
_WORDS, _FLOATS = ir.VectorType(_I32, ROWS), ir.VectorType(_F32, ROWS)
_BYTES, _PAIRS = ir.VectorType(_I8, 4 * ROWS), ir.VectorType(_I16, 2 * ROWS)
_QUAD = 4


def _host_has(*features: str) -> bool:
    """True if the target CPU has all of these features; NUMBA_CPU_FEATURES can name another CPU's."""
    if config.CPU_NAME:
        return {f"+{feature}" for feature in features} <= set((config.CPU_FEATURES or "").split(","))
    return all(llvm.get_host_cpu_features().get(feature) for feature in features)


def _instruction_set() -> str:
    machine = llvm.get_process_triple().split("-")[0]
    if machine == "x86_64":
        if _host_has("avx512f", "avx512bw", "avx512vnni"):
            return "avx512vnni"
        return "avx2" if _host_has("avx2") else "any"
    return "neon" if machine in ("aarch64", "arm64") and _host_has("dotprod") else "any"


INSTRUCTIONS = _instruction_set()
"""Instructions of integer products: "avx512vnni", "avx2", "neon" or "any"."""
_AHEAD = 4096
"""Prefetch distance of codes in bytes: with 8 rows of activations, the CPU's own prefetcher is less than two blocks
ahead, and products wait for memory; with it, 8 rows of Q8_0 take 0.73 of the time."""
ROW_SIZES = (1, 2, 4, 8) if _host_has("avx512f") else (1, 2, 4)
"""Numbers of rows of activations of one product; their sums stay in registers."""


def _load(c: Code, address: Any, kind: Any) -> Any:
    return c.b.load(pointer(c.b, address, kind), align=1, typ=kind)


def _offset(c: Code, address: Any, index: Any, size: int) -> Any:
    return c.b.add(address, c.b.mul(index, _I64(size)))


def _prefetch(c: Code, address: Any, lines: int) -> None:
    """Prefetches lines of 64 bytes; any address is allowed."""
    kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(_I8), _I32, _I32, _I32])
    name = "llvm.prefetch.p0"
    function = c.b.module.globals.get(name) or ir.Function(c.b.module, kind, name)
    for i in range(lines):
        place = pointer(c.b, c.b.add(address, _I64(64 * i)), _I8)
        c.b.call(function, [place, _I32(0), _I32(3), _I32(1)])


def _split(value: Any, c: Code, parts: int) -> list[Any]:
    width = value.type.count // parts
    return [c.shuffle(value, value, list(range(i * width, (i + 1) * width))) for i in range(parts)]


def _join(c: Code, parts: list[Any]) -> Any:
    while len(parts) > 1:
        count = parts[0].type.count
        parts = [
            c.shuffle(a, b, list(range(2 * count))) for a, b in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]


def _intrinsic(c: Code, name: str, result: Any, *args: Any) -> Any:
    kind = ir.FunctionType(result, [value.type for value in args])
    function = c.b.module.globals.get(name) or ir.Function(c.b.module, kind, name)
    return c.b.call(function, args)


# --- sums of four products --------------------------------------------------------------------------------------
#
# Activations are 16-bit integers. The four of a quad are two words: the factors of the even and of the odd bytes of a
# word of codes. Arm's instruction multiplies bytes: there they are the high and the low bytes of the four.

SIXTEEN_BITS = 127 * 256
"""Largest activation of a block: its high byte is then at most 127, with a signed low byte."""


def _madd_vnni(c: Code, total: Any, codes: Any, factors: Any) -> Any:
    # Until LLVM 21 the operands were 32-bit words; later versions still parse that form from text.
    name = "llvm.x86.avx512.vpdpwssd.512"
    if llvm.llvm_version_info[0] < 22:
        return _intrinsic(c, name, _WORDS, total, codes, factors)
    return _intrinsic(c, name, _WORDS, total, c.b.bitcast(codes, _PAIRS), c.b.bitcast(factors, _PAIRS))


def _madd_avx2(c: Code, total: Any, codes: Any, factors: Any) -> Any:
    name, half = "llvm.x86.avx2.pmadd.wd", ir.VectorType(_I32, 8)
    pairs = (_split(c.b.bitcast(x, _PAIRS), c, 2) for x in (codes, factors))
    sums = [_intrinsic(c, name, half, a, b) for a, b in zip(*pairs, strict=True)]
    return c.b.add(total, _join(c, sums))


def _madd_any(c: Code, total: Any, codes: Any, factors: Any) -> Any:
    sixteen = ir.Constant(_WORDS, [16] * ROWS)
    high = c.b.mul(c.b.lshr(codes, sixteen), c.b.ashr(factors, sixteen))
    low = c.b.mul(
        c.b.and_(codes, ir.Constant(_WORDS, [0xFFFF] * ROWS)), c.b.ashr(c.b.shl(factors, sixteen), sixteen)
    )
    return c.b.add(total, c.b.add(high, low))


class _OfPairs:
    """Products of 16-bit integers: the even and the odd bytes of codes, zero-extended."""

    order = (0, 2, 1, 3)
    signed = False

    def __init__(self, madd: Callable[..., Any]) -> None:
        self._madd = madd

    def words(self, c: Code, integers: Any) -> Any:
        """Stored form of 16 integer activations."""
        pairs = c.b.trunc(integers, ir.VectorType(_I16, ROWS))
        return c.shuffle(pairs, pairs, [4 * q + i for q in range(ROWS // 4) for i in self.order])

    def codes(self, c: Code, quad: Any) -> list[Any]:
        """The codes that are multiplied with each of the two words of activations."""
        low = ir.Constant(_WORDS, [0x00FF00FF] * ROWS)
        return [c.b.and_(quad, low), c.b.and_(c.b.lshr(quad, ir.Constant(_WORDS, [8] * ROWS)), low)]

    def begin(self, c: Code, start: Any) -> list[Any]:
        """Integer sums that start at ``start``."""
        return [start]

    def add(self, c: Code, sums: list[Any], codes: list[Any], factors: list[Any]) -> list[Any]:
        """Adds the products of a quad to ``sums``."""
        total = sums[0]
        for code, factor in zip(codes, factors, strict=True):
            total = self._madd(c, total, code, factor)
        return [total]

    def end(self, c: Code, sums: list[Any]) -> Any:
        """The sum."""
        return sums[0]


class _OfBytes:
    """Arm's products of signed bytes: separate sums for the high and the low bytes of activations."""

    signed = True

    def words(self, c: Code, integers: Any) -> Any:
        eight, narrow = ir.Constant(_WORDS, [8] * ROWS), ir.VectorType(_I8, ROWS)
        high = c.b.ashr(c.b.add(integers, ir.Constant(_WORDS, [128] * ROWS)), eight)
        low = c.b.sub(integers, c.b.shl(high, eight))
        order = [part + 4 * q + i for q in range(ROWS // 4) for part in (0, ROWS) for i in range(4)]
        return c.shuffle(c.b.trunc(high, narrow), c.b.trunc(low, narrow), order)

    def codes(self, c: Code, quad: Any) -> list[Any]:
        return [quad]

    def begin(self, c: Code, start: Any) -> list[Any]:
        return [ir.Constant(_WORDS, [0] * ROWS), start]

    def add(self, c: Code, sums: list[Any], codes: list[Any], factors: list[Any]) -> list[Any]:
        return [self._dot(c, total, codes[0], factor) for total, factor in zip(sums, factors, strict=True)]

    def end(self, c: Code, sums: list[Any]) -> Any:
        high, low = sums
        return c.b.add(c.b.shl(high, ir.Constant(_WORDS, [8] * ROWS)), low)

    def _dot(self, c: Code, total: Any, codes: Any, factors: Any) -> Any:
        four, sixteen = ir.VectorType(_I32, 4), ir.VectorType(_I8, 16)
        sums = []
        for into, a, b in zip(*(_split(x, c, 4) for x in (total, codes, factors)), strict=True):
            a, b = c.b.bitcast(a, sixteen), c.b.bitcast(b, sixteen)
            sums.append(_intrinsic(c, "llvm.aarch64.neon.sdot.v4i32.v16i8", four, into, a, b))
        return _join(c, sums)


_MADD = {"avx512vnni": _madd_vnni, "avx2": _madd_avx2, "any": _madd_any}
_PRODUCTS: _OfPairs | _OfBytes = _OfBytes() if INSTRUCTIONS == "neon" else _OfPairs(_MADD[INSTRUCTIONS])


def code_of_zero(fmt: WeightFormat) -> int:
    """Factor of the activations' sum that corrects a group's sum; signed 8-bit codes have 128 subtracted."""
    return fmt.zero - 128 if _PRODUCTS.signed and _has_8_bits(fmt) else fmt.zero


def _has_8_bits(fmt: WeightFormat) -> bool:
    return fmt.bits == 8 or fmt.table is not None


def _byte_vector(value: int) -> Any:
    word = value * 0x01010101
    return ir.Constant(_WORDS, [word - (1 << 32) if word >> 31 else word] * ROWS)


def _looked_up(c: Code, table: tuple[int, ...], index: Any) -> Any:
    """Looks up 64 bytes in a table of 16."""
    if INSTRUCTIONS == "any":
        found = ir.Constant(_WORDS, [0] * ROWS)
        for code, value in enumerate(table):
            same = c.b.icmp_unsigned("==", c.b.bitcast(index, _BYTES), ir.Constant(_BYTES, [code] * 4 * ROWS))
            chosen = c.b.select(
                same, ir.Constant(_BYTES, [value] * 4 * ROWS), ir.Constant(_BYTES, [0] * 4 * ROWS)
            )
            found = c.b.or_(found, c.b.bitcast(chosen, _WORDS))
        return found
    name, parts = {
        "avx512vnni": ("llvm.x86.avx512.pshuf.b.512", 1),
        "avx2": ("llvm.x86.avx2.pshuf.b", 2),
        "neon": ("llvm.aarch64.neon.tbl1.v16i8", 4),
    }[INSTRUCTIONS]
    width = 4 * ROWS // parts
    values = ir.Constant(ir.VectorType(_I8, width), list(table) * (width // 16))
    pieces = [
        _intrinsic(c, name, values.type, values, piece)
        for piece in _split(c.b.bitcast(index, _BYTES), c, parts)
    ]
    return c.b.bitcast(_join(c, pieces), _WORDS)


def _quads(c: Code, fmt: WeightFormat, codes: Any) -> list[Any]:
    """Unpacks the eight quads of a block, each as 16 words of four bytes: codes, or values of the table."""
    vectors = [_load(c, c.b.add(codes, _I64(4 * ROWS * i)), _WORDS) for i in range(fmt.bits)]
    quads: list[Any] = []
    for q in range(QUADS):
        code, done = None, 0
        for bits in fmt.planes:
            part, shift = vectors[done + q % bits], bits * (q // bits) - done
            # One shift to the plane's position in a code; the mask removes other bits.
            if shift > 0:
                part = c.b.lshr(part, ir.Constant(_WORDS, [shift] * ROWS))
            elif shift < 0:
                part = c.b.shl(part, ir.Constant(_WORDS, [-shift] * ROWS))
            if bits < 8:
                part = c.b.and_(part, _byte_vector(((1 << bits) - 1) << done))
            code = part if code is None else c.b.or_(code, part)
            done += bits
        quads.append(code if fmt.table is None else _looked_up(c, fmt.table, code))
    return quads


# --- a panel times some rows ------------------------------------------------------------------------------------

PANEL_ARGUMENTS = 13
"""``(codes, scales, steps, minima, min_steps, blocks, a, lda, factors, starts, sums, groups, out)``: addresses of a
panel's parts; number of blocks; activations and the stride of their rows in bytes; scales of activations by row and
block; start values of integer sums, and sums of activations, by row and group; number of groups; results [rows, 16]."""


def panel_product(fmt: WeightFormat, rows: int, exact: bool) -> Any:
    """``out[rows, 16] = a[rows] @ panel.T``, a numba function of one tuple, see ``PANEL_ARGUMENTS``."""
    in_block = BLOCK // fmt.group

    def lanes(c: Code, address: Any, index: Any, kind: Any) -> Any:
        """Loads sixteen numbers of any type as float32."""
        value = _load(
            c, _offset(c, address, index, ROWS * (2 if kind is _F16 else 1)), ir.VectorType(kind, ROWS)
        )
        return c.b.fpext(value, _FLOATS) if kind is _F16 else value

    def scale(c: Code, scales: Any, steps: Any, block: Any, group: Any, signed: bool) -> Any:
        if not fmt.has_steps:
            return lanes(c, scales, group, _F16)
        big = lanes(c, scales, c.b.lshr(block, _I64(3)), _F16)
        small = lanes(c, steps, group, _I8)
        wide = c.b.sext(small, _WORDS) if signed else c.b.zext(small, _WORDS)
        return c.b.fmul(big, c.b.sitofp(wide, _FLOATS))

    def number(c: Code, address: Any, row: Any, index: Any, kind: Any) -> Any:
        """Loads one of a row's numbers to all elements of a vector."""
        value = c.b.load(pointer(c.b, _offset(c, address, c.b.add(row, index), 4), kind), align=4, typ=kind)
        return c.spread(value, _WORDS if kind is _I32 else _FLOATS)

    def write(
        c: Code, codes: Any, scales: Any, steps: Any, minima: Any, min_steps: Any, blocks: Any, a: Any, lda: Any,
        factors: Any, starts: Any, sums: Any, groups: Any, out: Any,
    ) -> None:  # fmt: skip
        totals = c.variables(rows, ir.Constant(_FLOATS, [0.0] * ROWS))
        row_of = [c.b.add(a, c.b.mul(lda, _I64(r))) for r in range(rows)]
        of_blocks, of_groups = ([c.b.mul(n, _I64(r)) for r in range(rows)] for n in (blocks, groups))
        with c.loop(blocks, 1) as block:
            here = _offset(c, codes, block, 4 * ROWS * fmt.bits)
            _prefetch(c, c.b.add(here, _I64(_AHEAD)), fmt.bits)
            quads = _quads(c, fmt, here)
            for part in range(in_block):
                group = c.b.add(c.b.mul(block, _I64(in_block)), _I64(part))
                mine = range(part * QUADS // in_block, (part + 1) * QUADS // in_block)
                if exact:
                    products = float_products(c, quads, mine, row_of, block)
                else:
                    products = integer_products(c, quads, mine, row_of, block, starts, of_groups, group)
                factor = scale(c, scales, steps, block, group, True)
                for r in range(rows):
                    own = factor if exact else c.b.fmul(factor, number(c, factors, of_blocks[r], block, _F32))
                    c.b.store(c.fma(products[r], own, c.get(totals[r])), totals[r])
                if fmt.has_minima:
                    least = c.b.fneg(scale(c, minima, min_steps, block, group, False))
                    for r in range(rows):
                        own = number(c, sums, of_groups[r], group, _F32)
                        c.b.store(c.fma(least, own, c.get(totals[r])), totals[r])
        for r in range(rows):
            c.store(c.get(totals[r]), c.at(out, ROWS * r))

    def integer_products(
        c: Code, quads: list[Any], mine: range, row_of: list[Any], block: Any, starts: Any, of_groups: list[Any],
        group: Any,
    ) -> list[Any]:  # fmt: skip
        sums = [_PRODUCTS.begin(c, number(c, starts, of_groups[r], group, _I32)) for r in range(rows)]
        for q in mine:
            quad = quads[q]
            if _PRODUCTS.signed and _has_8_bits(fmt):
                quad = c.b.xor(quad, _byte_vector(128))
            codes = _PRODUCTS.codes(c, quad)
            for r in range(rows):
                place = c.b.add(_offset(c, row_of[r], block, 2 * BLOCK), _I64(2 * _QUAD * q))
                words = [_load(c, c.b.add(place, _I64(4 * i)), _I32) for i in (0, 1)]
                sums[r] = _PRODUCTS.add(c, sums[r], codes, [c.spread(word, _WORDS) for word in words])
        return [c.b.sitofp(_PRODUCTS.end(c, parts), _FLOATS) for parts in sums]

    def float_products(c: Code, quads: list[Any], mine: range, row_of: list[Any], block: Any) -> list[Any]:
        zero = ir.Constant(_FLOATS, [float(fmt.zero)] * ROWS)
        sums: list[Any] = [None] * rows
        for q in mine:
            for j in range(_QUAD):
                code = c.b.lshr(quads[q], ir.Constant(_WORDS, [8 * j] * ROWS)) if j else quads[q]
                numbers = c.b.sitofp(c.b.and_(code, ir.Constant(_WORDS, [255] * ROWS)), _FLOATS)
                if fmt.zero:
                    numbers = c.b.fsub(numbers, zero)
                for r in range(rows):
                    place = c.b.add(_offset(c, row_of[r], block, 4 * BLOCK), _I64(4 * (_QUAD * q + j)))
                    own = c.spread(_load(c, place, _F32), _FLOATS)
                    sums[r] = c.b.fmul(numbers, own) if sums[r] is None else c.fma(numbers, own, sums[r])
        return sums

    return instructions(write, types.void, *(types.int64,) * PANEL_ARGUMENTS)


# --- two panels of floating-point numbers times some rows -------------------------------------------------------

_PANELS_AT_ONCE = 2 if _host_has("avx512f") else 1
"""Panels whose sums stay in registers together with those of the most rows. One panel and 8 rows are as many loads
as multiply-adds, and a CPU does two of each at a time: two panels share the loads of activations."""
_UNROLLED = 8
"""Columns of a step."""


def widened(c: Code, fmt: FloatFormat, address: Any) -> Any:
    """Loads sixteen numbers as float32."""
    if fmt.name == "F32":
        return _load(c, address, _FLOATS)
    if fmt.name == "F16":
        return c.b.fpext(_load(c, address, ir.VectorType(_F16, ROWS)), _FLOATS)
    high = c.b.zext(_load(c, address, ir.VectorType(_I16, ROWS)), _WORDS)
    return c.b.bitcast(c.b.shl(high, ir.Constant(_WORDS, [16] * ROWS)), _FLOATS)


def pair_product(fmt: FloatFormat, rows: int) -> Any:
    """``((first, second, columns, a, lda, out, out_second))``: ``out[rows, 16] = a[rows] @ first.T``, and of second.

    All are addresses but ``columns``, a multiple of 32, and ``lda``, bytes of a row of activations. Each sum is in
    the order of columns, whatever the number of rows.
    """
    line = ROWS * fmt.bits // 8

    def multiply(c: Code, panels: list[tuple[Any, Any]], columns: Any, a: Any, lda: Any) -> None:
        totals = [c.variables(rows, ir.Constant(_FLOATS, [0.0] * ROWS)) for _ in panels]
        row_of = [c.b.add(a, c.b.mul(lda, _I64(r))) for r in range(rows)]
        with c.loop(columns, _UNROLLED) as column:
            starts = [_offset(c, panel, column, line) for panel, _ in panels]
            for start in starts:
                _prefetch(c, c.b.add(start, _I64(_AHEAD)), _UNROLLED * line // 64)
            for i in range(_UNROLLED):
                numbers = [widened(c, fmt, c.b.add(start, _I64(line * i))) for start in starts]
                for r in range(rows):
                    own = c.spread(_load(c, c.b.add(c.at(row_of[r], column), _I64(4 * i)), _F32), _FLOATS)
                    for number, cells in zip(numbers, totals, strict=True):
                        c.b.store(c.fma(number, own, c.get(cells[r])), cells[r])
        for (_, out), cells in zip(panels, totals, strict=True):
            for r in range(rows):
                c.store(c.get(cells[r]), c.at(out, ROWS * r))

    def write(
        c: Code, first: Any, second: Any, columns: Any, a: Any, lda: Any, out: Any, out_second: Any
    ) -> None:
        both = [(first, out), (second, out_second)]
        for i in range(0, 2, _PANELS_AT_ONCE):
            multiply(c, both[i : i + _PANELS_AT_ONCE], columns, a, lda)

    return instructions(write, types.void, *(types.int64,) * 7)


# --- rows of activations ----------------------------------------------------------------------------------------


def _sum_of_lanes(c: Code, value: Any) -> Any:
    add: Callable[[Any, Any], Any] = c.b.fadd if value.type.element == _F32 else c.b.add
    return c.b.extract_element(c.halves(value, add, 1), _I32(0))


def _write_square_sum(c: Code, row: Any, count: Any) -> Any:
    """Sum of squares of ``count`` float32, a multiple of 32."""
    sums = c.variables(2, ir.Constant(_FLOATS, [0.0] * ROWS))
    with c.loop(count, 2 * ROWS) as i:
        for half in (0, 1):
            x = c.load(c.at(row, i, ROWS * half), _FLOATS)
            c.b.store(c.fma(x, x, c.get(sums[half])), sums[half])
    return _sum_of_lanes(c, c.b.fadd(c.get(sums[0]), c.get(sums[1])))


square_sum = instructions(_write_square_sum, types.float32, types.int64, types.int64)
"""``((row, count)) -> sum``"""


def _write_scaled(c: Code, row: Any, scale: Any, factor: Any, out: Any, count: Any) -> None:
    by = c.spread(factor, _FLOATS)
    with c.loop(count, ROWS) as i:
        x = c.b.fmul(c.b.fmul(c.load(c.at(row, i), _FLOATS), by), c.load(c.at(scale, i), _FLOATS))
        c.store(x, c.at(out, i))


scaled = instructions(
    _write_scaled, types.void, types.int64, types.int64, types.float32, types.int64, types.int64
)
"""``((row, scale, factor, out, count))``: ``out = row * factor * scale``."""


def quantize_row(fmt: WeightFormat) -> Any:
    """``((row, blocks, out, factors, starts, sums))``: rounds a row to integers; writes ``panel_product``'s arguments.

    A value that is not finite makes all sums of its block NaN.
    """
    in_block, zero = BLOCK // fmt.group, code_of_zero(fmt)

    def write(c: Code, row: Any, blocks: Any, out: Any, factors: Any, starts: Any, sums: Any) -> None:
        with c.loop(blocks, 1) as block:
            halves = [c.load(c.at(row, c.b.mul(block, _I64(BLOCK)), ROWS * half), _FLOATS) for half in (0, 1)]
            top = c.largest(*(c.call("fabs", x) for x in halves))
            largest = c.b.extract_element(c.halves(top, c.largest, 1), _I32(0))
            some = c.b.fcmp_ordered(">", largest, _F32(0.0))
            inverse = c.b.select(some, c.b.fdiv(_F32(SIXTEEN_BITS), largest), _F32(0.0))
            integers = []
            for half, x in enumerate(halves):
                near = c.call("nearbyint", c.b.fmul(x, c.spread(inverse, _FLOATS)))
                integers.append(c.b.fptosi(near, _WORDS))
                words = _PRODUCTS.words(c, integers[half])
                place = c.b.add(_offset(c, out, block, 2 * BLOCK), _I64(2 * ROWS * half))
                c.b.store(words, pointer(c.b, place, words.type), align=1)
            # 0 * x is NaN if x is NaN or infinite.
            nothing = [c.b.fmul(x, ir.Constant(_FLOATS, [0.0] * ROWS)) for x in halves]
            check = _sum_of_lanes(c, c.b.fadd(*nothing))
            factor = c.b.fadd(c.b.fdiv(largest, _F32(SIXTEEN_BITS)), check)
            c.store(factor, c.at(factors, block))
            parts = integers if in_block == 2 else [c.b.add(*integers)]
            for part, values in enumerate(parts):
                total = _sum_of_lanes(c, values)
                group = c.b.add(c.b.mul(block, _I64(in_block)), _I64(part))
                c.store(c.b.mul(total, _I32(-zero)), c.at(starts, group))
                if fmt.has_minima:
                    c.store(c.b.fmul(c.b.sitofp(total, _F32), factor), c.at(sums, group))

    return instructions(write, types.void, *(types.int64,) * 6)


def group_sums(fmt: WeightFormat) -> Any:
    """``((row, blocks, sums))``: sums of each group of float32."""

    def write(c: Code, row: Any, blocks: Any, sums: Any) -> None:
        with c.loop(blocks, 1) as block:
            parts = [c.load(c.at(row, c.b.mul(block, _I64(BLOCK)), ROWS * half), _FLOATS) for half in (0, 1)]
            if fmt.group == BLOCK:
                parts = [c.b.fadd(*parts)]
            for part, values in enumerate(parts):
                group = c.b.add(c.b.mul(block, _I64(len(parts))), _I64(part))
                c.store(_sum_of_lanes(c, values), c.at(sums, group))

    return instructions(write, types.void, *(types.int64,) * 3)


# --- after the products -----------------------------------------------------------------------------------------


def _write_gate(steepness: Callable[[Code, Any], Any]) -> Any:
    """``x * sigmoid(steepness(x)) * up`` of 16 numbers, without exponentials of positive numbers.

    ``sigmoid(y) = 1 / (1 + exp(-y))``.
    """

    def write(c: Code, gate: Any, up: Any, out: Any) -> None:
        one = c.constant(1.0)
        for i in range(0, ROWS, WIDTH):
            x = c.load(c.at(gate, i))
            y = steepness(c, x)
            e = write_exp(c, c.b.fneg(c.call("fabs", y)))
            positive = c.b.fcmp_unordered(">=", y, c.constant(0.0))
            share = c.b.fdiv(c.b.select(positive, one, e), c.b.fadd(one, e))
            c.store(c.b.fmul(c.b.fmul(x, share), c.load(c.at(up, i))), c.at(out, i))

    return instructions(write, types.void, *(types.int64,) * 3)


def _gelu_steepness(c: Code, x: Any) -> Any:
    """GELU with a tanh is ``x * sigmoid(sqrt(8 / pi) * (x + 0.044715 x^3))`` (arXiv:1606.08415)."""
    factor = math.sqrt(8 / math.pi)
    cubic = c.b.fmul(c.b.fmul(x, x), c.constant(0.044715 * factor))
    return c.b.fmul(x, c.b.fadd(cubic, c.constant(factor)))


gated = _write_gate(lambda c, x: x)
"""``((gate, up, out))``: 16 numbers each, ``silu(gate) * up``."""
gated_by_gelu = _write_gate(_gelu_steepness)
"""``((gate, up, out))``: likewise with GELU."""


def _write_added(c: Code, a: Any, b: Any, out: Any) -> None:
    c.store(c.b.fadd(c.load(a, _FLOATS), c.load(b, _FLOATS)), out)


def _write_copied(c: Code, a: Any, out: Any) -> None:
    c.store(c.load(a, _FLOATS), out)


added = instructions(_write_added, types.void, *(types.int64,) * 3)
"""``((a, b, out))``: 16 numbers each."""
copied = instructions(_write_copied, types.void, *(types.int64,) * 2)
"""``((a, out))``: 16 numbers."""
