"""The flags of ``jaxpaged bench-serve``, and what they are once checked."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from jaxpaged.app.options import MODEL_OPTIONS, CountList, FiniteFloat, NameList, chain, option, page_options
from jaxpaged.app.server.options import ByteSize

VARIANTS = {
    "paged": ("--kv-cache-paged",),
    "contiguous": ("--no-kv-cache-paged",),
    "prefix": ("--kv-cache-paged", "--prefix-cache"),
    "no-prefix": ("--kv-cache-paged", "--no-prefix-cache"),
}
"""What the server is started with, by the name of the variant."""
GOODPUT_METRICS = ("ttft", "tpot", "e2e", "normalized")
_DECIDED = ("--host", "--port", "--api-key", "--api-key-file", "-h", "--help")
"""Flags of the server that the benchmark gives itself, or that end the server before it serves."""
_MOST_REQUESTS, _MOST_CLIENTS, _LONGEST_SECONDS = 100_000, 4096, 7 * 86400
_AT_LEAST_1 = click.IntRange(min=1)


@dataclass(frozen=True)
class BenchServeOptions:
    """One benchmark, as asked for."""

    url: str | None = None
    """None: servers of its own."""
    api_key: str | None = None
    served_model: str | None = None
    allow_remote: bool = False
    compare: tuple[str, ...] = ("paged", "contiguous")
    server_flags: tuple[str, ...] = ()
    """For every server of its own."""
    start_timeout: float = 600.0
    lengths: Lengths = field(default_factory=ShareGPTLike)
    requests: int | None = None
    """Of a level of load; None: 4 a client, 16 at least."""
    clients: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    rates: tuple[float, ...] = ()
    """Requests a second; none: a closed loop of ``clients``."""
    shared_prefix: int = 0
    ctx_size: int = 0
    """0 = the server's."""
    vocab: int | None = None
    seed: int = 0
    warmup: int = 4
    repetitions: int = 1
    timeout: float = 600.0
    """Seconds of a request."""
    time_limit: float = 1800.0
    """Seconds of a level."""
    retries: int = 100
    goodput: tuple[tuple[str, float], ...] = ()
    logprobs: bool = False
    output: Path | None = None
    as_json: bool = False
    plot: Path | None = None

    @property
    def limits(self) -> dict[str, float]:
        """Of the goodput, in milliseconds."""
        return dict(self.goodput)

    @classmethod
    def of_flags(
        cls,
        *,
        url: str | None,
        written: Callable[[str], tuple[str, ...]],
        kv_memory: int | None,
        parallel: int | None,
        server_args: str,
        **flags: Any,
    ) -> BenchServeOptions:
        """The options of a command line.

        Args:
          written: the flags of a group of the help that stand on the command line.

        Raises:
          InputError: flags that contradict each other.
        """
        passed = {name: flags.pop(name) for name in _PASSED}
        own = [*written("Model"), *written("Own servers"), *written("KV cache")]
        theirs = written("A server that runs")
        if url is not None and own:
            raise InputError(f"{own[0]} is for servers that this command starts; {url} runs already")
        if url is None and theirs:
            raise InputError(f"{theirs[0]} is for a server that runs already; --url says where")
        if written("Load") == ("--clients", "--rate"):
            raise InputError("--clients and --rate are two kinds of load; give one of them")
        compare, rates, clients = flags["compare"], flags["rates"], flags["clients"]
        if url is None and kv_memory is None and {"paged", "contiguous"} <= set(compare):
            raise InputError(
                "--kv-memory is missing: paged and contiguous are compared with the same bytes, such as 64M"
            )
        slots = parallel or (_USUAL_SLOTS if rates else max(clients))
        server_flags: list[str] = [f"--parallel={slots}"]
        for name, flag in _PASSED.items():
            value = passed[name]
            if value is not None and value is not False:
                server_flags.append(flag if value is True else f"{flag}={value}")
        if flags["ctx_size"]:
            server_flags.append(f"--ctx-size={flags['ctx_size']}")
        if kv_memory is not None:
            server_flags.append(f"--kv-memory={kv_memory}")
        return cls(url=url, server_flags=(*server_flags, *_words(server_args)), **flags)


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


_PASSED = {
    "model": "--model", "hf": "--hf-repo", "offline": "--offline", "dtype": "--dtype", "threads": "--threads",
    "weights": "--weights", "exact": "--exact",
    "batch_size": "--batch-size", "page_size": "--page-size", "cache_type_k": "--cache-type-k",
    "cache_type_v": "--cache-type-v", "hadamard": "--hadamard",
}  # fmt: skip
"""Flags that go to ``jaxpaged serve`` as they are, by the names of their values here."""
_USUAL_SLOTS = 32


class LengthsType(click.ParamType):
    """A distribution of lengths."""

    name = "lengths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Lengths:
        if not isinstance(value, str):
            return value
        try:
            return parse_lengths(value)
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


class RateList(click.ParamType):
    """Positive numbers with commas between them."""

    name = "rate,rate,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            rates = tuple(dict.fromkeys(float(word) for word in str(value).split(",")))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0.5,2.", param, ctx)
        if not all(math.isfinite(rate) and rate > 0 for rate in rates):
            self.fail(f"{value!r}: requests a second are above 0.", param, ctx)
        return rates


class GoodputType(click.ParamType):
    """Limits such as ``ttft:500 tpot:50``, in milliseconds."""

    name = "limits"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[str, float], ...]:
        if isinstance(value, tuple):
            return value
        limits: dict[str, float] = {}
        for word in re.split(r"[\s,]+", str(value).strip()):
            name, _, number = word.partition(":")
            try:
                limits[name] = float(number)
            except ValueError:
                self.fail(f"{word!r} is not a limit such as ttft:500.", param, ctx)
            if name not in GOODPUT_METRICS or not 0 < limits[name] < math.inf:
                self.fail(
                    f"{word!r} is not one of {', '.join(GOODPUT_METRICS)} with milliseconds.", param, ctx
                )
        return tuple(limits.items())


class ResultFile(click.ParamType):
    """A file that can be made: its folder is there, and its name ends as it should."""

    name = "file"

    def __init__(self, *suffixes: str) -> None:
        self.suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value)
        if self.suffixes and path.suffix.lower() not in self.suffixes:
            self.fail(f"{value}: the name must end in {' or '.join(self.suffixes)}.", param, ctx)
        # Now, not after an hour of measuring.
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK) or path.is_dir():
            self.fail(f"{value}: cannot be written.", param, ctx)
        return path


BENCH_SERVE_OPTIONS = chain(
    option("A server that runs", "--url", metavar="URL",
           help="Measure this OpenAI-compatible server (jaxpaged, llama-server, vLLM, ...), by its /v1/completions."),
    option("A server that runs", "--api-key", envvar="JAXPAGED_API_KEY", metavar="KEY",
           help="Sent as a bearer token.  [default: the environment's JAXPAGED_API_KEY]"),
    option("A server that runs", "--served-model", metavar="NAME",
           help="The name that requests carry.  [default: the first of /v1/models]"),
    option("A server that runs", "--allow-remote", is_flag=True,
           help="--url may be another machine, which is yours to load."),
    option("Own servers", "--compare", type=NameList(tuple(VARIANTS)), default="paged,contiguous", show_default=True,
           metavar="NAME,...",
           help=f"Servers to start, one at a time: {', '.join(VARIANTS)}. contiguous gets as many slots of -c tokens "
                "as --kv-memory holds, at most -np; prefix and no-prefix are paged with and without the prefix cache."),
    option("Own servers", "--kv-memory", type=ByteSize(), metavar="SIZE",
           help="Memory for keys and values of each server, such as 64M."),
    option("Own servers", "-np", "--parallel", type=click.IntRange(1, _MOST_CLIENTS), metavar="N",
           help="Sequences at once.  [default: the most --clients]"),
    option("Own servers", "-b", "--batch-size", type=_AT_LEAST_1, metavar="N", help="Tokens of a step."),
    option("Own servers", "--server-args", default="", metavar="'FLAGS'",
           help="More flags of jaxpaged serve, in one word: --server-args '--decode-steps 4'."),
    option("Own servers", "--start-timeout", type=FiniteFloat(0, _LONGEST_SECONDS, above=True), default=600.0,
           show_default=True, metavar="S", help="For loading and compiling."),
    *MODEL_OPTIONS,
    page_options(),
    option("Load", "--clients", type=CountList(1), default="1,2,4,8,16,32", show_default=True, metavar="N,...",
           help="Closed loop: each client sends its next request when the one before is answered."),
    option("Load", "--rate", "rates", type=RateList(), default=(), metavar="R,...",
           help="Open loop instead: requests a second, arriving as a Poisson process."),
    option("Load", "--requests", type=click.IntRange(1, _MOST_REQUESTS), metavar="N",
           help="Of each level of load.  [default: 4 a client, 16 at least; 64 with --rate]"),
    option("Load", "--warmup", type=click.IntRange(0, 256), default=4, show_default=True, metavar="N",
           help="Short requests before the first level."),
    option("Load", "-r", "--repetitions", type=click.IntRange(1, 100), default=1, show_default=True, metavar="N",
           help="Of everything, servers in turns; the table has medians."),
    option("Workload", "--lengths", type=LengthsType(), default=DEFAULT, show_default=True, metavar="DISTRIBUTION",
           help=f"Prompt and output tokens. sharegpt-like[:SCALE]: lognormal, means {PROMPT_MEAN:.0f} and "
                f"{OUTPUT_MEAN:.0f} times SCALE, sigma {SIGMA:g}, clipped to the context. uniform:LOW:HIGH: each of "
                "both. fixed:PROMPT:OUTPUT."),
    option("Workload", "--shared-prefix", type=click.IntRange(0, 2**24), default=0, show_default=True, metavar="N",
           help="A system prompt of N tokens before all prompts, another one at each level."),
    option("Workload", "-c", "--ctx-size", type=click.IntRange(0, 2**24), default=0, metavar="N",
           help="Tokens that prompt and output may have, and the context of own servers.  [default: the server's]"),
    option("Workload", "--vocab", type=click.IntRange(2, 2**24), metavar="N",
           help="Token ids are drawn below N.  [default: what /v1/models says]"),
    option("Workload", "-s", "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, metavar="S",
           help="Of lengths, tokens and arrivals: the same seed, the same requests."),
    option("Limits", "--timeout", type=FiniteFloat(0, _LONGEST_SECONDS, above=True), default=600.0, show_default=True,
           metavar="S", help="Of a request."),
    option("Limits", "--time-limit", type=FiniteFloat(0, _LONGEST_SECONDS, above=True), default=1800.0,
           show_default=True, metavar="S", help="Of a level of load; what is not answered then is an error."),
    option("Limits", "--retries", type=click.IntRange(0, 10_000), default=100, show_default=True, metavar="N",
           help="Of a request that is told 429 or 503, after the Retry-After (10 s at most)."),
    option("Output", "--goodput", type=GoodputType(), default=(), metavar="'LIMITS'",
           help="Count requests within limits, in ms: 'ttft:500 tpot:50'; also e2e, and normalized (e2e by output "
                "tokens). The comparison at equal latency takes them, too."),
    option("Output", "--logprobs", is_flag=True,
           help="Ask for log-probabilities, so that each chunk tells its tokens exactly; costs the server a little."),
    option("Output", "-o", "--output", type=ResultFile(), metavar="FILE", help="Write everything as JSON."),
    option("Output", "--json", "as_json", is_flag=True, help="Print the JSON instead of the tables."),
    option("Output", "--plot", type=ResultFile(".svg", ".png"), metavar="FILE", help="Draw it, .svg or .png."),
)  # fmt: skip
"""All the flags of ``jaxpaged bench-serve``; a decorator."""
