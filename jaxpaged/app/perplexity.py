"""``jaxpaged perplexity``: perplexity of a text read through a cache, as llama-perplexity measures it."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from typing import Any

import click
import numpy as np
from jaxpaged_model.text.tokenizer import Tokenizer

from jaxpaged.app.cache_type import CacheType, bits_per_value, check_hadamard
from jaxpaged.app.divergence import Divergence, pair, percent, perplexity, running_perplexity
from jaxpaged.app.errors import InputError, nan_message, out_of_memory_is_input, say
from jaxpaged.app.loading import ReadyModel, open_model
from jaxpaged.app.measure_options import PerplexityOptions
from jaxpaged.app.prompt import read_text
from jaxpaged.app.scoring import Scores, cut, default_parallel, score

_CONTEXT = 512
_SMALLEST_CONTEXT = 8
HELD_OUT = "the embedded model's held-out text"
_RUNNING = (
    "chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence"
    "              Δp RMS            Same top p"
)
BASE = CacheType("f32", "f32")
"""Reference cache of ``--kl-divergence``."""


def run(options: PerplexityOptions) -> None:
    """Measures and prints.

    Raises:
      InputError: flags, a text or a model that cannot be used.
    """
    o = options
    if o.chunks == 0:
        raise InputError("--chunks 0: there is nothing to measure")
    check_hadamard(o.hadamard, o.cache_type_k, o.cache_type_v)
    text = scored_text(o.file)
    ready = open_model(o, show_progress=o.log)
    kind = CacheType.of(o.cache_type_k or ready.dtype, o.cache_type_v or ready.dtype, o.hadamard)
    n_ctx = context_of(ready.loaded.config.context_length, o.ctx_size)
    tokens = tokens_of(ready.loaded.tokenizer, text)
    chunks = chunks_of(ready.loaded.tokenizer, tokens, n_ctx, o.file or HELD_OUT)
    chunks = chunks if o.chunks < 0 else chunks[: o.chunks]
    step = min(o.step_tokens, n_ctx)
    parallel = min(o.parallel or default_parallel(step), len(chunks))
    with out_of_memory_is_input("a smaller -c, -ub or -np needs less"):
        caches = [
            kind.create(ready.loaded.config, num_seqs=parallel, tokens=n_ctx, page_size=o.page_size)
            for kind in ([BASE, kind] if o.kl_divergence else [kind])
        ]
        bits = bits_per_value(caches[-1], ready.loaded.config)
        if o.log:
            loaded = ready.loaded
            say(f"model = {loaded.path}, {loaded.description}, computing in {ready.dtype}")
            say(f"cache = {kind}, pages of {o.page_size} tokens, {bits:.4g} bits a value")
            say(f"text = {o.file or HELD_OUT}, {len(tokens)} tokens")
            say(
                f"{len(chunks)} chunks of {n_ctx} tokens, the last {n_ctx - n_ctx // 2 - 1} of each scored; "
                f"{step} tokens a step, {parallel} side by side"
            )
        found = _measured(ready, caches, chunks, o)
    result: dict[str, Any] = {
        "model": ready.loaded.description,
        "dtype": ready.dtype,
        "exact": ready.loaded.function == ready.loaded.exact_function,
        "n_ctx": n_ctx,
        "chunks": len(chunks),
        "step": step,
        "cache": {**dataclasses.asdict(kind), "page_size": o.page_size, "bits_per_value": bits},
    }
    if o.kl_divergence:
        divergence = Divergence(*found)
        result |= {"base": dataclasses.asdict(BASE), **divergence.as_dict()}
        shown = "\n".join(divergence.lines())
    else:
        ppl = perplexity(found[0])
        running = running_perplexity(found[0]).tolist()
        result |= {"tokens": found[0].nll.size, "ppl": ppl._asdict(), "running": running}
        shown = f"Final estimate: PPL = {ppl.value:.4f} +/- {ppl.error:.5f}"
    click.echo(json.dumps(result) if o.as_json else f"\n{shown}")


def scored_text(file: str | None) -> str:
    """Text of ``-f``, "-" for stdin; without it, Python that the embedded model was not trained on."""
    if file is None:
        from jaxpaged_model.tiny.corpus import read_corpus

        if not (texts := read_corpus().held_out):
            raise InputError("-f FILE is needed: Python's standard library is not here as files")
        return "\n".join(texts.values())
    return read_text("-f", file)


def context_of(trained: int, asked: int | None) -> int:
    """Tokens of a chunk, for a model that was trained for ``trained`` tokens.

    Raises:
      InputError: more than that, too few, or an odd number.
    """
    n_ctx = min(_CONTEXT, trained) if asked is None else asked or trained
    if n_ctx > trained:
        raise InputError(f"-c {n_ctx} is more than the {trained} tokens that the model was trained for")
    if n_ctx < _SMALLEST_CONTEXT:
        raise InputError(f"-c {n_ctx} is less than the {_SMALLEST_CONTEXT} tokens that make a chunk")
    if n_ctx % 2:
        raise InputError(f"-c {n_ctx} is odd: the second half of each chunk is scored")
    return n_ctx


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of the text, with BOS if the model's texts begin with it."""
    tokens = tokenizer.encode(text)
    return tokens[:-1] if tokenizer.add_eos else tokens


def chunks_of(tokenizer: Tokenizer, tokens: list[int], n_ctx: int, source: str) -> np.ndarray:
    """Tokens as chunks ``i32[C, n_ctx]``; BOS replaces each first one if the model's texts begin with it.

    Raises:
      InputError: there are fewer tokens than a chunk needs.
    """
    if len(tokens) < n_ctx:
        raise InputError(f"{source} has {len(tokens)} tokens; a chunk (-c) needs {n_ctx}")
    return cut(tokens, n_ctx, bos=tokenizer.bos_id if tokenizer.add_bos else None)


def _measured(
    ready: ReadyModel, caches: list[Any], chunks: np.ndarray, options: PerplexityOptions
) -> list[Scores]:
    """Scores of each cache over all chunks; prints the estimates up to each chunk."""
    loaded = ready.loaded
    parallel = caches[0].max_seqs
    groups = score(
        ready.call,
        loaded.params,
        loaded.tokenizer.vocab_size,
        caches,
        chunks,
        step=options.step_tokens,
        base=loaded.exact_function if options.kl_divergence else None,
    )
    found: list[Scores] = []
    printed, start = 0, 0.0
    for number, group in enumerate(groups):
        found = [Scores.join(parts) for parts in zip(found, group, strict=True)] if found else group
        done = len(found[0].nll)
        if any(np.isnan(scores.nll).any() for scores in group):
            raise InputError(nan_message(ready.dtype))
        if number == 0 and done < len(chunks):
            # It compiled, too: the second group shows how long all will take.
            start = time.perf_counter()
            continue
        if number == 1 and options.log:
            seconds = time.perf_counter() - start
            left = math.ceil((len(chunks) - done) / parallel) * seconds
            say(f"{seconds:.2f} seconds for {parallel}, {_time(left)} to go")
        if not options.as_json:
            _print_estimates(found, printed)
        printed = done
    return found


def _time(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.1f} minutes"


def _print_estimates(found: list[Scores], done: int) -> None:
    """Prints the estimates after each chunk from number ``done`` on."""
    chunks = len(found[0].nll)
    if len(found) == 1:
        running = running_perplexity(found[0])
        click.echo("".join(f"[{i + 1}]{running[i]:.4f}," for i in range(done, chunks)), nl=False)
        sys.stdout.flush()
        return
    if not done:
        click.echo(_RUNNING)
    for end in range(done + 1, chunks + 1):
        d = Divergence(*(scores[:end] for scores in found))
        click.echo(
            f"{end:4d}    {pair(d.ppl, '9.4f')}    {pair(d.ln_ratio, '10.5f')}    {pair(d.kld, '10.5f')}    "
            f"{percent(d.rms_delta_p)}    {percent(d.same_top)}"
        )
