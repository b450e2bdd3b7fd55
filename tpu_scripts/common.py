"""What the benchmarks share: arguments, models without files, filled caches, memory, and the measured bandwidth."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxpaged_model.config import ModelConfig

from jaxpaged import ContiguousKVCache, GenerateStream, PagedKVCache
from jaxpaged.attention.api import IMPLEMENTATIONS, candidates, default_platform, load
from jaxpaged.pages.formats import BlockPages, ResidualFormat

# --- arguments ----------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose complaints are one line; they end the program with status 2."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            _program(), description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def positives(text: str) -> list[int]:
    """A list like "1,4,8"."""
    return [positive(part) for part in text.split(",")]


def natural(text: str) -> int:
    """A whole number, 0 too."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)


def naturals(text: str) -> list[int]:
    """A list like "128,700"; zeros are dropped, so that "0" is none."""
    return [] if text == "0" else positives(text)


def choose_implementations(parser: Parser, text: str | None) -> list[str]:
    """The implementations of attention that ``--implementation`` names, or all that this platform prefers.

    One that was named and is not here ends the program; of the others a line says why they are left out.
    """
    if text is None:
        # Chosen by the environment or by the platform; the specification is no implementation to measure.
        try:
            tried = list(candidates())
        except ValueError as error:
            parser.error(str(error))
        names = [name for name in tried if name != "reference"] or tried
    else:
        names = text.split(",")
        for name in names:
            if name not in IMPLEMENTATIONS:
                parser.error(f"unknown implementation {name!r}; there are {', '.join(IMPLEMENTATIONS)}")
    found = []
    for name in names:
        try:
            load(name)
        except NotImplementedError as reason:
            if text is not None:
                parser.error(f"{name}: {reason}")
            note(f"left out: {name}: {reason}")
            continue
        found.append(name)
    return found


def choose_models(parser: Parser, names: Sequence[str], known: Mapping[str, Any]) -> None:
    """Ends the program if a model is none of those known."""
    for name in names:
        if name not in known:
            parser.error(f"unknown model {name!r}; there are {', '.join(known)}")


def add_json(parser: Parser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements here")


def check_writable(parser: Parser, *paths: Path | None) -> None:
    """Ends the program if a file cannot be written, before anything is measured."""
    for path in paths:
        if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            parser.error(f"cannot write {path}: {path.parent} is no folder that can be written to")


def write_json(path: Path | None, values: Mapping[str, Any]) -> None:
    """What was measured, and on what."""
    if path is None:
        return
    head = {"command": command_line(), "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    path.write_text(json.dumps(head | dict(values), indent=1) + "\n")


def command_line() -> str:
    """How this program was called."""
    return " ".join([_program(), *sys.argv[1:]])


def _program() -> str:
    """The command that starts this script, such as "python -m tpu_scripts.bench.generate"."""
    parts = Path(sys.argv[0]).with_suffix("").parts
    names = parts[parts.index("tpu_scripts") :] if "tpu_scripts" in parts else parts[-1:]
    return f"python -m {'.'.join(names).removesuffix('.__main__')}"


def note(line: str) -> None:
    """A line for whoever watches; tables go to stdout."""
    print(line, file=sys.stderr, flush=True)


def need(module: str, what_for: str, install: str) -> str | None:
    """Why ``module`` cannot be used, in one line; None where it can."""
    try:
        import_module(module)
    except ModuleNotFoundError:
        return f"{what_for} needs {module}: {install}"
    return None


def on_cpu() -> bool:
    return default_platform() == "cpu"


# --- models and caches --------------------------------------------------------------------------------------


SMOLLM2_135M = ModelConfig(
    architecture="llama",
    name="SmolLM2-135M shape, random weights",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_q_heads=9,
    num_kv_heads=3,
    head_dim=64,
    context_length=8192,
    rope_theta=100000.0,
    tie_embeddings=True,
)

MODEL_SHAPES: dict[str, ModelConfig] = {
    "SmolLM2-135M": SMOLLM2_135M,
    "Qwen3-0.6B": ModelConfig(
        architecture="qwen3",
        name="Qwen3-0.6B shape, random weights",
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_q_heads=16,
        num_kv_heads=8,
        head_dim=128,
        context_length=40960,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        tie_embeddings=True,
        qk_norm=True,
    ),
    "Llama-3-8B": ModelConfig(
        architecture="llama",
        name="Llama-3-8B shape, random weights",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=128,
        context_length=8192,
        rope_theta=500000.0,
    ),
    "Qwen3-8B": ModelConfig(
        architecture="qwen3",
        name="Qwen3-8B shape, random weights",
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_layers=36,
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=128,
        context_length=40960,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        qk_norm=True,
    ),
}
"""Whole models whose weights are drawn, for benchmarks that need no file."""


def noise(pool: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """Normal numbers in the shape of ``pool``: a block of them, repeated."""
    return _noise(pool.shape, pool.dtype)


@partial(jax.jit, static_argnums=(0, 1))
def _noise(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    block = jax.random.normal(jax.random.key(0), (min(shape[0], 4), *shape[1:]), jnp.float32).astype(dtype)
    repeats = -(-shape[0] // len(block))
    return jnp.broadcast_to(block, (repeats, *block.shape)).reshape(-1, *shape[1:])[: shape[0]]


def with_noise(cache: Any) -> Any:
    """``cache`` with random keys and values everywhere; whole pages of them, where pages are sealed."""
    pools = ("k_pages", "v_pages") if cache.kind == "paged" else ("k", "v")
    return dataclasses.replace(cache, **{p: tuple(_noisy(x) for x in getattr(cache, p)) for p in pools})


def _noisy(pages: Any) -> Any:
    if not isinstance(pages, BlockPages):
        return noise(pages)
    num_pages, num_kv_heads, page_size, head_dim = pages.shape
    few = min(num_pages, 4)
    rows = jax.random.normal(jax.random.key(0), (few, page_size, num_kv_heads, head_dim))
    if isinstance(pages.format, ResidualFormat):
        made = pages.format.encode(rows.swapaxes(1, 2))
    else:
        page, slot = jnp.divmod(jnp.arange(few * page_size), page_size)
        block = pages.format.create(few, num_kv_heads, page_size, head_dim)
        made = pages.format.write(block, page, slot, rows.reshape(-1, *rows.shape[2:])).parts
    repeats = -(-num_pages // few)
    parts = {
        name: jnp.tile(part, (repeats,) + (1,) * (part.ndim - 1))[:num_pages] for name, part in made.items()
    }
    return dataclasses.replace(pages, parts=parts)


@partial(jax.jit, static_argnames="num_tokens", donate_argnames="cache")
def fill(cache: Any, depth: jax.Array, num_tokens: int) -> tuple[Any, jax.Array]:
    """``depth i32[S]`` tokens in every sequence of an empty cache, over whatever lies there; ``cache`` is donated."""
    cache, _, ok = cache.reserve(depth, num_tokens=num_tokens)
    return cache, ok


def make_cache(
    kind: str,
    config: ModelConfig,
    batch: int,
    context: int,
    page_size: int,
    dtype: str = "f32",
    **formats: str,
) -> Any:
    """Both kinds have room for ``batch`` sequences of ``context`` tokens; ``formats`` as ``create`` has them."""
    shape: dict[str, Any] = {
        "num_layers": config.num_layers,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_seqs": batch,
        "dtype": dtype,
        **formats,
    }
    if kind == "contiguous":
        return ContiguousKVCache.create(**shape, max_length=context)
    pages = context // page_size
    return PagedKVCache.create(**shape, page_size=page_size, num_pages=batch * pages, max_pages_per_seq=pages)


def generation_rate(stream: GenerateStream, depth: int) -> float:
    """Tokens a second of the decode steps of one chunk, all sequences together, behind ``depth`` tokens each.

    The stream's cache must be empty, and is again when this returns.
    """
    batch = stream.num_samples
    stream.cache, ok = fill(stream.cache, np.full(batch, depth, np.int32), batch * depth)
    if not ok:
        raise SystemExit(f"a {stream.cache.kind} cache has no room for {depth} tokens of {batch} sequences")
    chunks = iter(stream)
    next(chunks)
    start = time.perf_counter()
    chunk = next(chunks)
    seconds = time.perf_counter() - start
    return sum(len(t) for t in chunk.tokens) / seconds


def prompt_rate(stream: GenerateStream, length: int) -> float:
    """Tokens a second of prefilling ``length`` tokens in each sequence; the cache is empty before and after."""
    start = time.perf_counter()
    next(iter(stream))
    return stream.num_samples * length / (time.perf_counter() - start)


# --- memory -------------------------------------------------------------------------------------------------


def free_memory() -> int:
    """Bytes that can be allocated where JAX computes; on CPUs half of what the system could give."""
    if not on_cpu():
        stats = jax.devices()[0].memory_stats() or {}
        if "bytes_limit" in stats:
            return int(0.95 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
    return _system_memory() // 2


def _system_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = Path("/sys/fs/cgroup")  # a container's own limit
    try:
        most, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if most == "max" else min(free, int(most) - int(used))


def last_level_cache() -> int:
    """Bytes of the chip's own memory that repeated reads may be served from; a guess where nothing tells."""
    if on_cpu():
        sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        return max((_kibibytes(path.read_text()) for path in sizes), default=32 << 20)
    return 128 << 20


def _kibibytes(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20}
    return int(text.strip()[:-1]) * units[text.strip()[-1]]


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.1f}" if count < 100 << 20 else f"{count / 2**20:,.0f}"


# --- bandwidth ----------------------------------------------------------------------------------------------


class Bandwidth:
    """What the device's memory gives, measured whenever it is asked.

    ``copy`` is a jitted ``x + 1`` in place: every byte is read once and written once, and both count. ``read`` is for
    CPUs: every core sums its part of an array. Attention to a cache writes next to nothing, so on CPUs ``read`` is the
    limit it is held against; elsewhere ``copy`` is, as no program is known to read faster than the best copy.
    """

    def __init__(self, most: int) -> None:
        """Allocates; ``most`` bytes is what the arrays may take."""
        self.cpu = on_cpu()
        wanted = max(256 << 20, 8 * last_level_cache()) if self.cpu else 2 << 30
        count = min(wanted, most // (2 if self.cpu else 1)) // 4
        self.bytes = 4 * count
        self._copied = jnp.ones(count, jnp.float32)
        self._add = jax.jit(
            lambda x, times: jax.lax.fori_loop(0, times, lambda _, x: x + 1, x), donate_argnums=0
        )
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if self.cpu:
            self._pool = ThreadPoolExecutor(threads)
            self._parts = np.array_split(np.ones(count // 2, np.uint64), threads)
        self._times = 1
        self.copy()  # compiles
        # A call costs some 100 us of launching and waiting; the copies of one call shall take longer by far.
        self._times = max(1, int(0.02 * self.copy() / (2 * self.bytes)))

    @property
    def kind(self) -> str:
        """Which of the two is the limit."""
        return "read" if self.cpu else "copy"

    def limit(self) -> float:
        """Bytes a second, measured now."""
        return self.read() if self.cpu else self.copy()

    def copy(self) -> float:
        start = time.perf_counter()
        self._copied = jax.block_until_ready(self._add(self._copied, self._times))
        return 2 * self.bytes * self._times / (time.perf_counter() - start)

    def read(self) -> float:
        start = time.perf_counter()
        list(self._pool.map(np.add.reduce, self._parts))
        return self.bytes / (time.perf_counter() - start)

    def describe(self, repeat: int = 7) -> tuple[str, dict[str, float]]:
        """A line for people, and medians of ``repeat`` measurements in bytes a second."""
        kinds = ("copy", "read") if self.cpu else ("copy",)
        rates = {kind: statistics.median(getattr(self, kind)() for _ in range(repeat)) for kind in kinds}
        shown = ", ".join(f"{kind} {rate / 1e9:,.1f} GB/s" for kind, rate in rates.items())
        return f"memory, arrays of {mebibytes(self.bytes)} MiB: {shown}; the limit is {self.kind}", rates


def in_turns(measures: Mapping[str, Callable[[], float]], repeat: int) -> dict[str, list[float]]:
    """Measures each in turn, ``repeat`` times, so that a machine's changing speed hits all alike."""
    results: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(repeat):
        for name, measure in measures.items():
            results[name].append(measure())
    return results


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median of the ratios of turns."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
