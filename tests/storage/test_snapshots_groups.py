"""Laws of snapshots of several layer groups: what comes back is what a next token may see, in all groups or none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_oracle import assert_same, counted
from cache_oracle import snapshot as arrays_of
from groups_kit import MAX_SEQS, contents, filled, grouped, jit, jit_step, layer_groups
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import jaxpaged as ops
from jaxpaged import (
    ALL,
    GroupedKVCache,
    LayerGroup,
    OutOfPages,
    PagedKVCache,
    Rope,
    SnapshotError,
    check_invariants,
    read_snapshot,
    restore,
    snapshot,
)
from jaxpaged.storage.snapshot_file import Snapshot, write_snapshot

MODEL = "a model"
jit_seen = counted(lambda cache: replace(cache, parts=tuple(part.without_unseen() for part in cache.parts)))


def save(cache: Any, path: Path, seq: int = ALL, lengths: Any = None) -> Snapshot:
    """lengths: tokens of each sequence, where the group that sees furthest has freed some."""
    counts = np.asarray(cache.lengths if lengths is None else lengths)
    ids = [[1000 * i + j for j in range(n)] for i, n in enumerate(counts)]
    snapshot(cache, path, seq=seq, token_ids=ids if seq == ALL else ids[seq], fingerprint=MODEL)
    return read_snapshot(path, fingerprint=MODEL)


def seen(cache: Any) -> list[list[dict[int, int]]]:
    """Contents of each group, without the entries that no next token sees."""
    return [contents(part) for part in jit_seen(cache).parts]


positions = st.integers(-2, 60)
ids = st.integers(0, MAX_SEQS - 1)
operations = st.one_of(
    st.tuples(
        st.just("step"), st.lists(st.sampled_from([0, 1, 8, 10]), min_size=MAX_SEQS, max_size=MAX_SEQS)
    ),
    st.tuples(st.just("decode"), st.integers(1, 12)),
    st.tuples(st.just("seq_copy"), ids, ids, st.just(0), positions),
    st.tuples(st.just("seq_remove"), ids, positions, positions),
    st.tuples(st.just("seq_shift"), ids, positions, st.just(-1), st.integers(-9, 9)),
    st.tuples(st.just("seq_defragment"), st.just(ALL)),
)


@settings(max_examples=12)
@given(
    operations=st.lists(operations, max_size=12),
    window=st.sampled_from([12, 33]),
    page_size=st.sampled_from([8, 16]),
    p1=st.just(-1) | st.integers(0, 60),
)
def test_any_history_comes_back_and_restoring_a_beginning_is_removing_the_rest(
    tmp_path_factory: pytest.TempPathFactory, operations: list[Any], window: int, page_size: int, p1: int
) -> None:
    cache, token = grouped(window), 0
    for name, *arguments in [("step", [10, 0, 10, 10]), *operations]:
        if name in ("step", "decode"):
            alive = [int(n > 0) for n in np.asarray(cache.lengths)]
            for given_now in [arguments[0]] if name == "step" else [alive] * arguments[0]:
                cache, _, ok = jit_step(cache, jnp.asarray(given_now, jnp.int32), token)
                token += sum(given_now) if ok else 0
        else:
            cache, _ = jit[name](cache, *arguments)
    path = tmp_path_factory.mktemp("groups")
    saved = save(cache, path / "all")
    assert [group.num_tokens for group in saved.groups] == [int(part.lengths.sum()) for part in cache.parts]
    again = restore(grouped(window), saved)  # a cache like the one it comes from always has room
    check_invariants(again)
    assert (np.asarray(again.pages_used) <= np.asarray(cache.pages_used)).all()
    assert [contents(part) for part in again.parts] == seen(cache)
    save(restore(again, saved), path / "again")

    roomy = {"num_pages": 40, "page_size": page_size, "max_seq_len": 400, "step_tokens": 400}
    expected, possible = jit["seq_remove"](cache, ALL, p1, -1) if p1 > 0 else (cache.clear(), True)
    if p1 < 0:
        expected = cache
    if possible:
        other = restore(grouped(window, **roomy), saved, p1=p1)
        check_invariants(other)
        assert [contents(part) for part in other.parts] == seen(expected)
    else:
        with pytest.raises(SnapshotError, match="of which the snapshot lacks some in layers 0, 2"):
            restore(grouped(window, **roomy), saved, p1=p1)


@pytest.mark.parametrize("windows", [(30, 12), (12,)])
def test_the_whole_text_is_saved_where_every_layer_has_a_window(
    tmp_path: Path, windows: tuple[int, ...]
) -> None:
    groups = [LayerGroup((i,), 1, 4, window=window) for i, window in enumerate(windows)]
    sizes: dict[str, Any] = {"num_pages": 30, "max_seqs": MAX_SEQS, "page_size": 8, "rope": Rope.create(())}
    cache = filled(GroupedKVCache.create(groups, **sizes), [57, 0, 5, 0])
    saved = save(cache, tmp_path / "file", 0, [57, 0, 5, 0])
    assert saved.token_ids == {0: list(range(57))} and saved.groups[0].num_tokens < 57
    assert saved.common_prefix(list(range(40))) == 40
    assert saved.common_prefix([0, 1, 2, 99, 4]) == 3
    for p1 in (-1, 0, *range(1, 58)):
        expected, ok = jit["seq_remove"](cache, 0, p1, -1) if p1 >= 0 else (cache, True)
        if ok:
            other = restore(GroupedKVCache.create(groups, **sizes), saved, p1=p1)
            check_invariants(other)
            assert [one[0] for one in map(contents, other.parts)] == [one[0] for one in seen(expected)]
        else:
            with pytest.raises(
                SnapshotError, match=f"^a token at position {p1} of sequence 0 sees others from "
            ):
                restore(GroupedKVCache.create(groups, **sizes), saved, p1=p1)
    for count in (int(cache.lengths[0]) - 1, 58):
        with pytest.raises(ValueError, match=f"token_ids has {count} for it"):
            snapshot(cache, tmp_path / "no", seq=0, token_ids=range(count), fingerprint=MODEL)
    everything = GroupedKVCache.create([replace(group, window=None) for group in groups], **sizes)
    with pytest.raises(
        SnapshotError, match="a token at position 57 of sequence 0 sees others from position 0 on"
    ):
        restore(everything, saved)


def test_a_group_that_saw_everything_is_restored_with_a_window(tmp_path: Path) -> None:
    whole = filled(grouped(window=400, num_pages=30), [57, 0, 9, 0])
    local = filled(grouped(window=12, num_pages=30), [57, 0, 9, 0])
    saved, short = save(whole, tmp_path / "whole"), save(local, tmp_path / "short")
    narrow = restore(grouped(window=12, num_pages=(9, 30)), saved)
    check_invariants(narrow)
    assert [contents(part) for part in narrow.parts] == seen(local)
    assert saved.groups[0].num_tokens == saved.groups[1].num_tokens > short.groups[1].num_tokens
    with pytest.raises(
        SnapshotError, match=r"position 57 of sequence 0 sees others from position 0 on, .* layers 0, 2"
    ):
        restore(grouped(window=400, num_pages=30), short)


def test_what_is_saved_of_a_group_is_what_it_holds_alone(tmp_path: Path) -> None:
    """The rows of each group are those of a cache of this group, in any format; restoring does not change them."""
    groups = [
        LayerGroup((0, 3), 2, 64, k_dtype="q8_0", window=12), LayerGroup((1,), 1, 64, k_dtype="kivi4"),
        LayerGroup((2,), 1, 32, v_dtype="bf16"),
    ]  # fmt: skip

    def make() -> GroupedKVCache:
        return GroupedKVCache.create(groups, num_pages=12, max_seqs=2, page_size=8, step_tokens=20)

    @jax.jit
    def step(cache: GroupedKVCache, seed: jax.Array) -> GroupedKVCache:
        cache, batch, _ = ops.reserve(cache, jnp.asarray([17, 3]), num_tokens=20)
        parts = []
        for g, part in enumerate(cache.parts):
            for layer in range(part.num_layers):
                rows = (
                    jax.random.normal(jax.random.key(seed), (2, 20, part.num_kv_heads, part.head_dim)) + layer
                )
                part = part.write(layer, *rows, batch.of_group(g))
            parts.append(part)
        return replace(cache, parts=tuple(parts))

    cache = step(step(step(make(), 0), 1), 2)
    saved = save(cache, tmp_path / "file")
    assert saved.has_residual and repr(saved) == (
        "Snapshot(2 sequences, 60 tokens, 1 layers of 1 KV heads of 64 values, k kivi4+hadamard, v f32; "
        "1 layers of 1 KV heads of 32 values, k f32, v bf16; "
        f"2 layers of 2 KV heads of 64 values, k q8_0, v f32, {saved.groups[2].num_tokens} of the tokens)"
    )
    assert [group.layers for group in saved.groups] == [(1,), (2,), (0, 3)]
    seen = replace(cache, parts=tuple(part.without_unseen() for part in cache.parts))
    again = save(restore(make(), saved), tmp_path / "again")
    for group, same, part in zip(
        save(seen, tmp_path / "seen").groups, again.groups, cache.parts, strict=True
    ):
        alone = save(part.without_unseen(), tmp_path / "alone", lengths=part.without_unseen().lengths).groups[
            0
        ]
        for other in (same, alone):
            assert (other.k_format, other.v_format) == (group.k_format, group.v_format)
            jax.tree.map(np.testing.assert_array_equal, other.keys, group.keys)
            jax.tree.map(np.testing.assert_array_equal, other.values, group.values)


def test_a_cache_of_one_group_is_a_cache_without_groups(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_pages": 20, "max_seqs": MAX_SEQS, "page_size": 8}
    one = GroupedKVCache.create([LayerGroup((0, 1), 2, 2)], **options)
    alone = PagedKVCache.create(num_layers=2, num_kv_heads=2, head_dim=2, **options)
    one = filled(one, [19, 0, 3, 0])
    save(one, tmp_path / "grouped")
    save(one.parts[0], tmp_path / "alone")
    files = [safe_open(tmp_path / name, framework="numpy") for name in ("grouped", "alone")]
    # In any order, which the checksum depends on.
    metadata = [{**file.metadata(), "sha256": ""} for file in files]
    assert metadata[0] == metadata[1] and metadata[0]["version"] == "2"
    assert (
        sorted(files[0].keys())
        == sorted(files[1].keys())
        == ["entries", "k.0", "k.1", "token_ids", "v.0", "v.1"]
    )
    for name in sorted(files[0].keys()):
        np.testing.assert_array_equal(files[0].get_tensor(name), files[1].get_tensor(name))
    restored = restore(alone, read_snapshot(tmp_path / "grouped", fingerprint=MODEL))
    assert contents(restored) == contents(one.parts[0])
    back = GroupedKVCache.create([LayerGroup((0, 1), 2, 2)], **options)
    assert contents(restore(back, read_snapshot(tmp_path / "alone", fingerprint=MODEL)).parts[0]) == contents(
        restored
    )


def test_what_does_not_fit_in_one_group_changes_nothing_in_any(tmp_path: Path) -> None:
    saved = save(filled(grouped(num_pages=30), [57, 0, 9, 0]), tmp_path / "file")

    def refused(cache: Any, error: type[Exception], message: str) -> None:
        before = arrays_of(cache)
        with pytest.raises(error, match=message) as raised:
            restore(cache, saved)
        assert "\n" not in str(raised.value)
        assert_same(cache, before)

    assert [part.num_layers for part in grouped().parts] == [1, 2]
    refused(grouped(num_pages=(3, 30)), OutOfPages, "out of pages: [45] requested, 3 free")
    refused(grouped(num_pages=(30, 9)), OutOfPages, "out of pages: 10 requested, 9 free")
    refused(
        grouped(num_pages=30, max_seq_len=40), SnapshotError, "needs 8 table entries, max_pages_per_seq is 6"
    )
    theirs = "the snapshot has 1 layers of 1 KV heads of 4 values in f32; 2 layers of 2 KV heads of 2 values in f32; "
    for dtype, ours in (("bf16", "bf16"), ("q8_0", "q8_0")):
        groups = [LayerGroup((0, 2), 2, 32, window=12), LayerGroup((1,), 1, 32, k_dtype=dtype)]
        other = GroupedKVCache.create(groups, num_pages=20, max_seqs=MAX_SEQS, page_size=8)
        refused(other, SnapshotError, theirs + f"the cache has 1 layers of 1 KV heads of 32 values in {ours}")
    alone = PagedKVCache.create(
        num_layers=1, num_kv_heads=1, head_dim=4, num_pages=20, max_seqs=4, page_size=8
    )
    refused(alone, SnapshotError, theirs + "the cache has 1 layers of 1 KV heads of 4 values in f32$")
    first, second = layer_groups(12)
    swapped = [replace(first, layers=(0, 1)), replace(second, layers=(2,))]
    other = GroupedKVCache.create(swapped, num_pages=30, max_seqs=MAX_SEQS, page_size=8)
    refused(other, SnapshotError, r"the snapshot has a group of layers \(1,\), the cache of \(2,\)")


def test_a_damaged_file_of_groups_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "file"
    saved = save(filled(grouped(num_pages=30), [37, 0, 9, 0]), path)
    data = path.read_bytes()
    for place in range(3, len(data), 41):
        for damaged in (data[:place], data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(SnapshotError, match=r"^file: "):
                read_snapshot(path, fingerprint=MODEL)

    def invalid(message: str, changed: Snapshot) -> None:
        write_snapshot(path, changed)
        with pytest.raises(SnapshotError, match=f"^file: invalid in version 3 of a snapshot: {message}$"):
            read_snapshot(path, fingerprint=MODEL)

    first, second = saved.groups
    invalid("layers", replace(saved, groups=(first, replace(second, layers=(1, 2)))))
    invalid("layers", replace(saved, groups=(second,)))
    invalid("lengths", replace(saved, lengths=saved.lengths - np.arange(MAX_SEQS)))
    invalid("lengths", replace(saved, lengths=saved.lengths[:3]))
    invalid("token_ids", replace(saved, tokens=saved.tokens[:-1]))
    later = second.entries + np.asarray([0, 0, 0, 0, 20, 0], np.int32)
    invalid("positions of the groups", replace(saved, groups=(first, replace(second, entries=later))))
    bad = second.entries.copy()
    bad[-1, 2] = 8
    invalid("slots", replace(saved, groups=(first, replace(second, entries=bad))))
    # Nothing is wrong with the file, but the next token sees what is not there.
    fewer = second.entries[: np.flatnonzero(second.entries[:, 0] == 2)[0]]
    rows = int(fewer[:, 3].sum())
    cut = replace(
        second, entries=fewer, keys=tuple(k[:rows] for k in second.keys), values=tuple(v[:rows] for v in second.values)
    )  # fmt: skip
    write_snapshot(path, replace(saved, groups=(first, cut)))
    with pytest.raises(
        SnapshotError, match="a token at position 9 of sequence 2 sees others from position 0 on"
    ):
        restore(grouped(num_pages=30), read_snapshot(path, fingerprint=MODEL))
