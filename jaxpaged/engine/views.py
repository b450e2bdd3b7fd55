"""What an engine shows of itself: its pool, page by page, and its slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpaged.engine.request import EngineRequest

FREE, USED, SHARED, CACHED = 0, 1, 2, 3
"""What a page is: nobody's; one sequence's; several sequences'; kept for the prefix cache alone."""


@dataclass(frozen=True)
class PoolView:
    """A picture of the pool between two steps."""

    num_pages: int
    page_size: int
    state: bytes
    """A byte a page: FREE, USED, SHARED or CACHED."""
    owner: list[int]
    """The first slot that holds the page; -1 = none."""
    sequences: list[dict[str, Any]]
    """``slot``, ``request_id``, ``tokens``, ``state`` ("prefill" or "decode") of each that runs."""


@dataclass(frozen=True)
class SlotView:
    """One slot: a sequence of the cache, and the last sample that had it."""

    id: int
    request_id: str | None
    """None: nobody had it yet."""
    is_processing: bool
    num_prompt: int
    num_computed: int
    num_generated: int
    n_ctx: int
    params: EngineRequest | None


@dataclass(frozen=True)
class SlotTransfer:
    """What became of a slot that was saved or restored."""

    num_tokens: int
    num_bytes: int
    """Of the file."""
    seconds: float


@dataclass(frozen=True)
class PoolUse:
    """Pages and tokens of the running sequences."""

    used: int
    live: int
    """Tokens, counted once where a page is shared."""


def page_use(pages: np.ndarray, page_tokens: np.ndarray, num_pages: int) -> PoolUse:
    """Counts what the rows of a table hold.

    Args:
      pages, page_tokens: i32[S, P], page (``num_pages`` = none) and tokens of each entry.
    """
    live = np.zeros(num_pages + 1, np.int64)
    for row, tokens in zip(pages, page_tokens, strict=True):
        mine = np.bincount(row, tokens, num_pages + 1)
        np.maximum(live, mine, out=live, casting="unsafe")
    live = live[:num_pages]
    return PoolUse(int((live > 0).sum()), int(live.sum()))


def pool_view(
    pages: np.ndarray, num_pages: int, page_size: int, cached: list[int], sequences: list[dict[str, Any]]
) -> PoolView:
    """The picture of a table's pages ``i32[S, P]`` and of those that the prefix cache keeps."""
    holders = np.zeros(num_pages + 1, np.int32)
    owner = np.full(num_pages + 1, -1, np.int64)
    for slot in reversed(range(len(pages))):
        mine = np.unique(pages[slot])
        holders[mine] += 1
        owner[mine] = slot
    state = np.minimum(holders, SHARED).astype(np.uint8)
    kept = np.asarray(cached, np.int64)
    state[kept[state[kept] == FREE]] = CACHED
    return PoolView(num_pages, page_size, state[:num_pages].tobytes(), owner[:num_pages].tolist(), sequences)
