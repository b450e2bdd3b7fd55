"""Memory and speed of a model by the format of its pages.

    python -m tpu_scripts.bench.formats
    python -m tpu_scripts.bench.formats -m Llama-3-8B -b 8 --live 4000 --formats bf16,q8_0,q4_0

Needs: jax for the device, and the model's libraries (pip install -e ".[model,tpu]", ".[model,cuda13]" or ".[model]").
Weights are random, of a named shape. k/v names one format for keys and one for values.

"bytes" are those of one token in all layers, keys and values, from the arrays of the pool. "generation" is the decode
steps of one chunk of the loop inside ``generate``, all sequences together, each behind so many live tokens; "prompt" is
the prefill of a prompt in every sequence, quantizing included. Measured in turns; the ratios to f32 and to f16 are
medians of the ratios of each round. The context is filled by reserving slots over random keys and values, which costs
no forward pass and does not change the time of a step.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

import jax
from jaxpaged_model.llama import functional, random_params

from jaxpaged import generate_stream
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
from tpu_scripts.common import Parser, each, known, mebibytes, natural, note, on_cpu, positive

_BASES = ("f32", "f16")


def page_formats(text: str) -> tuple[str, dict[str, str]]:
    """Parses "q8_0/q4_0" into itself and the options of a cache."""
    k, _, v = text.partition("/")
    parse = known("format", PAGE_FORMATS)
    return text, {"k_dtype": parse(k), "v_dtype": parse(v or k)}


def rates_of(args: argparse.Namespace, create: Any, chosen: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Tokens per second of each round, by test and format."""
    config = MODEL_SHAPES[args.model]
    dtype = PAGE_FORMATS[args.dtype].dtype
    params, model = random_params(config, dtype=dtype), functional(config, dtype)
    measures: dict[str, dict[str, Any]] = {"generation": {}, "prompt": {}}
    for name, options in chosen.items():
        note(f"compiling: {name}")
        pool = Pool(with_noise(create(**options)))
        if args.live:
            steps = {"max_new_tokens": args.steps + 1, "every": args.steps, "batch_size": args.batch}
            stream = generate_stream(model, params, pool.cache, [[1]] * args.batch, **steps)
            rate = partial(generation_rate, depth=args.live)
            measures["generation"][name] = partial(pool.lend, stream, rate)
        if args.prompt:
            prompts = prompts_of(config, args.batch, args.prompt)
            stream = generate_stream(model, params, pool.cache, prompts, max_new_tokens=1)
            rate = partial(prompt_rate, length=args.prompt)
            measures["prompt"][name] = partial(pool.lend, stream, rate)
    for by_format in measures.values():
        common.in_turns(by_format, 1)  # compiles
    return {
        test: common.in_turns(by_format, args.repeat) for test, by_format in measures.items() if by_format
    }


def main() -> None:
    parser = Parser(__doc__, page_size=32, repeat=5, json=None)
    models = f"shape of the model, one of {', '.join(MODEL_SHAPES)}"
    parser.add("-m --model", models, known("model", MODEL_SHAPES), "SmolLM2-135M")
    parser.add("-b --batch", "sequences", positive, 8)
    parser.add("--live", "live tokens per sequence while it generates; 0: skip", natural, 4000)
    parser.add("-p --prompt", "tokens of the prompt to prefill; 0: skip", natural, 512)
    parser.add(
        "--formats", "of pages, such as f32,q8_0,q8_0/q4_0", each(page_formats), ",".join(PAGE_FORMATS)
    )
    weights = "f32" if on_cpu() else "bf16"
    parser.add("--dtype", "of weights", default=weights, choices=("f32", "bf16", "f16"))
    parser.add("-n --steps", "decode steps of a measurement", positive, 16)
    args = parser.parse()
    chosen = dict(args.formats)
    context = max(args.live + args.steps, args.prompt) + 1
    create = partial(make_cache, "paged", MODEL_SHAPES[args.model], args.batch, context, args.page_size)
    try:
        sizes = {name: jax.eval_shape(partial(create, **options)) for name, options in chosen.items()}
    except ValueError as error:
        parser.error(str(error))
    if num_bytes(sizes) > free_memory():
        free = f"{mebibytes(free_memory())} are free"
        parser.error(f"the pages of all formats take {mebibytes(num_bytes(sizes))} MiB, {free}")
    rates = rates_of(args, create, chosen)

    print(
        f"{args.model}; {common.device()}; pages of {args.page_size}; batch {args.batch}; generation behind "
        f"{args.live:,} live tokens, prompts of {args.prompt}; tokens per second, medians of {args.repeat} rounds\n"
    )
    bases = [base for base in _BASES if base in chosen]
    heads = ["format", "bytes"]
    for test in rates:
        heads += [test, *(f"/ {base}" for base in bases)]
    print(common.head(*heads))
    rows: list[dict[str, Any]] = []
    for name in chosen:
        row: dict[str, Any] = {"format": name, "bytes": sizes[name].bytes_per_page / args.page_size}
        cells = [name, f"{row['bytes']:,.0f}"]
        for test, found in rates.items():
            row[test] = found[name]
            cells.append(f"{statistics.median(found[name]):,.1f}")
            cells += [f"{common.median_ratio(found[name], found[base]):.2f}" for base in bases]
        rows.append(row)
        print(common.row(*cells))
    values = {"model": args.model, "page_size": args.page_size, "batch": args.batch, "rows": rows}
    common.write_json(args.json, values)


if __name__ == "__main__":
    main()
