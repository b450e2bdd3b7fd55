"""Tokens a second of one GGUF file on llama.cpp and on jaxpaged: same CPU, same number of threads, run by run in turns.

    python -m tpu_scripts.bench_against_llama_cpp -m model.gguf --llama-bench ../llama.cpp/build/bin/llama-bench
    python -m tpu_scripts.bench_against_llama_cpp -m model.gguf -b 1 -d 0 -p 128 -n 32 -r 3   # a quick look

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
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxpaged import GenerateStream, generate_stream
from model.config import ModelConfig, ModelError
from model.gguf_file import GGUFFile
from model.loading import load_model, read_config
from tpu_scripts.bench_paged_attention import line
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

LLAMA_CPP, LLAMA_CPP_PAGED = "llama.cpp", "llama.cpp paged"
CONTIGUOUS, PAGED = "jaxpaged contiguous", "jaxpaged paged"
PAGED_FLAG = "--kv-cache-paged"
PAGE_SIZE = 32
CACHE_TYPES = {"f32": 0, "f16": 1, "bf16": 30}
"""Those that all rows know, with their numbers in ggml."""

SERVE = "--serve"
"""How this file is started as a child; not for people."""


class Failure(Exception):
    """A program that cannot be measured; one line."""


# --- what is measured ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One batch and depth: two tests, or one where ``prompt`` or ``steps`` is 0."""

    batch: int
    depth: int
    prompt: int
    steps: int

    @property
    def read(self) -> tuple[int, int]:
        """Of the prompt's test: tokens that lie in each sequence already, and tokens that are read into it."""
        return (self.depth, self.prompt) if self.batch == 1 else (0, self.depth or self.prompt)

    @property
    def behind(self) -> int:
        """Tokens that lie in each sequence when generation starts."""
        return max(self.depth, 1)

    @property
    def longest(self) -> int:
        """The tokens that a sequence must have room for."""
        prompt = sum(self.read) if self.prompt else 0
        return max(prompt, self.behind + self.steps if self.steps else 0)

    @property
    def tokens(self) -> dict[str, int]:
        """Tests, and the tokens that each computes in all sequences."""
        found = {"prompt": self.batch * self.read[1] if self.prompt else 0}
        found["generation"] = self.batch * self.steps
        return {test: count for test, count in found.items() if count}

    def name(self, test: str) -> str:
        """As llama-bench would call it, such as "pp712 @ d4000"; "8 x pp4000" for eight sequences."""
        start, count = self.read
        text, depth = (f"pp{count}", start) if test == "prompt" else (f"tg{self.steps}", self.depth)
        text += f" @ d{depth}" if depth else ""
        return text if self.batch == 1 else f"{self.batch} x {text}"


def turns(count: int, repeat: int) -> list[list[int]]:
    """The order of ``count`` rows in each repetition: each starts one further, so that none always follows another's
    heat."""
    return [[(turn + i) % count for i in range(count)] for turn in range(repeat)]


class Side(Protocol):
    """A row of the table."""

    name: str

    def prepare(self, cell: Cell) -> str | None:
        """What is done once before a cell's repetitions; why the cell cannot be measured, or None."""

    def measure(self, cell: Cell) -> dict[str, float]:
        """One repetition: seconds of each of the cell's tests."""


def measure(
    sides: Sequence[Side], cell: Cell, repeat: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """One batch and depth: seconds of each test by row, and why a row has none."""
    missing: dict[str, str] = {}
    for side in sides:
        progress(f"{side.name}, getting ready")
        if reason := side.prepare(cell):
            missing[side.name] = reason
    served = [side for side in sides if side.name not in missing]
    seconds: dict[str, dict[str, list[float]]] = {
        test: {side.name: [] for side in served} for test in cell.tokens
    }
    for turn, order in enumerate(turns(len(served), repeat), 1):
        for side in (served[i] for i in order):
            progress(f"{turn} of {repeat}, {side.name}")
            found = side.measure(cell)
            for test, by_side in seconds.items():
                by_side[side.name].append(found[test])
    return {**asdict(cell), "tokens": cell.tokens, "seconds": seconds, "missing": missing}


# --- llama.cpp's programs -----------------------------------------------------------------------------------


def run_program(arguments: Sequence[Any]) -> str:
    """What a program prints on stdout.

    Raises:
      Failure: it does not start, or fails; with the last line it wrote to stderr.
    """
    name = Path(arguments[0]).name
    try:
        done = subprocess.run(
            [str(a) for a in arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise Failure(f"{arguments[0]} does not start: {error.strerror or error}") from None
    if done.returncode:
        raise Failure(f"{name} failed: {last_line(done.stderr) or f'exit status {done.returncode}'}")
    return done.stdout


def last_line(text: str) -> str:
    return next((row.strip() for row in reversed(text.splitlines()) if row.strip()), "")


def knows_paged(program: Path) -> bool:
    """Whether ``--help`` tells of ``--kv-cache-paged``; some builds end their help with a status other than 0."""
    try:
        done = subprocess.run(
            [program, "--help"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise Failure(f"{program} does not start: {error.strerror or error}") from None
    return PAGED_FLAG in done.stdout + done.stderr


def read_llama_bench(text: str) -> list[dict[str, Any]]:
    """The tests in what ``llama-bench -o json`` prints.

    Raises:
      Failure: it is something else.
    """
    try:
        rows = json.loads(text)
        for row in rows:
            _ = row["n_prompt"] + row["n_gen"] + row["samples_ns"][0]
        _ = rows[0]
    except (ValueError, TypeError, LookupError):
        raise Failure(f"llama-bench printed no tests: {last_line(text)[:80]!r}") from None
    return rows


def read_batched_bench(text: str) -> dict[str, Any]:
    """The one test in what ``llama-batched-bench --output-format jsonl`` prints.

    Raises:
      Failure: it is something else.
    """
    try:
        (row,) = (json.loads(row) for row in text.splitlines() if row.startswith("{"))
        _ = row["t_pp"] + row["t_tg"]
    except (ValueError, TypeError, LookupError):
        raise Failure(f"llama-batched-bench printed no test: {last_line(text)[:80]!r}") from None
    return row


class Programs:
    """llama-bench for one sequence, llama-batched-bench for more; a process for each repetition."""

    def __init__(
        self, name: str, llama_bench: Path, model: Path, threads: int, cache_type: str | None, paged: bool
    ) -> None:
        self.name = name
        self._bench = llama_bench
        self._batched = batched_bench(llama_bench)
        self._common: list[Any] = ["-m", model, "-t", threads, "-ngl", 0]
        if cache_type:
            self._common += ["-ctk", cache_type, "-ctv", cache_type]
        self._paged = paged
        self._unknown: dict[Path, bool] = {}

    def prepare(self, cell: Cell) -> str | None:
        program = self._bench if cell.batch == 1 else self._batched
        if not self._paged:
            return None
        if program not in self._unknown:
            self._unknown[program] = not knows_paged(program)
        return "not known to this build" if self._unknown[program] else None

    def probe(self) -> dict[str, Any]:
        """One token: what llama-bench says of itself; it fails now where it would fail later."""
        arguments = [self._bench, *self._common, "-p", 1, "-n", 0, "-r", 1, "-o", "json"]
        return read_llama_bench(run_program(arguments))[0]

    def measure(self, cell: Cell) -> dict[str, float]:
        return self._measure_one(cell) if cell.batch == 1 else self._measure_many(cell)

    def _flag(self) -> list[str]:
        return [PAGED_FLAG] if self._paged else []

    def _measure_one(self, cell: Cell) -> dict[str, float]:
        sizes = ["-p", cell.prompt, "-n", cell.steps, "-d", cell.depth, "-r", 1, "-o", "json"]
        rows = read_llama_bench(run_program([self._bench, *self._common, *self._flag(), *sizes]))
        found = {"prompt" if row["n_prompt"] else "generation": row["samples_ns"][0] / 1e9 for row in rows}
        if missing := cell.tokens.keys() - found:
            raise Failure(f"llama-bench measured no {' and no '.join(sorted(missing))}")
        return found

    def _measure_many(self, cell: Cell) -> dict[str, float]:
        if cell.depth:  # what is read as the prompt is what generation needs
            row = self._batched_bench(cell.batch, cell.depth, cell.steps or 1)
            return {"prompt": row["t_pp"], "generation": row["t_tg"]}
        found = {}
        if cell.prompt:
            found["prompt"] = self._batched_bench(cell.batch, cell.prompt, 1)["t_pp"]
        if cell.steps:
            found["generation"] = self._batched_bench(cell.batch, cell.behind, cell.steps)["t_tg"]
        return found

    def _batched_bench(self, batch: int, prompt: int, steps: int) -> dict[str, Any]:
        context = batch * -(-(prompt + steps) // 256) * 256  # of a sequence, llama.cpp rounds up to 256
        sizes = ["-c", context, "-npp", prompt, "-ntg", steps, "-npl", batch, "--output-format", "jsonl"]
        return read_batched_bench(run_program([self._batched, *self._common, *self._flag(), *sizes]))


def batched_bench(llama_bench: Path) -> Path:
    """llama-batched-bench, beside llama-bench."""
    return llama_bench.with_name(f"llama-batched-bench{llama_bench.suffix}")


class Unknown:
    """llama.cpp's paged cache, where llama-cpp-python stands for llama.cpp: its bindings have no switch for it."""

    name = LLAMA_CPP_PAGED

    def prepare(self, cell: Cell) -> str | None:
        return "not known to this build"

    def measure(self, cell: Cell) -> dict[str, float]:
        raise AssertionError("never asked for")


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
            [sys.executable, "-m", "tpu_scripts.bench_against_llama_cpp", SERVE, json.dumps(task)],
            cwd=Path(__file__).parent.parent,
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


class OnLlamaCpp:
    """llama.cpp by the functions of its library, as llama-cpp-python has them; timed as its own programs are."""

    def __init__(self, task: Mapping[str, Any]) -> None:
        import llama_cpp

        self._lib = lib = llama_cpp
        self._threads = task["threads"]
        self._type = CACHE_TYPES[task["cache_type"] or "f16"]
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(task["model"].encode(), params)
        if not self._model:
            sys.exit(f"llama.cpp does not load {task['model']}")
        self._vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._context: Any = None

    def about(self) -> dict[str, Any]:
        return {"version": self._lib.__version__}

    def prepare(self, cell: Cell) -> None:
        """Room for the cell, and one run."""
        if self._context is not None:
            self._lib.llama_free(self._context)
        params = self._lib.llama_context_default_params()
        params.n_ctx = cell.batch * -(-cell.longest // 256) * 256
        params.n_batch, params.n_ubatch, params.n_seq_max = 2048, 512, cell.batch
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = self._type
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            sys.exit(f"llama.cpp has no context for {cell.batch} x {cell.longest} tokens")
        self.measure(cell)

    def measure(self, cell: Cell) -> dict[str, float]:
        lib = self._lib
        memory = lib.llama_get_memory(self._context)
        lib.llama_memory_clear(memory, False)
        seconds, held = {}, 0
        if cell.prompt:
            start, count = cell.read
            self._read(cell.batch, 0, start)
            begin = time.perf_counter()
            self._read(cell.batch, start, count)
            seconds["prompt"] = time.perf_counter() - begin
            held = start + count
        if cell.steps:
            for row in range(cell.batch):
                lib.llama_memory_seq_rm(memory, row, cell.behind, -1)
            self._read(cell.batch, held, max(0, cell.behind - held))
            begin = time.perf_counter()
            for step in range(cell.steps):
                self._read(cell.batch, cell.behind + step, 1)
            seconds["generation"] = time.perf_counter() - begin
        return seconds

    def _read(self, batch: int, start: int, count: int) -> None:
        """``count`` random tokens of every sequence, sequence after sequence, 2048 a call; the last has logits."""
        lib = self._lib
        places = [(row, start + i, i == count - 1) for row in range(batch) for i in range(count)]
        for first in range(0, len(places), 2048):
            part = places[first : first + 2048]
            made = lib.llama_batch_init(len(part), 0, 1)
            made.n_tokens = len(part)
            for i, (row, position, last) in enumerate(part):
                made.token[i] = random.randrange(self._vocab_size)
                made.pos[i], made.n_seq_id[i], made.logits[i] = position, 1, last
                made.seq_id[i][0] = row
            status = lib.llama_decode(self._context, made)
            lib.llama_batch_free(made)
            if status:
                sys.exit(f"llama_decode gave {status}")
        lib.llama_synchronize(self._context)


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
