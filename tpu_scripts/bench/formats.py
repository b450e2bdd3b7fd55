"""Memory and speed of a model by the format of its pages, in turns.

    python -m tpu_scripts.bench.formats
    python -m tpu_scripts.bench.formats -m Llama-3-8B -b 8 --live 4000 --formats bf16,q8_0,q4_0

Needs: jax for the device, and the model's libraries (pip install -e ".[model,tpu]", ".[model,cuda13]" or ".[model]").
Weights are random, of a named shape. k/v names one format for keys and one for values.

"bytes" are those of one token in all layers, keys and values, from the arrays of the pool. "generation" is the decode
steps of one chunk of the jitted loop that generate runs, all sequences together, each behind so many live tokens;
"prompt" is reading a prompt in every sequence, quantizing included. Medians of turns; the ratios are medians of the
ratios of turns, to f32 and to f16. The context is filled by reserving slots over random keys and values, which costs no
forward pass and changes no time.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxpaged_model.llama import functional, random_params

from jaxpaged import generate_stream
from jaxpaged.pages.formats import PAGE_FORMATS, check_page_size
from tpu_scripts.bench.paged_attention import line
from tpu_scripts.common import (
    MODEL_SHAPES,
    Parser,
    add_json,
    check_writable,
    choose_models,
    free_memory,
    generation_rate,
    in_turns,
    make_cache,
    mebibytes,
    median_ratio,
    natural,
    note,
    on_cpu,
    positive,
    prompt_rate,
    with_noise,
    write_json,
)

_BASES = ("f32", "f16")


def formats(text: str) -> dict[str, dict[str, str]]:
    """What ``--formats`` names: options of a cache by name."""
    found = {}
    for name in text.split(","):
        k, _, v = name.strip().partition("/")
        for one in (k, v or k):
            if one not in PAGE_FORMATS:
                raise ValueError(f"unknown format {one!r}; there are {', '.join(PAGE_FORMATS)}")
        found[name.strip()] = {"k_dtype": k, "v_dtype": v or k}
    return found


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("-m", "--model", default="SmolLM2-135M", help=f"one of {', '.join(MODEL_SHAPES)}")
    parser.add_argument("-b", "--batch", type=positive, default=8, help="sequences (default: 8)")
    parser.add_argument(
        "--live",
        type=natural,
        default=4000,
        help="live tokens of each while it generates; 0 = do not (default: 4000)",
    )
    parser.add_argument(
        "-p",
        "--prompt",
        type=natural,
        default=512,
        help="tokens of the prompt to read; 0 = none (default: 512)",
    )
    parser.add_argument(
        "--formats",
        default=",".join(PAGE_FORMATS),
        help="of pages, such as f32,q8_0,q8_0/q4_0 (default: all)",
    )
    parser.add_argument(
        "--dtype", choices=("f32", "bf16", "f16"), help="of weights (default: bf16; on CPU f32)"
    )
    parser.add_argument("--page-size", type=positive, default=32, help="tokens of a page (default: 32)")
    parser.add_argument(
        "-n", "--steps", type=positive, default=16, help="decode steps of a turn (default: 16)"
    )
    parser.add_argument("-r", "--repeat", type=positive, default=5, help="turns (default: 5)")
    add_json(parser)
    args = parser.parse_args()
    choose_models(parser, [args.model], MODEL_SHAPES)
    check_writable(parser, args.json)
    config = MODEL_SHAPES[args.model]
    context = -(-(max(args.live + args.steps + 1, args.prompt + 1)) // args.page_size) * args.page_size
    try:
        check_page_size(args.page_size)
        chosen = formats(args.formats)
        create = partial(make_cache, "paged", config, args.batch, context, args.page_size)
        sizes = {name: jax.eval_shape(partial(create, **options)) for name, options in chosen.items()}
    except ValueError as error:
        parser.error(str(error))
    dtype = PAGE_FORMATS[args.dtype or ("f32" if on_cpu() else "bf16")].dtype
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(sizes))
    if needed > free_memory():
        parser.error(f"the pages of all formats take {mebibytes(needed)} MiB, more than there is room for")

    params, model = random_params(config, dtype=dtype), functional(config, dtype)
    generation, prompts = {}, {}
    for name, options in chosen.items():
        note(f"compiling: {name}")
        stream = None
        if args.live:
            stream = generate_stream(
                model, params, with_noise(create(**options)), [[1]] * args.batch,
                max_new_tokens=args.steps + 1, every=args.steps, batch_size=args.batch,
            )  # fmt: skip
            generation[name] = partial(generation_rate, stream, args.live)
        if args.prompt:
            words = [(np.arange(args.prompt) % min(250, config.vocab_size)).tolist()] * args.batch
            cache = stream.cache if stream else with_noise(create(**options))
            reader = generate_stream(model, params, cache, words, max_new_tokens=1)
            prompts[name] = partial(_lent, stream, reader, args.prompt)
    for measures in (generation, prompts):
        in_turns(measures, 1)
    rates = {"generation": in_turns(generation, args.repeat), "prompt": in_turns(prompts, args.repeat)}

    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(
        f"{args.model}; {device}; pages of {args.page_size}; batch {args.batch}; generation behind {args.live:,} live "
        f"tokens, prompts of {args.prompt}; tokens a second, medians of {args.repeat} turns\n"
    )
    tests = [test for test, found in rates.items() if found]
    heads = ["format", "bytes"]
    for test in tests:
        heads += [test, *(f"/ {base}" for base in _BASES if base in chosen)]
    print(line(heads))
    print(f"|---|{'---:|' * (len(heads) - 1)}")
    rows: list[dict[str, Any]] = []
    for name in chosen:
        row: dict[str, Any] = {"format": name, "bytes": sizes[name].bytes_per_page / args.page_size}
        cells = [name, f"{row['bytes']:,.0f}"]
        for test in tests:
            found = rates[test]
            row[test] = found[name]
            cells.append(f"{statistics.median(found[name]):,.1f}")
            cells += [f"{median_ratio(found[name], found[base]):.2f}" for base in _BASES if base in chosen]
        rows.append(row)
        print(line(cells))
    write_json(
        args.json, {"model": args.model, "page_size": args.page_size, "batch": args.batch, "rows": rows}
    )


def _lent(owner: Any, reader: Any, length: int) -> float:
    """Reads prompts with the cache of another stream, if there is one: all of them empty it again."""
    if owner is not None:
        reader.cache = owner.cache
    rate = prompt_rate(reader, length)
    if owner is not None:
        owner.cache = reader.cache
    return rate


if __name__ == "__main__":
    main()
