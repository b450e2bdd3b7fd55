"""The flags of ``jaxpaged bench-serve``."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import click

from jaxpaged.app.bench_serve.lengths import (
    DEFAULT,
    OUTPUT_MEAN,
    PROMPT_MEAN,
    SIGMA,
    Lengths,
    ShareGPTLike,
    parse_lengths,
)
from jaxpaged.app.errors import InputError
from jaxpaged.app.flags import AT_LEAST_1, CONTEXT_SIZE, FiniteFloat, Parsed, count_list, flag, name_list
from jaxpaged.app.options import ModelFlags, PageFlags
from jaxpaged.app.server.options import BYTES

VARIANTS = {
    "paged": ("--kv-cache-paged",),
    "contiguous": ("--no-kv-cache-paged",),
    "prefix": ("--kv-cache-paged", "--prefix-cache"),
    "no-prefix": ("--kv-cache-paged", "--no-prefix-cache"),
}
"""Flags of ``jaxpaged serve`` for each variant."""
GOODPUT_METRICS = ("ttft", "tpot", "e2e", "normalized")
_DECIDED = ("--host", "--port", "--api-key", "--api-key-file", "-h", "--help")
"""Flags of the server that the benchmark sets itself, or that end the server before it serves."""
_USUAL_SLOTS = 32
_MOST_CLIENTS = 4096
_SECONDS = FiniteFloat(0, 7 * 86400, above=True)


def _parse_rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(dict.fromkeys(float(word) for word in text.split(",")))
    except ValueError:
        raise ValueError(f"{text!r} is not a list of numbers such as 0.5,2") from None
    if not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise ValueError(f"{text!r}: requests a second are above 0")
    return rates


def _parse_goodput(text: str) -> tuple[tuple[str, float], ...]:
    """Limits such as ``ttft:500 tpot:50``, in milliseconds."""
    limits: dict[str, float] = {}
    for word in re.split(r"[\s,]+", text.strip()):
        name, _, number = word.partition(":")
        try:
            limits[name] = float(number)
        except ValueError:
            raise ValueError(f"{word!r} is not a limit such as ttft:500") from None
        if name not in GOODPUT_METRICS or not 0 < limits[name] < math.inf:
            raise ValueError(f"{word!r} is not one of {', '.join(GOODPUT_METRICS)} with milliseconds")
    return tuple(limits.items())


def _result_file(*suffixes: str) -> Parsed:
    """A file that can be written, checked before anything is measured; its name has one of ``suffixes``, if any."""

    def parse(text: str) -> Path:
        path = Path(text)
        if suffixes and path.suffix.lower() not in suffixes:
            raise ValueError(f"{text}: the name must end in {' or '.join(suffixes)}")
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK) or path.is_dir():
            raise ValueError(f"{text}: cannot be written")
        return path

    return Parsed("file", parse)


_theirs = partial(flag, "A server that runs")
_own = partial(flag, "Own servers")
_load = partial(flag, "Load")
_work = partial(flag, "Workload")
_limit = partial(flag, "Limits")
_output = partial(flag, "Output")


@dataclass(frozen=True, kw_only=True)
class BenchServeOptions(PageFlags, ModelFlags):
    """One run of ``jaxpaged bench-serve``."""

    url: str | None = _theirs(
        "--url",
        "Measure this OpenAI-compatible server (jaxpaged, llama-server, vLLM, ...) by its /v1/completions.",
        metavar="URL",
    )
    api_key: str | None = _theirs(
        "--api-key",
        "Sent as a bearer token.  [default: the environment's JAXPAGED_API_KEY]",
        envvar="JAXPAGED_API_KEY",
        metavar="KEY",
    )
    served_model: str | None = _theirs(
        "--served-model", "Model name in requests.  [default: the first of /v1/models]", metavar="NAME"
    )
    allow_remote: bool = _theirs(
        "--allow-remote", "Allow --url on another machine, which you may load.", False
    )
    compare: tuple[str, ...] = _own(
        "--compare",
        f"Servers to start, one at a time: {', '.join(VARIANTS)}. contiguous gets as many slots of -c tokens "
        "as --kv-memory holds, at most -np; prefix and no-prefix are paged with and without the prefix cache.",
        ("paged", "contiguous"),
        name_list(tuple(VARIANTS)),
        metavar="NAME,...",
    )
    kv_memory: int | None = _own(
        "--kv-memory", "Memory for keys and values of each server, such as 64M.", type=BYTES, metavar="SIZE"
    )
    parallel: int | None = _own(
        "-np, --parallel",
        "Sequences at once.  [default: the most --clients]",
        type=click.IntRange(1, _MOST_CLIENTS),
    )
    batch_size: int | None = _own("-b, --batch-size", "Tokens of a step.", type=AT_LEAST_1)
    server_args: str = _own(
        "--server-args",
        "More flags of jaxpaged serve, in one word: --server-args '--decode-steps 4'.",
        "",
        show_default=False,
        metavar="'FLAGS'",
    )
    start_timeout: float = _own("--start-timeout", "Time to load and compile.", 600.0, _SECONDS, metavar="S")
    clients: tuple[int, ...] = _load(
        "--clients",
        "Closed loop: each client sends its next request when the one before is answered.",
        (1, 2, 4, 8, 16, 32),
        count_list(1),
        metavar="N,...",
    )
    rates: tuple[float, ...] = _load(
        "--rate",
        "Open loop instead: requests a second, arriving as a Poisson process.",
        (),
        Parsed("rate,rate,...", _parse_rates),
        metavar="R,...",
    )
    requests: int | None = _load(
        "--requests",
        "Requests of each level of load.  [default: 4 a client, at least 16; 64 with --rate]",
        type=click.IntRange(1, 100_000),
    )
    warmup: int = _load("--warmup", "Short requests before the first level.", 4, click.IntRange(0, 256))
    repetitions: int = _load(
        "-r, --repetitions",
        "Repetitions of everything, servers in turns; tables have medians.",
        1,
        click.IntRange(1, 100),
    )
    lengths: Lengths = _work(
        "--lengths",
        f"Prompt and output tokens. sharegpt-like[:SCALE]: lognormal, means {PROMPT_MEAN:.0f} and "
        f"{OUTPUT_MEAN:.0f} times SCALE, sigma {SIGMA:g}, clipped to the context. uniform:LOW:HIGH: each of "
        "both. fixed:PROMPT:OUTPUT.",
        ShareGPTLike(),
        Parsed("lengths", parse_lengths),
        show_default=DEFAULT,
        metavar="DISTRIBUTION",
    )
    shared_prefix: int = _work(
        "--shared-prefix", "Tokens that all prompts of a level of load begin with.", 0, CONTEXT_SIZE
    )
    ctx_size: int = _work(
        "-c, --ctx-size",
        "Tokens of prompt and output together, and the context of own servers.  [default: the server's]",
        0,
        CONTEXT_SIZE,
        show_default=False,
    )
    vocab: int | None = _work(
        "--vocab",
        "Token ids are sampled below N.  [default: what /v1/models says]",
        type=click.IntRange(2, 2**24),
    )
    seed: int = _work(
        "-s, --seed",
        "Seed of lengths, tokens and arrivals: the same seed gives the same requests.",
        0,
        click.IntRange(0, 2**32 - 1),
        metavar="S",
    )
    timeout: float = _limit("--timeout", "Time limit of a request.", 600.0, _SECONDS, metavar="S")
    time_limit: float = _limit(
        "--time-limit",
        "Time limit of a level of load; requests not answered by then are errors.",
        1800.0,
        _SECONDS,
        metavar="S",
    )
    retries: int = _limit(
        "--retries",
        "Retries of a request refused with 429 or 503, after the Retry-After (10 s at most).",
        100,
        click.IntRange(0, 10_000),
    )
    goodput: tuple[tuple[str, float], ...] = _output(
        "--goodput",
        "Count requests within limits in ms: 'ttft:500 tpot:50'; also e2e, and normalized (e2e by output "
        "tokens). The comparison at equal latency uses them, too.",
        (),
        Parsed("limits", _parse_goodput),
        metavar="'LIMITS'",
    )
    logprobs: bool = _output(
        "--logprobs",
        "Ask for log-probabilities, which say how many tokens a chunk has; costs the server a little.",
        False,
    )
    output: Path | None = _output(
        "-o, --output", "Write everything as JSON.", type=_result_file(), metavar="FILE"
    )
    as_json: bool = _output("--json", "Print the JSON instead of the tables.", False)
    plot: Path | None = _output(
        "--plot", "Draw it, .svg or .png.", type=_result_file(".svg", ".png"), metavar="FILE"
    )

    @property
    def limits(self) -> dict[str, float]:
        """Limits of the goodput, in milliseconds."""
        return dict(self.goodput)

    def check(self, written: Callable[[str], tuple[str, ...]]) -> None:
        """Refuses flags that contradict each other; ``written`` gives the flags under a heading that were given.

        Raises:
          InputError: they do.
        """
        own = [*written("Model"), *written("Own servers"), *written("KV cache")]
        theirs = written("A server that runs")
        if self.url is not None and own:
            raise InputError(f"{own[0]} is for servers that this command starts; {self.url} runs already")
        if self.url is None and theirs:
            raise InputError(f"{theirs[0]} is for a server that runs already; --url says where")
        if written("Load") == ("--clients", "--rate"):
            raise InputError("--clients and --rate are two kinds of load; give one of them")
        if self.url is None and self.kv_memory is None and {"paged", "contiguous"} <= set(self.compare):
            raise InputError(
                "--kv-memory is missing: paged and contiguous are compared with the same bytes, such as 64M"
            )
        _ = self.server_flags  # refuses --server-args

    @property
    def server_flags(self) -> tuple[str, ...]:
        """Flags of every server that is started."""
        slots = self.parallel or (_USUAL_SLOTS if self.rates else max(self.clients))
        flags = [f"--parallel={slots}"]
        passed = {field.name for cls in (ModelFlags, PageFlags) for field in fields(cls)}
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default and field.name in {*passed, "batch_size", "ctx_size", "kv_memory"}:
                name = next(n for n in field.metadata["flag"][1] if n.startswith("--")).partition("/")[0]
                flags.append(name if value is True else f"{name}={value}")
        return (*flags, *_words(self.server_args))


def _words(server_args: str) -> list[str]:
    try:
        words = shlex.split(server_args)
    except ValueError as error:
        raise InputError(f"--server-args {server_args!r}: {error}") from None
    for word in words:
        if word.partition("=")[0].replace("_", "-") in _DECIDED:
            raise InputError(
                f"--server-args: {word} is not for you to choose here; --url measures a server of yours"
            )
    return words
