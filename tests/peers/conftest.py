"""Fixtures of the comparisons: reported numbers, and an interpreter with llama.cpp."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

LlamaCpp = Callable[..., dict[str, np.ndarray]]
Measured = Callable[..., None]

_NUMBERS = pytest.StashKey[list[str]]()


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    """Reports numbers, as in ``measured(difference=1e-6)``; ``docs/reports/peers.md`` quotes them."""

    def note(**numbers: float) -> None:
        values = ", ".join(f"{name} {value:.1e}" for name, value in numbers.items())
        request.config.stash.setdefault(_NUMBERS, []).append(f"{request.node.name}: {values}")

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if numbers := config.stash.get(_NUMBERS, None):
        terminalreporter.section("measured")
        for line in numbers:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> LlamaCpp:
    """Runs ``llama_cpp_worker.py``: called with keywords, it returns the arrays that the worker wrote.

    llama.cpp runs in a process of its own, with the interpreter that ``JAXPAGED_LLAMA_PYTHON`` names, or with this
    one where llama-cpp-python is installed beside the project.
    """
    python = os.environ.get("JAXPAGED_LLAMA_PYTHON")
    if python is None:
        if importlib.util.find_spec("llama_cpp") is None:
            pytest.skip(
                "llama-cpp-python is not installed, and JAXPAGED_LLAMA_PYTHON names no Python that has it"
            )
        python = sys.executable
    folder = tmp_path_factory.mktemp("llama_cpp")

    def run(**request: Any) -> dict[str, np.ndarray]:
        out = folder / "result.npz"
        worker = Path(__file__).with_name("llama_cpp_worker.py")
        done = subprocess.run(
            [python, str(worker), str(out)],
            input=json.dumps(request),
            text=True,
            capture_output=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        with np.load(out) as result:
            return dict(result)

    return run
