"""Edits and statistics between two steps cost what they change and count, not what the pool could hold."""

from __future__ import annotations

import sys

import jax
import numpy as np
import pytest
from engine_kit import MODEL, PAGE_SIZE

from jaxpaged import PagedKVCache
from jaxpaged.engine.device import Device
from jaxpaged.engine.stats import CACHED, FREE, SHARED, USED, PoolUse, page_states, page_use

S, P, N = 64, 32, 256


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("name", ["edit", "shift"])
def test_an_edit_computes_nothing_as_large_as_the_table(name):
    cache = PagedKVCache.create(
        **MODEL, num_pages=N, max_seqs=S, page_size=PAGE_SIZE, max_seq_len=(P - 1) * PAGE_SIZE
    )
    device = Device(
        None, None, cache, decode_rows=[], prompt_rows=[], decode_steps=1, num_recent=1, vocab_size=8
    )
    program = next(program for program in device.to_compile() if program.name == name)
    jaxpr = jax.make_jaxpr(program.function)(cache, *program.arguments).jaxpr
    nested = {"cond", "while", "scan", "jit", "pjit", "closed_call"}
    for equation in equations(jaxpr):
        if "scatter" in equation.primitive.name:  # in place: costs its updates
            size = equation.invars[2].aval.size
        elif equation.primitive.name in nested:
            continue
        else:
            size = max((out.aval.size for out in equation.outvars), default=0)
        assert size < S * P, equation


def random_table(rng, *, shared: bool) -> tuple[np.ndarray, np.ndarray]:
    pages, tokens = np.full((S, P), N, np.int32), np.zeros((S, P), np.int32)
    free = rng.permutation(N).tolist()
    for row in range(S):
        for entry in range(rng.integers(0, P)):
            page = int(rng.integers(0, N)) if (shared and rng.random() < 0.5) or not free else free.pop()
            left = PAGE_SIZE - int(tokens[row, pages[row] == page].sum())  # a row may name a page twice
            if left == 0:
                break
            pages[row, entry] = page
            tokens[row, entry] = left if rng.random() < 0.7 else rng.integers(1, left + 1)
    return pages, tokens


@pytest.mark.parametrize("seed", range(6))
def test_statistics_equal_a_recount_page_by_page(seed):
    pages, tokens = random_table(np.random.default_rng(seed), shared=seed % 2 == 0)
    cached = sorted({0, 5, N - 1} | set(pages[0, pages[0] < N].tolist()))
    state, owner = page_states(pages, N, cached)
    used = live = 0
    for page in range(N):
        held = {row: int(tokens[row, pages[row] == page].sum()) for row in range(S) if page in pages[row]}
        used += bool(held)
        live += max(held.values(), default=0)
        assert owner[page] == min(held, default=-1)
        assert state[page] == ([CACHED if page in cached else FREE, USED] + [SHARED] * S)[len(held)]
    assert page_use(pages, tokens, N, PAGE_SIZE) == PoolUse(used, live)


def test_statistics_do_not_loop_over_sequences_or_pages():
    def calls(rows: int) -> int:
        count = 0

        def profile(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        pages, tokens = random_table(np.random.default_rng(0), shared=True)
        sys.setprofile(profile)
        try:
            page_use(pages[:rows], tokens[:rows], N, PAGE_SIZE)
            page_states(pages[:rows], N, [])
        finally:
            sys.setprofile(None)
        return count

    assert calls(S) == calls(2)
