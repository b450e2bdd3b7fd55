"""Saving and restoring slots: the cached pages of a slot's last request, as a file.

The pages of a finished request are in the prefix cache. To save them, the idle slot attaches them
again. To restore them, the slot reads the file and its pages go into the prefix cache, where any
request with the same prefix finds them.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import jax
import numpy as np

from jaxpaged.engine.device_shard import DeviceShard
from jaxpaged.engine.pool import PagedPool, Pool
from jaxpaged.engine.prefix_index import Node, root_key
from jaxpaged.engine.request import RefusedError
from jaxpaged.storage.snapshot_file import read_snapshot

_ROOT = root_key(cache_salt="")


@dataclass(frozen=True)
class SlotTransfer:
    """Size and time of a slot's save or restore."""

    num_tokens: int
    num_bytes: int
    """Size of the file."""
    seconds: float


def _paged(pool: Pool) -> PagedPool:
    if not isinstance(pool, PagedPool):
        raise RefusedError("slots are saved and restored by pages; this cache is contiguous")
    return pool


def save(
    device: DeviceShard,
    pool: Pool,
    slot: int,
    root: bytes,
    tokens: list[int],
    path: str | os.PathLike[str],
    fingerprint: str,
) -> SlotTransfer:
    """Writes the cached prefix of ``tokens`` to a file, by way of an idle slot.

    Raises:
      RefusedError: nothing is cached, or the cache is contiguous.
      OSError: the file cannot be written.
    """
    begin = time.monotonic()
    paged = _paged(pool)
    match = paged.match(root, tokens, len(tokens))
    if not match.num_tokens:
        raise RefusedError(f"slot {device.first_slot + slot} has nothing in the pool that could be saved")
    device.attach([paged.attachment(slot, match)])
    try:
        device.snapshot(path, slot, tokens[: match.num_tokens], fingerprint)
    finally:
        device.edit(removed=[slot])
    return SlotTransfer(match.num_tokens, os.path.getsize(path), time.monotonic() - begin)


def load(
    device: DeviceShard, pool: Pool, slot: int, path: str | os.PathLike[str], fingerprint: str
) -> tuple[SlotTransfer, list[int]]:
    """Loads a file into the prefix cache, by way of an idle slot: ``(sizes, tokens)``.

    Raises:
      RefusedError: the cache is contiguous.
      SnapshotError: not a snapshot, or one of another model or page format.
      OutOfPages: running requests leave too few pages.
      OSError: the file cannot be read.
    """
    begin = time.monotonic()
    paged = _paged(pool)
    saved = read_snapshot(path, fingerprint=fingerprint)
    if len(saved.sequences) != 1:
        raise RefusedError(f"{os.path.basename(path)} has {len(saved.sequences)} sequences; a slot holds one")
    tokens = [int(token) for token in saved.tokens]
    paged.ensure(paged.pages_ahead_of(len(tokens)))
    device.restore(saved, slot)
    kept = _indexed(device, paged, slot, tokens)
    device.edit(pinned=kept, removed=[slot])
    return SlotTransfer(len(tokens), os.path.getsize(path), time.monotonic() - begin), tokens


def _indexed(device: DeviceShard, pool: PagedPool, slot: int, tokens: list[int]) -> list[list[int]]:
    """Indexes the pages of a sequence; returns pages to pin before the sequence is removed."""
    ps = pool.page_size
    pinned: list[list[int]] = [[] for _ in device.parts]
    for table in device.block_tables():
        row = jax.tree.map(lambda field: np.asarray(field[slot]), table)
        used = np.arange(int(row.num_entries))
        # A shifted or cut sequence cannot be the prefix of others.
        whole = (row.position[: len(used)] - row.position[:1] == used * ps) & (row.position[:1] % ps == 0)
        if not whole.all() or row.first_slot[: len(used)].any() or row.rotation[: len(used)].any():
            return pinned
    chain: list[Node] = []
    for i in range(0, len(tokens), ps):
        if len(tokens) - i < ps and device.parts[0].staging is not None:
            break
        page = device.page(0, slot, i // ps)
        assert page is not None
        node, _ = pool.index.insert(_ROOT, chain[-1] if chain else None, tokens[i : i + ps], page)
        chain.append(node)
    for g in range(1, len(pinned)):
        for i, node in enumerate(chain):
            page = device.page(g, slot, i)
            pinned[g] += [] if page is None else pool.index.pin(g, node, page)
    pinned[0] = pool.index.release(chain)
    return pinned


def erase(device: DeviceShard, pool: Pool, root: bytes, tokens: list[int]) -> int:
    """Releases unused cached pages at the end of ``tokens``; returns the number of their tokens."""
    if not isinstance(pool, PagedPool):
        return 0
    match = pool.index.match(root, tokens, len(tokens))
    unpinned, num_tokens = pool.index.drop([*match.nodes, *([] if match.tail is None else [match.tail])])
    device.edit(unpinned=unpinned)
    return num_tokens
