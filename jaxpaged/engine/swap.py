"""Swapping: copies of preempted sequences in host memory, where that beats recomputing them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxpaged.pages.block_table import BlockTable


@dataclass(frozen=True)
class SwappedPages:
    """Table row and pages of one sequence in a layer group."""

    row: BlockTable
    """``[P]`` numpy fields; pages are numbered from 0 in the order of ``chunks``."""
    num_pages: int
    chunks: list[Any]
    """Pages as returned by ``cache.sharing.read_pages``, a few in each."""


@dataclass(frozen=True)
class SwappedSequence:
    """A sequence in host memory."""

    groups: tuple[SwappedPages, ...]
    num_computed: int

    @property
    def num_bytes(self) -> int:
        """Bytes of its pages."""
        return sum(leaf.nbytes for group in self.groups for leaf in jax.tree.leaves(group.chunks))


@dataclass
class SwapCosts:
    """Measured rates that decide between swapping and recomputing; moving averages, 0.0 = none."""

    tokens_per_second: float = 0.0
    """Prefill rate."""
    bytes_per_second: float = 0.0
    """Rate of copies in one direction."""

    def observe_prompt(self, tokens: int, seconds: float) -> None:
        """Records a prefill step."""
        self.tokens_per_second = _average(self.tokens_per_second, tokens, seconds)

    def observe_copy(self, num_bytes: int, seconds: float) -> None:
        """Records a copy to or from the host."""
        self.bytes_per_second = _average(self.bytes_per_second, num_bytes, seconds)

    def swap_is_cheaper(self, num_tokens: int, num_bytes: int) -> bool:
        """True if copying ``num_bytes`` both ways is faster than recomputing ``num_tokens``."""
        if not self.tokens_per_second or not self.bytes_per_second:
            return False
        return 2 * num_bytes / self.bytes_per_second < num_tokens / self.tokens_per_second


def _average(old: float, amount: float, seconds: float) -> float:
    new = amount / max(seconds, 1e-9)
    return new if old == 0.0 else 0.8 * old + 0.2 * new


def numbered(row: BlockTable) -> tuple[BlockTable, np.ndarray]:
    """A row with pages numbered in order of first use, and the pages by number; P in padding."""
    row = jax.tree.map(np.asarray, row)
    used = int(row.num_entries)
    pages, first, inverse = np.unique(row.pages[:used], return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    numbers = np.full(row.max_pages_per_seq, row.max_pages_per_seq, np.int32)
    numbers[:used] = rank[inverse]
    return replace(row, pages=numbers), pages[np.argsort(first)].astype(np.int32)  # type: ignore[arg-type]
