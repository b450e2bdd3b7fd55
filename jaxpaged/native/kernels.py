"""Kernels as XLA custom calls: object code from the cache, or compiled by another process meanwhile.

A kernel is a Python file with two numba functions, see ``ffi``. Its object code is kept in the cache
folder and linked by llvmlite, so that a process that finds it there does not import numba. What is
not there is compiled by a process of its own, beside this one, which traces and compiles programs
that call it: XLA is given a few instructions that wait for the kernel when it is called.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import llvmlite.binding as llvm
from llvmlite import ir

from jaxpaged.compilation import background
from jaxpaged.compilation.cache_folder import cache_folder, private_folder, read_entry, write_entry
from jaxpaged.native.layout import ERROR_CREATE, MAJOR, MINOR
from jaxpaged.native.target import target_machine

_FAILED = -1
_POLL_MICROSECONDS = 500
_lock = threading.Lock()
_registered: set[str] = set()
"""Names of kernels that are registered."""
_linked: list[Any] = []
"""References to linked code, whose addresses XLA has."""


@dataclass(frozen=True)
class Kernel:
    """The source of a kernel, and the custom call that it becomes.

    Attributes:
      name: target of ``jax.ffi.ffi_call``.
      file: Python file with the functions ``handler`` and ``task``.
      module: name under which the file is loaded; one file may define a kernel for each name.
      sources: other files with the kernel's code, beside those of ``jaxpaged.native``.
    """

    name: str
    file: Path
    module: str
    sources: tuple[Path, ...] = ()

    @property
    def key(self) -> str:
        """Digest of the sources, the libraries and the machine."""
        variables = [
            f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NUMBA_CPU")
        ]
        parts = [self.name, version("jaxlib"), version("numba"), llvm.get_host_cpu_name(), *variables]
        digest = hashlib.sha256(" ".join(parts).encode())
        for source in sorted({*Path(__file__).parent.glob("*.py"), self.file, *self.sources}):
            digest.update(source.read_bytes())
        return digest.hexdigest()[:32]


def register(*kernels: Kernel) -> None:
    """Registers kernels as custom calls of the CPU platform, once; does not wait for their compilation.

    ``background.wait`` does, and raises what made it fail; a program that calls a kernel before
    then waits.

    Warns:
      RuntimeWarning: the cache folder cannot be used, so kernels are compiled.
    """
    with _lock:  # programs may be traced on several threads
        kernels = tuple(kernel for kernel in kernels if kernel.name not in _registered)
        _registered.update(kernel.name for kernel in kernels)
        if kernels:
            _register_all(kernels)


def _register_all(kernels: Sequence[Kernel]) -> None:
    folder = None
    try:
        folder = private_folder(cache_folder() / "kernels")
    except OSError as error:
        warnings.warn(f"no kernel cache, every process compiles: {error}", RuntimeWarning, stacklevel=3)
    missing = []
    for kernel in kernels:
        entry = None if folder is None else folder / f"{kernel.key}.kernel"
        content = None if entry is None else read_entry(entry)
        if content is not None:
            _register(kernel.name, link(kernel.name, content))
            continue
        address = ctypes.c_int64(0)
        _linked.append(address)
        _register(kernel.name, _waiting_call(kernel.name, ctypes.addressof(address)))
        missing.append(_Missing(kernel, entry, address))
    if missing:
        background.start(lambda: _compile(missing))


class _Missing(NamedTuple):
    """A kernel that is not in the cache."""

    kernel: Kernel
    entry: Path | None
    """Its file in the cache, if there is one."""
    address: ctypes.c_int64
    """Address of its handler; 0 until it is compiled."""


def _register(name: str, address: int) -> None:
    function = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(address)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="cpu")
    _linked.append(function)


def _compile(missing: Sequence[_Missing]) -> None:
    """Compiles kernels in another process, links them, and lets the calls that wait for them go on."""
    try:
        contents = _compiled_elsewhere([each.kernel for each in missing])
        for (kernel, entry, address), content in zip(missing, contents, strict=True):
            if entry is not None:
                write_entry(entry, content)
            address.value = link(kernel.name, content)
    except BaseException:
        for each in missing:
            each.address.value = each.address.value or _FAILED
        raise


def _compiled_elsewhere(kernels: Sequence[Kernel]) -> list[bytes]:
    """Object code of kernels. One process compiles the functions that they share once."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, kernel.name) for kernel in kernels]
        command = [sys.executable, "-m", "jaxpaged.native.compile_kernel"]
        for kernel, output in zip(kernels, outputs, strict=True):
            command += [kernel.name, str(kernel.file), kernel.module, str(output)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            names = " or ".join(kernel.name for kernel in kernels)
            raise RuntimeError(f"kernel {names} does not compile:\n{done.stderr}")
        return [output.read_bytes() for output in outputs]


def link(name: str, content: bytes) -> int:
    """Links object code, as ``compile_kernel`` writes it, into this process; returns the address of
    its handler."""
    engine = _engine("")
    names, _, code = content.partition(b"\n")
    for absent in names.split():  # calls of error paths that kernels do not have
        llvm.add_symbol(absent.decode(), llvm.address_of_symbol("abort"))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return int(engine.get_function_address(name))


def _engine(code: str) -> Any:
    """A linker of the process, which finds the process's own functions, with a module of LLVM."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(code), target_machine())
    _linked.append(engine)
    return engine


_I8, _I32, _I64 = (ir.IntType(bits) for bits in (8, 32, 64))
_CALL = ir.FunctionType(_I64, [_I64])


def _at(b: ir.IRBuilder, address: Any, offset: int) -> Any:
    """A pointer to the 64 bits at ``address + offset``."""
    return b.inttoptr(b.add(address, _I64(offset)), ir.PointerType(_I64))


def _new_call(name: str) -> tuple[ir.Module, ir.Function, ir.IRBuilder]:
    """A custom call that answers XLA's question for its version, and a builder of what it does else."""
    module = ir.Module(name=name)
    module.triple = llvm.get_process_triple()
    function = ir.Function(module, _CALL, name)
    begin, version_query, rest = (
        function.append_basic_block(block) for block in ("begin", "version", "rest")
    )
    b = ir.IRBuilder(begin)
    extension = b.load(_at(b, function.args[0], 8), typ=_I64)
    b.cbranch(b.icmp_unsigned("!=", extension, _I64(0)), version_query, rest)
    b.position_at_end(version_query)
    metadata = b.load(_at(b, extension, 24), typ=_I64)
    b.store(_I64(MAJOR | MINOR << 32), _at(b, metadata, 24))
    traits = b.load(_at(b, metadata, 32), typ=_I64)
    b.store(b.and_(traits, _I64(~0xFFFFFFFF & (1 << 64) - 1)), _at(b, metadata, 32))
    b.ret(_I64(0))
    return module, function, ir.IRBuilder(rest)


def _waiting_call(name: str, address_of: int) -> int:
    """Address of a custom call that waits until the 64 bits at ``address_of`` are the address of
    another one, and calls that; it returns an XLA error once they are ``_FAILED``."""
    module, function, b = _new_call(name)
    call = function.args[0]
    poll, sleep, check, run, failed = (
        function.append_basic_block(block) for block in ("poll", "sleep", "check", "run", "failed")
    )
    b.branch(poll)

    b.position_at_end(poll)
    found = b.load_atomic(_at(b, _I64(address_of), 0), ordering="acquire", align=8, typ=_I64)
    b.cbranch(b.icmp_unsigned("==", found, _I64(0)), sleep, check)

    b.position_at_end(sleep)
    if sys.platform != "win32":
        usleep = ir.Function(module, ir.FunctionType(_I32, [_I32]), "usleep")
        b.call(usleep, [_I32(_POLL_MICROSECONDS)])
    b.branch(poll)

    b.position_at_end(check)
    b.cbranch(b.icmp_signed("==", found, _I64(_FAILED)), failed, run)

    b.position_at_end(run)
    b.ret(b.call(b.inttoptr(found, ir.PointerType(_CALL)), [call]))

    b.position_at_end(failed)
    text = bytearray(f"the kernel {name} did not compile\0".encode())
    message = ir.GlobalVariable(module, ir.ArrayType(_I8, len(text)), "message")
    message.initializer = ir.Constant(message.value_type, text)
    message.linkage = "internal"
    arguments = b.ptrtoint(b.alloca(_I64, 4), _I64)
    for offset, value in ((0, _I64(28)), (8, _I64(0)), (16, b.ptrtoint(message, _I64)), (24, _I64(13))):
        b.store(value, _at(b, arguments, offset))
    create = b.load(_at(b, b.load(_at(b, call, 16), typ=_I64), ERROR_CREATE), typ=_I64)
    b.ret(b.call(b.inttoptr(create, ir.PointerType(_CALL)), [arguments]))
    return _address(module, name)


def _address(module: ir.Module, name: str) -> int:
    engine = _engine(str(module))
    engine.finalize_object()
    return int(engine.get_function_address(name))


@functools.cache
def _untouched_call() -> str:
    """Registers a custom call that writes nothing to its results."""
    name = "jaxpaged_untouched"
    module, _, b = _new_call(name)
    b.ret(_I64(0))
    _register(name, _address(module, name))
    return name


@functools.partial(jax.jit, static_argnums=0)
def _untouched(shape: jax.ShapeDtypeStruct) -> jax.Array:
    found: jax.Array = jax.ffi.ffi_call(_untouched_call(), shape)()
    return found


def untouched(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """An array on the CPU with arbitrary numbers; the system gives it memory where it is written."""
    return _untouched(jax.ShapeDtypeStruct(shape.shape, shape.dtype))
