"""What ``plan_capacity`` is asked, from its flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jaxpaged_model.config import ModelConfig

from jaxpaged.pages.formats import check_page_size, formats_of
from tpu_scripts.capacity.chips import CHIPS, MODELS, Assumptions, Chip, model_shape
from tpu_scripts.capacity.load import Lengths, Load
from tpu_scripts.capacity.search import Search, Server, Targets
from tpu_scripts.common import Parser, add_json, check_writable, need, positive, positives


@dataclass(frozen=True)
class Question:
    """What is to be calculated, and where it goes."""

    config: ModelConfig
    chips: tuple[Chip, ...]
    tensors: tuple[int, ...]
    search: Search
    server: Server
    assumed: Assumptions
    prices: dict[str, float]
    """Of an hour of a chip, by its name."""
    day: tuple[str, int] | None
    """Chip and devices whose day is wanted."""
    json: Path | None
    plot: Path | None


def number(low: float, high: float, unit: float = 1.0) -> Callable[[str], float]:
    """A parser of numbers from ``low`` to ``high``, which multiplies by ``unit``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a number from {low:g} to {high:g}, got {text!r}")
        return value * unit

    return parse


_share = number(0.01, 1)


def _lengths(text: str) -> Lengths:
    parts = text.split(":")
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"must be MEDIAN:SIGMA:MOST, such as 800:1:4096, got {text!r}")
    return Lengths(number(1, 1e6)(parts[0]), number(0, 3)(parts[1]), positive(parts[2]))


def _chip(name: str) -> Chip:
    if name not in CHIPS:
        raise argparse.ArgumentTypeError(f"unknown chip {name!r}; there are {', '.join(CHIPS)}")
    return CHIPS[name]


def _chips(text: str) -> tuple[Chip, ...]:
    return tuple(_chip(name) for name in text.split(","))


def _prices(text: str) -> dict[str, float]:
    pairs = (part.partition("=") for part in text.split(","))
    return {_chip(name).name: number(0, 1e6)(price) for name, _, price in pairs}


def _day(text: str) -> tuple[str, int]:
    name, _, tensor = text.partition(":")
    return _chip(name).name, positive(tensor)


def _parser(description: str | None) -> Parser:
    assumed, load, server, targets = Assumptions(), Load(), Server(), Targets()
    made = Parser(description)
    add = made.add_argument
    add("-m", "--model", default="llama-3.1-70b", metavar="NAME|FILE",
        help=f"{', '.join(MODELS)}, or the shape of a GGUF file, a Hugging Face folder or a config.json "
             "(default: llama-3.1-70b)")  # fmt: skip
    add("--chips", metavar="NAMES", type=_chips, default=tuple(CHIPS.values()),
        help=f"such as v6e,h100 (default: {','.join(CHIPS)})")  # fmt: skip
    add("--tp", type=positives, default=[1, 2, 4, 8, 16], metavar="N",
        help="JAX devices that split the model, each tried (default: 1,2,4,8,16); "
             "a tpu7x chip is two devices")  # fmt: skip
    add = made.add_argument_group("the load").add_argument
    add("--requests", type=number(1, 1e9), default=load.per_day, metavar="N", help="a day (default: 1000000)")
    add("--peak", type=number(1, 24), default=load.peak, metavar="X",
        help=f"the highest rate of the day over the mean one (default: {load.peak:g})")  # fmt: skip
    add("--peak-hour", type=number(0, 24), default=load.peak_hour, metavar="H",
        help=f"when that is (default: {load.peak_hour:g})")  # fmt: skip
    add("--prompt", type=_lengths, default=load.prompt, metavar="MEDIAN:SIGMA:MOST",
        help="tokens that a request has for itself, lognormal (default: 800:1:4096)")  # fmt: skip
    add("--output", type=_lengths, default=load.output, metavar="MEDIAN:SIGMA:MOST",
        help="tokens to generate, lognormal (default: 250:0.8:2048)")  # fmt: skip
    add("--shared", type=number(0, 1), default=load.shared, metavar="SHARE",
        help=f"of the requests begins with a system prompt (default: {load.shared:g})")  # fmt: skip
    add("--prefixes", type=positive, default=load.prefixes, metavar="N",
        help=f"system prompts, each as likely (default: {load.prefixes})")  # fmt: skip
    add("--prefix-tokens", type=positive, default=load.prefix_tokens, metavar="P",
        help=f"of each (default: {load.prefix_tokens})")  # fmt: skip
    add("--ttft", type=number(1, 1e6, 1e-3), default=targets.ttft, metavar="MS",
        help=f"target: p95 time to the first token (default: {1e3 * targets.ttft:g})")  # fmt: skip
    add("--tpot", type=number(0.1, 1e5, 1e-3), default=targets.tpot, metavar="MS",
        help=f"target: p95 time per output token behind it (default: {1e3 * targets.tpot:g})")  # fmt: skip
    add("--window", type=number(1, 1440, 60), default=1800.0, metavar="MINUTES",
        help="around the peak, in which the targets are to be met (default: 30)")  # fmt: skip
    add("--seed", type=int, default=load.seed, help="of the draws (default: 0)")
    add = made.add_argument_group("the server, as jaxpaged serve has it").add_argument
    add("-np", "--parallel", type=positive, default=server.slots, metavar="N",
        help=f"sequences at once of a replica (default: {server.slots})")  # fmt: skip
    add("-b", "--batch-size", type=positive, default=server.batch_tokens, metavar="N",
        help=f"tokens of a step (default: {server.batch_tokens})")  # fmt: skip
    add("--decode-steps", type=positive, default=server.decode_steps, metavar="N",
        help=f"between two looks at the queue, at most (default: {server.decode_steps})")  # fmt: skip
    add("--page-size", type=positive, default=server.page_size, metavar="N",
        help=f"tokens of a page (default: {server.page_size})")  # fmt: skip
    add("-ctk", "--cache-type-k", default=server.k_format, metavar="FORMAT",
        help="pages of keys: bf16, q8_0, fp8_e4m3, q4_0, ... (default: bf16)")  # fmt: skip
    add("-ctv", "--cache-type-v", metavar="FORMAT", help="pages of values (default: as keys)")
    add("--no-prefix-cache", action="store_true", help="share no pages")
    add = made.add_argument_group("assumptions that no data sheet has, measured nowhere").add_argument
    add("--weight-bits", type=number(1, 32), default=assumed.weight_bits, metavar="BITS",
        help=f"of a parameter, in memory and when read (default: {assumed.weight_bits:g}); below 16 is a what-if: this "
             "project keeps weights quantized in memory on CPUs alone")  # fmt: skip
    add("--utilization", type=_share, default=assumed.utilization, metavar="SHARE",
        help=f"of the memory, for weights and pages (default: {assumed.utilization:g})")  # fmt: skip
    add("--memory-efficiency", type=_share, default=assumed.memory_efficiency, metavar="SHARE",
        help=f"of the memory's bandwidth (default: {assumed.memory_efficiency:g})")  # fmt: skip
    add("--compute-efficiency", type=_share, default=assumed.compute_efficiency, metavar="SHARE",
        help=f"of the peak of operations (default: {assumed.compute_efficiency:g})")  # fmt: skip
    add("--link-efficiency", type=_share, default=assumed.link_efficiency, metavar="SHARE",
        help=f"of the links' bandwidth (default: {assumed.link_efficiency:g})")  # fmt: skip
    add("--reduce-us", type=number(0, 1e6, 1e-6), default=assumed.reduce_seconds, metavar="US",
        help=f"what an all-reduce takes beside its bytes (default: {1e6 * assumed.reduce_seconds:g})")  # fmt: skip
    add("--host-ms", type=number(0, 1e4, 1e-3), default=assumed.host_seconds, metavar="MS",
        help=f"of the host at each look at the queue (default: {1e3 * assumed.host_seconds:g})")  # fmt: skip
    add("--price", type=_prices, default={}, metavar="CHIP=PRICE,...",
        help="of an hour of a chip, in any currency (default: none)")  # fmt: skip
    add("--day", type=_day, metavar="CHIP:TP",
        help="whose day is simulated too, for --plot and --json (default with --plot: what is cheapest where there are "
             "prices, else what takes the fewest chips)")  # fmt: skip
    add_json(made)
    add("--plot", type=Path, metavar="FILE", help="draw latencies against replicas, and a day; .svg or .png")
    return made


def asked(description: str | None) -> Question:
    """What the command line asks; bad input ends the program with one line and status 2."""
    parser = _parser(description)
    args = parser.parse_args()
    check_writable(parser, args.json, args.plot)
    if args.plot and (missing := need("matplotlib", "--plot", "pip install matplotlib")):
        parser.error(missing)
    values = args.cache_type_v or args.cache_type_k
    try:
        check_page_size(args.page_size)
        config = model_shape(args.model)
        for storage in formats_of(args.cache_type_k, args.cache_type_k, values):
            storage.check(args.page_size, config.head_dim)
    except ValueError as error:  # ModelError is one
        parser.error(str(error))
    load = Load(
        args.requests, args.peak, args.peak_hour, args.prompt, args.output, args.shared, args.prefixes,
        args.prefix_tokens, args.seed,
    )  # fmt: skip
    if load.longest > config.context_length:
        parser.error(
            f"the longest request has {load.longest} tokens (--prefix-tokens, --prompt, --output), the model's context "
            f"{config.context_length}"
        )
    if args.day and not (args.day[0] in {chip.name for chip in args.chips} and args.day[1] in args.tp):
        parser.error(f"--day {args.day[0]}:{args.day[1]} is not among --chips and --tp")
    return Question(
        config=config,
        chips=args.chips,
        tensors=tuple(args.tp),
        search=Search(load, Targets(args.ttft, args.tpot), args.window),
        server=Server(
            args.cache_type_k, values, args.page_size, args.parallel, args.batch_size, args.decode_steps,
            not args.no_prefix_cache,
        ),
        assumed=Assumptions(
            args.memory_efficiency, args.compute_efficiency, args.link_efficiency, args.reduce_us, args.host_ms,
            args.weight_bits, args.utilization,
        ),
        prices=args.price,
        day=args.day,
        json=args.json,
        plot=args.plot,
    )  # fmt: skip
