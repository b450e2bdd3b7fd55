"""Laws of an engine whose model sees windows in some layers: pages by group, and what prefixes find."""

from __future__ import annotations

import pytest
from engine_kit import N_CTX, NUM_PAGES, alone, finish, greedy, make_engine, params, prompt
from toy_transformer import PAGE_SIZE, VOCAB, WINDOW, toy_grouped, toy_groups

from jaxpaged import PagedKVCache, Rope
from jaxpaged.cache.groups import create_cache
from jaxpaged.cache.sequences import pages_held
from jaxpaged.engine import Engine, EngineConfig
from jaxpaged.engine.prefix_index import PrefixIndex, root_key

WINDOWS = (None, WINDOW)


@pytest.fixture(scope="module")
def compiled() -> Engine:
    return make_engine(groups=toy_groups(), num_pages=(NUM_PAGES, 20))


@pytest.fixture
def engine(compiled: Engine) -> Engine:
    assert not compiled.has_work
    compiled.drop_prefix_cache()
    assert [group.pages_free for group in compiled.stats().groups] == [NUM_PAGES, 20]
    return compiled


def computed(engine: Engine) -> int:
    return engine.stats().prompt_tokens


def test_texts_are_those_of_the_model_alone_and_pages_are_bounded(engine: Engine) -> None:
    requests = [greedy(f"r{i}", prompt(i, 3 + 9 * i), 24) for i in range(5)]
    for request in requests:
        engine.add_request(request)
    results: dict = {}
    while engine.has_work:
        for output in engine.step():
            results.setdefault(output.request_id, []).extend(output.tokens)
        engine.check_state()
        _, local = engine.stats().groups
        assert local.pages_used <= engine.stats().running * pages_held(WINDOW, 16, PAGE_SIZE)
    for request in requests:
        assert results[request.request_id] == alone(request.prompt, 24, WINDOWS)


def chat(engine: Engine, turns: int, n_ctx: int) -> list[tuple[int, int, int]]:
    """``(prompt tokens, cached, computed)`` of each turn of a conversation."""
    history: tuple[int, ...] = ()
    seen = []
    for turn in range(turns):
        text = history + prompt(turn, 9)
        before = computed(engine)
        (result,) = finish(engine, greedy(f"turn {turn}", text, 7)).values()
        assert len(text) + 7 <= n_ctx and len(result.tokens) == 7
        seen.append((len(text), result.outputs[-1].num_cached, computed(engine) - before))
        history = text + tuple(result.tokens)
    assert result.tokens == alone(text, 7, WINDOWS)
    return seen


@pytest.mark.parametrize("keeps_everything", [False, True])
def test_a_turn_of_a_chat_computes_the_new_tokens_only(keeps_everything: bool) -> None:
    turns, n_ctx = 40, 40 * 16 + 8
    pages = -(-n_ctx // PAGE_SIZE)
    sizes = {"max_seqs": 2, "page_size": PAGE_SIZE}
    if keeps_everything:
        cache = PagedKVCache.create(
            num_layers=2, num_kv_heads=2, head_dim=8, num_pages=2 * pages, rope=Rope.create(()), **sizes
        )
    else:
        cache = create_cache(
            toy_groups(), num_pages=(2 * pages, 24), step_tokens=16, rope=Rope.create(()), **sizes
        )
    engine = Engine(toy_grouped, params(), cache, EngineConfig(n_ctx, VOCAB, max_batch_tokens=16))
    engine.compile()
    for turn, (length, cached, new) in enumerate(chat(engine, turns, n_ctx)):
        # The newest token of an answer was sampled, and not computed.
        assert length == 16 * turn + 9
        assert cached == (16 * turn - 1 if turn else 0)
        assert new == length - cached == (10 if turn else 9)
    if not keeps_everything:
        assert engine.stats().groups[1].pages_total == 24  # of the 160 that all its tokens would take


def test_another_answer_to_a_prompt_finds_the_windows_at_its_end(engine: Engine) -> None:
    """The pages that decoding has left are kept at the end of the prompt, where an answer is written again."""
    text = prompt(0, 3 * PAGE_SIZE)
    finish(engine, greedy("first", text, 30))
    before = computed(engine)
    other = text + prompt(1, 4)
    (result,) = finish(engine, greedy("second", other, 10)).values()
    assert result.outputs[-1].num_cached == len(text)
    assert computed(engine) - before == 4
    assert result.tokens == alone(other, 10, WINDOWS)


def test_a_prefix_whose_window_is_gone_is_computed_again(engine: Engine) -> None:
    text = prompt(0, 4)
    (first,) = finish(engine, greedy("first", text, 52)).values()
    middle = (text + tuple(first.tokens))[:36]  # decoding has left its window, and nothing kept it
    before = computed(engine)
    (result,) = finish(engine, greedy("second", middle, 10)).values()
    assert result.outputs[-1].num_cached in (0, 4)
    assert computed(engine) - before == len(middle) - result.outputs[-1].num_cached
    assert result.tokens == alone(middle, 10, WINDOWS)


def test_kept_windows_are_evicted_on_their_own(engine: Engine) -> None:
    """Texts that need pages of the second group take those of windows kept; the first group's stay."""
    for i in range(7):
        finish(engine, greedy(f"r{i}", prompt(i, 17), 6))
    everything, local = engine.stats().groups
    assert local.pages_free + local.pages_cached == local.pages_total == 20
    assert everything.pages_cached > local.pages_cached > 0
    assert engine.stats().evictions > 0
    (result,) = finish(engine, greedy("newest", (*prompt(6, 17), 1), 6)).values()
    assert result.outputs[-1].num_cached == 17


def test_contexts_shift_where_windows_hold_what_is_seen() -> None:
    engine = make_engine(groups=toy_groups(), num_pages=(NUM_PAGES, 24), context_shift=True)
    (result,) = finish(engine, greedy("long", prompt(0, 20), 150)).values()
    assert len(result.tokens) == 150 and engine.stats().shifts > 1
    plain = PagedKVCache.create(
        num_layers=2, num_kv_heads=2, head_dim=8, num_pages=NUM_PAGES, max_seqs=4, page_size=PAGE_SIZE,
        rope=Rope.create(()),
    )  # fmt: skip
    config = EngineConfig(N_CTX, VOCAB, max_batch_tokens=16, context_shift=True)
    other = Engine(toy_grouped, params(), plain, config)
    other.compile()
    (expected,) = finish(other, greedy("long", prompt(0, 20), 150)).values()
    assert result.tokens == expected.tokens


def test_preempted_samples_swap_the_pages_of_all_groups() -> None:
    engine = make_engine(groups=toy_groups(), num_pages=(12, 24))
    engine.shards[0].pool.costs.tokens_per_second = 1e-3
    engine.shards[0].pool.costs.bytes_per_second = 1e12
    requests = [greedy(f"r{i}", prompt(i, 20), 40) for i in range(3)]
    results = finish(engine, *requests)
    assert engine.stats().swaps > 0
    for request in requests:
        assert results[request.request_id, 0].tokens == alone(request.prompt, 40, WINDOWS)


def test_a_group_without_pages_for_one_sequence_is_named() -> None:
    with pytest.raises(
        ValueError, match="a window of 12 tokens and steps of 16 need 5 pages of 8, the group has 4"
    ):
        make_engine(groups=toy_groups(), num_pages=(NUM_PAGES, 4))


def test_a_match_ends_where_every_group_has_what_is_seen() -> None:
    index, root = PrefixIndex(4, (None, 8)), root_key()
    text = list(range(40))
    chain = []
    for i in range(10):
        node, _ = index.insert(root, chain[-1] if chain else None, text[4 * i : 4 * i + 4], i)
        chain.append(node)

    def matched(*windows: int) -> int:
        for node in chain:
            node.windows.clear()
        for i in windows:
            index.pin(1, chain[i], 100 + i)
        return index.match(root, text, len(text)).num_tokens

    # Behind 4 n tokens, the next one sees 7 before it: pages n - 2 and n - 1.
    assert matched(8, 9) == 40
    assert matched(9) == 0
    assert matched(4, 5, 9) == 24
    assert matched(0) == 4
    assert matched() == 0
