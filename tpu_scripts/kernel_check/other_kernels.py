"""The conformance kit over other people's paged attention, and over the project's own: which serves what.

    python -m tpu_scripts.kernel_check.other_kernels [--json FILE] [--only NAME]
    pip install "jax[tpu]"   # for the kernels that are compiled for a TPU; without it those are left out, and named

No TPU and no GPU is needed: kernels run in Pallas' interpreters, or are compiled or lowered without being run. Each
kernel runs in a process of its own, with a limit on every check, so that one that hangs or crashes is a cell of the
table. ``docs/conformance.md`` has the table and explains its rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.testing.conformance import judge
from tpu_scripts.kernel_check.adapters import KERNELS, Arrays, CannotExpress, Kernel, Prepared
from tpu_scripts.kernel_check.cases import CHECKS, Check

# --- asking -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """What came of one variant of one check."""

    kind: str
    """"ok", "wrong", "NaN", "NaN leaks", "compiles", "lowers", "refused", "cannot be expressed", "not run" or "not
    asked"."""
    detail: str = ""


_WORDS = 220
"""Characters of a message that are short."""


def _in_its_own_words(error: Exception) -> str:
    """The line of an error's message that says what is wrong; of an assertion without one, the assertion."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        line = traceback.extract_tb(error.__traceback__)[-1].line or ""
        return f"{type(error).__name__}: {line}"
    said = lines[0]
    if "callback" in said:  # an interpreter's own error stands last
        said = lines[-1]
    said = re.sub(r"( at)? /\S+", "", said)  # where a file lies on this machine
    said = re.sub(r"\s+", " ", said)
    # Whole sentences, as many as are short together, and the first one in any case.
    end = max(said.rfind(". ", 0, _WORDS), said.find(". ")) if len(said) > _WORDS else -1
    return said[: end + 1] if end >= 0 else said[:300]


def _compile(kernel: Kernel, prepared: Prepared) -> None:
    """As far as one comes without the device.

    Raises:
      Exception: whatever the compilers of TPUs and GPUs raise.
    """
    run, arrays, _ = prepared
    if kernel.how == "cuda":
        from jax.sharding import AbstractDevice, AbstractMesh

        device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
            jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",))
        return
    from jax.experimental import topologies

    topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
    # Kernels that ask for the chip find it in the mesh.
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arrays]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jax.jit(run).trace(*shapes).lower(lowering_platforms=("tpu",)).compile()


def _interpret_for_tpu(run: Callable[..., Any], arrays: Arrays) -> Any:
    from jax.experimental.pallas import tpu as pltpu

    parameters = pltpu.InterpretParams(
        detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan"
    )
    pltpu.reset_tpu_interpret_mode_state()
    with pltpu.force_tpu_interpret_mode(parameters):
        return jax.block_until_ready(run(*arrays))


def _race_was_found() -> bool:
    """Whether the interpreter saw a race since it was reset; jax has no public name for it."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races is not None and interpret_pallas_call.races.races_found


def ask(kernel: Kernel, check: Check, label: str) -> Cell:
    """One variant of a check, put to a kernel."""
    runs = kernel.how in ("run", "interpret")
    if check.of_values and not runs:
        return Cell("not asked")
    built = check.builds[label](kernel.dtype)

    def attention(*args: Any, **options: Any) -> Any:
        run, arrays, back = kernel.prepare(*args, **options)
        return back(_interpret_for_tpu(run, arrays) if kernel.how == "interpret" else run(*arrays))

    try:
        if not runs:
            # Queries of the pages' dtype, as these kernels are used.
            q = built.q.astype(built.k_pages.dtype)
            options = built.options | ({"return_lse": True} if check.lse else {})
            _compile(
                kernel, kernel.prepare(q, built.k_pages, built.v_pages, built.table, built.batch, **options)
            )
            return Cell("compiles" if kernel.how == "v5e" else "lowers")
        verdict = judge(attention, built, rtol=kernel.tolerance, atol=kernel.tolerance, lse=check.lse)
    except CannotExpress as reason:
        return Cell("cannot be expressed", str(reason))
    except Exception as error:
        return Cell("refused", _in_its_own_words(error))
    if verdict.kind == "ok":
        return Cell("ok", "but a race" if kernel.how == "interpret" and _race_was_found() else "")
    if verdict.kind == "nan":
        return Cell("NaN leaks" if jnp.isnan(built.v_pages).any() else "NaN")
    if verdict.kind == "refused":
        return Cell("refused", verdict.reason)
    if not verdict.reason and verdict.max_error <= 2 * float(jnp.finfo(built.k_pages.dtype).eps):
        return Cell(
            "ok", f"to {verdict.max_error:.1g}"
        )  # weights in the pages' dtype, as flash attention has them
    return Cell("wrong", verdict.reason or f"{verdict.max_error:.1g}")


_PLACES = [(check.name, label) for check in CHECKS for label in check.builds]
_MARK = "CELL "


def _child(name: str, skip: int) -> None:
    """Asks one kernel everything from the place ``skip`` on; a line for each start and each answer."""
    kernel = next(k for k in KERNELS if k.name == name)
    checks = {check.name: check for check in CHECKS}
    for place in range(skip, len(_PLACES)):
        print(f"{_MARK}{json.dumps([place])}", flush=True)
        check, label = _PLACES[place]
        cell = ask(kernel, checks[check], label)
        print(f"{_MARK}{json.dumps([place, cell.kind, cell.detail])}", flush=True)
        jax.clear_caches()


_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # What libtpu asks for on a machine without a TPU.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


_FASTER_TO_COMPILE = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
"""Where a kernel is run: results are compared, not timed."""


def answers(name: str, limit: float) -> Iterator[tuple[tuple[str, str], Cell]]:
    """Every place and its cell; a process that hangs or dies is followed by another, behind the place it was at."""
    place = 0
    kernel = next(k for k in KERNELS if k.name == name)
    environment = (
        os.environ | _ENVIRONMENT | (_FASTER_TO_COMPILE if kernel.how in ("run", "interpret") else {})
    )
    while place < len(_PLACES):
        command = [
            sys.executable,
            "-m",
            "tpu_scripts.kernel_check.other_kernels",
            "--child",
            name,
            "--from",
            str(place),
        ]
        with tempfile.TemporaryFile("w+") as complaints:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=complaints, text=True, env=environment
            )
            lines: queue.Queue[str | None] = queue.Queue()

            def read(stream: Any, lines: queue.Queue[str | None] = lines) -> None:
                for line in stream:
                    lines.put(line)
                lines.put(None)

            threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
            why = ""
            while True:
                try:
                    line = lines.get(timeout=limit)
                except queue.Empty:
                    process.kill()
                    why = f"no end within {limit:.0f} s"
                    break
                if line is None:
                    break
                if line.startswith(_MARK):
                    at, *cell = json.loads(line.removeprefix(_MARK))
                    if cell:
                        yield _PLACES[at], Cell(*cell)
                        place = at + 1
            status = process.wait()
            if place == len(_PLACES):
                return
            if not why:
                complaints.seek(0)
                last = ["", *complaints.read().strip().splitlines()][-1]
                signalled = signal.Signals(-status).name if status < 0 else f"status {status}"
                why = f"the process ended with {signalled}: {last}"[:300]
        yield _PLACES[place], Cell("not run", why)
        place += 1


# --- telling ------------------------------------------------------------------------------------------------

_SHOWN = {"NaN": "**NaN**", "NaN leaks": "**NaN leaks**", "not asked": ""}


class Notes:
    """Numbered notes under a table, each said once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def _say(cell: Cell, notes: Notes) -> str:
    shown = _SHOWN.get(cell.kind, cell.kind)
    if cell.kind == "wrong":
        return f"**wrong** ({cell.detail})"
    if cell.kind == "ok" and cell.detail:
        return f"ok {cell.detail}"
    return f"{shown} [{notes.number(cell.detail)}]" if cell.detail else shown


def _summary(cells: Mapping[str, Cell], notes: Notes) -> str:
    said: dict[str, list[str]] = {}
    for label, cell in cells.items():
        said.setdefault(_say(cell, notes), []).append(label)
    if len(said) == 1:
        return next(iter(said))
    return "; ".join(f"{', '.join(labels)}: {text}" for text, labels in said.items())


def _count(cells: Mapping[str, Cell]) -> str:
    kinds = Counter(cell.kind for cell in cells.values())
    return ", ".join(
        f"{number} {_SHOWN.get(kind, kind)}" for kind, number in kinds.items() if kind != "not asked"
    )


def table(group: str, results: Mapping[str, Mapping[tuple[str, str], Cell]]) -> str:
    """The kernels of a group, a column each, and the notes below."""
    kernels = [kernel for kernel in KERNELS if kernel.group == group and kernel.name in results]
    notes = Notes()
    rows = [["", *(kernel.name for kernel in kernels)], ["---"] * (len(kernels) + 1)]
    for check in CHECKS:
        row = [check.name]
        for kernel in kernels:
            cells = {
                label: results[kernel.name].get((check.name, label), Cell("not run"))
                for label in check.builds
            }
            text = _count(cells) if check is CHECKS[-1] else _summary(cells, notes)
            if check.name in kernel.documented and text != "ok":
                text += f" (documented [{notes.number(kernel.documented[check.name])}])"
            row.append(text)
        rows.append(row)
    lines = [f"### {group}", "", *("| " + " | ".join(row) + " |" for row in rows), ""]
    lines += [f"{number}. {text}" for number, text in enumerate(notes.texts, 1)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAME", help="kernels whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every cell there too")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for one check of one kernel")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--from", dest="skip", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return _child(args.child, args.skip)
    chosen = [kernel for kernel in KERNELS if args.only is None or args.only in kernel.name]
    if not chosen:
        parser.error(f"no kernel is called {args.only!r}; there are {'; '.join(k.name for k in KERNELS)}")
    results: dict[str, dict[tuple[str, str], Cell]] = {}
    for kernel in chosen:
        if why := kernel.missing():
            print(f"left out: {kernel.name}: {why}", file=sys.stderr)
            continue
        results[kernel.name] = {}
        for place, cell in answers(kernel.name, args.limit):
            results[kernel.name][place] = cell
            print(
                f"{kernel.name} | {' '.join(place)} | {cell.kind} {cell.detail}", file=sys.stderr, flush=True
            )
    print(f"jax {jax.__version__}\n")
    for group in dict.fromkeys(kernel.group for kernel in chosen if kernel.name in results):
        print(table(group, results))
    if args.json:
        cells = [
            {"kernel": name, "check": check, "variant": label, **dataclasses.asdict(cell)}
            for name, found in results.items()
            for (check, label), cell in found.items()
        ]
        args.json.write_text(json.dumps({"jax": jax.__version__, "cells": cells}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
