"""Tokens a second, paged against contiguous, over batch sizes and live contexts.

    python -m tpu_scripts.bench.paged_vs_contiguous

Both caches run the same model in one process, in turns, so that a machine's changing speed hits both alike. The context
is filled by reserving slots over random keys and values, which costs no forward pass and changes no time. Compile time
is not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jaxpaged_model.checkpoint.loading import load_model
from jaxpaged_model.llama import functional, random_params

from jaxpaged import GenerateStream, generate_stream
from tpu_scripts.common import SMOLLM2_135M, generation_rate, make_cache, prompt_rate, with_noise


def numbers(text: str) -> list[int]:
    """The positive numbers of a list like "1,4,8"."""
    return [int(x) for x in text.split(",") if int(x) > 0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-m", "--model", type=Path, help="a GGUF file or Hugging Face folder (default: random weights)"
    )
    parser.add_argument("-b", "--batch", default="1,4,8")
    parser.add_argument("--live", default="128,700,4000", help="live tokens of each sequence; 0 = none")
    parser.add_argument("-p", "--prompt", default="128,700,4000", help="prompt lengths to prefill; 0 = none")
    parser.add_argument("-c", "--context", type=int, default=4096)
    parser.add_argument("-n", "--steps", type=int, default=24, help="decode steps of one measurement")
    parser.add_argument("-r", "--repeat", type=int, default=5)
    parser.add_argument("--page-size", type=int, default=32)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()

    if args.model is None:
        config, params = SMOLLM2_135M, random_params(SMOLLM2_135M)
        model = functional(config)
    else:
        loaded = load_model(args.model)
        config, params, model = loaded.config, loaded.params, loaded.function

    def rate_of(
        measure: Callable[[GenerateStream, int], float],
        streams: dict[str, GenerateStream],
        tokens: int,
        kind: str,
    ) -> float:
        return measure(streams[kind], tokens)

    kinds = ("paged", "contiguous")
    rows = []
    print(
        f"{config.name}; {jax.devices()[0].device_kind}, jax {jax.__version__}; context {args.context}, pages of "
        f"{args.page_size}; median of {args.repeat} runs in turns\n"
    )
    print("| test | batch | tokens | paged t/s | contiguous t/s | paged / contiguous |")
    print("|---|---:|---:|---:|---:|---:|", flush=True)

    def report(test: str, batch: int, tokens: int, measure: Callable[[str], float]) -> None:
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(args.repeat):
            for kind in kinds:
                rates[kind].append(measure(kind))
        ratio = statistics.median(p / c for p, c in zip(rates["paged"], rates["contiguous"], strict=True))
        paged, contiguous = (statistics.median(rates[kind]) for kind in kinds)
        rows.append({"test": test, "batch": batch, "tokens": tokens, "ratio": ratio, "rates": rates})
        print(f"| {test} | {batch} | {tokens} | {paged:.1f} | {contiguous:.1f} | {ratio:.2f} |", flush=True)

    for batch in numbers(args.batch):
        streams = {}
        for kind in kinds:
            cache = with_noise(make_cache(kind, config, batch, args.context, args.page_size))
            streams[kind] = generate_stream(
                model,
                params,
                cache,
                [[1]] * batch,
                max_new_tokens=args.steps + 1,
                every=args.steps,
                batch_size=batch,
            )
            streams[kind].compile()
        for live in numbers(args.live):
            report("generation", batch, live, partial(rate_of, generation_rate, streams, live))
    for batch, length in itertools.product(numbers(args.batch), numbers(args.prompt)):
        prompts = [(np.arange(length) % 250).tolist()] * batch
        streams = {}
        for kind in kinds:
            cache = make_cache(kind, config, batch, args.context, args.page_size)
            streams[kind] = generate_stream(model, params, cache, prompts, max_new_tokens=1)
            streams[kind].compile()
        report("prompt", batch, length, partial(rate_of, prompt_rate, streams, length))
    if args.json:
        args.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
