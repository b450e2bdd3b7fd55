"""Engines on the toy transformer, running them to the end, and what a request alone gives."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from toy_transformer import (
    HEAD_DIM,
    KV_HEADS,
    PAGE_SIZE,
    VOCAB,
    toy,
    toy_grouped,
    toy_log_probabilities,
    toy_params,
)

from jaxpaged import ContiguousKVCache, PagedKVCache, Rope
from jaxpaged.cache.groups import create_cache
from jaxpaged.engine import Engine, EngineConfig, EngineRequest, SampleOutput

N_CTX, NUM_PAGES, FEW_PAGES, SLOTS = 64, 24, 12, 4
MODEL = {"num_layers": 1, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "rope": Rope.create(())}


@functools.cache
def params():
    return toy_params()


def make_engine(*, paged: bool = True, groups=None, num_pages=NUM_PAGES, **config) -> Engine:
    """A compiled engine of SLOTS sequences; with ``groups``, of a model with a window."""
    model, width = toy, -(-N_CTX // PAGE_SIZE) + 4
    if groups is not None:
        model = toy_grouped
        cache = create_cache(
            groups,
            num_pages=num_pages,
            max_seqs=SLOTS,
            page_size=PAGE_SIZE,
            max_seq_len=(width - 1) * PAGE_SIZE,
            step_tokens=16,
            rope=MODEL["rope"],
        )
    elif paged:
        cache = PagedKVCache.create(
            **MODEL,
            num_pages=num_pages,
            max_seqs=SLOTS,
            page_size=PAGE_SIZE,
            max_seq_len=(width - 1) * PAGE_SIZE,
        )
    else:
        cache = ContiguousKVCache.create(**MODEL, max_seqs=SLOTS, max_length=N_CTX)
    settings = {
        "n_ctx": N_CTX,
        "vocab_size": VOCAB,
        "max_batch_tokens": 16,
        "decode_steps": 4,
        "max_waiting": 8,
    }
    engine = Engine(model, params(), cache, EngineConfig(**(settings | config)))
    engine.compile()
    return engine


@dataclass
class Result:
    """Outputs of one sample."""

    tokens: list[int] = field(default_factory=list)
    outputs: list[SampleOutput] = field(default_factory=list)

    @property
    def finish_reason(self):
        return self.outputs[-1].finish_reason


def collect(results: dict, outputs: Iterable[SampleOutput]) -> None:
    for output in outputs:
        result = results.setdefault((output.request_id, output.index), Result())
        result.tokens += output.tokens
        result.outputs.append(output)


def finish(engine: Engine, *requests: EngineRequest, steps: int = 2000) -> dict[tuple[str, int], Result]:
    """Runs until all is done, the state checked after every step."""
    results: dict[tuple[str, int], Result] = {}
    for request in requests:
        engine.add_request(request)
    for _ in range(steps):
        if not engine.has_work:
            break
        collect(results, engine.step())
        engine.check_state()
    assert not engine.has_work, "the engine does not come to an end"
    return results


def prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple(int(t) for t in np.random.default_rng(seed).integers(0, VOCAB, length))


@functools.cache
def alone(text: tuple[int, ...], count: int, windows=(None,)) -> list[int]:
    """Tokens of greedy decoding, by the model in float64 and without a cache."""
    tokens = list(text)
    for _ in range(count):
        tokens.append(int(np.argmax(toy_log_probabilities(params(), tokens, windows))))
    return tokens[len(text) :]


def greedy(request_id: str, text: tuple[int, ...], count: int, **more) -> EngineRequest:
    return EngineRequest(request_id, text, max_new_tokens=count, temperature=0.0, **more)
