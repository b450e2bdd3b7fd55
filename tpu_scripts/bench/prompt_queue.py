"""Tokens per second of a queue of prompts in one program, against static batches that wait for their longest output.

    python -m tpu_scripts.bench.prompt_queue

Needs: pip install -e ".[model]".

Prompts and outputs have lengths spread exponentially, the same ones each way, and every output runs to its length. The
queue is one call of ``generate`` with all prompts. Static batches are a call for each group of as many prompts as there
are sequences, in order; "sorted" groups them by output length, which nobody knows beforehand. All ways in turns;
medians. Compiling is not timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
from jaxpaged_model import tiny
from jaxpaged_model.checkpoint.loading import LoadedModel, load_model

from jaxpaged import generate
from tpu_scripts import common
from tpu_scripts.bench.models import make_cache
from tpu_scripts.common import Parser, natural, positive

Texts = dict[int, list[int]]


def sample_lengths(rng: np.random.Generator, mean: int, least: int, count: int) -> list[int]:
    """Exponentially distributed lengths of at most four times the mean."""
    return np.clip(rng.exponential(mean, count).round(), least, 4 * mean).astype(int).tolist()


class Workload:
    """Prompts, lengths of their outputs, and a cache that is passed from run to run."""

    def __init__(self, loaded: LoadedModel, args: argparse.Namespace) -> None:
        rng = np.random.default_rng(args.seed)
        vocab = loaded.config.vocab_size
        self.model, self.params = loaded.function, loaded.params
        self.batch_size = args.batch_size
        self.outputs = sample_lengths(rng, args.output, 4, args.prompts)
        lengths = sample_lengths(rng, args.prompt, 4, args.prompts)
        self.prompts = [rng.integers(0, vocab, n).tolist() for n in lengths]
        # Pages for the longest prompt with the longest output in every sequence: none ever waits for pages.
        self.cache = make_cache("paged", loaded.config, args.slots, 4 * (args.prompt + args.output))

    def run(self, order: Sequence[int], size: int) -> tuple[Texts, int, float]:
        """Generates all texts, ``size`` prompts a call; returns them, the number of model runs and the seconds."""
        texts: Texts = {}
        steps, start_time = 0, time.perf_counter()
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
        return texts, steps, time.perf_counter() - start_time


def main() -> None:
    parser = Parser(__doc__, model_file=tiny.PATH, repeat=7)
    parser.add("--prompts", "number of prompts", positive, 64)
    parser.add("--slots", "sequences of the cache", positive, 8)
    parser.add("--prompt", "mean tokens of a prompt", positive, 64)
    parser.add("--output", "mean tokens of an output", positive, 64)
    parser.add("--batch-size", "tokens of a prefill step", positive, 64)
    parser.add("--seed", "of the lengths and prompts", natural, 0)
    args = parser.parse()
    loaded = load_model(args.model)
    work = Workload(loaded, args)
    in_order = list(range(args.prompts))
    by_length = sorted(in_order, key=lambda i: work.outputs[i])
    ways = {
        "queue": partial(work.run, in_order, args.prompts),
        "static": partial(work.run, in_order, args.slots),
        "static, sorted": partial(work.run, by_length, args.slots),
    }
    first = {name: way() for name, way in ways.items()}
    for name, (texts, *_) in first.items():
        if texts != first["queue"][0]:
            raise SystemExit(f"{name} and queue: the texts differ")
    tokens = sum(work.outputs)
    print(
        f"{loaded.config.name}; {common.device()}; {args.prompts} prompts, {sum(map(len, work.prompts))} tokens in "
        f"and {tokens} out, {args.slots} sequences\n"
    )
    runs = common.in_turns(ways, args.repeat)
    seconds = {name: [run[2] for run in found] for name, found in runs.items()}
    print(common.head("", "runs of the model", "tokens generated per second", "queue / this"))
    for name, times in seconds.items():
        ratio = common.median_ratio(times, seconds["queue"])
        rate = tokens / statistics.median(times)
        print(common.row(name, first[name][1], f"{rate:.0f}", f"{ratio:.2f}"))


if __name__ == "__main__":
    main()
