"""The machine that kernels are compiled for."""

from __future__ import annotations

import os
from typing import Any

import llvmlite.binding as llvm

ABSENT = "jaxpaged_absent_"
"""Prefix of symbols that object code names and never calls."""


def target_machine() -> Any:
    """LLVM's code generator for this CPU, or for that of numba's variables NUMBA_CPU_NAME and
    NUMBA_CPU_FEATURES."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name = os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is None:
        features = llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(name, features, opt=3, reloc="default", codemodel="jitdefault")
