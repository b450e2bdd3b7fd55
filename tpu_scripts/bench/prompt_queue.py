"""A queue of prompts in one program against static batches that wait for their longest, tokens a second.

    python -m tpu_scripts.bench.prompt_queue

Prompts and outputs have lengths spread exponentially, the same ones each way, and every output runs to its length. The
queue is one call of ``generate`` with all prompts. Static batches are a call for each group of as many prompts as there
are sequences, in order; "sorted" groups them by output length, which nobody knows beforehand. All ways in turns, so
that a machine's changing speed hits them alike; medians. Compilation is not timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxpaged_model import tiny
from jaxpaged_model.checkpoint.loading import LoadedModel, load_model

from jaxpaged import PagedKVCache, generate

_PAGE_SIZE = 32
Texts = dict[int, list[int]]


def lengths(rng: np.random.Generator, mean: int, least: int, count: int) -> list[int]:
    """Spread exponentially, none above four times the mean."""
    return np.clip(rng.exponential(mean, count).round(), least, 4 * mean).astype(int).tolist()


class Workload:
    """Prompts, what is to follow each, and a cache that is handed from run to run."""

    def __init__(self, loaded: LoadedModel, args: argparse.Namespace) -> None:
        rng = np.random.default_rng(args.seed)
        vocab = loaded.config.vocab_size
        self.model, self.params = loaded.function, loaded.params
        self.slots, self.batch_size = args.slots, args.batch_size
        self.outputs = lengths(rng, args.output, 4, args.prompts)
        self.prompts = [
            rng.integers(0, vocab, n).tolist() for n in lengths(rng, args.prompt, 4, args.prompts)
        ]
        # Pages for the longest prompt with the longest output in every sequence: none ever waits for pages.
        pages = -(-4 * (args.prompt + args.output) // _PAGE_SIZE)
        self.cache = PagedKVCache.create(
            num_layers=loaded.config.num_layers,
            num_kv_heads=loaded.config.num_kv_heads,
            head_dim=loaded.config.head_dim,
            num_pages=args.slots * pages,
            max_seqs=args.slots,
            max_pages_per_seq=pages,
            page_size=_PAGE_SIZE,
        )

    def run(self, order: Sequence[int], size: int) -> tuple[Texts, int]:
        """All prompts, in calls of ``size``: what was generated, and how often the model ran."""
        texts: Texts = {}
        steps = 0
        for start in range(0, len(order), size):
            group = order[start : start + size]
            result, self.cache = generate(
                self.model,
                self.params,
                self.cache,
                [self.prompts[i] for i in group],
                max_new_tokens=[self.outputs[i] for i in group],
                batch_size=self.batch_size,
            )
            tokens, counts = np.asarray(result.tokens), np.asarray(result.num_tokens)
            texts |= {i: tokens[row, : counts[row]].tolist() for row, i in enumerate(group)}
            steps += int(result.num_steps)
        return texts, steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", type=Path, default=tiny.PATH)
    parser.add_argument("--prompts", type=int, default=64, help="how many")
    parser.add_argument("--slots", type=int, default=8, help="sequences of the cache")
    parser.add_argument("--prompt", type=int, default=64, help="mean tokens of a prompt")
    parser.add_argument("--output", type=int, default=64, help="mean tokens of an output")
    parser.add_argument("--batch-size", type=int, default=64, help="tokens of a step that reads prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-r", "--repeat", type=int, default=7)
    args = parser.parse_args()
    loaded = load_model(args.model)
    work = Workload(loaded, args)
    everyone = list(range(args.prompts))
    by_length = sorted(everyone, key=lambda i: work.outputs[i])
    ways: dict[str, Callable[[], tuple[Texts, int]]] = {
        "queue": lambda: work.run(everyone, len(everyone)),
        "static": lambda: work.run(everyone, args.slots),
        "static, sorted": lambda: work.run(by_length, args.slots),
    }
    first: dict[str, Any] = {name: way() for name, way in ways.items()}
    for name, (texts, _) in first.items():
        if texts != first["queue"][0]:
            raise SystemExit(f"{name} and queue: the texts differ")
    tokens = sum(work.outputs)
    print(
        f"{loaded.config.name}; {jax.devices()[0].device_kind}, jax {jax.__version__}; {args.prompts} prompts, "
        f"{sum(map(len, work.prompts))} tokens in and {tokens} out, {args.slots} sequences\n"
    )
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeat):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    print("| | runs of the model | tokens generated a second | queue / this |")
    print("|---|---:|---:|---:|")
    for name, times in seconds.items():
        ratio = statistics.median(t / q for t, q in zip(times, seconds["queue"], strict=True))
        print(f"| {name} | {first[name][1]} | {tokens / statistics.median(times):.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
