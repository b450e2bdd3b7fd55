"""Tokens a second of a whole model on a paged cache, with each implementation of attention, in turns.

    python -m tpu_scripts.bench.generate
    python -m tpu_scripts.bench.generate -m Llama-3-8B -b 1,8,64 --live 1024,8192 --implementation mosaic_tpu,xla

Needs: jax for the device, and the model's libraries (pip install -e ".[model,tpu]", ".[model,cuda13]" or ".[model]").
Weights are random, of a named shape, or those of a file; random ones take as long and need no download.

"generation" is the decode steps of one chunk of the jitted loop that generate runs, all sequences together, each behind
so many live tokens; the context is filled by reserving slots over random keys and values, which costs no forward pass
and changes no time. "prompt" is reading a prompt of that length in every sequence. The first implementation named is
"before", each other one is "after": the last columns are their ratios to it, medians of turns. Compiling is not timed.
JAXPAGED_ATTENTION forces one implementation for any other program in the same way.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxpaged_model.checkpoint.loading import load_model, read_config
from jaxpaged_model.config import ModelConfig, ModelError
from jaxpaged_model.llama import ModelFn, abstract_params, functional, random_params

from jaxpaged import GenerateStream, generate_stream
from jaxpaged.attention.api import VARIABLE
from jaxpaged.pages.formats import PAGE_FORMATS, check_page_size
from tpu_scripts.bench.paged_attention import line
from tpu_scripts.common import (
    MODEL_SHAPES,
    Parser,
    add_json,
    check_writable,
    choose_implementations,
    free_memory,
    generation_rate,
    in_turns,
    make_cache,
    mebibytes,
    median_ratio,
    naturals,
    note,
    on_cpu,
    positive,
    positives,
    prompt_rate,
    with_noise,
    write_json,
)


@contextmanager
def forced(implementation: str) -> Iterator[None]:
    """Programs that are traced inside compute attention with this implementation."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = implementation
    # A program that was traced with another implementation must not be found again.
    jax.clear_caches()
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before
        jax.clear_caches()


class Model:
    """A model with weights, in one dtype."""

    def __init__(self, args: Any, parser: Parser) -> None:
        self.dtype = PAGE_FORMATS[args.dtype].dtype
        self.path = None if args.model in MODEL_SHAPES else Path(args.model)
        if self.path is not None and not self.path.exists():
            known = ", ".join(MODEL_SHAPES)
            parser.error(
                f"unknown model {args.model!r}: no file of that name, and of shapes there are {known}"
            )
        try:
            self.config: ModelConfig = (
                MODEL_SHAPES[args.model] if self.path is None else read_config(self.path)
            )
        except ModelError as error:
            parser.error(str(error))
        self.params: Any = None
        self.function: ModelFn = functional(self.config, self.dtype)

    @property
    def bytes(self) -> int:
        known = abstract_params(self.config, self.dtype) if self.params is None else self.params
        leaves = jax.tree.leaves(known)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    def load(self) -> None:
        if self.path is None:
            self.params = random_params(self.config, dtype=self.dtype)
        else:
            loaded = load_model(self.path, dtype=self.dtype)
            self.params, self.function = loaded.params, loaded.function


def compile_streams(
    model: Model, cache: Any, names: Sequence[str], prompts: list[list[int]], **options: Any
) -> dict[str, GenerateStream]:
    """The generation with each implementation; a line for each that cannot serve."""
    streams = {}
    for name in names:
        with forced(name):
            stream = generate_stream(model.function, model.params, cache, prompts, **options)
            try:
                stream.compile()
            except NotImplementedError as reason:
                note(f"left out: {reason}")
                continue
        streams[name] = stream
    return streams


class Pool:
    """One cache that is handed from stream to stream: all of them empty it again."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def lend(self, stream: GenerateStream, measure: Callable[[GenerateStream], float]) -> float:
        stream.cache = self.cache
        rate = measure(stream)
        self.cache = stream.cache
        return rate


def cache_bytes(config: ModelConfig, args: Any, batch: int, context: int) -> int:
    shapes = jax.eval_shape(
        partial(make_cache, "paged", config, batch, context, args.page_size, args.cache_dtype)
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def measure(
    model: Model, args: Any, test: str, batch: int, sizes: Sequence[int], names: Sequence[str], room: int
) -> Iterator[dict[str, Any]]:
    """The rows of one test and batch, ``sizes`` live or prompt tokens each: rates by implementation, turn by turn."""
    steps = args.steps if test == "generation" else 0
    fitting: dict[int, int] = {}
    for tokens in sizes:
        context = -(-(tokens + steps + 1) // args.page_size) * args.page_size
        name = f"{test}, batch {batch}, {tokens:,} tokens"
        needed = cache_bytes(model.config, args, batch, context)
        if context > model.config.context_length:
            note(f"left out: {name}: the model's context has {model.config.context_length:,} tokens")
        elif needed > room:
            note(f"left out: {name}: {mebibytes(needed)} MiB of pages, there is room for {mebibytes(room)}")
        else:
            fitting[tokens] = context
    if not fitting:
        return
    context = max(fitting.values())
    pool = Pool(
        with_noise(make_cache("paged", model.config, batch, context, args.page_size, args.cache_dtype))
    )
    compile_it = partial(compile_streams, model, pool.cache, names)
    streams: dict[str, GenerateStream] = {}
    for tokens in fitting:
        if test == "prompt":
            prompts = [(np.arange(tokens) % min(250, model.config.vocab_size)).tolist()] * batch
            streams = compile_it(prompts, max_new_tokens=1)
            rate = partial(prompt_rate, length=tokens)
        else:  # one program for every depth: a step's cost follows live tokens, not the room for more
            streams = streams or compile_it(
                [[1]] * batch, max_new_tokens=steps + 1, every=steps, batch_size=batch
            )
            rate = partial(generation_rate, depth=tokens)
        if not streams:
            return
        measures = {name: partial(pool.lend, stream, rate) for name, stream in streams.items()}
        in_turns(measures, 1)  # what is only done once
        yield {"test": test, "batch": batch, "tokens": tokens, "rates": in_turns(measures, args.repeat)}


def cells(row: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Of the table: rates, then ratios to the first implementation."""
    rates = row["rates"]
    shown = [f"{statistics.median(rates[name]):,.1f}" if name in rates else "" for name in names]
    first = names[0]
    ratios = [
        f"{median_ratio(rates[name], rates[first]):.2f}" if {name, first} <= set(rates) else ""
        for name in names[1:]
    ]
    return [row["test"], str(row["batch"]), f"{row['tokens']:,}", *shown, *ratios]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "-m", "--model", default="SmolLM2-135M", metavar="NAME|FILE",
        help=f"a GGUF file, a Hugging Face folder, or random weights of {', '.join(MODEL_SHAPES)} "
        "(default: SmolLM2-135M)",
    )  # fmt: skip
    parser.add_argument("-b", "--batch", type=positives, default=[1, 8], help="sequences (default: 1,8)")
    parser.add_argument(
        "--live", type=naturals, default=[700, 4000], metavar="TOKENS",
        help="live tokens of each sequence while it generates; 0 = do not (default: 700,4000)",
    )  # fmt: skip
    parser.add_argument(
        "-p", "--prompt", type=naturals, default=[512], metavar="TOKENS",
        help="lengths of prompts to read; 0 = none (default: 512)",
    )  # fmt: skip
    parser.add_argument(
        "--implementation", metavar="NAMES",
        help="of attention, such as xla,cpu_numba; the others are compared with the first "
        "(default: all that this platform tries, but the specification, xla first)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=PAGE_FORMATS, help="of weights and activations (default: bf16; on CPU f32)"
    )
    parser.add_argument("--cache-dtype", choices=PAGE_FORMATS, help="of the pages (default: as --dtype)")
    parser.add_argument("--page-size", type=positive, default=32, help="tokens of a page (default: 32)")
    parser.add_argument(
        "-n", "--steps", type=positive, default=24, help="decode steps of one measurement (default: 24)"
    )
    parser.add_argument("-r", "--repeat", type=positive, default=5, help="turns (default: 5)")
    parser.add_argument(
        "--memory",
        type=positive,
        metavar="MIB",
        help="use so much (default: what is free; on CPU half of it)",
    )
    add_json(parser)
    args = parser.parse_args()
    args.dtype = args.dtype or ("f32" if on_cpu() else "bf16")
    args.cache_dtype = args.cache_dtype or args.dtype
    try:
        check_page_size(args.page_size)
    except ValueError as error:
        parser.error(str(error))
    if not args.live and not args.prompt:
        parser.error("nothing to measure: --live and --prompt are both 0")
    check_writable(parser, args.json)
    names = choose_implementations(parser, args.implementation)
    if args.implementation is None:
        names.sort(key=lambda name: name != "xla")
    model = Model(args, parser)
    room = (args.memory << 20 if args.memory else free_memory()) - model.bytes
    if room < 0:
        parser.error(
            f"the weights of {model.config.name or args.model} take {mebibytes(model.bytes)} MiB in {args.dtype}, "
            f"{mebibytes(-room)} MiB more than there is room for"
        )
    model.load()

    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(
        f"{model.config.name or args.model}; {device}; {args.dtype} weights, {args.cache_dtype} pages of "
        f"{args.page_size}; tokens a second, medians of {args.repeat} turns\n"
    )
    head = ["test", "batch", "tokens", *names, *(f"{name} / {names[0]}" for name in names[1:])]
    print(line(head))
    print(f"|---|{'---:|' * (len(head) - 1)}", flush=True)
    rows = []
    for test, sizes in (("generation", args.live), ("prompt", args.prompt)):
        for batch in args.batch:
            for row in measure(model, args, test, batch, sizes, names, room):
                rows.append(row)
                print(line(cells(row, names)), flush=True)
    values = {"model": model.config.name or args.model, "dtype": args.dtype, "cache_dtype": args.cache_dtype}
    write_json(args.json, values | {"page_size": args.page_size, "rows": rows})
    if not rows:
        raise SystemExit("nothing was measured")


if __name__ == "__main__":
    main()
