"""llama.cpp for ``bench_against_llama_cpp``: its programs, started for each repetition, or its library in a process."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tpu_scripts.bench.turns import Cell, Failure

LLAMA_CPP, LLAMA_CPP_PAGED = "llama.cpp", "llama.cpp paged"
PAGED_FLAG = "--kv-cache-paged"
CACHE_TYPES = {"f32": 0, "f16": 1, "bf16": 30}
"""Those that all rows know, with their numbers in ggml."""


def _ended(arguments: Sequence[Any]) -> subprocess.CompletedProcess[str]:
    """A program that has ended, however.

    Raises:
      Failure: it does not start.
    """
    try:
        return subprocess.run(
            [str(a) for a in arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise Failure(f"{arguments[0]} does not start: {error.strerror or error}") from None


def run_program(arguments: Sequence[Any]) -> str:
    """What a program prints on stdout.

    Raises:
      Failure: it does not start, or fails; with the last line it wrote to stderr.
    """
    done = _ended(arguments)
    if done.returncode:
        reason = last_line(done.stderr) or f"exit status {done.returncode}"
        raise Failure(f"{Path(arguments[0]).name} failed: {reason}")
    return done.stdout


def last_line(text: str) -> str:
    return next((row.strip() for row in reversed(text.splitlines()) if row.strip()), "")


def knows_paged(program: Path) -> bool:
    """Whether ``--help`` tells of ``--kv-cache-paged``; some builds end their help with a status other than 0."""
    done = _ended([program, "--help"])
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
