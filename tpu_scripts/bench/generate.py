"""Tokens per second of a whole model on a paged cache, with each implementation of attention.

    python -m tpu_scripts.bench.generate
    python -m tpu_scripts.bench.generate -m Llama-3-8B -b 1,8,64 --live 1024,8192 --implementation mosaic_tpu,xla

Needs: jax for the device, and the model's libraries (pip install -e ".[model,tpu]", ".[model,cuda13]" or ".[model]").
Weights are random, of a named shape, or those of a file; random ones take as long and need no download.

"generation" is the decode steps of one chunk of the loop inside ``generate``, all sequences together, each behind so
many live tokens; the context is filled by reserving slots over random keys and values, which costs no forward pass and
does not change the time of a step. "prompt" is the prefill of a prompt of that length in every sequence. The first
implementation named is the baseline: the last columns are the ratios of the others to it. Measured in turns; compiling
is not timed. JAXPAGED_ATTENTION forces one implementation for any other program in the same way.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jaxpaged_model.checkpoint.loading import load_model, read_config
from jaxpaged_model.config import ModelError
from jaxpaged_model.llama import ModelFn, abstract_params, functional, random_params

from jaxpaged import generate_stream
from jaxpaged.attention.api import VARIABLE
from jaxpaged.generation.stream import GenerateStream
from jaxpaged.pages.formats import PAGE_FORMATS
from tpu_scripts import common
from tpu_scripts.bench.memory import free_memory
from tpu_scripts.bench.models import (
    MODEL_SHAPES,
    Pool,
    generation_rate,
    make_cache,
    num_bytes,
    prompt_rate,
    prompts_of,
    with_noise,
)
from tpu_scripts.common import Parser, each, mebibytes, natural, note, on_cpu, positive


@contextmanager
def forced(implementation: str) -> Iterator[None]:
    """Context in which traced programs compute attention with this implementation."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = implementation
    # A program traced with another implementation must not be reused.
    jax.clear_caches()
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before
        jax.clear_caches()


class Model:
    """A named shape with random weights, or a file, in one dtype."""

    def __init__(self, args: Any, parser: Parser) -> None:
        self.dtype = PAGE_FORMATS[args.dtype].dtype
        self.path = None if args.model in MODEL_SHAPES else Path(args.model)
        if self.path is not None and not self.path.exists():
            shapes = ", ".join(MODEL_SHAPES)
            parser.error(f"unknown model {args.model!r}: no such file, and known shapes are {shapes}")
        try:
            self.config = MODEL_SHAPES[args.model] if self.path is None else read_config(self.path)
        except ModelError as error:
            parser.error(str(error))
        self.name = self.config.name or args.model
        self.num_bytes = num_bytes(abstract_params(self.config, self.dtype))
        self.params: Any = None
        self.function: ModelFn = functional(self.config, self.dtype)

    def load(self) -> None:
        if self.path is None:
            self.params = random_params(self.config, dtype=self.dtype)
        else:
            loaded = load_model(self.path, dtype=self.dtype)
            self.params, self.function = loaded.params, loaded.function


def compile_streams(
    model: Model, cache: Any, names: Sequence[str], prompts: list[list[int]], **options: Any
) -> dict[str, GenerateStream]:
    """Compiles generation with each implementation; prints a line for each that cannot serve."""
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


def measure(
    model: Model, args: Any, test: str, batch: int, sizes: Sequence[int], names: Sequence[str], free: int
) -> Iterator[dict[str, Any]]:
    """Yields the rows of one test and batch, ``sizes`` live or prompt tokens each, with the rates of each round."""
    steps = args.steps if test == "generation" else 0
    create = partial(
        make_cache, "paged", model.config, batch, page_size=args.page_size, dtype=args.cache_dtype
    )
    fitting: dict[int, int] = {}
    for tokens in filter(None, sizes):
        context = -(-(tokens + steps + 1) // args.page_size) * args.page_size
        name = f"{test}, batch {batch}, {tokens:,} tokens"
        needed = num_bytes(jax.eval_shape(partial(create, context)))
        if context > model.config.context_length:
            note(f"left out: {name}: the model's context has {model.config.context_length:,} tokens")
        elif needed > free:
            note(f"left out: {name}: {mebibytes(needed)} MiB of pages, {mebibytes(free)} are free")
        else:
            fitting[tokens] = context
    if not fitting:
        return
    pool = Pool(with_noise(create(max(fitting.values()))))
    compile_it = partial(compile_streams, model, pool.cache, names)
    streams: dict[str, GenerateStream] = {}
    for tokens in fitting:
        if test == "prompt":
            streams = compile_it(prompts_of(model.config, batch, tokens), max_new_tokens=1)
            rate = partial(prompt_rate, length=tokens)
        else:  # one program for every depth: a step's cost follows live tokens, not the size of the cache
            options = {"max_new_tokens": steps + 1, "every": steps, "batch_size": batch}
            streams = streams or compile_it([[1]] * batch, **options)
            rate = partial(generation_rate, depth=tokens)
        if not streams:
            return
        measures = {name: partial(pool.lend, stream, rate) for name, stream in streams.items()}
        common.in_turns(measures, 1)  # warm-up
        rates = common.in_turns(measures, args.repeat)
        yield {"test": test, "batch": batch, "tokens": tokens, "rates": rates}


def cells(row: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Cells of a row: rates, then ratios to the first implementation."""
    rates, first = row["rates"], names[0]
    shown = [f"{statistics.median(rates[name]):,.1f}" if name in rates else "" for name in names]
    ratios = [
        f"{common.median_ratio(rates[name], rates[first]):.2f}" if {name, first} <= set(rates) else ""
        for name in names[1:]
    ]
    return [row["test"], row["batch"], f"{row['tokens']:,}", *shown, *ratios]


def main() -> None:
    parser = Parser(
        __doc__, batch=[1, 8], implementation=None, page_size=32, repeat=5, memory=None, json=None
    )
    shapes = ", ".join(MODEL_SHAPES)
    parser.add("-m --model", f"GGUF file, Hugging Face folder, or shape of {shapes}", str, "SmolLM2-135M")
    parser.add("--live", "live tokens per sequence while it generates; 0: skip", each(natural), [700, 4000])
    parser.add("-p --prompt", "tokens of prompts to prefill; 0: skip", each(natural), [512])
    dtype = "f32" if on_cpu() else "bf16"
    parser.add("--dtype", "of weights and activations", default=dtype, choices=PAGE_FORMATS)
    parser.add("--cache-dtype", "of the pages (default: as --dtype)", choices=PAGE_FORMATS)
    parser.add("-n --steps", "decode steps of a measurement", positive, 24)
    args = parser.parse()
    args.cache_dtype = args.cache_dtype or args.dtype
    if not any(args.live) and not any(args.prompt):
        parser.error("nothing to measure: --live and --prompt are both 0")
    names = common.choose_implementations(parser, args.implementation)
    if args.implementation is None:
        names.sort(key=lambda name: name != "xla")
    model = Model(args, parser)
    free = args.memory << 20 if args.memory else free_memory()
    if model.num_bytes > free:
        needed = f"{mebibytes(model.num_bytes)} MiB in {args.dtype}"
        parser.error(f"the weights of {model.name} take {needed}, {mebibytes(free)} are free")
    model.load()

    print(
        f"{model.name}; {common.device()}; {args.dtype} weights, {args.cache_dtype} pages of {args.page_size}; "
        f"tokens per second, medians of {args.repeat} rounds\n"
    )
    heads = ("test", "batch", "tokens", *names, *(f"{name} / {names[0]}" for name in names[1:]))
    print(common.head(*heads), flush=True)
    rows = []
    for test, sizes in (("generation", args.live), ("prompt", args.prompt)):
        for batch in args.batch:
            for row in measure(model, args, test, batch, sizes, names, free - model.num_bytes):
                rows.append(row)
                print(common.row(*cells(row, names)), flush=True)
    about = {"model": model.name, "dtype": args.dtype, "cache_dtype": args.cache_dtype}
    common.write_json(args.json, {**about, "page_size": args.page_size, "rows": rows})
    if not rows:
        raise SystemExit("nothing was measured")


if __name__ == "__main__":
    main()
