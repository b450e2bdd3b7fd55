"""Tokens per second on a paged and on a contiguous cache, over batch sizes and live contexts.

    python -m tpu_scripts.bench.paged_vs_contiguous

Needs: jax for the device, and pip install -e ".[model]".

Both caches run the same model in one process, in turns. The context is filled by reserving slots over random keys and
values, which costs no forward pass and does not change the time of a step. Compiling is not timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from jaxpaged_model.checkpoint.loading import load_model
from jaxpaged_model.llama import functional, random_params

from jaxpaged import generate_stream
from tpu_scripts import common
from tpu_scripts.bench.models import (
    SMOLLM2_135M,
    generation_rate,
    make_cache,
    prompt_rate,
    prompts_of,
    with_noise,
)
from tpu_scripts.common import Parser, each, natural, positive

_KINDS = ("paged", "contiguous")


def main() -> None:
    parser = Parser(__doc__, model_file=None, batch=[1, 4, 8], page_size=32, repeat=5, json=None)
    parser.add(
        "--live", "live tokens per sequence while it generates; 0: skip", each(natural), [128, 700, 4000]
    )
    parser.add("-p --prompt", "tokens of prompts to prefill; 0: skip", each(natural), [128, 700, 4000])
    parser.add("-c --context", "tokens that a sequence can have", positive, 4096)
    parser.add("-n --steps", "decode steps of a measurement", positive, 24)
    args = parser.parse()
    if args.model is None:
        config, params = SMOLLM2_135M, random_params(SMOLLM2_135M)
        model = functional(config)
    else:
        loaded = load_model(args.model)
        config, params, model = loaded.config, loaded.params, loaded.function
    print(
        f"{config.name}; {common.device()}; context {args.context}, pages of {args.page_size}; "
        f"medians of {args.repeat} rounds\n"
    )
    heads = ("test", "batch", "tokens", "paged t/s", "contiguous t/s", "paged / contiguous")
    print(common.head(*heads), flush=True)
    rows = []

    def compiled(batch: int, prompts: Any, **options: Any) -> dict[str, Any]:
        streams = {}
        for kind in _KINDS:
            cache = with_noise(make_cache(kind, config, batch, args.context, args.page_size))
            streams[kind] = generate_stream(model, params, cache, prompts, **options)
            streams[kind].compile()
        return streams

    def report(test: str, tokens: int, streams: dict[str, Any], rate: Callable[..., float]) -> None:
        batch = streams["paged"].num_samples
        measures = {kind: partial(rate, stream, tokens) for kind, stream in streams.items()}
        rates = common.in_turns(measures, args.repeat)
        ratio = common.median_ratio(rates["paged"], rates["contiguous"])
        rows.append({"test": test, "batch": batch, "tokens": tokens, "ratio": ratio, "rates": rates})
        medians = (f"{statistics.median(rates[kind]):.1f}" for kind in _KINDS)
        print(common.row(test, batch, tokens, *medians, f"{ratio:.2f}"), flush=True)

    for batch in args.batch:
        options = {"max_new_tokens": args.steps + 1, "every": args.steps, "batch_size": batch}
        streams = compiled(batch, [[1]] * batch, **options)
        for live in filter(None, args.live):
            report("generation", live, streams, generation_rate)
    for batch in args.batch:
        for length in filter(None, args.prompt):
            streams = compiled(batch, prompts_of(config, batch, length), max_new_tokens=1)
            report("prompt", length, streams, prompt_rate)
    common.write_json(args.json, {"rows": rows})


if __name__ == "__main__":
    main()
