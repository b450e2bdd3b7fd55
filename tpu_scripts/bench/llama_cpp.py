"""Tokens per second of one GGUF file on llama.cpp and on jaxpaged, on the same CPU with the same number of threads.

    python -m tpu_scripts.bench.llama_cpp -m model.gguf --llama-bench ../llama.cpp/build/bin/llama-bench
    python -m tpu_scripts.bench.llama_cpp -m model.gguf -b 1 -d 0 -p 128 -n 32 -r 3   # a quick look

Needs: the model's libraries (pip install -e ".[model]"), and llama.cpp built for CPUs: llama-bench, for more than one
sequence llama-batched-bench beside it; or, without --llama-bench, llama-cpp-python.

There are four rows: llama.cpp, llama.cpp with --kv-cache-paged (if its --help has that flag), jaxpaged with a
contiguous cache, and jaxpaged with a paged one. In each repetition every row is measured once, and the order rotates
from repetition to repetition, so that a machine's changing speed affects all alike. Only one row computes at a time,
each in a process of its own: llama-bench and llama-batched-bench are started for each repetition; jaxpaged and
llama-cpp-python stay, have loaded and compiled before, and wait on a pipe. Loading and compiling are never timed.

The tests, for B sequences, a depth of D tokens, -p P and -n N; all sequences together:

  B = 1, as llama-bench -d D has it: the prompt is P tokens behind D others; generation is N steps behind D tokens.
  B > 1, as llama-batched-bench has it, which prefills an empty cache only: the prompt is the D tokens of each sequence
         (P where D is 0); generation is N steps of all sequences behind D tokens each.

At depth 0 generation starts behind one token, which jaxpaged and llama-batched-bench need; llama-bench starts behind
none. llama.cpp's programs feed random tokens and sample none; jaxpaged runs the loop inside its ``generate``, which
also samples the likeliest token of every step, inside the time. Its depth is random keys and values, which takes no
forward pass and does not change the time; a prompt is really prefilled. Both prefill 512 tokens a step (-ub 512). Keys
and values are each program's own default, float16 in llama.cpp and float32 here, unless --cache-type sets one for
both. To warm up, llama-bench prefills its prompt once and generates a token, llama-batched-bench prefills 16 tokens,
and the processes that stay run each test once.

A cell is the median, with minimum and maximum in brackets; ours also has its ratio to llama.cpp, the median of the
ratios of repetitions. Generating one token reads every weight once (of the embedding one row, unless it is the output
too), so the memory bandwidth bounds one sequence's generation; it is measured before and after, by all cores.

With the defaults, -b 8 -d 4000 takes nearly all the time: every row prefills 32,000 tokens in each repetition.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
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

from jaxpaged import generate_stream
from tpu_scripts import common
from tpu_scripts.bench.llama_cpp_side import (
    CACHE_TYPES,
    LLAMA_CPP,
    LLAMA_CPP_PAGED,
    Cell,
    Failure,
    OnLlamaCpp,
    Programs,
    Unknown,
    batched_bench,
    measure,
)
from tpu_scripts.bench.memory import Bandwidth, free_memory, num_cores
from tpu_scripts.bench.models import fill, make_cache, prompts_of, with_noise
from tpu_scripts.common import Parser, each, natural, note, positive, progress
from tpu_scripts.workers import Worker, WorkerFailed, run_as_worker

CONTIGUOUS, PAGED = "jaxpaged contiguous", "jaxpaged paged"
PAGE_SIZE = 32

# --- workers ------------------------------------------------------------------------------------------------


class Child:
    """A side in a worker that has loaded the model."""

    def __init__(self, name: str, model: Path, threads: int, cache_type: str | None) -> None:
        self.name = name
        self.about: dict[str, Any] = {}
        task = {"name": name, "model": str(model.resolve()), "threads": threads, "cache_type": cache_type}
        environment = {"PJRT_NPROC": str(threads), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
        self.worker = Worker("tpu_scripts.bench.llama_cpp", {"task": task}, environment)

    def load(self) -> None:
        self.about = self._ask("about")

    def prepare(self, cell: Cell) -> str | None:
        self._ask("prepare", cell=asdict(cell))
        return None

    def measure(self, cell: Cell) -> dict[str, float]:
        return self._ask("measure", cell=asdict(cell))

    def _ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        try:
            return self.worker.ask({"do": do, **arguments})
        except WorkerFailed as reason:
            raise Failure(f"{self.name} failed: {reason}") from None


def work(task: Mapping[str, Any]) -> Iterator[Any]:
    """Loads a model in a worker, and answers each request from stdin."""
    model = (OnLlamaCpp if task["name"] == LLAMA_CPP else OnJaxpaged)(task)
    for request in map(json.loads, sys.stdin):
        arguments = [Cell(**request["cell"])] if "cell" in request else []
        yield getattr(model, request["do"])(*arguments)


class OnJaxpaged:
    """The loop of ``jaxpaged generate``, on one kind of cache."""

    def __init__(self, task: Mapping[str, Any]) -> None:
        from jaxpaged.app.environment import prepare

        prepare(task["threads"])
        self._kind = "paged" if task["name"] == PAGED else "contiguous"
        self._dtype = task["cache_type"] or "f32"
        loaded = load_model(task["model"])
        self._config: ModelConfig = loaded.config
        self._params = jax.block_until_ready(loaded.params)
        self._model = loaded.function
        self._streams: dict[str, Any] = {}

    def about(self) -> dict[str, Any]:
        return {"cache_type": self._dtype, "page_size": PAGE_SIZE if self._kind == "paged" else None}

    def prepare(self, cell: Cell) -> None:
        """Compiles the cell's tests, and runs them once."""
        self._streams = {}
        for test in cell.tokens:
            if test == "prompt":
                prompts = prompts_of(self._config, cell.batch, cell.read[1])
                options = {"max_new_tokens": 1}
            else:
                prompts = [[1]] * cell.batch
                options = {"max_new_tokens": cell.steps + 1, "every": cell.steps, "batch_size": cell.batch}
            cache = self._cache(cell, test)
            stream = generate_stream(self._model, self._params, cache, prompts, **options)
            stream.compile()
            stream.cache = None
            self._streams[test] = stream
        self.measure(cell)

    def measure(self, cell: Cell) -> dict[str, float]:
        seconds = {}
        for test, stream in self._streams.items():
            stream.cache = self._cache(cell, test)
            depth = cell.read[0] if test == "prompt" else cell.behind - 1  # a stream prefills one token more
            if depth:
                depths = np.full(cell.batch, depth, np.int32)
                stream.cache, ok = fill(stream.cache, depths, cell.batch * depth)
                assert ok, "_cache is large enough"
            chunks = iter(stream)  # the first is the prompt
            if test == "generation":
                next(chunks)
            begin = time.perf_counter()
            next(chunks)
            seconds[test] = time.perf_counter() - begin
            stream.cache = None  # one cache at a time
        return seconds

    def _cache(self, cell: Cell, test: str) -> Any:
        """Cache of random keys and values, large enough for the test and the token after it."""
        needed = sum(cell.read) if test == "prompt" else cell.behind + cell.steps
        cache = make_cache(self._kind, self._config, cell.batch, needed + 1, PAGE_SIZE, self._dtype)
        return jax.block_until_ready(with_noise(cache))


# --- output ------------------------------------------------------------------------------------------------


def rates(row: Mapping[str, Any], test: str, side: str) -> list[float]:
    """Tokens per second of each repetition; empty if the side was not measured."""
    return [row["tokens"][test] / s for s in row["seconds"][test].get(side, [])]


def shown(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:,.1f}"


def table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Lines of a Markdown table: a row per side, a column per test of each batch and depth."""
    tests = [(row, test) for row in rows for test in row["seconds"]]
    heads = [Cell(**{k: row[k] for k in ("batch", "depth", "prompt", "steps")}).name(t) for row, t in tests]
    lines = common.head("t/s", *heads).splitlines()
    for name in names:
        reasons = dict.fromkeys(row["missing"][name] for row in rows if name in row["missing"])
        cells = [": ".join([name, *reasons])]
        for row, test in tests:
            own, other = rates(row, test, name), rates(row, test, LLAMA_CPP)
            text = f"{shown(statistics.median(own))} ({shown(min(own))}-{shown(max(own))})" if own else "-"
            if own and other and name in (CONTIGUOUS, PAGED):
                text += f" {common.median_ratio(own, other):.2f}x"
            cells.append(text)
        lines.append(common.row(*cells))
    return lines


def bytes_of_a_token(file: GGUFFile) -> int:
    """Bytes of weights that one step reads: all, except an embedding that is not also the output."""
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
    """Name of llama.cpp's build; with a number if it was built from a clone with its history."""
    if "version" in about:
        return f"llama.cpp of llama-cpp-python {about['version']}"
    number, commit = about.get("build_number"), about.get("build_commit")
    return f"llama.cpp build {number} ({commit})" if number else "llama.cpp of unknown build"


def read_bandwidth() -> list[float]:
    """Seven measurements of the memory bandwidth, bytes per second."""
    memory = Bandwidth(free_memory())
    return [memory.read() for _ in range(7)]


def bound_line(bandwidth: Sequence[float], bytes_read: int, cores: int) -> str:
    rate = statistics.median(bandwidth)
    return (
        f"memory: {rate / 1e9:.1f} GB/s read by {cores} cores ({min(bandwidth) / 1e9:.1f}-{max(bandwidth) / 1e9:.1f}); "
        f"a token reads {bytes_read / 1e6:,.1f} MB of weights: at most {shown(rate / bytes_read)} t/s in one sequence"
    )


# --- the command --------------------------------------------------------------------------------------------


def check(parser: Parser, args: argparse.Namespace) -> tuple[list[Cell], int]:
    """Returns what to measure, and the bytes of weights that a token reads; bad input ends the program."""
    if not args.prompt and not args.steps:
        parser.error("nothing to measure: -p and -n are both 0")
    if not args.model.is_file():
        parser.error(f"-m {args.model}: no such file")
    if args.only_ours and args.llama_bench:
        parser.error("--only-ours measures no llama.cpp, and --llama-bench names one; give one of them")
    try:
        config = read_config(args.model)
        bytes_read = bytes_of_a_token(GGUFFile(args.model))
    except ModelError as error:
        parser.error(str(error))
    cells = [Cell(batch, depth, args.prompt, args.steps) for batch in args.batch for depth in args.depth]
    longest, most = max(cell.longest for cell in cells), config.context_length
    if longest > most:
        parser.error(f"-p, -n and -d need {longest:,} tokens per sequence; the model's context has {most:,}")
    return cells, bytes_read


def their_sides(parser: Parser, args: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """llama.cpp's two rows and its description of itself; ends the program if there is no llama.cpp."""
    if args.llama_bench is None:
        if importlib.util.find_spec("llama_cpp") is None:
            parser.error(
                "no llama.cpp to compare with: name its program with --llama-bench, or pip install llama-cpp-python; "
                "--only-ours measures jaxpaged alone"
            )
        return [Child(LLAMA_CPP, args.model, args.threads, args.cache_type), Unknown()], {}
    found = shutil.which(args.llama_bench)
    if found is None:
        parser.error(f"--llama-bench {args.llama_bench}: no such program")
    program = Path(found)
    if max(args.batch) > 1 and not batched_bench(program).is_file():
        parser.error(f"-b {max(args.batch)} needs {batched_bench(program).name} beside {program}")
    options = program, args.model, args.threads, args.cache_type
    sides = [Programs(name, *options, name == LLAMA_CPP_PAGED) for name in (LLAMA_CPP, LLAMA_CPP_PAGED)]
    return sides, sides[0].probe()


def run(parser: Parser, args: argparse.Namespace) -> None:
    """Measures and prints.

    Raises:
      Failure: a side cannot be measured.
    """
    cells, bytes_read = check(parser, args)
    jax.config.update("jax_platforms", "cpu")  # for the bandwidth; a GPU in this machine plays no part
    cores = num_cores()
    with ExitStack() as stack:
        theirs, about = ([], {}) if args.only_ours else their_sides(parser, args)
        ours = [Child(name, args.model, args.threads, args.cache_type) for name in (CONTIGUOUS, PAGED)]
        sides = [*theirs, *ours]
        children = [side for side in sides if isinstance(side, Child)]
        for child in children:
            stack.enter_context(child.worker)
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
        bandwidth = read_bandwidth()
        rows: list[dict[str, Any]] = []
        for number, cell in enumerate(cells, 1):
            at = f"{number} of {len(cells)}: batch {cell.batch}, depth {cell.depth:,}"
            if not sys.stderr.isatty():
                note(at)
            try:
                rows.append(measure(sides, cell, args.repeat, lambda text, at=at: progress(f"{at}: {text}")))
            finally:
                progress("")
            # After every cell, so that an interrupted run keeps its measurements.
            common.write_json(args.json, values | {"bandwidth": bandwidth, "rows": rows})
        bandwidth += read_bandwidth()
    common.write_json(args.json, values | {"bandwidth": bandwidth, "rows": rows})
    cache_type = args.cache_type or ("f32" if args.only_ours else "f16 there, f32 here")
    ratio = "" if args.only_ours else f", x = times {LLAMA_CPP}"
    print(f"{args.model.name}; {cpu_name()}, {cores} cores, {args.threads} threads; {', '.join(versions)}")
    print(
        f"tokens per second, all sequences together: median (minimum-maximum) of {args.repeat} repetitions in turns"
        f"{ratio}; keys and values {cache_type}"
    )
    print(bound_line(bandwidth, bytes_read, cores), end="\n\n")
    print("\n".join(table(rows, names)))


def main() -> None:
    if run_as_worker(work):
        return
    parser = Parser(__doc__, batch=[1, 8], repeat=5, json=None)
    parser.add("-m --model", "GGUF file", Path, required=True)
    parser.add("--llama-bench", "llama.cpp's program (default: llama-cpp-python)")
    parser.flag("--only-ours", "measure jaxpaged alone")
    parser.add("-t --threads", "threads of every row", positive, num_cores())
    parser.add("-p --prompt", "tokens of a prompt; 0: skip", natural, 712)
    parser.add("-n --steps", "tokens that each sequence generates; 0: skip", natural, 100)
    parser.add("-d --depth", "tokens in each sequence before", each(natural), [0, 4000])
    parser.add(
        "--cache-type", "of keys and values, in every row (default: each its own)", choices=CACHE_TYPES
    )
    args = parser.parse()
    try:
        run(parser, args)
    except Failure as failure:
        parser.error(str(failure))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")


if __name__ == "__main__":
    main()
