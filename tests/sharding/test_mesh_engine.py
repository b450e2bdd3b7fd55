"""An engine on a mesh: what a single engine gives, with queues, shared beginnings, and pages for fewer than come."""

from __future__ import annotations

from dataclasses import replace

import mesh_kit
import numpy as np
import pytest

from jaxpaged.engine import Engine, EngineConfig, EngineRequest

BEGIN = tuple(range(40, 60))


def config(**more) -> EngineConfig:
    settings = {"n_ctx": 64, "max_batch_tokens": 16, "decode_steps": 4, "max_waiting": 32}
    return EngineConfig(vocab_size=mesh_kit.loaded("tiny").config.vocab_size, **settings, **more)


def engine_on(mesh, pages: int, **options):
    """A compiled engine of two sequences a data shard."""
    model = mesh_kit.loaded("tiny", mesh)
    cache = mesh_kit.create_cache(model, 2, pages, **(options or {"max_seq_len": 11 * mesh_kit.PAGE_SIZE}))
    made = Engine(model.function, model.params, cache, config(fingerprint=model.fingerprint))
    made.compile()
    return made


@pytest.fixture(scope="module")
def single():
    return engine_on(None, 24)


@pytest.fixture(scope="module")
def spread():
    """Two shards of two sequences, with pages for not much more than one."""
    return engine_on(mesh_kit.mesh_of(2, 2), 8)


def requests(count: int, *, begin: tuple[int, ...] = (), temperature: float = 0.0) -> list[EngineRequest]:
    rng = np.random.default_rng(5)
    return [
        EngineRequest(
            str(i), (*begin, *rng.integers(1, 200, int(rng.integers(2, 12))).tolist()),
            max_new_tokens=int(rng.integers(3, 46)), temperature=temperature, seed=i,
        )
        for i in range(count)
    ]  # fmt: skip


def served(engine, some: list[EngineRequest], check: bool = True) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for request in some:
        engine.add_request(request)
    for _ in range(2000):
        if not engine.has_work:
            return tokens
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.tokens)
        if check:
            engine.check_state()
    raise AssertionError("the engine does not come to an end")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_queue_in_pools_that_are_too_small_gives_the_same_tokens(single, spread, temperature):
    some = requests(12, temperature=temperature)
    before = spread.stats()
    assert served(spread, some) == served(single, some)
    after = spread.stats()
    if not temperature:
        assert after.preemptions > before.preemptions
    assert after.compiled_late == 0


def test_a_contiguous_cache_gives_the_same_tokens(single):
    contiguous = engine_on(mesh_kit.mesh_of(2, 1), 16, paged=False)
    for i in range(4):
        contiguous.add_request(EngineRequest(f"short {i}", (i, 5), max_new_tokens=20))
    contiguous.step()
    stats, state = contiguous.stats(), contiguous.pool_state()
    assert (stats.running, stats.pages_total, stats.pages_free) == (4, 4, 0)
    assert sorted(one["slot"] for one in state.sequences) == state.owner.tolist() == [0, 1, 2, 3]
    assert stats.bytes_per_page == single.stats().bytes_per_page * contiguous.page_size // mesh_kit.PAGE_SIZE
    for i in range(4):
        contiguous.abort(f"short {i}")
    some = requests(6)
    assert served(contiguous, some) == served(single, some)


def test_beginnings_are_found_where_they_lie(single, spread):
    spread.drop_prefix_cache()
    some = requests(6, begin=BEGIN)
    expected = served(single, some)
    before = spread.stats().prefix_hits
    first = served(spread, some[:1])
    rest = served(spread, some[1:2])
    assert first | rest == {name: expected[name] for name in ("0", "1")}
    assert spread.stats().prefix_hits - before >= len(BEGIN) // mesh_kit.PAGE_SIZE * mesh_kit.PAGE_SIZE


def test_who_leaves_makes_room_and_leaves_the_others_alone(single, spread):
    some = requests(8)
    expected = served(single, some)
    for request in some:
        spread.add_request(request)
    tokens: dict[str, list[int]] = {}
    for look in range(2000):
        for output in spread.step():
            tokens.setdefault(output.request_id, []).extend(output.tokens)
        if look == 1:
            spread.abort("0")
            spread.abort("7")
        spread.check_state()
        if not spread.has_work:
            break
    assert {name: tokens[name] for name in map(str, range(1, 7))} == {
        name: expected[name] for name in map(str, range(1, 7))
    }
    spread.drop_prefix_cache()
    assert spread.stats().pages_used == 0


def test_a_slot_is_saved_on_a_mesh_and_goes_on_on_one_device(single, spread, tmp_path):
    text = tuple(range(100, 121))
    request = EngineRequest("a", text, max_new_tokens=6, temperature=0.0, slot=3)
    told = served(spread, [request])["a"]
    saved = spread.save_slot(3, tmp_path / "slot")
    restored = single.restore_slot(1, tmp_path / "slot")
    assert saved.num_tokens == restored.num_tokens >= len(text) + 5
    more = (*text, *told, 7, 9)
    again = EngineRequest("b", more, max_new_tokens=6, temperature=0.0, slot=1)
    before = single.stats().prefix_hits
    assert (
        served(single, [again])["b"]
        == served(spread, [EngineRequest("c", more, max_new_tokens=6, temperature=0.0)])["c"]
    )
    assert single.stats().prefix_hits > before


class Every:
    """Allows a token whose number is a multiple of ``step`` alone, ``count`` times."""

    def __init__(self, step: int, count: int) -> None:
        self.step, self.left = step, count

    is_active = True

    @property
    def is_finished(self) -> bool:
        return self.left <= 0

    def allowed(self, out: np.ndarray) -> None:
        for token in range(self.step, 200, self.step):
            out.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)

    def accept(self, tokens) -> None:
        assert all(token % self.step == 0 for token in tokens)
        self.left -= len(tokens)

    def forced(self) -> list[int]:
        return []

    def copy(self) -> Every:
        return Every(self.step, self.left)


def test_constraints_hold_in_every_shard_and_change_nothing_for_others(single, spread):
    some = requests(8)
    constrained = [
        replace(request, constraint=Every(i + 2, 9), max_new_tokens=20) if i % 2 else request
        for i, request in enumerate(some)
    ]
    found = served(spread, constrained)
    assert found == served(single, constrained)
    free = served(single, some)
    for i, request in enumerate(some):
        tokens = found[request.request_id]
        if i % 2:
            assert len(tokens) == 9 and all(token % (i + 2) == 0 for token in tokens)
        else:
            assert tokens == free[request.request_id]
