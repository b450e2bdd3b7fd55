"""Laws of snapshots: what comes back is what was saved, in any pool; what is damaged changes nothing."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_oracle import (
    jit_copy,
    jit_remove,
    jit_shift,
    jit_step,
    make_cache,
    read_back,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxpaged import (
    ALL,
    OutOfPages,
    PagedKVCache,
    SnapshotError,
    check_invariants,
    read_snapshot,
    restore,
    snapshot,
)
from jaxpaged.storage.snapshot_file import Snapshot, write_snapshot

PAGE_SIZES = [8, 16, 32, 64, 128, 256]
MODEL = "a model"


def step(cache: PagedKVCache, counts: list[int], first: int) -> PagedKVCache:
    cache, _, ok = jit_step(cache, jnp.asarray(counts), first, num_tokens=64)
    assert ok
    return cache


def make(**sizes: Any) -> PagedKVCache:
    """One shape for most tests, so that little is compiled."""
    return make_cache(**({"num_pages": 24, "max_seqs": 5, "max_pages_per_seq": 12} | sizes))


def tangled() -> PagedKVCache:
    """Shared pages, shared in part, a hole inside a page, shifted positions, an empty sequence, pages out of order."""
    cache = make()
    cache = step(cache, [0, 0, 0, 30, 0], 500)
    cache = step(cache, [21, 5, 0, 0, 0], 0)
    for operation, arguments in (
        (jit_remove, (3, 0, -1)),
        (jit_copy, (0, 3, 0, -1)),
        (jit_copy, (0, 4, 3, 18)),
        (jit_remove, (0, 10, 13)),
        (jit_shift, (0, 13, -1, -3)),
        (jit_shift, (4, 0, -1, 100)),
    ):
        cache, ok = operation(cache, *arguments)
        assert ok
    return step(cache, [4, 11, 0, 1, 0], 200)


def ids_of(cache: PagedKVCache) -> list[list[int]]:
    """Token ids that nothing else would give."""
    return [[1000 * seq + i for i in range(n)] for seq, n in enumerate(np.asarray(cache.lengths))]


def bits(cache: PagedKVCache) -> list[bytes]:
    """All of it, to show that nothing changed."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(cache)]


def contents(cache: PagedKVCache, seq: int) -> list[Any]:
    """Positions, rotations, and the bits of keys and values."""
    used = slice(int(cache.table.num_entries[seq]))
    rotation = np.repeat(
        np.asarray(cache.table.rotation)[seq, used], np.asarray(cache.table.num_tokens)[seq, used]
    )
    position, k, v = read_back(cache, seq)
    return [position, rotation.tolist(), k.tobytes(), v.tobytes()]


def slots_used(cache: PagedKVCache) -> int:
    """Slots that a token lives in, those of several tokens counted once."""
    table = jax.tree.map(np.asarray, cache.table)
    return len(
        {
            (table.pages[seq, e], table.first_slot[seq, e] + i)
            for seq in range(cache.max_seqs)
            for e in range(table.num_entries[seq])
            for i in range(table.num_tokens[seq, e])
        }
    )


def save(cache: PagedKVCache, path: Path, seq: int = ALL) -> Snapshot:
    ids = ids_of(cache)
    snapshot(cache, path, seq=seq, token_ids=ids if seq == ALL else ids[seq], fingerprint=MODEL)
    return read_snapshot(path, fingerprint=MODEL)


def fields_of(saved: Snapshot) -> list[Any]:
    """Numbers and arrays of all fields."""
    return jax.tree.leaves([vars(saved) | {"groups": [vars(group) for group in saved.groups]}])


def with_group(saved: Snapshot, **fields: Any) -> Snapshot:
    """The snapshot with other fields of its only group."""
    return replace(saved, groups=(replace(saved.groups[0], **fields),))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_all_sequences_come_back_in_pages_of_any_size_and_share_what_they_shared(
    tmp_path: Path, page_size: int
) -> None:
    cache = tangled()
    saved = save(cache, tmp_path / "all")
    assert saved.token_ids == dict(enumerate(ids_of(cache)))
    assert saved.groups[0].keys[0].shape == (slots_used(cache), 2, 2), (
        "a slot that no token lives in was saved"
    )
    other = restore(make(page_size=page_size, max_seqs=6), saved)
    check_invariants(other)
    for seq in range(5):
        assert contents(other, seq) == contents(cache, seq)
    assert slots_used(other) == slots_used(cache)
    if page_size == cache.page_size:
        assert int(other.pages_used) <= int(cache.pages_used)


@pytest.mark.parametrize("page_size", [8, 32])
def test_what_is_shared_again_is_copied_when_written(tmp_path: Path, page_size: int) -> None:
    source = tangled()
    cache = restore(make(page_size=page_size), save(source, tmp_path / "all"))
    cache = step(cache, [3, 3, 3, 3, 3], 300)
    check_invariants(cache)
    for seq in range(5):
        for whole, part in zip(contents(cache, seq), contents(source, seq), strict=True):
            assert whole[: len(part)] == part and len(whole) > len(part)


@pytest.mark.parametrize("page_size", [8, 16, 128])
@pytest.mark.parametrize("seq", [0, 1, 2, 3, 4])
def test_a_sequence_goes_to_another_id_in_the_fewest_pages_and_the_others_stay(
    tmp_path: Path, seq: int, page_size: int
) -> None:
    source = tangled()
    saved = save(source, tmp_path / "one", seq)
    assert saved.token_ids == {seq: ids_of(source)[seq]}
    length = len(ids_of(source)[seq])
    cache = restore(make(page_size=page_size), save(source, tmp_path / "all"))
    cache = restore(cache, saved, seq=1)
    check_invariants(cache)
    assert contents(cache, 1) == contents(source, seq)
    assert [contents(cache, i) for i in (0, 2, 3, 4)] == [contents(source, i) for i in (0, 2, 3, 4)]
    table = np.asarray(cache.table.pages)
    others = set(table[[0, 2, 3, 4]].ravel()) - {cache.num_pages}
    assert len(set(table[1]) - {cache.num_pages}) == -(-length // page_size)
    assert int(cache.pages_used) == len(others) - (-length // page_size)


def test_rows_stay_where_they_were_when_moving_them_together_takes_more_entries_than_there_are(
    tmp_path: Path,
) -> None:
    source = step(make(), [32, 0, 0, 0, 0], 0)
    for p0, p1 in ((24, 32), (16, 20), (4, 8)):
        source, _ = jit_remove(source, 0, p0, p1)
    saved = save(source, tmp_path / "holes", 0)
    for max_pages_per_seq, pages, entries in ((12, 2, 4), (3, 3, 3)):
        cache = restore(make(max_pages_per_seq=max_pages_per_seq), saved)
        check_invariants(cache)
        assert contents(cache, 0) == contents(source, 0)
        assert (int(cache.pages_used), int(cache.table.num_entries[0])) == (pages, entries)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_numbers_come_back_bit_by_bit(tmp_path: Path, dtype: str) -> None:
    source = make(dtype=dtype)
    unsigned = {"f32": np.uint32, "bf16": np.uint16, "f16": np.uint16}[dtype]
    rng = np.random.default_rng(0)

    def draw(pages: jax.Array) -> jax.Array:
        """Infinities, subnormal numbers and negative zeros among them."""
        values = rng.integers(0, np.iinfo(unsigned).max, pages.shape, unsigned)
        sign, mantissa = (
            unsigned(np.iinfo(unsigned).max // 2 + 1),
            unsigned(2 ** jnp.finfo(pages.dtype).nmant - 1),
        )
        values[..., 0] &= sign | unsigned(1)
        # No NaN: writing may quiet a signalling one.
        values[(values | sign | mantissa) == np.iinfo(unsigned).max] &= ~mantissa
        return jnp.asarray(values.view(pages.dtype))

    k_pages, v_pages = jax.tree.map(draw, (source.k_pages, source.v_pages))
    source = step(source, [11, 0, 6, 0, 0], 0)
    source = replace(source, k_pages=k_pages, v_pages=v_pages)
    saved = save(source, tmp_path / "bits")
    cache = restore(make(dtype=dtype, page_size=16), saved)
    assert contents(cache, 0) == contents(source, 0)
    assert contents(cache, 2) == contents(source, 2)
    with safe_open(tmp_path / "bits", framework="numpy") as file:
        assert file.get_slice("k.0").get_dtype() == dtype.upper()


def test_a_prefix_is_restored_alone(tmp_path: Path) -> None:
    source = tangled()
    for seq in range(5):
        saved = save(source, tmp_path / "one", seq)
        position, rotation, *_ = contents(source, seq)
        _, k, _ = read_back(source, seq)
        for p1 in (0, 1, 7, 8, 9, 17, 105, 1000):
            cache = restore(make(page_size=16), saved, seq=0, p1=p1)
            check_invariants(cache)
            count = sum(p < p1 for p in position)
            assert contents(cache, 0)[:3] == [position[:count], rotation[:count], k[:count].tobytes()]
            assert int(cache.pages_used) == -(-count // 16)


def test_the_common_prefix_ends_at_another_token_and_at_a_gap(tmp_path: Path) -> None:
    source = step(make(), [12, 0, 0, 0, 0], 0)
    saved = save(source, tmp_path / "one", 0)
    ids = ids_of(source)[0]
    for count in range(13):
        assert saved.common_prefix(ids[:count]) == count
        assert saved.common_prefix([*ids[:count], -5, *ids[count:]]) == count
    source, _ = jit_remove(source, 0, 4, 6)
    saved = save(source, tmp_path / "gap", 0)
    assert saved.common_prefix(ids_of(source)[0]) == 4
    with pytest.raises(ValueError, match="a prefix is of one sequence; the snapshot has 5"):
        save(source, tmp_path / "all").common_prefix([1])


_lengths = st.integers(0, 20)
_operations = st.one_of(
    st.tuples(st.just("step"), st.lists(st.sampled_from([0, 0, 1, 3, 8, 9]), min_size=5, max_size=5)),
    st.tuples(st.just("copy"), st.integers(0, 4), st.integers(0, 4), _lengths, _lengths),
    st.tuples(st.just("remove"), st.integers(0, 4), _lengths, _lengths),
    st.tuples(st.just("shift"), st.integers(0, 4), _lengths, st.integers(-1, 20), st.integers(-4, 9)),
)


@settings(max_examples=40)
@given(
    operations=st.lists(_operations, max_size=14),
    page_size=st.sampled_from([8, 16, 32]),
    p1=st.integers(-1, 30),
)
def test_any_history_comes_back(
    tmp_path_factory: pytest.TempPathFactory, operations: list[Any], page_size: int, p1: int
) -> None:
    cache = make()
    for n, (name, *arguments) in enumerate([("step", [9, 0, 3, 0, 0]), *operations]):
        if name == "step":
            cache, *_ = jit_step(cache, jnp.asarray(arguments[0]), 100 * n, num_tokens=64)
        else:
            operation = {"copy": jit_copy, "remove": jit_remove, "shift": jit_shift}[name]
            cache, _ = operation(cache, *arguments)
    path = tmp_path_factory.mktemp("history")
    saved = save(cache, path / "all")
    again = restore(make(), saved)  # a cache like the one it comes from always has room
    check_invariants(again)
    assert slots_used(again) == slots_used(cache) and int(again.pages_used) <= int(cache.pages_used)
    again = restore(again, saved)
    assert [contents(again, seq) for seq in range(5)] == [contents(cache, seq) for seq in range(5)]
    save(again, path / "again")
    other = restore(make(num_pages=40, max_pages_per_seq=40, page_size=page_size), saved, p1=p1)
    check_invariants(other)
    for seq in range(5):
        kept = [n for n, p in enumerate(contents(cache, seq)[0]) if p1 < 0 or p < p1]
        position, k, v = read_back(cache, seq)
        assert contents(other, seq)[0] == [position[n] for n in kept]
        assert contents(other, seq)[2:] == [k[kept].tobytes(), v[kept].tobytes()]


def test_where_sequences_lay_in_the_pool_is_not_saved(tmp_path: Path) -> None:
    save(step(make(), [9, 0, 12, 0, 0], 0), tmp_path / "a")
    cache = step(step(make(), [0, 30, 0, 0, 0], 900), [0, 0, 0, 9, 0], 950)
    cache = step(jit_remove(cache, 1)[0], [9, 0, 12, 0, 0], 0)
    save(jit_remove(cache, 3)[0], tmp_path / "b")
    first, second = (read_snapshot(tmp_path / name, fingerprint=MODEL) for name in "ab")
    assert first.groups[0].entries[:, 1].tolist() == [0, 1, 2, 3]
    for one, other in zip(fields_of(first), fields_of(second), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    saved = save(tangled(), tmp_path / "all")
    one = save(tangled(), tmp_path / "one", 1)

    def refused(cache: PagedKVCache, error: type[Exception], message: str, **arguments: Any) -> None:
        before = bits(cache)
        with pytest.raises(error, match=message) as raised:
            restore(cache, **({"saved": saved} | arguments))
        assert "\n" not in str(raised.value)
        assert bits(cache) == before

    refused(make(num_pages=7), OutOfPages, "out of pages: 8 requested, 7 free")
    full = step(make(num_pages=6), [30, 16, 0, 0, 0], 0)
    refused(full, OutOfPages, "out of pages: 2 requested, 0 free", saved=one, seq=2)
    refused(make(max_seqs=4), SnapshotError, "the snapshot has a sequence 4, the cache 4")
    refused(make(max_pages_per_seq=3), SnapshotError, "needs 5 table entries, max_pages_per_seq is 3")
    for sizes in (
        {"num_layers": 1}, {"num_kv_heads": 1}, {"head_dim": 4}, {"dtype": "f16"}, {"dtype": "bf16"},
    ):  # fmt: skip
        cache = make(**sizes)
        refused(
            cache, SnapshotError, "the snapshot has 2 layers of 2 KV heads of 2 values in f32; the cache has"
        )
    refused(make(), ValueError, "seq is for a snapshot of one sequence", seq=1)
    refused(make(), ValueError, "seq must be an id from 0 to 4, got 5", saved=one, seq=5)
    refused(make(), ValueError, "seq must be an id from 0 to 4, got -1", saved=one, seq=-1)


def test_the_pages_of_the_sequence_that_is_replaced_count_as_free(tmp_path: Path) -> None:
    source = step(make(), [40, 0, 0, 0, 0], 0)
    saved = save(source, tmp_path / "one", 0)
    cache = step(make(num_pages=6), [8, 40, 0, 0, 0], 400)
    before = bits(cache)
    with pytest.raises(OutOfPages, match="out of pages: 5 requested, 1 free"):
        restore(cache, saved, seq=0)
    assert bits(cache) == before
    cache = restore(cache, saved, seq=1)
    check_invariants(cache)
    assert contents(cache, 1) == contents(source, 0)
    # Pages that another sequence still needs are not free.
    cache, _ = jit_copy(cache, 1, 2)
    before = bits(cache)
    with pytest.raises(OutOfPages, match="out of pages: 5 requested, 0 free"):
        restore(cache, saved, seq=1)
    assert bits(cache) == before


def test_pins_are_kept(tmp_path: Path) -> None:
    saved = save(step(make(), [17, 0, 0, 0, 0], 0), tmp_path / "one", 0)
    cache = step(make(), [17, 0, 0, 0, 0], 0)
    pins = np.zeros(cache.num_pages, np.int32)
    pins[np.asarray(cache.table.pages)[0, :2]] = 1
    pinned = replace(cache.allocator, ref_counts=cache.allocator.ref_counts + pins)
    check_invariants(restore(replace(cache, allocator=pinned), saved), pins)


def test_token_ids_must_be_those_of_the_sequences(tmp_path: Path) -> None:
    cache = step(make(), [3, 0, 2, 0, 0], 0)
    for arguments, message in (
        ({"token_ids": [[1, 2, 3]]}, "one list for each of 5 sequences, got 1"),
        ({"token_ids": [[1, 2, 3], [], [1], [], []]}, "sequence 2 holds 2 tokens, token_ids has 1"),
        ({"token_ids": [1, 2], "seq": 0}, "sequence 0 holds 3 tokens, token_ids has 2"),
        ({"token_ids": [], "seq": 5}, "seq must be ALL or an id from 0 to 4, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            snapshot(cache, tmp_path / "no", fingerprint=MODEL, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = step(make(), [3, 0, 2, 0, 0], 0)
    save(cache, tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    save(cache, tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        save(step(cache, [5, 0, 0, 0, 0], 50), tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert read_snapshot(tmp_path / "file", fingerprint=MODEL).tokens.size == 5 and before
    monkeypatch.undo()
    with pytest.raises(OSError, match="nowhere"):
        save(make(), tmp_path / "nowhere" / "file")


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save(tangled(), path)
    data = path.read_bytes()
    head = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(0)
    ends = {*range(0, 200, 3), *range(head - 20, head + 20), *range(0, len(data), 61), len(data) - 1}
    damaged = [data[:end] for end in sorted(ends)] + [data + b"\0", b"\0" + data]
    for place in [*range(head), *rng.integers(head, len(data), 300)]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    middle = len(data) // 2
    damaged += [data[:middle] + bytes(64) + data[middle + 64 :], data[:head] + data[head:][::-1]]
    for wrong in damaged:
        path.write_bytes(wrong)
        with pytest.raises(SnapshotError) as error:
            read_snapshot(path, fingerprint=MODEL)
        # A server sends the message to clients: no folder of its own.
        assert str(error.value).startswith("file: ") and "\n" not in str(error.value)
        assert len(str(error.value)) < 100


def test_the_repr_shows_sizes_alone(tmp_path: Path) -> None:
    saved = save(step(make(), [20, 0, 3, 0, 0], 0), tmp_path / "file")
    assert repr(saved) == "Snapshot(5 sequences, 23 tokens, 2 layers of 2 KV heads of 2 values, k f32, v f32)"


def test_x64_changes_nothing(tmp_path: Path) -> None:
    cache = tangled()
    saved = save(cache, tmp_path / "file")
    with jax.enable_x64(True):
        again = save(cache, tmp_path / "again")
        other = restore(make(), again)
        check_invariants(other)
    for one, same in zip(fields_of(again), fields_of(saved), strict=True):
        np.testing.assert_array_equal(one, same)
    assert [x.dtype for x in jax.tree.leaves(other)] == [x.dtype for x in jax.tree.leaves(cache)]
    assert bits(other) == bits(restore(make(), saved))


def test_a_foreign_older_or_other_models_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def says(message: str, fingerprint: str = MODEL) -> None:
        with pytest.raises(SnapshotError, match=message):
            read_snapshot(path, fingerprint=fingerprint)

    for content in (b"", b"GGUF" + bytes(200), b"ggsn\x09\0\0\0" + bytes(64), b"{}", b"text\n" * 50):
        path.write_bytes(content)
        says("no snapshot, or a truncated or damaged one")
    save_file({"weight": np.zeros(3)}, path)
    says("a safetensors file, but no snapshot")
    save_file({"weight": np.zeros(3)}, path, {"format": "pt"})
    says("a safetensors file, but no snapshot")
    save_file({"k": np.zeros(3)}, path, {"kind": "jaxpaged.snapshot", "version": "0"})
    says("a snapshot of version '0'; supported are 2 and 3")
    save(step(make(), [3, 0, 0, 0, 0], 0), path)
    says("made with another model: its fingerprint is 'a model', this model's 'another'", "another")
    with pytest.raises(FileNotFoundError):
        read_snapshot(tmp_path / "nowhere", fingerprint=MODEL)


@pytest.mark.parametrize(
    ("column", "value"), [(0, 7), (1, -1), (2, -1), (2, 8), (3, 0), (3, 9), (4, -1), (4, 2**31 - 1), (4, 0)]
)
def test_a_correct_checksum_proves_no_good_intentions(tmp_path: Path, column: int, value: int) -> None:
    saved = save(step(make(), [20, 0, 3, 0, 0], 0), tmp_path / "file")
    entries = saved.groups[0].entries.copy()
    entries[1, column] = value
    write_snapshot(tmp_path / "file", with_group(saved, entries=entries))
    with pytest.raises(SnapshotError, match=r"invalid in version [23] of a snapshot"):
        read_snapshot(tmp_path / "file", fingerprint=MODEL)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float16, np.int64, np.bool_])
def test_rows_of_another_type_than_the_format_are_refused(tmp_path: Path, dtype: Any) -> None:
    saved = save(step(make(), [20, 0, 3, 0, 0], 0), tmp_path / "file")
    keys = tuple(rows.astype(dtype) for rows in saved.groups[0].keys)
    write_snapshot(tmp_path / "file", with_group(saved, keys=keys))
    with pytest.raises(SnapshotError, match=r"invalid in version [23] of a snapshot"):
        read_snapshot(tmp_path / "file", fingerprint=MODEL)


def test_without_safetensors_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        snapshot(make(), tmp_path / "file", token_ids=[[]] * 5, fingerprint=MODEL)
    with pytest.raises(ImportError, match="pip install safetensors"):
        read_snapshot(tmp_path / "file", fingerprint=MODEL)


def test_the_page_about_snapshots_says_what_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "guides" / "snapshots.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert capsys.readouterr().out == f"{ {0: list(range(40))} } 3\n"
    assert np.asarray(names["other"].lengths).tolist() == [0, 0, 0, 3]
