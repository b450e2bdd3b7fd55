"""Runs the conformance kit over other people's paged attention and over the project's own, and shows which serves what.

    python -m tpu_scripts.kernel_check.other_kernels [--json FILE] [--only NAME]
    pip install "jax[tpu]"   # for the kernels that are compiled for a TPU; without it those are left out, and named

Needs: jax; no TPU and no GPU.

Kernels run in Pallas' interpreters, or are compiled or lowered without being run. Each kernel runs in a process of its
own, with a limit on every check, so that one that hangs or crashes is a cell of the table. docs/conformance.md has the
table and explains its rows.
"""

from __future__ import annotations

import dataclasses
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxpaged.testing.conformance import judge
from tpu_scripts import common
from tpu_scripts.common import Parser, note, number
from tpu_scripts.compile_check.devices import TPU_ENVIRONMENT, Compiler
from tpu_scripts.kernel_check.adapters import KERNELS, Arrays, Call, CannotExpress, Kernel, Prepared
from tpu_scripts.kernel_check.cases import CHECKS, Check
from tpu_scripts.workers import Worker, WorkerFailed, run_as_worker

# --- checks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """Result of one variant of one check."""

    kind: str
    """"ok", "wrong", "NaN", "NaN leaks", "compiles", "lowers", "refused", "cannot be expressed", "not run" or "not
    tested"."""
    detail: str = ""


_SHORT = 220
"""Characters of a short message."""


def _message(error: Exception) -> str:
    """Line of an error's message that says what is wrong; of an assertion without a message, the assertion."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        line = traceback.extract_tb(error.__traceback__)[-1].line or ""
        return f"{type(error).__name__}: {line}"
    said = lines[0]
    if "callback" in said:  # an interpreter's own error stands last
        said = lines[-1]
    said = re.sub(r"( at)? /\S+", "", said)  # paths of this machine
    said = re.sub(r"\s+", " ", said)
    # As many whole sentences as are short together, and at least the first.
    end = max(said.rfind(". ", 0, _SHORT), said.find(". ")) if len(said) > _SHORT else -1
    return said[: end + 1] if end >= 0 else said[:300]


def _compile(kernel: Kernel, prepared: Prepared) -> None:
    """Compiles, or lowers, without the device.

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
    compiler = Compiler("v5e:2x2")
    shapes = [compiler.array(*x.shape, dtype=x.dtype) for x in arrays]
    # Kernels that query the chip find it in the mesh.
    with jax.sharding.use_abstract_mesh(compiler.mesh.abstract_mesh):
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
    """True if the interpreter saw a race since it was reset; jax has no public name for it."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races is not None and interpret_pallas_call.races.races_found


def ask(kernel: Kernel, check: Check, label: str) -> Cell:
    """Runs one variant of a check."""
    if check.of_values and not kernel.runs:
        return Cell("not tested")
    built = check.builds[label](kernel.dtype)

    def attention(*args: Any, **options: Any) -> Any:
        run, arrays, back = kernel.prepare(Call(*args, **options))
        return back(_interpret_for_tpu(run, arrays) if kernel.how == "interpret" else run(*arrays))

    try:
        if not kernel.runs:
            # Queries of the pages' dtype, as these kernels are used.
            q = built.q.astype(built.k_pages.dtype)
            options = built.options | ({"return_lse": True} if check.lse else {})
            call = Call(q, built.k_pages, built.v_pages, built.table, built.batch, **options)
            _compile(kernel, kernel.prepare(call))
            return Cell("compiles" if kernel.how == "v5e" else "lowers")
        verdict = judge(attention, built, rtol=kernel.tolerance, atol=kernel.tolerance, lse=check.lse)
    except CannotExpress as reason:
        return Cell("cannot be expressed", str(reason))
    except Exception as error:
        return Cell("refused", _message(error))
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


_VARIANTS = [(check, label) for check in CHECKS for label in check.builds]
_COMPILES_FASTER = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
"""Variables of a kernel that is run: results are compared, not timed."""


def work(name: str, first: int) -> Iterator[dict[str, Any]]:
    """Tests one kernel from variant ``first`` on."""
    kernel = next(kernel for kernel in KERNELS if kernel.name == name)
    for check, label in _VARIANTS[first:]:
        yield dataclasses.asdict(ask(kernel, check, label))
        jax.clear_caches()


def answers(kernel: Kernel, limit: float) -> list[Cell]:
    """Tests one kernel; a worker that hangs or dies is followed by another, behind the variant it was at."""
    cells: list[Cell] = []
    environment = {**TPU_ENVIRONMENT, **(_COMPILES_FASTER if kernel.runs else {})}
    while len(cells) < len(_VARIANTS):
        task = {"name": kernel.name, "first": len(cells)}
        with Worker("tpu_scripts.kernel_check.other_kernels", task, environment, limit) as worker:
            try:
                for row in worker.rows():
                    cells.append(Cell(**row))
                    _report(kernel, cells)
            except WorkerFailed as reason:
                cells.append(Cell("not run", str(reason)))
                _report(kernel, cells)
    return cells


def _report(kernel: Kernel, cells: list[Cell]) -> None:
    check, label = _VARIANTS[len(cells) - 1]
    note(f"{kernel.name} | {check.name} {label} | {cells[-1].kind} {cells[-1].detail}")


# --- the table ----------------------------------------------------------------------------------------------

_SHOWN = {"NaN": "**NaN**", "NaN leaks": "**NaN leaks**", "not tested": ""}


class Notes:
    """Numbered notes under a table, without repetitions."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def _cell(cell: Cell, notes: Notes) -> str:
    shown = _SHOWN.get(cell.kind, cell.kind)
    if cell.kind == "wrong":
        return f"**wrong** ({cell.detail})"
    if cell.kind == "ok" and cell.detail:
        return f"ok {cell.detail}"
    return f"{shown} [{notes.number(cell.detail)}]" if cell.detail else shown


def _summary(cells: Mapping[str, Cell], notes: Notes) -> str:
    labels_by_text: dict[str, list[str]] = {}
    for label, cell in cells.items():
        labels_by_text.setdefault(_cell(cell, notes), []).append(label)
    if len(labels_by_text) == 1:
        return next(iter(labels_by_text))
    return "; ".join(f"{', '.join(labels)}: {text}" for text, labels in labels_by_text.items())


def _count(cells: Mapping[str, Cell]) -> str:
    kinds = Counter(cell.kind for cell in cells.values())
    return ", ".join(
        f"{number} {_SHOWN.get(kind, kind)}" for kind, number in kinds.items() if kind != "not tested"
    )


def table(group: str, results: Mapping[str, list[Cell]]) -> str:
    """Markdown of the kernels of a group, a column each, with the notes below."""
    kernels = [kernel for kernel in KERNELS if kernel.group == group and kernel.name in results]
    notes = Notes()
    heads = ("", *(kernel.name for kernel in kernels))
    lines = [f"### {group}", "", common.head(*heads, left=heads)]
    for check in CHECKS:
        texts = []
        for kernel in kernels:
            found = zip(_VARIANTS, results[kernel.name], strict=True)
            cells = {label: cell for (other, label), cell in found if other is check}
            text = _count(cells) if check is CHECKS[-1] else _summary(cells, notes)
            if check.name in kernel.documented and text != "ok":
                text += f" (documented [{notes.number(kernel.documented[check.name])}])"
            texts.append(text)
        lines.append(common.row(check.name, *texts))
    lines += ["", *(f"{number}. {text}" for number, text in enumerate(notes.texts, 1))]
    return "\n".join(lines) + "\n"


def main() -> None:
    if run_as_worker(work):
        return
    parser = Parser(__doc__, json=None)
    parser.add("--only", "kernels whose name contains this", default="")
    parser.add("--limit", "seconds for one check of one kernel", number(1, 1e6), 240.0)
    args = parser.parse()
    chosen = [kernel for kernel in KERNELS if args.only in kernel.name]
    if not chosen:
        parser.error(
            f"no kernel has {args.only!r} in its name; there are {'; '.join(k.name for k in KERNELS)}"
        )
    results = {}
    for kernel in chosen:
        if why := kernel.missing():
            note(f"left out: {kernel.name}: {why}")
        else:
            results[kernel.name] = answers(kernel, args.limit)
    print(f"jax {jax.__version__}\n")
    for group in dict.fromkeys(kernel.group for kernel in chosen if kernel.name in results):
        print(table(group, results))
    cells = [
        {"kernel": name, "check": check.name, "variant": label, **dataclasses.asdict(cell)}
        for name, found in results.items()
        for (check, label), cell in zip(_VARIANTS, found, strict=True)
    ]
    common.write_json(args.json, {"cells": cells}, measured=False)


if __name__ == "__main__":
    main()
