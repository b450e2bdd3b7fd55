"""Compiles one kernel to object code: ``python -m jaxpaged.native.compile_kernel NAME FILE MODULE OUTPUT``."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numba
from numba import types

from jaxpaged.native.target import ABSENT, target_machine

_PYTHON = re.compile(r'@"?((?:numba_|NRT_|_?Py)\w+)"?')
"""Functions of numba's error paths, which a kernel never takes."""


def compile_kernel(name: str, file: Path, module: str) -> bytes:
    """Object code with the symbols ``name`` and ``name_task``, behind a line with the names of
    functions that it does not call; see ``kernels.Kernel``."""
    spec = importlib.util.spec_from_file_location(module, file)
    assert spec is not None
    assert spec.loader is not None
    kernel = sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
    c_function = numba.cfunc(types.int64(types.int64), error_model="numpy")
    task = c_function(kernel.task)
    llvm.add_symbol(f"{name}_task", task.address)  # numba links the handler, too
    handler = c_function(kernel.handler)
    parts = []
    for symbol, function in ((f"{name}_task", task), (name, handler)):
        text = function.inspect_llvm().replace(function.native_name, symbol)
        parts.append(llvm.parse_assembly(_PYTHON.sub(rf"@{ABSENT}\1", text)))
    whole = parts[0]
    whole.link_in(parts[1])
    whole.verify()
    absent = [one.name for one in whole.functions if one.name.startswith(ABSENT)]
    absent += [one.name for one in whole.global_variables if one.name.startswith(ABSENT)]
    return " ".join(absent).encode() + b"\n" + bytes(target_machine().emit_object(whole))


if __name__ == "__main__":
    name, file, module, output = sys.argv[1:]
    Path(output).write_bytes(compile_kernel(name, Path(file), module))
