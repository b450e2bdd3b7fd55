"""Prompt-lookup decoding against plain greedy decoding: what is drafted, what is accepted, tokens a second.

    python -m tpu_scripts.bench.speculative

One sequence at a time, in turns, so that a machine's changing speed hits both alike; medians, and the median of the
ratios of the turns. The first step and compilation are not timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxpaged_model import tiny
from jaxpaged_model.checkpoint.loading import LoadedModel, load_model
from jaxpaged_model.tiny.corpus import read_corpus

from jaxpaged import PagedKVCache, generate_stream, lookup_stream

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
_PAGE_SIZE = 32
_FILE_TOKENS = 200


def texts(loaded: LoadedModel) -> dict[str, list[int]]:
    """Prompts by what they are."""
    encode = loaded.tokenizer.encode
    prompts = {"repetitive": encode(_REPETITIVE), "ordinary": encode(_SHORT)}
    files = sorted(read_corpus().held_out.items(), key=lambda item: -len(item[1]))
    return prompts | {
        f"{_FILE_TOKENS} tokens of {name}": encode(text)[:_FILE_TOKENS] for name, text in files[:4]
    }


def empty_cache(loaded: LoadedModel, tokens: int) -> PagedKVCache:
    config, pages = loaded.config, -(-tokens // _PAGE_SIZE)
    return PagedKVCache.create(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_pages=pages,
        max_seqs=1,
        page_size=_PAGE_SIZE,
    )


def rate(stream: Any) -> float:
    """Tokens a second after the first step; the stream's cache is empty before and after."""
    chunks = iter(stream)
    first = len(next(chunks).tokens[0])
    start = time.perf_counter()
    for _ in chunks:
        pass
    return (int(stream.result.num_tokens[0]) - first) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", type=Path, default=tiny.PATH)
    parser.add_argument("-n", "--predict", type=int, default=256)
    parser.add_argument("-k", "--num-draft", type=int, nargs="+", default=[8])
    parser.add_argument("-r", "--repeat", type=int, default=15)
    args = parser.parse_args()
    loaded = load_model(args.model)
    model = loaded.function
    print("| prompt | K | drafted | accepted | steps | plain t/s | lookup t/s | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, ids in texts(loaded).items():
        cache = empty_cache(loaded, len(ids) + args.predict)
        common: dict[str, Any] = {"max_new_tokens": args.predict, "every": args.predict}
        plain = generate_stream(model, loaded.params, cache, [ids], **common)
        plain.compile()
        for num_draft in args.num_draft:
            lookup = lookup_stream(model, loaded.params, plain.cache, [ids], num_draft=num_draft, **common)
            lookup.compile()
            rates: list[tuple[float, float]] = []
            for _ in range(args.repeat):
                one = rate(plain)
                lookup.cache = plain.cache
                rates.append((one, rate(lookup)))
                plain.cache = lookup.cache
            theirs, ours = plain.result, lookup.result
            assert theirs is not None
            assert ours is not None
            if not np.array_equal(theirs.tokens[0], ours.tokens[0]):
                raise SystemExit(f"{name}: the texts differ")
            drafted, accepted = int(ours.drafted[0]), int(ours.accepted[0])
            cells = [
                name,
                str(num_draft),
                str(drafted),
                f"{accepted} ({accepted / max(1, drafted):.0%})",
                f"{int(ours.num_steps[0])} for {int(ours.num_tokens[0])} tokens",
                *(f"{statistics.median(x):.0f}" for x in zip(*rates, strict=True)),
                f"{statistics.median(b / a for a, b in rates):.2f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
