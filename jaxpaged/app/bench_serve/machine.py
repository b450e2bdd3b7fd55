"""Machine and command line of a benchmark, for its results."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxpaged import __version__

_SECRET = "--api-key"


def machine() -> dict[str, Any]:
    """Processor, number of cores that this process may use, and software versions."""
    model = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": model,
        "cores": cores,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "jaxpaged": __version__,
    }


def command_line(arguments: list[str] | None = None) -> str:
    """Command line of the benchmark, without its API key."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for i, word in enumerate(words):
        if word.startswith(f"{_SECRET}="):
            words[i] = f"{_SECRET}=***"
        elif word == _SECRET and i + 1 < len(words):
            words[i + 1] = "***"
    return shlex.join(["jaxpaged", *words])
