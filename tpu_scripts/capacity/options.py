"""Command line of ``tpu_scripts.capacity``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from jaxpaged_model.config import ModelConfig

from jaxpaged.pages.formats import formats_of
from tpu_scripts.capacity.chips import CHIPS, MODELS, Assumptions, Chip, model_shape
from tpu_scripts.capacity.load import Load
from tpu_scripts.capacity.search import Search, Server, Targets
from tpu_scripts.common import Parser, each, from_options, known, number, positive

_chip = known("chip", CHIPS)


@dataclass(frozen=True)
class Question:
    """The parsed command line."""

    config: ModelConfig
    chips: tuple[Chip, ...]
    tensors: tuple[int, ...]
    search: Search
    server: Server
    assumed: Assumptions
    prices: dict[str, float]
    """Prices of an hour, by name of the chip."""
    day: tuple[str, int] | None
    """Chip and devices of the replica to simulate for a day."""
    json: Path | None
    plot: Path | None


def _price(text: str) -> tuple[str, float]:
    name, _, price = text.partition("=")
    return _chip(name), number(0, 1e6)(price)


def _day(text: str) -> tuple[str, int]:
    name, _, tensor = text.partition(":")
    return _chip(name), positive(tensor)


def _parser(description: str | None) -> Parser:
    parser = Parser(description, json=None, plot=None)
    models = f"{', '.join(MODELS)}, or a GGUF file, Hugging Face folder or config.json"
    parser.add("-m --model", models, str, "llama-3.1-70b")
    parser.add("--chips", "chips to compare", each(_chip), list(CHIPS))
    devices = "numbers of JAX devices that split the model; a tpu7x chip is two devices"
    parser.add("--tp", devices, each(positive), [1, 2, 4, 8, 16])
    parser.add("--price", "prices of an hour, such as v6e=2,h100=3, in any currency", each(_price))
    day = "replica to simulate for a day for --plot and --json, such as v6e:8 (default with --plot: the cheapest)"
    parser.add("--day", day, _day)
    parser.group("load")
    parser.add_fields(Load)
    parser.group("targets")
    parser.add_fields(Targets)
    parser.add_fields(Search)
    parser.group("server, as in jaxpaged serve")
    parser.add_fields(Server)
    parser.flag("--no-prefix-cache", "share no pages")
    parser.group("assumptions that no data sheet has, measured nowhere")
    parser.add_fields(Assumptions)
    return parser


def asked(description: str | None) -> Question:
    """Parses the command line; bad input ends the program with one line and status 2."""
    parser = _parser(description)
    args = parser.parse()
    server = dataclasses.replace(from_options(Server, args), prefix_cache=not args.no_prefix_cache)
    try:
        config = model_shape(args.model)
        for storage in formats_of(server.k_format, server.k_format, server.v_format):
            storage.check(server.page_size, config.head_dim)
    except ValueError as error:  # ModelError is one
        parser.error(str(error))
    load = from_options(Load, args)
    if load.longest > config.context_length:
        parser.error(
            f"the longest request has {load.longest} tokens (--prefix-tokens, --prompt, --output), the model's context "
            f"{config.context_length}"
        )
    if args.day and not (args.day[0] in args.chips and args.day[1] in args.tp):
        parser.error(f"--day {args.day[0]}:{args.day[1]} is not among --chips and --tp")
    return Question(
        config=config,
        chips=tuple(CHIPS[name] for name in args.chips),
        tensors=tuple(args.tp),
        search=from_options(Search, args, load=load, targets=from_options(Targets, args)),
        server=server,
        assumed=from_options(Assumptions, args),
        prices=dict(args.price or ()),
        day=args.day,
        json=args.json,
        plot=args.plot,
    )
