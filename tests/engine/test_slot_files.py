"""Slots are saved to files, and serve requests of other engines."""

from __future__ import annotations

import pytest
from engine_kit import SLOTS, alone, finish, greedy, make_engine, prompt

from jaxpaged.engine import Engine, RefusedError, SlotBusyError
from jaxpaged.storage.snapshot_file import SnapshotError


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine(fingerprint="a" * 64)


@pytest.mark.parametrize("length", [5, 16, 21])
def test_a_saved_slot_serves_again(engine, tmp_path, length):
    engine.drop_prefix_cache()
    text = prompt(1, length)
    result = finish(engine, greedy("a", text, 6))["a", 0]
    tokens, slot = result.tokens, result.outputs[0].slot
    saved = engine.save_slot(slot, tmp_path / "a.kv")
    assert saved.num_tokens == length + 5
    engine.check_state()
    assert engine.drop_prefix_cache() > 0
    restored = engine.restore_slot(2, tmp_path / "a.kv")
    engine.check_state()
    assert (restored.num_tokens, restored.num_bytes) == (saved.num_tokens, saved.num_bytes)
    more = (*text, *tokens, 3)
    result = finish(engine, greedy("b", more, 6))["b", 0]
    assert result.outputs[0].num_cached == length + 5
    assert result.tokens == alone(more, 6)
    assert engine.save_slot(2, tmp_path / "b.kv").num_tokens == length + 5


def test_an_erased_slot_is_computed_again(engine):
    engine.drop_prefix_cache()
    text = prompt(2, 20)
    results = finish(engine, greedy("a", text, 6), greedy("other", text[:8] + prompt(3, 5), 2))
    slot = results["a", 0].outputs[0].slot
    assert engine.erase_slot(slot) == 25 - 8
    engine.check_state()
    assert engine.erase_slot(slot) == 0
    assert finish(engine, greedy("b", text, 6))["b", 0].outputs[0].num_cached == 8


def test_what_does_not_fit_changes_nothing(engine, tmp_path):
    engine.drop_prefix_cache()
    slot = finish(engine, greedy("a", prompt(4, 20), 4))["a", 0].outputs[0].slot
    engine.save_slot(slot, tmp_path / "a.kv")
    before = engine.stats()
    with pytest.raises(RefusedError, match=f"slots 0 to {SLOTS - 1}"):
        engine.save_slot(SLOTS, tmp_path / "x.kv")
    with pytest.raises(FileNotFoundError):
        engine.restore_slot(0, tmp_path / "missing.kv")
    (tmp_path / "bad.kv").write_bytes(b"no snapshot at all")
    with pytest.raises(SnapshotError):
        engine.restore_slot(0, tmp_path / "bad.kv")
    with pytest.raises(OSError, match="directory"):
        engine.save_slot(slot, tmp_path / "no" / "folder.kv")
    other = make_engine(fingerprint="b" * 64)
    with pytest.raises(SnapshotError, match="model"):
        other.restore_slot(0, tmp_path / "a.kv")
    engine.check_state()
    assert engine.stats() == before


def test_a_busy_slot_is_left_alone(engine, tmp_path):
    engine.add_request(greedy("busy", prompt(5, 20), 20))
    engine.step()
    slot = next(view.id for view in engine.slot_states() if view.is_processing)
    with pytest.raises(SlotBusyError):
        engine.save_slot(slot, tmp_path / "a.kv")
    with pytest.raises(SlotBusyError):
        engine.restore_slot(slot, tmp_path / "a.kv")
    with pytest.raises(SlotBusyError):
        engine.erase_slot(slot)
    finish(engine)
