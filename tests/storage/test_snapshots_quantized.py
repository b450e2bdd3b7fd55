"""Snapshots of quantized pages: what attention reads is the same bit by bit, open pages go on where they were."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpaged as ops
from jaxpaged import PagedKVCache, SnapshotError, check_invariants, read_snapshot, restore, snapshot
from jaxpaged.pages.formats import PAGE_FORMATS, BlockPages
from jaxpaged.storage.snapshot_file import write_snapshot

KV, DIM, MAX_SEQS = 2, 64, 4
SIZES = {"num_layers": 2, "num_kv_heads": KV, "head_dim": DIM, "max_seqs": MAX_SEQS}
MODEL = "a model"


def create(**options: Any) -> PagedKVCache:
    return PagedKVCache.create(**{**SIZES, "num_pages": 20, "page_size": 8, **options})


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def _written(cache: PagedKVCache, num_new: jax.Array, first: jax.Array) -> tuple[PagedKVCache, jax.Array]:
    cache, batch, ok = ops.reserve(cache, num_new, num_tokens=64)
    rows = jax.random.normal(jax.random.key(first), (2, 64, KV, DIM))
    for layer in range(cache.num_layers):
        cache = cache.write(layer, rows[0] + layer, rows[1] - layer, batch)
    return cache, ok


def step(cache: PagedKVCache, num_new: list[int], first: int) -> PagedKVCache:
    cache, ok = _written(cache, jnp.asarray(num_new), first)
    assert ok
    return cache


def shared(**options: Any) -> PagedKVCache:
    """A fork that shares a residual page, one that has gone on, and a cut inside a quantized page."""
    cache = step(create(**options), [13, 9, 21, 0], 0)
    for operation, arguments in (
        (ops.seq_copy, (0, 3, 0, -1)),
        (ops.seq_remove, (2, 12, -1)),
        (ops.seq_remove, (1, 0, -1)),
        (ops.seq_copy, (0, 1, 0, -1)),
    ):
        cache, ok = operation(cache, *arguments)
        assert ok
    return step(cache, [0, 1, 3, 0], 1)


def rows_of(cache: PagedKVCache, seq: int) -> np.ndarray:
    """f32[2 * L, tokens, KV, D]: what attention reads of a sequence, in order."""
    found = []
    table = jax.tree.map(lambda x: np.asarray(x)[seq], cache.table)
    for layer in range(cache.num_layers):
        for pages in cache.pages(layer):
            every = jnp.arange(cache.num_pages)
            rows = np.asarray(
                pages.format.load(pages, every) if isinstance(pages, BlockPages) else pages, np.float32
            )
            found.append(
                np.concatenate(
                    [
                        rows[table.pages[e], :, first : first + table.num_tokens[e]].swapaxes(0, 1)
                        for e, first in enumerate(table.first_slot[: table.num_entries])
                    ]
                    or [np.zeros((0, KV, DIM), np.float32)]
                )
            )
    return np.stack(found)


def saved_as(cache: PagedKVCache, path: Path, seq: int = ops.ALL) -> ops.Snapshot:
    lengths = np.asarray(cache.lengths)
    ids = [list(range(n)) for n in lengths] if seq == ops.ALL else list(range(lengths[seq]))
    snapshot(cache, path, seq=seq, token_ids=ids, fingerprint=MODEL)
    return read_snapshot(path, fingerprint=MODEL)


FORMATS = [
    {"dtype": "q4_k", "num_layers": 1},
    {"k_dtype": "kivi4", "v_dtype": "q8_0"},
]


@pytest.mark.parametrize("formats", FORMATS, ids=lambda formats: "-".join(map(str, formats.values())))
def test_what_is_restored_is_what_was_saved_and_goes_on(tmp_path: Path, formats: dict[str, Any]) -> None:
    cache = shared(**formats)
    saved = saved_as(cache, tmp_path / "file")
    other = step(create(**formats), [5, 0, 0, 2], 7)
    other = restore(other, saved)
    check_invariants(other)
    assert other.pages_used == cache.pages_used, "what was shared is shared again"
    for _ in range(2):
        for seq in range(MAX_SEQS):
            np.testing.assert_array_equal(rows_of(other, seq), rows_of(cache, seq))
        cache, other = (step(one, [2, 9, 1, 1], 3) for one in (cache, other))
        check_invariants(other)


def test_quantized_rows_move_to_pages_of_any_size(tmp_path: Path) -> None:
    name = "q4_0"
    cache = shared(dtype=name)
    other = restore(create(dtype=name, page_size=32), saved_as(cache, tmp_path / "file"))
    for seq in range(MAX_SEQS):
        np.testing.assert_array_equal(rows_of(other, seq), rows_of(cache, seq))


def test_one_sequence_and_its_beginning(tmp_path: Path) -> None:
    cache = shared(dtype="q4_k")
    saved = saved_as(cache, tmp_path / "file", seq=0)
    for p1, kept in ((-1, 13), (10, 10), (8, 8), (3, 3)):
        other = restore(step(create(dtype="q4_k"), [3, 3, 0, 0], 5), saved, seq=1, p1=p1)
        check_invariants(other)
        np.testing.assert_array_equal(rows_of(other, 1), rows_of(cache, 0)[:, :kept])
        check_invariants(step(other, [6, 6, 1, 0], 6))


def test_residual_formats_with_pages_of_another_size_and_other_formats_are_refused(tmp_path: Path) -> None:
    saved = saved_as(shared(dtype="kivi4"), tmp_path / "file")
    with pytest.raises(SnapshotError, match="quantized pages of 8 tokens, which cannot change their size"):
        restore(create(dtype="kivi4", page_size=16), saved)
    with pytest.raises(SnapshotError, match=re.escape("64 values in kivi4")):
        restore(create(dtype="kivi4", hadamard=not PAGE_FORMATS["kivi4"].hadamard), saved)
    with pytest.raises(SnapshotError, match="64 values in q4_0 and kivi4"):
        restore(create(k_dtype="q4_0", v_dtype="kivi4", hadamard=False), saved)


@pytest.mark.parametrize("residual", [[99], [0, 0], [-1], [0]])
def test_impossible_residual_pages_are_refused(tmp_path: Path, residual: list[int]) -> None:
    saved = saved_as(shared(dtype="kivi4"), tmp_path / "file")
    (group,) = saved.groups
    assert 0 not in group.residual
    wrong = np.asarray(residual, np.int32)
    layers = [
        tuple(
            {**one, "residual": np.resize(one["residual"], (len(wrong), *one["residual"].shape[1:]))}
            for one in side
        )
        for side in (group.keys, group.values)
    ]
    changed = replace(group, residual=wrong, keys=layers[0], values=layers[1])
    write_snapshot(tmp_path / "file", replace(saved, groups=(changed,)))
    with pytest.raises(SnapshotError, match="snapshot: residual pages"):
        read_snapshot(tmp_path / "file", fingerprint=MODEL)
