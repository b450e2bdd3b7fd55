"""Compiles the kernels for every TPU and for a Hopper GPU, on a machine that has neither.

    python -m tpu_scripts.compile_check [--quick] [--meshes] [--json FILE]
    python -m tpu_scripts.compile_check --python-tpu .venv-tpu/bin/python --python-gpu .venv-gpu/bin/python

Needs: for TPUs pip install -e ".[tpu]"; for GPUs jax-cuda13-plugin and jax-cuda13-pjrt of jax's own version, and
nvidia-cuda-nvcc. No driver and no device. The two can be installed into one environment or into two.

Runs compile_check.tpu and compile_check.gpu; with --meshes also compile_check.mesh, which needs pip install -e
".[model]". They can be run alone; their --help says more. Exit status: 0, what could be checked is right; 1, something
is not; 2, nothing could be checked.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpu_scripts import common
from tpu_scripts.common import Parser
from tpu_scripts.compile_check.devices import FAILED, NOT_CHECKED, OK
from tpu_scripts.workers import ROOT

INSTALL = {
    "tpu": 'pip install -e ".[tpu]"',
    "gpu": "pip install jax-cuda13-plugin==J jax-cuda13-pjrt==J nvidia-cuda-nvcc, J being jax's version",
}


@dataclass(frozen=True)
class Check:
    """Result of one check."""

    target: str
    meshes: bool
    status: int
    seconds: float
    rows: list[Any]

    @property
    def name(self) -> str:
        return f"{self.target}{' meshes' * self.meshes}"

    def line(self) -> str:
        if self.status == NOT_CHECKED:
            model = ' and pip install -e ".[model]"' * self.meshes
            return f"{self.name}: not checked; it needs {INSTALL[self.target]}{model}"
        found = "ok" if self.status == OK else "FAILED"
        return f"{self.name}: {found}, {len(self.rows)} programs in {self.seconds:.0f} s"


def run(target: str, python: str, quick: bool, meshes: bool) -> Check:
    """Runs one check, of kernels or of steps over meshes; its tables go to stdout as they come."""
    print(f"== {target}{' meshes' * meshes}", flush=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        script = f"tpu_scripts.compile_check.{'mesh' if meshes else target}"
        command = [python, "-m", script, "--json", str(file)]
        command += ["--quick"] * quick + ["--platform", target] * meshes
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, check=False)
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
    status = done.returncode if done.returncode in (OK, NOT_CHECKED) else FAILED
    return Check(target, meshes, status, time.perf_counter() - start, rows)


def combined_status(checks: list[Check]) -> int:
    """Exit status of all checks together."""
    statuses = {check.status for check in checks}
    if FAILED in statuses:
        return FAILED
    return OK if OK in statuses else NOT_CHECKED


def main() -> int:
    parser = Parser(__doc__, json=None)
    parser.flag("--quick", "fewer shapes")
    parser.flag("--meshes", "also steps of a model over meshes of devices")
    for target in INSTALL:
        parser.add(
            f"--python-{target}", f"interpreter that compiles for {target.upper()}s (default: this one)"
        )
    args = parser.parse()
    pythons = {}
    for target in INSTALL:
        python = getattr(args, f"python_{target}") or sys.executable
        if (found := shutil.which(python)) is None:
            parser.error(f"--python-{target}: {python} is not a program")
        pythons[target] = str(Path(found).absolute())
    kinds = (False, True) if args.meshes else (False,)
    checks = [
        run(target, python, args.quick, meshes) for target, python in pythons.items() for meshes in kinds
    ]
    print()
    for check in checks:
        print(check.line())
    common.write_json(args.json, {check.name: check.rows for check in checks}, measured=False)
    return combined_status(checks)


if __name__ == "__main__":
    sys.exit(main())
