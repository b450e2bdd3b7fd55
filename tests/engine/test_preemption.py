"""When pages run out the newest request is preempted, and its text does not change."""

from __future__ import annotations

import pytest
from engine_kit import FEW_PAGES, MODEL, N_CTX, alone, collect, finish, greedy, make_engine, params, prompt
from toy_transformer import PAGE_SIZE, toy

from jaxpaged import PagedKVCache
from jaxpaged.engine import Engine, EngineRequest
from jaxpaged.engine.swap import SwapCosts
from jaxpaged.generation.api import generate
from jaxpaged.generation.request import ContextShift


@pytest.fixture(scope="module")
def small() -> Engine:
    """Twelve pages for four sequences of up to eight pages."""
    return make_engine(num_pages=FEW_PAGES)


@pytest.fixture
def tight(small: Engine) -> Engine:
    small.drop_prefix_cache()
    small.shards[0].pool.costs = SwapCosts()
    return small


@pytest.mark.parametrize("swaps", [False, True])
def test_preempted_requests_get_the_text_they_would_get_alone(tight, swaps, monkeypatch):
    monkeypatch.setattr(SwapCosts, "swap_is_cheaper", lambda *_: swaps)
    before = tight.stats()
    requests = [greedy(f"r{i}", prompt(i, 12 + i), 40, num_logprobs=1) for i in range(5)]
    results = finish(tight, *requests)
    after = tight.stats()
    assert after.preemptions - before.preemptions > 2
    assert (after.swaps - before.swaps > 2) == swaps
    for request in requests:
        result = results[request.request_id, 0]
        assert result.tokens == alone(request.prompt, 40)
        assert sum(len(output.logprobs) for output in result.outputs) == 40
    assert tight.shards[0].pool.swapped_bytes == after.swapped == 0
    assert after.compiled_late == 0
    # The oldest was never preempted: it ended first.
    assert results["r0", 0].outputs[-1].times.finished == min(
        r.outputs[-1].times.finished for r in results.values()
    )


@pytest.mark.parametrize("swaps", [False, True])
def test_sampled_texts_survive_as_well(tight, swaps, monkeypatch):
    monkeypatch.setattr(SwapCosts, "swap_is_cheaper", lambda *_: swaps)
    draw = {"max_new_tokens": 30, "temperature": 1.0, "top_k": 0, "frequency_penalty": 0.3}
    requests = [EngineRequest(f"r{i}", prompt(i, 12), seed=i, **draw) for i in range(4)]
    together = finish(tight, *requests)
    assert tight.stats().preemptions
    for request in requests:
        tight.drop_prefix_cache()
        assert finish(tight, request)[request.request_id, 0].tokens == together[request.request_id, 0].tokens


def test_a_preempted_request_can_be_aborted(tight, monkeypatch):
    monkeypatch.setattr(SwapCosts, "swap_is_cheaper", lambda *_: True)
    for i in range(4):
        tight.add_request(greedy(f"r{i}", prompt(i, 20), 40))
    while not tight.stats().swapped:
        tight.step()
    for i in range(4):
        tight.abort(f"r{i}")
    tight.step()
    tight.check_state()
    assert tight.shards[0].pool.swapped_bytes == tight.stats().pages_used == 0
    assert not tight.has_work


def test_host_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(SwapCosts, "swap_is_cheaper", lambda *_: True)
    engine = make_engine(num_pages=FEW_PAGES, swap_bytes=0)
    requests = [greedy(f"r{i}", prompt(i, 12), 40) for i in range(4)]
    results = finish(engine, *requests)
    assert engine.stats().swaps == 0
    assert engine.stats().preemptions
    assert all(results[r.request_id, 0].tokens == alone(r.prompt, 40) for r in requests)


def test_the_cheaper_way_follows_from_measurements():
    costs = SwapCosts()
    assert not costs.swap_is_cheaper(10**6, 1)  # nothing is known yet
    costs.observe_prompt(1000, 1.0)
    costs.observe_copy(10**6, 1.0)
    assert costs.swap_is_cheaper(100, 40_000)
    assert not costs.swap_is_cheaper(100, 60_000)


def test_samples_of_one_prompt_are_preempted_and_resumed(tight):
    texts = prompt(1, 20), prompt(2, 9)
    results = finish(tight, greedy("n", texts[0], 40, n=3), greedy("m", texts[1], 40, n=2))
    assert tight.stats().preemptions
    for request_id, text in zip("nm", texts, strict=True):
        assert all(r.tokens == alone(text, 40) for (name, _), r in results.items() if name == request_id)


# Context shifts


@pytest.fixture(scope="module")
def shifting() -> Engine:
    return make_engine(num_pages=FEW_PAGES, n_ctx=40, context_shift=True)


def shifted(engine: Engine, request: EngineRequest) -> list[int]:
    results = finish(engine, request)
    assert results[request.request_id, 0].outputs[-1].truncated
    return results[request.request_id, 0].tokens


@pytest.mark.parametrize("keep", [0, 3, PAGE_SIZE, -1])
def test_a_full_context_forgets_and_goes_on(shifting, keep):
    text = prompt(3, 14)
    shifting.drop_prefix_cache()
    tokens = shifted(shifting, greedy("s", text, 120, n_keep=keep))
    cache = PagedKVCache.create(**MODEL, num_pages=16, max_seqs=1, page_size=PAGE_SIZE)
    expected, _ = generate(
        toy, params(), cache, [list(text)], max_new_tokens=120, context_shift=ContextShift(40, n_keep=keep)
    )
    assert tokens == expected.tokens[0, :120].tolist()
    assert shifting.stats().compiled_late == 0
    # What was shifted is never taken for what it was before.
    assert finish(shifting, greedy("again", text, 10))["again", 0].tokens == alone(text, 10)


def test_shifted_texts_share_a_pool_and_survive_preemption_in_host_memory(shifting):
    shifting.drop_prefix_cache()
    text = prompt(4, 20)
    expected = shifted(shifting, greedy("one", text, 80))
    before = shifting.stats()
    results: dict = {}
    for i in range(4):
        shifting.add_request(greedy(f"r{i}", text, 80))
    while shifting.has_work:
        collect(results, shifting.step())
        shifting.check_state()
    stats = shifting.stats()
    assert stats.preemptions > before.preemptions
    assert all(result.tokens == expected for result in results.values())


def test_a_context_that_cannot_be_shifted_ends_the_text_and_says_so(shifting, monkeypatch):
    monkeypatch.setattr(shifting.shards[0].device, "shift", lambda *_: False)
    shifting.drop_prefix_cache()
    result = finish(shifting, greedy("x", prompt(6, 10), 80))["x", 0]
    assert len(result.tokens) == 31
    assert (result.finish_reason, result.outputs[-1].truncated) == ("length", True)


def test_a_bounded_context_is_not_shifted_by_default(engine):
    result = finish(engine, greedy("x", prompt(5, 60), 100))["x", 0]
    assert len(result.tokens) == N_CTX - 60
    assert engine.stats().shifts == 0
