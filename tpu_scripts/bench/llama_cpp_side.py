"""llama.cpp for ``bench.llama_cpp``: its programs, started for each repetition, or its library in a worker."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tpu_scripts.common import in_turns
from tpu_scripts.workers import last_line


class Failure(Exception):
    """A program that cannot be measured; the message is one line."""


@dataclass(frozen=True)
class Cell:
    """One batch and depth: two tests, or one where ``prompt`` or ``steps`` is 0."""

    batch: int
    depth: int
    prompt: int
    steps: int

    @property
    def read(self) -> tuple[int, int]:
        """Tokens in each sequence before the prompt's test, and tokens of the prompt."""
        return (self.depth, self.prompt) if self.batch == 1 else (0, self.depth or self.prompt)

    @property
    def behind(self) -> int:
        """Tokens in each sequence when generation starts."""
        return max(self.depth, 1)

    @property
    def longest(self) -> int:
        """Tokens that a sequence must be able to hold."""
        prompt = sum(self.read) if self.prompt else 0
        return max(prompt, self.behind + self.steps if self.steps else 0)

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of all sequences, by test."""
        found = {"prompt": self.batch * self.read[1] if self.prompt else 0}
        found["generation"] = self.batch * self.steps
        return {test: count for test, count in found.items() if count}

    def name(self, test: str) -> str:
        """Name of a test as in llama-bench, such as "pp712 @ d4000"; "8 x pp4000" for eight sequences."""
        start, count = self.read
        text, depth = (f"pp{count}", start) if test == "prompt" else (f"tg{self.steps}", self.depth)
        text += f" @ d{depth}" if depth else ""
        return text if self.batch == 1 else f"{self.batch} x {text}"


class Side(Protocol):
    """Row of the table: a program that is measured."""

    name: str

    def prepare(self, cell: Cell) -> str | None:
        """Prepares the repetitions of a cell; returns why it cannot be measured, or None."""

    def measure(self, cell: Cell) -> dict[str, float]:
        """Runs one repetition; returns the seconds of each of the cell's tests."""


def measure(
    sides: Sequence[Side], cell: Cell, repeat: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Measures one batch and depth: seconds of each test by side, and why a side has none."""
    missing: dict[str, str] = {}
    for side in sides:
        progress(f"{side.name}, preparing")
        if reason := side.prepare(cell):
            missing[side.name] = reason
    measures = {side.name: partial(side.measure, cell) for side in sides if side.name not in missing}
    runs = in_turns(measures, repeat, progress)
    seconds = {
        test: {name: [run[test] for run in found] for name, found in runs.items()} for test in cell.tokens
    }
    return {**asdict(cell), "tokens": cell.tokens, "seconds": seconds, "missing": missing}


LLAMA_CPP, LLAMA_CPP_PAGED = "llama.cpp", "llama.cpp paged"
PAGED_FLAG, _NO_FLAG = "--kv-cache-paged", "not known to this build"
CACHE_TYPES = {"f32": 0, "f16": 1, "bf16": 30}
"""Types that all rows support, with their numbers in ggml."""


def _ended(arguments: Sequence[Any]) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, whatever its exit status.

    Raises:
      Failure: it does not start.
    """
    try:
        command = [str(argument) for argument in arguments]
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise Failure(f"{arguments[0]} does not start: {error.strerror or error}") from None


def run_program(arguments: Sequence[Any]) -> str:
    """Runs a program; returns its stdout.

    Raises:
      Failure: it does not start, or fails; with the last line of its stderr.
    """
    done = _ended(arguments)
    if done.returncode:
        reason = last_line(done.stderr) or f"exit status {done.returncode}"
        raise Failure(f"{Path(arguments[0]).name} failed: {reason}")
    return done.stdout


def knows_paged(program: Path) -> bool:
    """True if ``--help`` has ``--kv-cache-paged``; some builds end their help with a status other than 0."""
    done = _ended([program, "--help"])
    return PAGED_FLAG in done.stdout + done.stderr


def read_llama_bench(text: str) -> list[dict[str, Any]]:
    """Parses the tests that ``llama-bench -o json`` prints.

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
    """Parses the one test that ``llama-batched-bench --output-format jsonl`` prints.

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

    def prepare(self, cell: Cell) -> str | None:
        program = self._bench if cell.batch == 1 else self._batched
        if not self._paged or knows_paged(program):
            return None
        return _NO_FLAG

    def probe(self) -> dict[str, Any]:
        """Runs one token; returns llama-bench's description of itself, or fails before anything is measured."""
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
        if cell.depth:  # generation needs the tokens of the prompt's test
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
    """Path of llama-batched-bench, beside llama-bench."""
    return llama_bench.with_name(f"llama-batched-bench{llama_bench.suffix}")


class Unknown:
    """llama.cpp's paged cache with llama-cpp-python, whose bindings have no option for it."""

    name = LLAMA_CPP_PAGED

    def prepare(self, cell: Cell) -> str | None:
        return _NO_FLAG

    def measure(self, cell: Cell) -> dict[str, float]:
        raise AssertionError("not measurable")


class OnLlamaCpp:
    """llama.cpp through llama-cpp-python, timed as its own programs are."""

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
        """Creates a context for the cell, and runs it once."""
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
            self._decode(cell.batch, 0, start)
            begin = time.perf_counter()
            self._decode(cell.batch, start, count)
            seconds["prompt"] = time.perf_counter() - begin
            held = start + count
        if cell.steps:
            for row in range(cell.batch):
                lib.llama_memory_seq_rm(memory, row, cell.behind, -1)
            self._decode(cell.batch, held, max(0, cell.behind - held))
            begin = time.perf_counter()
            for step in range(cell.steps):
                self._decode(cell.batch, cell.behind + step, 1)
            seconds["generation"] = time.perf_counter() - begin
        return seconds

    def _decode(self, batch: int, start: int, count: int) -> None:
        """Decodes ``count`` random tokens per sequence, 2048 a call; the last one has logits."""
        lib = self._lib
        slots = [(row, start + i, i == count - 1) for row in range(batch) for i in range(count)]
        for first in range(0, len(slots), 2048):
            part = slots[first : first + 2048]
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
