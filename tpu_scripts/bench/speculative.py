"""Prompt-lookup decoding against plain greedy decoding: drafted and accepted tokens, and tokens per second.

    python -m tpu_scripts.bench.speculative

Needs: pip install -e ".[model]".

One sequence at a time, in turns; medians, and the median of the ratios of each round. The first step and compiling are
not timed.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import numpy as np
from jaxpaged_model import tiny
from jaxpaged_model.checkpoint.loading import LoadedModel, load_model
from jaxpaged_model.tiny.corpus import read_corpus

from jaxpaged import generate_stream
from jaxpaged.generation.request import Lookup
from tpu_scripts import common
from tpu_scripts.bench.models import Pool, make_cache
from tpu_scripts.common import Parser, each, positive

_REPETITIVE = """class Point:
    def get_x(self):
        return self._x

    def get_y(self):
        return self._y

    def get_z(self):
        return self._z

    def get_w(self):
"""
_SHORT = '''def parse_header(line):
    """Split a header line into its name and its value."""
'''
_FILE_TOKENS = 200


def texts(loaded: LoadedModel) -> dict[str, list[int]]:
    """Tokens of prompts, by name."""
    encode = loaded.tokenizer.encode
    prompts = {"repetitive": encode(_REPETITIVE), "ordinary": encode(_SHORT)}
    files = sorted(read_corpus().held_out.items(), key=lambda item: -len(item[1]))
    return prompts | {
        f"{_FILE_TOKENS} tokens of {name}": encode(text)[:_FILE_TOKENS] for name, text in files[:4]
    }


def rate(stream: Any) -> float:
    """Tokens per second after the first step; the stream's cache is empty before and after."""
    chunks = iter(stream)
    first = len(next(chunks).tokens[0])
    start = time.perf_counter()
    for _ in chunks:
        pass
    return (int(stream.result.num_tokens[0]) - first) / (time.perf_counter() - start)


def main() -> None:
    parser = Parser(__doc__, model_file=tiny.PATH, repeat=15)
    parser.add("-n --predict", "tokens to generate", positive, 256)
    parser.add("-k --num-draft", "tokens of a draft", each(positive), [8])
    args = parser.parse()
    loaded = load_model(args.model)
    options: dict[str, Any] = {"max_new_tokens": args.predict, "every": args.predict}
    heads = ("prompt", "K", "drafted", "accepted", "steps", "plain t/s", "lookup t/s", "ratio")
    print(common.head(*heads), flush=True)
    for name, ids in texts(loaded).items():
        pool = Pool(make_cache("paged", loaded.config, 1, len(ids) + args.predict))
        plain = generate_stream(loaded.function, loaded.params, pool.cache, [ids], **options)
        plain.compile()
        for num_draft in args.num_draft:
            lookup = generate_stream(
                loaded.function, loaded.params, pool.cache, [ids], lookup=Lookup(num_draft), **options
            )
            lookup.compile()
            ways = {"plain": partial(pool.lend, plain, rate), "lookup": partial(pool.lend, lookup, rate)}
            rates = common.in_turns(ways, args.repeat)
            theirs, ours = plain.result, lookup.result
            assert theirs is not None
            assert ours is not None
            if not np.array_equal(theirs.tokens[0], ours.tokens[0]):
                raise SystemExit(f"{name}: the texts differ")
            drafted, accepted = int(ours.drafted[0]), int(ours.accepted[0])
            share = f"{accepted} ({accepted / max(1, drafted):.0%})"
            steps = f"{int(ours.num_steps)} for {int(ours.num_tokens[0])} tokens"
            medians = (f"{statistics.median(found):.0f}" for found in rates.values())
            ratio = common.median_ratio(rates["lookup"], rates["plain"])
            print(common.row(name, num_draft, drafted, share, steps, *medians, f"{ratio:.2f}"), flush=True)


if __name__ == "__main__":
    main()
