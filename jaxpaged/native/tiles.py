"""Small matrix products and rows of exponentials on vectors, for numba functions.

numba vectorizes simple loops, but keeps no tile of sums in registers; the inner loops of attention
are therefore vector instructions here. All matrices are float32, at addresses, with the distance of
their rows in elements. LLVM splits vectors that a machine does not have.

The shape of the tiles follows from the registers: AVX-512 has 32 of 16 numbers, others 16 of 8 (or
32 of 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from jaxpaged.native.memory import load_f32, pointer, store_f32

WIDE = bool(llvm.get_host_cpu_features().get("avx512f"))
WIDTH = 16 if WIDE else 8
"""Numbers in a vector; ``padded`` sizes are multiples of it."""
_ROWS = 4
_COLUMNS = 4 if WIDE else 2
"""A tile of sums: rows times vectors."""
_KEYS = 4
"""Products that are summed up side by side."""

_I64, _I32, _F32 = ir.IntType(64), ir.IntType(32), ir.FloatType()
_VECTOR = ir.VectorType(_F32, WIDTH)
_FAST = ("nnan", "nsz", "reassoc", "contract")

njit: Callable[..., Any] = numba.njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Decorator for functions of kernels: unchecked, and not callable from Python."""
i32: Any = np.int32
i64: Any = np.int64
f32: Any = np.float32
"""Typed numbers in functions that numba compiles; plain numbers to a type checker."""


@register_jitable
def padded(count: int) -> int:
    """The multiple of WIDTH that is not below ``count``."""
    return -(-count // WIDTH) * WIDTH


class Code:
    """Instructions on float32 vectors at addresses."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def at(self, address: Any, *offsets: Any) -> Any:
        """The address ``offsets`` float32 further on; those that are Python's are folded."""
        for offset in offsets:
            offset = _I64(4 * offset) if isinstance(offset, int) else self.b.mul(offset, _I64(4))
            address = self.b.add(address, offset)
        return address

    def load(self, address: Any, kind: Any = _VECTOR) -> Any:
        return self.b.load(pointer(self.b, address, kind), align=4, typ=kind)

    def store(self, value: Any, address: Any) -> None:
        self.b.store(value, pointer(self.b, address, value.type), align=4)

    def spread(self, value: Any, kind: Any = _VECTOR) -> Any:
        """A vector of one number."""
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
        zeros = ir.Constant(ir.VectorType(_I32, kind.count), [0] * kind.count)
        return self.b.shuffle_vector(first, first, zeros)

    def constant(self, value: float) -> Any:
        return ir.Constant(_VECTOR, [value] * WIDTH)

    def shuffle(self, a: Any, b: Any, index: list[int]) -> Any:
        return self.b.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(index)), index))

    def call(self, name: str, *args: Any, returns: Any = None) -> Any:
        """An intrinsic of LLVM, by its name without types."""
        kind = args[0].type
        suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
        name = f"llvm.{name}.{suffix}"
        function = self.b.module.globals.get(name) or ir.Function(
            self.b.module, ir.FunctionType(returns or kind, [a.type for a in args]), name
        )
        return self.b.call(function, args)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.call("fma", a, b, c)

    def halves(self, v: Any, combine: Callable[[Any, Any], Any], down_to: int) -> Any:
        """``v`` folded upon itself until ``down_to`` numbers are left."""
        while v.type.count > down_to:
            half = v.type.count // 2
            v = combine(
                self.shuffle(v, v, list(range(half))), self.shuffle(v, v, list(range(half, 2 * half)))
            )
        return v

    def add(self, a: Any, b: Any) -> Any:
        return self.b.fadd(a, b, flags=_FAST)

    def largest(self, a: Any, b: Any) -> Any:
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def variables(self, count: int, initial: Any) -> list[Any]:
        """Cells that LLVM turns into registers."""
        cells = [cgutils.alloca_once(self.b, initial.type) for _ in range(count)]
        for cell in cells:
            self.b.store(initial, cell)
        return cells

    def get(self, cell: Any) -> Any:
        return self.b.load(cell, typ=cell.allocated_type)

    @contextmanager
    def loop(self, count: Any, step: int) -> Iterator[Any]:
        """0, step, 2 * step, ... below ``count``."""
        with cgutils.for_range_slice(self.b, _I64(0), count, _I64(step), _I64) as (index, _):
            yield index


def instructions(write: Callable[..., Any], result: Any, *arguments: Any) -> Any:
    """A function for numba of what ``write(code, *args)`` emits."""

    @intrinsic
    def function(typing: Any, args: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            unpacked = cgutils.unpack_tuple(builder, values[0])
            out = write(Code(builder), *unpacked)
            return context.get_dummy_value() if result is types.void else out

        return result(types.Tuple(arguments)), codegen

    return function


# --- matrix products ----------------------------------------------------------------------------------------


def _write_product(rows: int, columns: int) -> Callable[..., None]:
    """``out[rows, columns * WIDTH] += a[rows, k] @ b[k, columns * WIDTH]``, sums in registers."""

    def write(c: Code, a: Any, lda: Any, b: Any, ldb: Any, out: Any, ldo: Any, k: Any) -> None:
        sums = c.variables(rows * columns, c.constant(0.0))
        row_of = [c.at(a, c.b.mul(lda, _I64(r))) for r in range(rows)]
        with c.loop(k, 1) as i:
            line = c.at(b, c.b.mul(i, ldb))
            parts = [c.load(c.at(line, WIDTH * j)) for j in range(columns)]
            for r in range(rows):
                factor = c.spread(c.load(c.at(row_of[r], i), _F32))
                for j in range(columns):
                    cell = sums[r * columns + j]
                    c.b.store(c.fma(factor, parts[j], c.get(cell)), cell)
        for r in range(rows):
            for j in range(columns):
                where = c.at(out, c.b.mul(ldo, _I64(r)), WIDTH * j)
                c.store(c.add(c.load(where), c.get(sums[r * columns + j])), where)

    return write


def _write_dots(rows: int, keys: int) -> Callable[..., None]:
    """``out[rows, keys] = a[rows, k] @ b[keys, k].T``, k a multiple of WIDTH."""

    def write(c: Code, a: Any, lda: Any, b: Any, ldb: Any, out: Any, ldo: Any, k: Any) -> None:
        sums = c.variables(rows * keys, c.constant(0.0))
        rows_of_a = [c.at(a, c.b.mul(lda, _I64(r))) for r in range(rows)]
        rows_of_b = [c.at(b, c.b.mul(ldb, _I64(j))) for j in range(keys)]
        with c.loop(k, WIDTH) as i:
            parts = [c.load(c.at(row, i)) for row in rows_of_b]
            for r in range(rows):
                factor = c.load(c.at(rows_of_a[r], i))
                for j in range(keys):
                    cell = sums[r * keys + j]
                    c.b.store(c.fma(factor, parts[j], c.get(cell)), cell)
        for r in range(rows):
            totals = [c.halves(c.get(sums[r * keys + j]), c.add, 4) for j in range(keys)]
            line = c.at(out, c.b.mul(ldo, _I64(r)))
            if keys == 1:
                total = c.halves(totals[0], c.add, 1)
                c.store(c.b.extract_element(total, _I32(0)), line)
                continue
            # Four vectors of four become the vector of their sums in two steps.
            x, y = (
                c.add(c.shuffle(p, q, [0, 1, 4, 5]), c.shuffle(p, q, [2, 3, 6, 7]))
                for p, q in (totals[:2], totals[2:])
            )
            c.store(c.add(c.shuffle(x, y, [0, 2, 4, 6]), c.shuffle(x, y, [1, 3, 5, 7])), line)

    return write


_MATRICES = (types.int64,) * 7
_product = {
    (rows, columns): instructions(_write_product(rows, columns), types.void, *_MATRICES)
    for rows in range(1, _ROWS + 1)
    for columns in (1, _COLUMNS)
}
_dots = {
    (rows, keys): instructions(_write_dots(rows, keys), types.void, *_MATRICES)
    for rows in (1, 2)
    for keys in (1, _KEYS)
}


def any_rows(functions: Sequence[Any]) -> Any:
    """``(rows, args)``: of functions of 1, 2, 3 and 4 rows the one for as many as there are, or for
    four."""
    one, two, three, four = functions

    @njit
    def run(rows: int, args: tuple[int, ...]) -> None:
        if rows >= 4:
            four(args)
        elif rows == 3:
            three(args)
        elif rows == 2:
            two(args)
        else:
            one(args)

    return run


_narrow, _broad = (
    any_rows([_product[rows, columns] for rows in range(1, _ROWS + 1)]) for columns in (1, _COLUMNS)
)


@njit
def product(a: int, lda: int, b: int, ldb: int, out: int, ldo: int, m: int, n: int, k: int) -> None:
    """``out[m, n] += a[m, k] @ b[k, n]``, n a multiple of WIDTH."""
    column = 0
    while column < n:
        broad = n - column >= WIDTH * _COLUMNS
        for row in range(0, m, _ROWS):
            args = (a + 4 * row * lda, lda, b + 4 * column, ldb, out + 4 * (row * ldo + column), ldo, k)
            if broad:
                _broad(m - row, args)
            else:
                _narrow(m - row, args)
        column += WIDTH * _COLUMNS if broad else WIDTH


_dots_2_4, _dots_1_4, _dots_2_1, _dots_1_1 = (_dots[key] for key in ((2, 4), (1, 4), (2, 1), (1, 1)))


@njit
def dots(a: int, lda: int, b: int, ldb: int, out: int, ldo: int, m: int, n: int, k: int) -> None:
    """``out[m, n] = a[m, k] @ b[n, k].T``, k a multiple of WIDTH: b is read in place, a few rows at
    a time."""
    column = 0
    while column < n:
        several = n - column >= _KEYS
        row = 0
        while row < m:
            args = (a + 4 * row * lda, lda, b + 4 * column * ldb, ldb, out + 4 * (row * ldo + column), ldo, k)
            pair = m - row >= 2
            if several:
                if pair:
                    _dots_2_4(args)
                else:
                    _dots_1_4(args)
            elif pair:
                _dots_2_1(args)
            else:
                _dots_1_1(args)
            row += 2 if pair else 1
        column += _KEYS if several else 1


def _write_transpose(c: Code, source: Any, lds: Any, target: Any, ldt: Any) -> None:
    """``target[8, 8] = source[8, 8].T``: pairs, pairs of pairs, halves."""
    eight = ir.VectorType(_F32, 8)
    rows = [c.load(c.at(source, c.b.mul(lds, _I64(i))), eight) for i in range(8)]
    for width in (1, 2, 4):
        low = [i if not i & width else i - width + 8 for i in range(8)]
        high = [i + width if not i & width else i + 8 for i in range(8)]
        mixed = list(rows)
        for i in range(8):
            if not i & width:
                mixed[i] = c.shuffle(rows[i], rows[i + width], low)
                mixed[i + width] = c.shuffle(rows[i], rows[i + width], high)
        rows = mixed
    for i in range(8):
        c.store(rows[i], c.at(target, c.b.mul(ldt, _I64(i))))


_transpose_8 = instructions(_write_transpose, types.void, *(types.int64,) * 4)


@njit
def transpose(source: int, lds: int, target: int, ldt: int, m: int, n: int) -> None:
    """``target[n, m] = source[m, n].T``, n a multiple of 8."""
    whole = m // 8 * 8
    for column in range(0, n, 8):
        for row in range(0, whole, 8):
            _transpose_8((source + 4 * (row * lds + column), lds, target + 4 * (column * ldt + row), ldt))
    for row in range(whole, m):
        for column in range(n):
            store_f32(target, column * ldt + row, load_f32(source, row * lds + column))


# --- rows ---------------------------------------------------------------------------------------------------


def write_exp(c: Code, x: Any) -> Any:
    """e ** x for x <= 0, to 1e-7 of it; 0 below -87, where float32 ends.

    x = n ln 2 + r, and e ** r by a polynomial (Cephes, S. Moshier 1992); 2 ** n is made of exponent
    bits.
    """
    n = c.call("floor", c.fma(x, c.constant(1.44269504088896341), c.constant(0.5)))
    r = c.fma(n, c.constant(-0.693359375), x)
    r = c.fma(n, c.constant(2.12194440e-4), r)
    p = c.constant(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = c.fma(p, r, c.constant(coefficient))
    p = c.fma(c.b.fmul(p, r), r, c.add(r, c.constant(1.0)))
    integers = ir.VectorType(_I32, WIDTH)
    bits = c.b.add(c.b.fptosi(n, integers), ir.Constant(integers, [127] * WIDTH))
    power = c.b.bitcast(c.b.shl(bits, ir.Constant(integers, [23] * WIDTH)), _VECTOR)
    tiny = c.b.fcmp_unordered("<", x, c.constant(-87.0))
    return c.b.select(tiny, c.constant(0.0), c.b.fmul(p, power))


def _write_row_exp(c: Code, row: Any, n: Any, maximum: Any) -> Any:
    total = c.variables(1, c.constant(0.0))[0]
    top = c.spread(maximum)
    with c.loop(n, WIDTH) as i:
        where = c.at(row, i)
        value = write_exp(c, c.b.fsub(c.load(where), top))
        c.store(value, where)
        c.b.store(c.add(c.get(total), value), total)
    return c.b.extract_element(c.halves(c.get(total), c.add, 1), _I32(0))


def _write_row_max(c: Code, row: Any, n: Any) -> Any:
    top = c.variables(1, c.constant(float("-inf")))[0]
    with c.loop(n, WIDTH) as i:
        c.b.store(c.largest(c.load(c.at(row, i)), c.get(top)), top)
    return c.b.extract_element(c.halves(c.get(top), c.largest, 1), _I32(0))


def _write_row_scale(c: Code, row: Any, n: Any, factor: Any) -> None:
    by = c.spread(factor)
    with c.loop(n, WIDTH) as i:
        c.store(c.b.fmul(c.load(c.at(row, i)), by), c.at(row, i))


def _write_row_fill(c: Code, row: Any, n: Any, value: Any) -> None:
    with c.loop(n, WIDTH) as i:
        c.store(c.spread(value), c.at(row, i))


def _write_row_cap(c: Code, row: Any, n: Any, cap: Any) -> None:
    """cap * tanh(x / cap), with tanh(y) = sign(y) (1 - e) / (1 + e) for e = exp(-2 |y|)."""
    bound, one = c.spread(cap), c.constant(1.0)
    with c.loop(n, WIDTH) as i:
        y = c.b.fdiv(c.load(c.at(row, i)), bound)
        e = write_exp(c, c.b.fmul(c.call("fabs", y), c.constant(-2.0)))
        size = c.b.fdiv(c.b.fsub(one, e), c.add(one, e))
        c.store(c.b.fmul(bound, c.call("copysign", size, y)), c.at(row, i))


row_exp = instructions(_write_row_exp, types.float32, types.int64, types.int64, types.float32)
"""``((row, n, maximum)) -> sum``: each x of a row becomes exp(x - maximum); n padded."""
row_max = instructions(_write_row_max, types.float32, types.int64, types.int64)
"""``((row, n)) -> largest``; n padded."""
row_scale = instructions(_write_row_scale, types.void, types.int64, types.int64, types.float32)
"""``((row, n, factor))``; n padded."""
row_fill = instructions(_write_row_fill, types.void, types.int64, types.int64, types.float32)
"""``((row, n, value))``; n padded."""
row_cap = instructions(_write_row_cap, types.void, types.int64, types.int64, types.float32)
"""``((row, n, cap))``: each x becomes cap * tanh(x / cap); n padded."""


# --- what is not float32 ------------------------------------------------------------------------------------


def _write_widen(kind: str) -> Callable[..., None]:
    """Eight numbers of two bytes to float32."""

    def write(c: Code, source: Any, target: Any) -> None:
        words = ir.VectorType(ir.IntType(16), 8)
        raw = c.b.load(pointer(c.b, source, words), align=2, typ=words)
        if kind == "f16":
            wide = c.b.fpext(c.b.bitcast(raw, ir.VectorType(ir.HalfType(), 8)), ir.VectorType(_F32, 8))
        else:
            integers = ir.VectorType(_I32, 8)
            wide = c.b.shl(c.b.zext(raw, integers), ir.Constant(integers, [16] * 8))
            wide = c.b.bitcast(wide, ir.VectorType(_F32, 8))
        c.store(wide, target)

    return write


widen_f16 = instructions(_write_widen("f16"), types.void, types.int64, types.int64)
"""``((source, target))``: eight float16 to eight float32."""
widen_bf16 = instructions(_write_widen("bf16"), types.void, types.int64, types.int64)
"""``((source, target))``: eight bfloat16 to eight float32."""
