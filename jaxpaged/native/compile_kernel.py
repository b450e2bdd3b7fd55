"""Compiles kernels to object code: ``python -m jaxpaged.native.compile_kernel [NAME FILE MODULE OUTPUT]...``."""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["NUMBA_OPT"] = "0"
# Otherwise numba optimizes each function, and generates its machine code, whenever another one calls it.

import llvmlite.binding as llvm
import numba
from numba import types

from jaxpaged.native.target import ABSENT, target_machine

_PYTHON = re.compile(r'@"?((?:numba_|NRT_|_?Py)\w+)"?')
"""Functions of numba's error paths, which a kernel never takes."""


class _BarePackages:
    """Imports packages without their ``__init__``, which would import JAX for half a second."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        found = PathFinder.find_spec(name, path) if name.startswith("jaxpaged") else None
        if found is not None and found.submodule_search_locations is not None:
            found.loader = None
        return found


sys.meta_path.insert(0, _BarePackages())


def load(file: Path, module: str) -> ModuleType:
    """Imports a kernel's file under the name ``module``."""
    spec = importlib.util.spec_from_file_location(module, file)
    assert spec is not None
    assert spec.loader is not None
    kernel = sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
    return kernel


def compile_kernel(name: str, file: Path, module: str) -> bytes:
    """Object code with the symbols ``name`` and ``name_task``, behind a line with the names of
    functions that it does not call; see ``kernels.Kernel``."""
    kernel = load(file, module)
    c_function = numba.cfunc(types.int64(types.int64), error_model="numpy")
    task = c_function(kernel.task)
    llvm.add_symbol(f"{name}_task", task.address)  # numba links the handler, too
    handler = c_function(kernel.handler)
    parts = []
    symbols = f"{name}_task", name
    for symbol, function in zip(symbols, (task, handler), strict=True):
        text = function.inspect_llvm().replace(function.native_name, symbol)
        parts.append(llvm.parse_assembly(_PYTHON.sub(rf"@{ABSENT}\1", text)))
    whole = parts[0]
    whole.link_in(parts[1])
    for function in whole.functions:
        if not function.is_declaration and function.name not in symbols:
            function.linkage = "internal"
    _optimize(whole)
    absent = [one.name for one in whole.functions if one.name.startswith(ABSENT)]
    absent += [one.name for one in whole.global_variables if one.name.startswith(ABSENT)]
    return " ".join(absent).encode() + b"\n" + bytes(target_machine().emit_object(whole))


def _optimize(module: Any) -> None:
    """LLVM's optimizations of a whole kernel, as numba configures them for a function."""
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = True
    options.slp_vectorization = False
    builder = llvm.create_pass_builder(target_machine(), options)
    builder.getModulePassManager().run(module, builder)
    module.verify()


if __name__ == "__main__":
    gc.disable()  # numba's objects live until the end
    for at in range(1, len(sys.argv), 4):
        name, file, module, output = sys.argv[at : at + 4]
        Path(output).write_bytes(compile_kernel(name, Path(file), module))
