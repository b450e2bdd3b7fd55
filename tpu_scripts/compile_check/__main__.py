"""Compiles the attention kernels for every TPU and for a Hopper GPU, on a machine that has neither.

    python -m tpu_scripts.compile_check [--quick] [--meshes] [--json FILE]
    python -m tpu_scripts.compile_check --python-tpu .venv-tpu/bin/python --python-gpu .venv-gpu/bin/python

Needs: for TPUs pip install -e ".[tpu]"; for GPUs jax-cuda13-plugin and jax-cuda13-pjrt of jax's own version, and
nvidia-cuda-nvcc. No driver and no device. The two can be installed into one environment or into two.

Runs compile_check.tpu and compile_check.gpu; with --meshes also compile_check.mesh, which pip install -e ".[model]" is
for. They can be called alone and say more in their --help. Exit status: 0, what could be checked is right; 1, something
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

from tpu_scripts.common import Parser, add_json, check_writable

ROOT = Path(__file__).resolve().parents[2]
OK, FAILED, NOT_CHECKED = range(3)
"""Exit statuses, of this script and of those that it runs."""
INSTALL = {
    "tpu": 'pip install -e ".[tpu]"',
    "gpu": "pip install jax-cuda13-plugin==J jax-cuda13-pjrt==J nvidia-cuda-nvcc, J being jax's version",
}


@dataclass(frozen=True)
class Check:
    """What came out of one of them."""

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


def run(target: str, python: str, quick: bool, meshes: bool = False) -> Check:
    """Runs one check, of kernels or of steps over meshes; its tables go to stdout as they come."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        script = "compile_check." + ("mesh" if meshes else target)
        command = [python, "-m", f"tpu_scripts.{script}", "--json", str(rows)]
        command += ["--quick"] * quick + ["--platform", target] * meshes
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, check=False)
        found = json.loads(rows.read_text()) if rows.exists() else []
    status = done.returncode if done.returncode in (OK, NOT_CHECKED) else FAILED
    return Check(target, meshes, status, time.perf_counter() - start, found)


def summed_up(checks: list[Check]) -> int:
    """The exit status of all together."""
    statuses = {check.status for check in checks}
    if FAILED in statuses:
        return FAILED
    return OK if OK in statuses else NOT_CHECKED


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--meshes", action="store_true", help="also steps of a model over meshes of devices")
    for target in INSTALL:
        parser.add_argument(
            f"--python-{target}", default=sys.executable, metavar="PYTHON",
            help=f"the interpreter that compiles for {target.upper()}s (default: this one)",
        )  # fmt: skip
    add_json(parser)
    args = parser.parse_args()
    check_writable(parser, args.json)
    pythons = {target: getattr(args, f"python_{target}") for target in INSTALL}
    for target, python in pythons.items():
        if shutil.which(python) is None:
            parser.error(f"--python-{target}: {python} is no program")
    paths = {
        target: str(Path(shutil.which(python) or python).absolute()) for target, python in pythons.items()
    }
    checks = []
    for target in pythons:
        print(f"== {target}", flush=True)
        checks.append(run(target, paths[target], args.quick))
        if args.meshes:
            print(f"== {target} meshes", flush=True)
            checks.append(run(target, paths[target], args.quick, meshes=True))
    print()
    for check in checks:
        print(check.line())
    if args.json:
        args.json.write_text(json.dumps({check.name: check.rows for check in checks}, indent=1) + "\n")
    return summed_up(checks)


if __name__ == "__main__":
    sys.exit(main())
