"""One benchmark: servers by turns, levels of load, and the output."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import Any

import click
import httpx

from jaxpaged.app import interrupt
from jaxpaged.app.bench_serve import plot, report, results, watch
from jaxpaged.app.bench_serve.client import Client
from jaxpaged.app.bench_serve.compare import compare
from jaxpaged.app.bench_serve.info import ServerInfo, ask, check_url
from jaxpaged.app.bench_serve.load import Load, apply_load
from jaxpaged.app.bench_serve.machine import command_line, machine
from jaxpaged.app.bench_serve.options import VARIANTS, BenchServeOptions
from jaxpaged.app.bench_serve.servers import Variant, serving
from jaxpaged.app.bench_serve.workload import Workload
from jaxpaged.app.errors import InputError, say

_A_CLIENT, _AT_LEAST, _OPEN_LOOP = 4, 16, 64
"""Default numbers of requests per level."""
_CONNECT_SECONDS = 10.0
_SAME_LEVEL = ("variant", "load", "load_value", "clients", "rate")


def run(options: BenchServeOptions) -> None:
    """Measures and prints; if interrupted, prints the finished levels.

    Raises:
      InputError: flags or servers that cannot be used, or no request was answered.
    """
    if options.plot is not None and find_spec("matplotlib") is None:
        raise InputError("--plot needs the package 'matplotlib': pip install matplotlib")
    url = None if options.url is None else check_url(options.url, allow_remote=options.allow_remote)
    bench = _Bench(options)
    with interrupt.before_exit(bench.print):
        for repetition in range(options.repetitions):
            variants = _variants(options, url)
            # In alternating order, so that drift of the machine affects all alike.
            for variant in reversed(variants) if repetition % 2 else variants:
                with _address(options, url, variant, bench) as address:
                    asyncio.run(bench.measure(address, variant.name, repetition))
    bench.print()
    if options.plot is not None:
        plot.draw(bench.result(), options.plot)
    if not any(row["answered"] for row in bench.rows):
        raise InputError(f"no request was answered: {bench.rows[0]['first_error']}")


def _variants(options: BenchServeOptions, url: str | None) -> list[Variant]:
    if url is not None:
        return [Variant("server", ())]
    return [
        Variant(name, (*options.server_flags, *VARIANTS[name])) for name in dict.fromkeys(options.compare)
    ]


@contextmanager
def _address(options: BenchServeOptions, url: str | None, variant: Variant, bench: _Bench) -> Iterator[str]:
    if url is None:
        bench.progress(f"{variant.name}: loading and compiling")
    with nullcontext(url) if url is not None else serving(variant, options.start_timeout) as address:
        yield address


@dataclass
class _Bench:
    """Measurements so far."""

    options: BenchServeOptions
    rows: list[dict[str, Any]] = field(default_factory=list)
    """One per level, server and repetition."""
    servers: dict[str, dict[str, Any]] = field(default_factory=dict)
    workload: Workload | None = None
    """Workload of all servers, made for the first one."""
    started: datetime = field(default_factory=lambda: datetime.now(UTC))

    async def measure(self, url: str, variant: str, repetition: int) -> None:
        """Measures all levels of load on one server."""
        o = self.options
        key = o.api_key if o.url is not None else None
        async with httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else None,
            # No limit of connections, which would be a queue that the server does not see.
            limits=httpx.Limits(max_connections=None),
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            trust_env=False,
        ) as http:
            info = await ask(http)
            workload = self._workload(info)
            self.servers[variant] = asdict(info)
            model = o.served_model or info.model
            client = Client(http, model, timeout=o.timeout, max_retries=o.retries, logprobs=o.logprobs)
            await self._warm_up(client, workload, variant, repetition)
            for level, load in enumerate(self.loads):
                await self._measure_level(http, client, workload, load, variant, repetition, level)

    @property
    def loads(self) -> list[Load]:
        """Levels of load."""
        if self.options.rates:
            return [Load(rate=rate) for rate in self.options.rates]
        return [Load(clients=clients) for clients in self.options.clients]

    def count(self, load: Load) -> int:
        """Number of requests of a level."""
        usual = _OPEN_LOOP if load.clients is None else max(_AT_LEAST, _A_CLIENT * load.clients)
        return self.options.requests or usual

    def _workload(self, info: ServerInfo) -> Workload:
        o = self.options
        if self.workload is None:
            vocab, context = o.vocab or info.vocab, o.ctx_size or info.context
            if vocab is None:
                raise InputError("the server does not report the size of its vocabulary; give --vocab")
            if context is None:
                raise InputError("the server does not report its context; give -c")
            self.workload = Workload(o.lengths, o.seed, vocab, context, o.shared_prefix)
            try:
                self.workload.pairs(max(map(self.count, self.loads)))
            except ValueError as error:
                raise InputError(str(error)) from None
        if info.context is not None and info.context < self.workload.context:
            raise InputError(
                f"the server's context has {info.context} tokens, requests may have {self.workload.context}; "
                f"-c {info.context} makes them fit"
            )
        return self.workload

    async def _warm_up(self, client: Client, workload: Workload, variant: str, repetition: int) -> None:
        o = self.options
        if not o.warmup:
            return
        self.progress(f"{variant}: warming up")
        specs = workload.warmup(o.warmup, repetition)
        for record in await apply_load(client, specs, Load(clients=o.warmup), time_limit=o.time_limit):
            if not record.ok:
                raise InputError(f"{variant}: a request of the warm-up failed: {record.error}")

    async def _measure_level(
        self,
        http: httpx.AsyncClient,
        client: Client,
        workload: Workload,
        load: Load,
        variant: str,
        repetition: int,
        level: int,
    ) -> None:
        o, count = self.options, self.count(load)
        specs = workload.requests(count, repetition=repetition, level=level, rate=load.rate)
        what = f"{variant} {repetition + 1}/{o.repetitions}, {load}"
        samples: list[watch.PoolSample] = []
        watcher = asyncio.create_task(watch.watch(http, samples, o.time_limit))
        try:
            records = await apply_load(
                client,
                specs,
                load,
                time_limit=o.time_limit,
                progress=lambda done: self.progress(f"{what}: {done}/{count} requests"),
            )
        finally:
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher
        if samples and (last := await watch.look(http)) is not None:
            samples.append(last)
        row = {"variant": variant, "load": str(load), "load_value": load.value, "clients": load.clients}
        row |= {"rate": load.rate, "repetition": repetition}
        row |= results.summarize(records, o.limits) | {"pool": watch.summarize(samples)}
        self.rows.append(row)
        self.progress()
        say(f"{what}: {row['output_tokens_per_second']:.1f} output tokens/s, {row['seconds']:.1f} s")
        if row["errors"]:
            say(f"warning: {row['errors']} of {count} requests failed: {row['first_error']}")
        if row["other_lengths"]:
            say(f"warning: {row['other_lengths']} answers have other numbers of tokens than requested")

    def progress(self, what: str = "") -> None:
        """Shows a progress line on a terminal; without text, erases it."""
        if sys.stderr.isatty():
            click.echo(f"\r\033[K{what}", nl=False, err=True)

    def result(self) -> dict[str, Any]:
        """The whole result, for JSON."""
        o = self.options
        levels: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in self.rows:
            levels.setdefault(tuple(row[name] for name in _SAME_LEVEL), []).append(row)
        medians = [
            dict(zip(_SAME_LEVEL, key, strict=True))
            | results.over_repetitions(
                [{k: v for k, v in row.items() if k not in _SAME_LEVEL} for row in rows]
            )
            for key, rows in levels.items()
        ]
        order = list(dict.fromkeys(o.compare)) if o.url is None else ["server"]
        medians.sort(key=lambda row: order.index(row["variant"]))
        assert self.workload is not None
        return {
            "command": command_line(),
            "machine": machine(),
            "started": self.started.isoformat(timespec="seconds"),
            "url": o.url,
            "server_flags": list(o.server_flags) if o.url is None else None,
            "servers": self.servers,
            "repetitions": o.repetitions,
            "goodput_limits_ms": o.limits,
            "workload": self.workload.as_dict(max(map(self.count, self.loads))),
            "definitions": results.__doc__,
            "medians": medians,
            "comparisons": compare(medians, o.limits),
            "runs": self.rows,
        }

    def print(self) -> None:
        """Prints and writes the result; nothing without a finished level."""
        self.progress()
        if not self.rows:
            return
        result = self.result()
        if self.options.output is not None:
            self.options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        click.echo(json.dumps(result) if self.options.as_json else report.tables(result))
