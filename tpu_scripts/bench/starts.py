"""Time to the first token of ``jaxpaged generate``: on a new machine, with a new request, and warm; by depth.

    python -m tpu_scripts.bench.starts
    python -m tpu_scripts.bench.starts -m model.gguf

Needs: pip install -e ".[model]".

Every run is a process of its own. "cold" begins with an empty cache folder: kernels and programs are compiled. "new
request" runs differ from the cold one in prompt, -n or temperature, and show the slowest; they should compile nothing.
"warm" repeats the cold run. Without -m, files of random weights in the shape of SmolLM2-135M with each number of
layers are written to a temporary folder first (Q8_0). With -v, each run prints what its start was spent on.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tpu_scripts import common
from tpu_scripts.bench.models import SMOLLM2_135M, write_random_model
from tpu_scripts.common import Parser, each, positive

_WORDS = ["The", "capital", "of", "France", "is", "a", "city", "on", "the", "river", "that"]
COLD: tuple[Any, ...] = (5, "-n", "60", "--temp", "0")
REQUESTS: tuple[tuple[Any, ...], ...] = (
    (42, "-n", "60", "--temp", "0"),
    (5, "-n", "100", "--temp", "0"),
    (5, "-n", "60", "--temp", "0.8"),
    (300, "-n", "20", "--temp", "0.8"),
    (1200, "-n", "1", "--temp", "0"),
    (1, "-n", "7", "--temp", "1.2"),
)
"""Words of the prompt, and flags."""


@dataclass(frozen=True)
class Start:
    """Seconds of a start, as ``jaxpaged generate -v`` prints them."""

    first_token: float
    programs: float
    compiled: bool
    peak_mib: int
    """Peak memory of the process."""


def run(model: Path, cache: Path, words: int, *flags: str, verbose: bool) -> Start:
    """Runs ``jaxpaged generate`` once."""
    prompt = " ".join(_WORDS[i % len(_WORDS)] for i in range(words))
    command = [sys.executable, "-m", "jaxpaged.app.cli", "generate", "-m", str(model), "-no-cnv", "-v"]
    command += ["--ignore-eos", "-p", prompt, *flags]
    environment = os.environ | {"JAXPAGED_CACHE": str(cache)}
    pipes: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stderr is not None
        log = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"jaxpaged generate ended with {process.returncode}: {log.strip()}")
    if verbose:
        common.note(f"{words} words, {' '.join(flags)}\n{log}")
    first, programs = (re.search(rf"{name} = +([\d.]+) s(?:: (\w+))?", log) for name in ("start", "programs"))
    assert first is not None
    assert programs is not None
    return Start(float(first[1]), float(programs[1]), programs[2] == "compiled", usage.ru_maxrss // 1024)


def measure(model: Path, repeat: int, verbose: bool) -> dict[str, Any]:
    """Starts of one model; seconds."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        cold = run(model, cache, *COLD, verbose=verbose)
        requests = [run(model, cache, *request, verbose=verbose) for request in REQUESTS]
        warm = [run(model, cache, *COLD, verbose=verbose) for _ in range(repeat)]
    slowest = max(requests, key=lambda one: one.first_token)
    return {
        "cold": cold.first_token,
        "cold_programs": cold.programs,
        "request": slowest.first_token,
        "requests_compiled": sum(one.compiled for one in requests),
        "warm": statistics.median(one.first_token for one in warm),
        "warm_programs": statistics.median(one.programs for one in warm),
        "peak_mib": max(one.peak_mib for one in warm),
    }


def main() -> None:
    parser = Parser(__doc__, model_file=None, repeat=3, json=None)
    parser.add("--layers", "layers of models of random weights", each(positive), [2, 30, 64])
    parser.flag("-v --verbose", "print what each run says of its start")
    args = parser.parse()
    names = (
        "cold, s",
        "of it programs, s",
        "new request, s",
        "compiled",
        "warm, s",
        "of it programs, s",
        "peak, MiB",
    )
    print(common.head("model", *names), flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        models = {args.model.name: args.model} if args.model else {}
        for layers in () if args.model else args.layers:
            models[f"{layers} layers"] = Path(folder, f"{layers}.gguf")
            # Elsewhere: the peak of a process begins at the memory of the one that starts it.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                config = replace(SMOLLM2_135M, num_layers=layers)
                pool.submit(write_random_model, models[f"{layers} layers"], config).result()
        for name, path in models.items():
            found = measure(path, args.repeat, args.verbose)
            rows.append({"model": name, **found})
            values = [f"{x:.2f}" if isinstance(x, float) else f"{x}" for x in found.values()]
            values[3] += f" of {len(REQUESTS)}"
            print(common.row(name, *values), flush=True)
    common.write_json(args.json, {"rows": rows})


if __name__ == "__main__":
    main()
