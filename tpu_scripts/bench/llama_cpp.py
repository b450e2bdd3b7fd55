"""Tokens a second of one GGUF file on llama.cpp and on jaxpaged: same CPU, same number of threads, run by run in turns.

    python -m tpu_scripts.bench.llama_cpp -m model.gguf --llama-bench ../llama.cpp/build/bin/llama-bench
    python -m tpu_scripts.bench.llama_cpp -m model.gguf -b 1 -d 0 -p 128 -n 32 -r 3   # a quick look

Needs: the model's libraries (pip install -e ".[model]"), and llama.cpp built for CPUs: llama-bench, for more than one
sequence llama-batched-bench beside it; or, without --llama-bench, llama-cpp-python.

There are four rows: llama.cpp, llama.cpp with --kv-cache-paged (where its --help knows that flag), jaxpaged with a
contiguous cache, and jaxpaged with a paged one. In each repetition every row is measured once, and the order rotates
from repetition to repetition, so that a machine's changing speed hits all alike. Only one row computes at a time, each
in a process of its own: llama-bench and llama-batched-bench are started for each repetition; jaxpaged and
llama-cpp-python stay, have loaded and compiled before, and wait on a pipe. Loading and compiling are never timed.

What counts, for B sequences, a depth of D tokens, -p P and -n N; all sequences together:

  B = 1, as llama-bench -d D has it: the prompt is P tokens behind D others; generation is N steps behind D tokens.
  B > 1, as llama-batched-bench has it, which reads prompts into an empty cache only: the prompt is the D tokens of each
         sequence (P where D is 0); generation is N steps of all sequences behind D tokens each.

At depth 0 generation starts behind one token, as jaxpaged and llama-batched-bench must read something; llama-bench
starts behind none. llama.cpp's programs feed random tokens and choose none; jaxpaged runs the loop that its generate
runs, which also samples the likeliest token of every step, inside the time. Its depth is random keys and values, which
takes no forward pass and changes no time; a prompt is really read. Both read prompts 512 tokens a step (-ub 512).
Keys and values are each program's own default, float16 in llama.cpp and float32 here, unless --cache-type says one for
both. To warm up, llama-bench reads its prompt once and generates a token, llama-batched-bench reads 16 tokens, and the
processes that stay run each test once.

A cell is the median, and the least and most in brackets; ours also has its ratio to llama.cpp, the median of the ratios
of repetitions. Generating one token reads every weight once (of the embedding one row, unless it is the output too), so
the memory's bandwidth bounds one sequence's generation; it is measured before and after, by all cores.

Of the defaults, -b 8 -d 4000 takes nearly all the time: every row reads 32,000 tokens in each repetition.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxpaged_model.checkpoint.gguf_file import GGUFFile
from jaxpaged_model.checkpoint.loading import load_model, read_config
from jaxpaged_model.config import ModelConfig
from jaxpaged_model.metadata import ModelError

from jaxpaged.generation.stream import GenerateStream
from jaxpaged import generate_stream
from tpu_scripts.bench.llama_cpp_side import (
    CACHE_TYPES,
    LLAMA_CPP,
    LLAMA_CPP_PAGED,
    OnLlamaCpp,
    Programs,
    Unknown,
    batched_bench,
    last_line,
)
from tpu_scripts.bench.paged_attention import line
from tpu_scripts.bench.turns import Cell, Failure, measure
from tpu_scripts.common import (
    Bandwidth,
    Parser,
    add_json,
    check_writable,
    fill,
    free_memory,
    make_cache,
    median_ratio,
    natural,
    note,
    positive,
    positives,
    with_noise,
    write_json,
)

CONTIGUOUS, PAGED = "jaxpaged contiguous", "jaxpaged paged"
PAGE_SIZE = 32

SERVE = "--serve"
"""How this file is started as a child; not for people."""


# --- children that stay -------------------------------------------------------------------------------------


class Child:
    """A process that has loaded the model, and measures when it is asked to."""

    def __init__(self, name: str, model: Path, threads: int, cache_type: str | None) -> None:
        self.name = name
        self.about: dict[str, Any] = {}
        task = {"name": name, "model": str(model.resolve()), "threads": threads, "cache_type": cache_type}
        # Set before jax starts, and this file imports it. An exception's last line shall be the exception.
        own = {"PJRT_NPROC": str(threads), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
        own |= {"JAX_TRACEBACK_FILTERING": "off"}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tpu_scripts.bench.llama_cpp", SERVE, json.dumps(task)],
            cwd=Path(__file__).parents[2],
            env=os.environ | own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def load(self) -> None:
        self.about = self._ask({"do": "load"})

    def prepare(self, cell: Cell) -> str | None:
        self._ask({"do": "prepare", "cell": asdict(cell)})
        return None

    def measure(self, cell: Cell) -> dict[str, float]:
        return self._ask({"do": "measure", "cell": asdict(cell)})

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            status = self._process.wait()
            self._errors.seek(0)
            said = last_line(self._errors.read().decode(errors="replace"))
            raise Failure(f"{self.name} failed: {said or f'exit status {status}'}")
        return json.loads(answer)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def serve(task: Mapping[str, Any]) -> None:
    """The child: a line of JSON for each request, on what was stdout; whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model: OnJaxpaged | OnLlamaCpp | None = None
    for request in map(json.loads, sys.stdin):
        if request["do"] == "load":
            model = (OnLlamaCpp if task["name"] == LLAMA_CPP else OnJaxpaged)(task)
            answer: Any = model.about()
        else:
            assert model is not None
            answer = getattr(model, request["do"])(Cell(**request["cell"]))
        print(json.dumps(answer), file=answers, flush=True)


class OnJaxpaged:
    """What ``jaxpaged generate`` runs, on one kind of cache."""

    def __init__(self, task: Mapping[str, Any]) -> None:
        from jaxpaged.app.environment import prepare

        prepare(task["threads"])
        self._kind = "paged" if task["name"] == PAGED else "contiguous"
        self._dtype = task["cache_type"] or "f32"
        loaded = load_model(task["model"])
        self._config: ModelConfig = loaded.config
        self._params = jax.block_until_ready(loaded.params)
        self._model = loaded.function
        self._streams: dict[str, GenerateStream] = {}

    def about(self) -> dict[str, Any]:
        return {"cache_type": self._dtype, "page_size": PAGE_SIZE if self._kind == "paged" else None}

    def prepare(self, cell: Cell) -> None:
        """Compiles, and runs once."""
        self._streams = {}
        for test in cell.tokens:
            prompt = (np.arange(cell.read[1]) % min(250, self._config.vocab_size)).tolist()
            prompts, options = (
                ([prompt], {"max_new_tokens": 1})
                if test == "prompt"
                else (
                    [[1]],
                    {"max_new_tokens": cell.steps + 1, "every": cell.steps, "batch_size": cell.batch},
                )
            )
            cache = self._cache(cell, test)
            stream = generate_stream(self._model, self._params, cache, prompts * cell.batch, **options)
            stream.compile()
            stream.cache = None
            self._streams[test] = stream
        self.measure(cell)

    def measure(self, cell: Cell) -> dict[str, float]:
        seconds = {}
        for test, stream in self._streams.items():
            stream.cache = self._cache(cell, test)
            depth = cell.read[0] if test == "prompt" else cell.behind - 1  # a stream reads one token more
            if depth:
                depths = np.full(cell.batch, depth, np.int32)
                stream.cache, ok = fill(stream.cache, depths, cell.batch * depth)
                assert ok, "_cache made room"
            chunks = iter(stream)  # the first is the prompt
            if test == "generation":
                next(chunks)
            begin = time.perf_counter()
            next(chunks)
            seconds[test] = time.perf_counter() - begin
            stream.cache = None  # both tests' caches at once would take twice the memory
        return seconds

    def _cache(self, cell: Cell, test: str) -> Any:
        """Of random keys and values, with room for what the test needs and the token after it."""
        needed = sum(cell.read) if test == "prompt" else cell.behind + cell.steps
        context = -(-(needed + 1) // PAGE_SIZE) * PAGE_SIZE
        cache = make_cache(self._kind, self._config, cell.batch, context, PAGE_SIZE, self._dtype)
        return jax.block_until_ready(with_noise(cache))


# --- what is printed ----------------------------------------------------------------------------------------


def rates(row: Mapping[str, Any], test: str, side: str) -> list[float]:
    """Tokens a second of each repetition; none where the side was not measured."""
    return [row["tokens"][test] / s for s in row["seconds"][test].get(side, [])]


def shown(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:,.1f}"


def table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """A markdown row for each side, a column for each test of each batch and depth."""
    tests = [(row, test) for row in rows for test in row["seconds"]]
    heads = [Cell(**{k: row[k] for k in ("batch", "depth", "prompt", "steps")}).name(t) for row, t in tests]
    lines = [line(["t/s", *heads]), f"|---|{'---:|' * len(heads)}"]
    for name in names:
        reasons = dict.fromkeys(row["missing"][name] for row in rows if name in row["missing"])
        cells = [": ".join([name, *reasons])]
        for row, test in tests:
            own, other = rates(row, test, name), rates(row, test, LLAMA_CPP)
            text = f"{shown(statistics.median(own))} ({shown(min(own))}-{shown(max(own))})" if own else "-"
            if own and other and name in (CONTIGUOUS, PAGED):
                text += f" {median_ratio(own, other):.2f}x"
            cells.append(text)
        lines.append(line(cells))
    return lines


def bytes_of_a_token(file: GGUFFile) -> int:
    """Bytes of the weights that one step reads: all of them, but of an embedding that is not the output too one row."""
    unread = "token_embd.weight" if "output.weight" in file.tensors else None
    return sum(tensor.num_bytes for name, tensor in file.tensors.items() if name != unread)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (row.partition(":")[2].strip() for row in lines if row.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


def build_name(about: Mapping[str, Any]) -> str:
    """What llama.cpp says of itself: a number, where it was built from a clone with its history."""
    if "version" in about:
        return f"llama.cpp of llama-cpp-python {about['version']}"
    number, commit = about.get("build_number"), about.get("build_commit")
    return f"llama.cpp build {number} ({commit})" if number else "llama.cpp of unknown build"


def reading() -> list[float]:
    """The memory's bandwidth, bytes a second, seven times."""
    memory = Bandwidth(free_memory())
    return [memory.read() for _ in range(7)]


def bound_line(bandwidth: Sequence[float], bytes_read: int, cores: int) -> str:
    rate = statistics.median(bandwidth)
    return (
        f"memory: {rate / 1e9:.1f} GB/s read by {cores} cores ({min(bandwidth) / 1e9:.1f}-{max(bandwidth) / 1e9:.1f}); "
        f"a token reads {bytes_read / 1e6:,.1f} MB of weights: at most {shown(rate / bytes_read)} t/s in one sequence"
    )


class Progress:
    """Where a run is, on stderr: one line that is overwritten, on a terminal; else a line for each cell."""

    def __init__(self, cells: int) -> None:
        self._cells = cells
        self._cell = ""

    def start(self, number: int, cell: Cell) -> None:
        self._cell = f"{number} of {self._cells}: batch {cell.batch}, depth {cell.depth:,}"
        if not sys.stderr.isatty():
            note(self._cell)

    def __call__(self, what: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{self._cell}: {what}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


# --- the command --------------------------------------------------------------------------------------------


def depths(text: str) -> list[int]:
    """A list like "0,4000"."""
    return [natural(part) for part in text.split(",")]


def arguments_of(parser: Parser) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("-m", "--model", type=Path, required=True, metavar="FILE", help="a GGUF file")
    parser.add_argument(
        "--llama-bench", metavar="PATH", help="llama.cpp's program (default: llama-cpp-python)"
    )
    parser.add_argument("--only-ours", action="store_true", help="measure jaxpaged alone")
    parser.add_argument(
        "-t", "--threads", type=positive, default=cores, help=f"of every row (default: all, {cores})"
    )
    parser.add_argument(
        "-p", "--prompt", type=natural, default=712, help="tokens of a prompt; 0 = do not measure (default: 712)"
    )  # fmt: skip
    parser.add_argument(
        "-n", "--steps", type=natural, default=100,
        help="tokens that each sequence generates; 0 = do not measure (default: 100)",
    )  # fmt: skip
    parser.add_argument("-b", "--batch", type=positives, default=[1, 8], help="sequences (default: 1,8)")
    parser.add_argument(
        "-d", "--depth", type=depths, default=[0, 4000],
        help="tokens that lie in each sequence before (default: 0,4000)",
    )  # fmt: skip
    parser.add_argument("-r", "--repeat", type=positive, default=5, help="repetitions (default: 5)")
    parser.add_argument(
        "--cache-type", choices=CACHE_TYPES, help="of keys and values, in every row (default: each its own)"
    )
    add_json(parser)
    return parser.parse_args()


def check(parser: Parser, args: argparse.Namespace) -> tuple[list[Cell], int]:
    """What is to be measured, and the bytes of weights that a token reads; bad input ends the program."""
    if not args.prompt and not args.steps:
        parser.error("nothing to measure: -p and -n are both 0")
    if not args.model.is_file():
        parser.error(f"-m {args.model}: no such file")
    check_writable(parser, args.json)
    if args.only_ours and args.llama_bench:
        parser.error("--only-ours measures no llama.cpp, and --llama-bench names one; give one of them")
    try:
        config = read_config(args.model)
        bytes_read = bytes_of_a_token(GGUFFile(args.model))
    except ModelError as error:
        parser.error(str(error))
    cells = [Cell(batch, depth, args.prompt, args.steps) for batch in args.batch for depth in args.depth]
    longest = max(cell.longest for cell in cells)
    if longest > config.context_length:
        parser.error(
            f"-p, -n and -d ask for {longest:,} tokens in a sequence; the model's context has "
            f"{config.context_length:,}"
        )
    return cells, bytes_read


def their_sides(parser: Parser, args: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """llama.cpp's two rows and what it says of itself; ends the program where there is no llama.cpp."""
    if args.llama_bench is None:
        if importlib.util.find_spec("llama_cpp") is None:
            parser.error(
                "no llama.cpp to compare with: name its program with --llama-bench, or pip install llama-cpp-python; "
                "--only-ours measures jaxpaged alone"
            )
        child = Child(LLAMA_CPP, args.model, args.threads, args.cache_type)
        return [child, Unknown()], {}
    found = shutil.which(args.llama_bench)
    if found is None:
        parser.error(f"--llama-bench {args.llama_bench}: no such program")
    program = Path(found)
    if max(args.batch) > 1 and not batched_bench(program).is_file():
        parser.error(f"-b {max(args.batch)} needs {batched_bench(program).name} beside {program}")
    options = program, args.model, args.threads, args.cache_type
    plain, paged = (
        Programs(name, *options, name == LLAMA_CPP_PAGED) for name in (LLAMA_CPP, LLAMA_CPP_PAGED)
    )
    return [plain, paged], plain.probe()


def run(parser: Parser, args: argparse.Namespace) -> None:
    """Measures and prints.

    Raises:
      Failure: a side cannot be measured.
    """
    cells, bytes_read = check(parser, args)
    jax.config.update("jax_platforms", "cpu")  # of the bandwidth; a GPU in this machine has no part in this
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ExitStack() as stack:
        theirs, about = ([], {}) if args.only_ours else their_sides(parser, args)
        ours = [Child(name, args.model, args.threads, args.cache_type) for name in (CONTIGUOUS, PAGED)]
        sides = [*theirs, *ours]
        children = [side for side in sides if isinstance(side, Child)]
        for child in children:
            stack.callback(child.close)
        for child in children:
            child.load()
        about = about or (theirs[0].about if theirs else {})
        versions = [version("jax"), version("numba"), *([build_name(about)] if theirs else [])]
        names = [side.name for side in sides]
        values = {
            "model": args.model.name,
            "cpu": cpu_name(),
            "cores": cores,
            "threads": args.threads,
            "versions": versions,
            "llama_cpp": about,
            "cache_type": args.cache_type,
            "bytes_read_of_a_token": bytes_read,
            "sides": names,
        }
        bandwidth = reading()
        rows: list[dict[str, Any]] = []
        progress = Progress(len(cells))
        for number, cell in enumerate(cells, 1):
            progress.start(number, cell)
            try:
                rows.append(measure(sides, cell, args.repeat, progress))
            finally:
                progress.clear()
            # After every cell: what an interrupted run has measured is not lost.
            write_json(args.json, values | {"bandwidth": bandwidth, "rows": rows})
        bandwidth += reading()
    write_json(args.json, values | {"bandwidth": bandwidth, "rows": rows})
    cache_type = args.cache_type or ("f32" if args.only_ours else "f16 there, f32 here")
    print(f"{args.model.name}; {cpu_name()}, {cores} cores, {args.threads} threads; {', '.join(versions)}")
    print(
        f"tokens a second, all sequences together: median (least-most) of {args.repeat} repetitions in turns"
        f"{'' if args.only_ours else f', x = times {LLAMA_CPP}'}; keys and values {cache_type}"
    )
    print(bound_line(bandwidth, bytes_read, cores), end="\n\n")
    print("\n".join(table(rows, names)))


def main() -> None:
    if sys.argv[1:2] == [SERVE]:
        serve(json.loads(sys.argv[2]))
        return
    parser = Parser(__doc__)
    args = arguments_of(parser)
    try:
        run(parser, args)
    except Failure as failure:
        parser.error(str(failure))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")


if __name__ == "__main__":
    main()
