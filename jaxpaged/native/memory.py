"""Addresses as integers, for numba functions: loads, stores, atomic counters, malloc.

Kernels read arrays of many types, some of them packed, whose shapes are known at run time alone. An
address and an index say as much as an array does and compile to one instruction.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_I8, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()


def pointer(builder: Any, address: Any, kind: Any) -> Any:
    """The address as a pointer to ``kind``."""
    return builder.inttoptr(address, ir.PointerType(kind))


def _loader(kind: Any, result: Any, size: int) -> Callable[[int, int], Any]:
    @intrinsic
    def load(typing: Any, address: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            at = builder.add(args[0], builder.mul(args[1], _I64(size)))
            return builder.load(pointer(builder, at, kind), align=size, typ=kind)

        return result(types.int64, types.int64), codegen

    return load


def _storer(kind: Any, value: Any, size: int) -> Callable[[int, int, Any], None]:
    @intrinsic
    def store(typing: Any, address: Any, index: Any, number: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            at = builder.add(args[0], builder.mul(args[1], _I64(size)))
            builder.store(args[2], pointer(builder, at, kind), align=size)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, value), codegen

    return store


load_i32 = _loader(_I32, types.int32, 4)
"""``(address, index) -> i32``: element ``index`` of the numbers that begin at ``address``."""
load_i64 = _loader(_I64, types.int64, 8)
load_f32 = _loader(_F32, types.float32, 4)
store_i64 = _storer(_I64, types.int64, 8)
"""``(address, index, value)``"""
store_f32 = _storer(_F32, types.float32, 4)


@intrinsic
def fetch_add(typing: Any, address: Any, value: Any) -> Any:
    """``(address, value) -> i64``: adds to the 64-bit counter there, atomically; what it was
    before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", pointer(builder, args[0], _I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _prefetch_line(typing: Any, address: Any) -> Any:
    """Asks for a line of the second-level cache."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(_I8), _I32, _I32, _I32])
        name = "llvm.prefetch.p0"
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        builder.call(function, [pointer(builder, args[0], _I8), _I32(0), _I32(2), _I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@numba.njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
def prefetch(address: int, size: int) -> None:
    """Asks for ``size`` bytes, which will be read soon."""
    for offset in range(0, size, 64):
        _prefetch_line(address + offset)


def _library(name: str, result: Any, argument: Any) -> Any:
    """A function of the C library with one 64-bit argument."""

    @intrinsic
    def call(typing: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            returns = ir.VoidType() if result is types.void else _I64
            kind = ir.FunctionType(returns, [_I64])
            function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
            value = builder.call(function, args)
            return context.get_dummy_value() if result is types.void else value

        return result(argument), codegen

    return call


malloc = _library("malloc", types.int64, types.int64)
"""``(bytes) -> address``; 0 when there is no memory."""
free = _library("free", types.void, types.int64)
"""``(address)``"""


@intrinsic
def yield_thread(typing: Any) -> Any:
    """Lets another thread run that waits for this core, where the system has such a call (POSIX);
    else nothing."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if sys.platform != "win32":
            kind = ir.FunctionType(ir.IntType(32), [])
            name = "sched_yield"
            function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
            builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call_address(typing: Any, function: Any, argument: Any) -> Any:
    """``(function, argument) -> i64``: calls a C function of one pointer that returns a pointer."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_I64, [_I64])
        return builder.call(pointer(builder, args[0], kind), [args[1]])

    return types.int64(types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def symbol(typing: Any, name: Any) -> Any:
    """``("NAME") -> i64``: the address of a function that the process knows by that name when the
    code is loaded."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_I64, [_I64])
        known = builder.module.globals.get(name.literal_value)
        function = known or ir.Function(builder.module, kind, name.literal_value)
        return builder.ptrtoint(function, _I64)

    return types.int64(name), codegen
