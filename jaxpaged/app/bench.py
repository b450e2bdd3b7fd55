"""``jaxpaged bench``: llama-bench's measurements, for each kind of cache."""

from __future__ import annotations

import csv
import io
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpaged.app import interrupt
from jaxpaged.app.cache_type import CacheType, check_hadamard
from jaxpaged.app.errors import InputError, out_of_memory_is_input, say
from jaxpaged.app.kv_report import CachePlan, readable
from jaxpaged.app.loading import ReadyModel, open_model
from jaxpaged.app.measure_options import BenchOptions
from jaxpaged.app.tables import markdown_table
from jaxpaged.sharding.mesh import CONTEXT, num_shards
from jaxpaged.sharding.multihost import fetch
from jaxpaged.sharding.specs import BATCH, CACHE, PARAMS, REPLICATED, ShardedCache, over_mesh

_SEED = 0


def cache_types(options: BenchOptions, own: str) -> tuple[CacheType, ...]:
    """Page formats to compare, for a model of ``own`` dtype.

    Raises:
      InputError: keys and values have different numbers of formats.
    """
    keys = options.cache_type_k or (own,)
    values = options.cache_type_v or keys
    most = max(len(keys), len(values))
    if {len(keys), len(values)} - {1, most}:
        raise InputError(f"-ctk has {len(keys)} formats and -ctv {len(values)}: they go in pairs")
    keys, values = (names * most if len(names) == 1 else names for names in (keys, values))
    pairs = dict.fromkeys(zip(keys, values, strict=True))
    return tuple(CacheType.of(k, v, options.hadamard) for k, v in pairs)


@dataclass
class Measurement:
    """One row of the table: a test, on one kind of cache."""

    test: str
    """"pp512", "tg128 @ d2048"."""
    kind: str
    cache_type: CacheType
    batch: int
    num_tokens: int
    """Tokens of one repetition, all sequences together."""
    compile_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    kv_bytes: int = 0
    """KV memory in use at the end: pages and staging slots, or all of a contiguous cache."""

    @property
    def rates(self) -> list[float]:
        """Tokens a second, each repetition."""
        return [self.num_tokens / s for s in self.seconds]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.rates)

    @property
    def deviation(self) -> float:
        """Standard deviation of the rates; 0 for a single repetition."""
        return statistics.stdev(self.rates) if len(self.seconds) > 1 else 0.0


class _Bench:
    """One test on one cache: its compiled programs, and the cache they start from."""

    def __init__(
        self, ready: ReadyModel, options: BenchOptions, plan: CachePlan, depth: int, n_prompt: int, n_gen: int
    ) -> None:
        self.measurement = Measurement(
            test=_name(depth, n_prompt, n_gen),
            kind=plan.kind,
            cache_type=plan.cache_type,
            batch=plan.shards * plan.num_seqs,
            num_tokens=plan.shards * plan.num_seqs * (n_prompt + n_gen),
        )
        self._params = ready.loaded.params
        self._vocab_size = ready.loaded.config.vocab_size
        self._batch, self._depth, self._n_prompt, self._n_gen = plan.num_seqs, depth, n_prompt, n_gen
        self._step = options.ubatch_size
        self._call = ready.call
        self._plan = plan
        empty = plan.create()
        start = time.perf_counter()
        self._prefills = {
            n: self._compile_prefill(empty, n) for n in {*self._steps(depth), *self._steps(n_prompt)}
        }
        self._decode = self._compile_decode(empty) if n_gen else None
        self.measurement.compile_seconds = time.perf_counter() - start
        # Filled once, by computing that many tokens; each repetition starts from a copy.
        self._filled = self._read(empty, depth)
        jax.block_until_ready(self._filled)

    def _steps(self, num_tokens: int) -> list[int]:
        """Sizes of the steps that prefill ``num_tokens`` tokens of every sequence."""
        total = self._batch * num_tokens
        return [self._step] * (total // self._step) + ([total % self._step] if total % self._step else [])

    def _compile_prefill(self, cache: Any, size: int) -> Any:
        def prefill(params: Any, cache: Any, tokens: jax.Array, num_new: jax.Array) -> Any:
            cache, batch, _ = cache.reserve(num_new, num_tokens=size)
            logits, cache = self._call(params, tokens, cache, batch, batch.last_rows)
            return cache, logits

        shapes = (jax.ShapeDtypeStruct((size,), jnp.int32), jax.ShapeDtypeStruct((self._batch,), jnp.int32))
        spread = over_mesh(prefill, (PARAMS, CACHE, REPLICATED, REPLICATED), (CACHE, BATCH))
        return jax.jit(spread, donate_argnums=1).lower(self._params, cache, *shapes).compile()

    def _compile_decode(self, cache: Any) -> Any:
        """Compiles ``n_gen`` greedy decode steps of every sequence, as one program."""

        def decode(params: Any, cache: Any, tokens: jax.Array) -> Any:
            def step(_: Any, carry: Any) -> Any:
                cache, tokens = carry
                ones = jnp.ones(self._batch, jnp.int32)
                cache, batch, _ = cache.reserve(ones, num_tokens=self._batch, max_new=1)
                logits, cache = self._call(params, tokens, cache, batch, batch.last_rows)
                return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

            return jax.lax.fori_loop(0, self._n_gen, step, (cache, tokens))

        shape = jax.ShapeDtypeStruct((self._batch,), jnp.int32)
        spread = over_mesh(decode, (PARAMS, CACHE, REPLICATED), (CACHE, BATCH))
        return jax.jit(spread, donate_argnums=1).lower(self._params, cache, shape).compile()

    def _tokens(self, count: int) -> np.ndarray:
        rng = np.random.default_rng(_SEED)
        return rng.integers(0, self._vocab_size, count, dtype=np.int32)

    def _read(self, cache: Any, num_tokens: int) -> Any:
        """The cache after a prefill of ``num_tokens`` tokens of every sequence, one sequence at a time."""
        left = [num_tokens] * self._batch
        logits = None
        for size in self._steps(num_tokens):
            take = [0] * self._batch
            room = size
            for row in range(self._batch):
                take[row] = min(room, left[row])
                room -= take[row]
                left[row] -= take[row]
            arguments = (self._tokens(size), np.asarray(take, np.int32))
            cache, logits = self._prefills[size](self._params, cache, *arguments)
        jax.block_until_ready(logits)
        return cache

    def repeat(self, record: bool) -> None:
        """Runs the test once; without ``record`` as a warm-up."""
        cache = jax.tree.map(jnp.copy, self._filled)
        tokens = self._tokens(self._batch)
        jax.block_until_ready((cache, tokens))
        start = time.perf_counter()
        if self._n_prompt:
            cache = self._read(cache, self._n_prompt)
        if self._decode is not None:
            cache, tokens = self._decode(self._params, cache, tokens)
            tokens.block_until_ready()
        seconds = time.perf_counter() - start
        if not record:
            return
        self.measurement.seconds.append(seconds)
        used = fetch(cache.pages_used)
        used = used.sum(axis=0) if isinstance(cache, ShardedCache) else used
        self.measurement.kv_bytes = self._plan.bytes_in_use(used)


def run(options: BenchOptions) -> None:
    """Measures and prints; if interrupted, prints the finished tests."""
    tests = [(n, 0) for n in options.n_prompt if n] + [(0, n) for n in options.n_gen if n]
    if not tests:
        raise InputError("nothing to measure: -p and -n are both 0")
    check_hadamard(options.hadamard, *(options.cache_type_k or ()), *(options.cache_type_v or ()))
    ready = open_model(options, mesh=options.mesh)
    shards = num_shards(ready.loaded.mesh)
    if uneven := [batch for batch in options.batch if batch % shards]:
        raise InputError(f"-b {uneven[0]}: data={shards} of --mesh needs multiples of {shards}")
    caches = caches_of(options, ready.dtype, ready.loaded.mesh)
    longest = max(map(sum, tests)) + max(options.depth)
    trained = ready.loaded.config.context_length
    if longest > trained:
        raise InputError(
            f"-p, -n and -d ask for {longest} tokens in a sequence; the model's context has {trained}"
        )
    done: list[Measurement] = []

    def report() -> None:
        _progress()
        if done:
            click.echo(_FORMATS[options.output](ready, done))

    try:
        with interrupt.before_exit(report), out_of_memory_is_input("a smaller -b, -p, -n or -d needs less"):
            for batch, depth, (n_prompt, n_gen) in itertools.product(options.batch, options.depth, tests):
                done += measure(ready, options, caches, batch, depth, n_prompt, n_gen)
    finally:
        report()


def caches_of(options: BenchOptions, own: str, mesh: Mesh | None) -> list[tuple[str, CacheType]]:
    """Caches to compare, kind and type, for a model of ``own`` dtype; unsupported ones are left out with a line.

    Raises:
      InputError: none is supported.
    """
    types = cache_types(options, own)
    quantizing = [one for one in types if one.has_residual]
    if quantizing and "contiguous" in options.kinds:
        names = "; ".join(map(str, quantizing))
        if len(quantizing) == len(types) and "paged" not in options.kinds:
            raise InputError(f"--kv contiguous: {names} quantizes whole pages")
        say(f"contiguous {names} is left out: it quantizes whole pages")
    kinds = options.kinds
    if mesh is not None and mesh.shape[CONTEXT] > 1 and "contiguous" in kinds:
        if "paged" not in kinds:
            raise InputError("--kv contiguous: --mesh context=N spreads pages")
        say("contiguous is left out: --mesh context=N spreads pages")
        kinds = ("paged",)
    return [(kind, one) for one in types for kind in kinds if kind == "paged" or not one.has_residual]


def measure(
    ready: ReadyModel,
    options: BenchOptions,
    caches: Sequence[tuple[str, CacheType]],
    batch: int,
    depth: int,
    n_prompt: int,
    n_gen: int,
) -> list[Measurement]:
    """Runs one test on every cache, alternating between caches."""
    name, tokens = _name(depth, n_prompt, n_gen), depth + n_prompt + n_gen
    plans = [
        CachePlan.make(
            ready.loaded.local_config,
            mesh=ready.loaded.mesh,
            paged=kind == "paged",
            cache_type=cache_type,
            num_seqs=batch // num_shards(ready.loaded.mesh),
            context=tokens,
            tokens=tokens,
            page_size=options.page_size,
        )
        for kind, cache_type in caches
    ]
    benches = []
    for plan in plans:
        _progress(name, batch, f"compiling for {plan.kind} {plan.cache_type}")
        benches.append(_Bench(ready, options, plan, depth, n_prompt, n_gen))
    for repetition in range(options.repetitions + 1):
        for plan, bench in zip(plans, benches, strict=True):
            if repetition:
                _progress(name, batch, f"{plan.kind} {plan.cache_type}, {repetition}")
            bench.repeat(record=repetition > 0)
    return [bench.measurement for bench in benches]


def _name(depth: int, n_prompt: int, n_gen: int) -> str:
    """Name of a test, as llama-bench has it."""
    name = f"pp{n_prompt}" if n_prompt else f"tg{n_gen}"
    return f"{name} @ d{depth}" if depth else name


def _progress(test: str = "", batch: int = 0, what: str = "") -> None:
    """Shows a progress line on a terminal; without a test, erases it."""
    if sys.stderr.isatty():
        click.echo(f"\r\033[K{test} batch {batch}: {what}" if test else "\r\033[K", nl=False, err=True)


def _rows(ready: ReadyModel, done: Sequence[Measurement]) -> list[dict[str, Any]]:
    loaded = ready.loaded
    return [
        {
            "model": loaded.description,
            "size_bytes": loaded.size_bytes,
            "params": loaded.config.num_parameters(),
            "backend": jax.default_backend(),
            "dtype": ready.dtype,
            "kv": m.kind,
            **m.cache_type.as_dict(),
            "batch": m.batch,
            "test": m.test,
            "tokens_per_second": m.mean,
            "stddev": m.deviation,
            "samples": m.rates,
            "kv_bytes": m.kv_bytes,
            "compile_seconds": m.compile_seconds,
        }
        for m in done
    ]


def _markdown(ready: ReadyModel, done: Sequence[Measurement]) -> str:
    rows = _rows(ready, done)
    columns = {
        "model": [row["model"] for row in rows],
        "size": [readable(row["size_bytes"]) for row in rows],
        "params": [f"{row['params'] / 1e6:.2f} M" for row in rows],
        "backend": [row["backend"] for row in rows],
        "kv": [m.kind for m in done],
        "type": [str(m.cache_type) for m in done],
        "batch": [str(m.batch) for m in done],
        "test": [m.test for m in done],
        "t/s": [f"{m.mean:.2f} ± {m.deviation:.2f}" for m in done],
        "KV": [readable(m.kv_bytes) for m in done],
        "compile s": [f"{m.compile_seconds:.2f}" for m in done],
    }
    return markdown_table(columns, left=("model", "backend", "kv", "type"))


def _json(ready: ReadyModel, done: Sequence[Measurement]) -> str:
    return json.dumps(_rows(ready, done), indent=2)


def _csv(ready: ReadyModel, done: Sequence[Measurement]) -> str:
    rows = [{k: v for k, v in row.items() if k != "samples"} for row in _rows(ready, done)]
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


_FORMATS = {"md": _markdown, "json": _json, "csv": _csv}
