"""Common prefixes are computed once, whichever request computed them, and change no text."""

from __future__ import annotations

import numpy as np
import pytest
from engine_kit import NUM_PAGES, alone, collect, finish, greedy, make_engine, prompt
from toy_transformer import PAGE_SIZE

from jaxpaged.engine import EngineRequest
from jaxpaged.engine.prefix_index import PrefixIndex, child_key, root_key
from jaxpaged.engine.stats import CACHED, FREE, USED


def hits(results, request_id: str, index: int = 0) -> int:
    return results[request_id, index].outputs[0].num_cached


def test_a_text_that_was_there_is_computed_but_for_its_last_token(engine):
    text = prompt(1, 21)
    finish(engine, greedy("cold", text, 6))
    before = engine.stats()
    results = finish(engine, greedy("warm", text, 6))
    assert hits(results, "warm") == 20
    assert engine.stats().prompt_tokens - before.prompt_tokens == 1
    assert engine.stats().prefix_hits - before.prefix_hits == 20
    assert results["warm", 0].tokens == alone(text, 6)


@pytest.mark.parametrize("shared", [0, 1, 5, 7, 8, 9, 15, 16, 17, 20])
def test_texts_share_what_they_have_in_common_to_the_token(engine, shared):
    first = prompt(2, 21)
    second = first[:shared] + tuple((t + 1) % 97 for t in first[shared:])
    finish(engine, greedy("first", first, 4))
    results = finish(engine, greedy("second", second, 4), greedy("again", first, 4))
    assert hits(results, "second") == shared
    assert results["second", 0].tokens == alone(second, 4)
    assert results["again", 0].tokens == alone(first, 4)


def test_a_conversation_goes_on_where_it_ended(engine):
    text, held = prompt(3, 13), 0
    for turn in range(3):
        results = finish(engine, greedy(f"turn{turn}", text, 5))
        assert results[f"turn{turn}", 0].tokens == alone(text, 5)
        assert hits(results, f"turn{turn}") == held
        # The newest token is never computed.
        held = len(text) + 4
        text = (*text, *results[f"turn{turn}", 0].tokens, *prompt(turn, 3))


def test_pages_of_busy_requests_are_shared_and_the_one_being_written_too(engine):
    text = prompt(4, 20)
    results: dict = {}
    engine.add_request(greedy("busy", text, 30))
    while engine.stats().generated_tokens == 0 or len(results) == 0:
        collect(results, engine.step())
    engine.add_request(greedy("second", text, 30))
    engine.add_request(greedy("third", text[:18], 5))
    results |= finish(engine)
    # Two whole pages, and of the third one what both have.
    assert hits(results, "second") == 19
    assert hits(results, "third") == 17
    assert results["second", 0].tokens == alone(text, 30)
    assert results["third", 0].tokens == alone(text[:18], 5)


def test_a_partial_page_is_replaced_only_by_a_longer_one(engine):
    text = prompt(21, 20)
    for length, cached in (
        (4, 1),
        (20, 4),
        (6, 4),
        (7, 4),
    ):  # the part, then the page, then what the page covers
        finish(engine, greedy(f"r{length}", text[:length], 1))
        assert engine.stats().pages_cached == cached
    other = prompt(22, 20)
    for length, cached in ((4, 5), (6, 5), (5, 5)):
        finish(engine, greedy(f"s{length}", other[:length], 1))
        assert engine.stats().pages_cached == cached


def test_a_salt_parts_tenants(engine):
    text = prompt(5, 21)
    finish(engine, greedy("a", text, 2, cache_salt="tenant a"))
    results = finish(engine, greedy("b", text, 2, cache_salt="tenant b"), greedy("n", text, 2))
    assert hits(results, "b") == hits(results, "n") == 0
    assert hits(finish(engine, greedy("c", text, 2, cache_salt="tenant b")), "c") == 20


def test_extras_are_tagged():
    keys = {
        root_key(),
        root_key(a="b"),
        root_key(b="a"),
        root_key(a="", b=""),
        root_key(a="b", c=""),
        root_key(ab=""),
    }
    assert len(keys) == 6


def test_a_request_may_stay_out_of_the_cache(engine):
    text = prompt(6, 21)
    finish(engine, greedy("out", text, 2, cache_prompt=False))
    assert engine.stats().pages_cached == 0
    finish(engine, greedy("in", text, 2))
    results = finish(engine, greedy("out", text, 4, n=3, cache_prompt=False))
    assert hits(results, "out") == 0
    assert all(results["out", i].tokens == alone(text, 4) for i in range(3))


def test_without_a_prefix_cache_samples_share_all_the_same():
    engine = make_engine(prefix_cache=False)
    text = prompt(7, 21)
    results = finish(engine, greedy("a", text, 9, n=3), greedy("b", text, 9))
    assert engine.stats().prompt_tokens == 21 + 2 + 21
    assert engine.stats().pages_free == NUM_PAGES
    assert {tuple(result.tokens) for result in results.values()} == {tuple(alone(text, 9))}


def test_cached_pages_are_evicted_the_oldest_first(engine):
    texts = [prompt(10 + i, 33) for i in range(6)]  # five pages each, of 24
    for i, text in enumerate(texts):
        finish(engine, greedy(f"r{i}", text, 3))
    assert engine.stats().pages_free == NUM_PAGES - engine.stats().pages_cached < 5
    assert hits(finish(engine, greedy("new", texts[5], 3)), "new") == 32
    assert hits(finish(engine, greedy("old", texts[0], 3)), "old") == 0
    # Of a chain its end goes first, so that what is left of it is of use.
    finish(engine, greedy("more", prompt(20, 12), 3))
    partly = hits(finish(engine, greedy("some", texts[2], 3)), "some")
    assert 0 < partly < 32
    assert partly % PAGE_SIZE == 0


def test_statistics_distinguish_used_cached_and_free(engine):
    engine.add_request(greedy("a", prompt(8, 20), 20))
    engine.step()
    engine.step()
    stats = engine.stats()
    assert stats.pages_used + stats.pages_cached + stats.pages_free == NUM_PAGES
    assert stats.pages_used == -(-stats.tokens_live // PAGE_SIZE)
    assert stats.waste == pytest.approx(1 - stats.tokens_live / (stats.pages_used * PAGE_SIZE))
    assert np.count_nonzero(engine.pool_state().state == USED) == stats.pages_used
    finish(engine)
    state, stats = engine.pool_state().state, engine.stats()
    assert np.count_nonzero(state == CACHED) == stats.pages_cached == 5
    assert np.count_nonzero(state == FREE) == stats.pages_free


def test_sampled_texts_are_the_same_from_the_cache(engine):
    text = prompt(9, 26)
    draw = {"max_new_tokens": 12, "temperature": 1.2, "top_k": 0, "seed": 3}
    cold = finish(engine, EngineRequest("cold", text, **draw))["cold", 0].tokens
    assert finish(engine, EngineRequest("warm", text, **draw))["warm", 0].tokens == cold


# The index by itself


def test_tokens_are_compared_and_not_their_hash_alone(monkeypatch):
    index = PrefixIndex(4)
    root = root_key()
    node, _ = index.insert(root, None, (1, 2, 3, 4), 7)
    monkeypatch.setattr("jaxpaged.engine.prefix_index.child_key", lambda parent, tokens: node.key)
    assert index.match(root, (5, 6, 7, 8, 9), 4).num_tokens == 0


def test_a_chain_is_its_whole_beginning():
    index = PrefixIndex(2)
    root = root_key()
    a, _ = index.insert(root, None, (1, 2), 0)
    index.insert(root, a, (3, 4), 1)
    assert [n.page for n in index.match(root, (1, 2, 3, 4, 5), 4).nodes] == [0, 1]
    assert index.match(root, (9, 9, 3, 4, 5), 4).num_tokens == 0
    assert child_key(child_key(root, (1, 2)), (3, 4)) != child_key(root, (1, 2, 3, 4))


def test_the_index_forgets_all_that_it_evicts():
    index = PrefixIndex(2)
    root = root_key(cache_salt="x")
    a, _ = index.insert(root, None, (1, 2), 5)
    b, _ = index.insert(root, a, (3, 4), 6)
    c, _ = index.insert(root, a, (3,), 7)
    assert index.release([c]) == [7]
    assert index.release([a, b]) == [6, 5]
    assert index.num_unused == (3,)
    assert index.evict([1]) == [[7]]
    assert index.evict([5]) == [[6, 5]]
    assert len(index) == index.num_unused[0] == 0
    assert index.match(root, (1, 2, 3), 3).num_tokens == 0
    assert not index._roots
