"""Pages in host memory: where preempted sequences wait if copying them is cheaper than computing them again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxpaged.pages.block_table import BlockTable


@dataclass(frozen=True)
class SwappedPages:
    """One sequence's entries, and what its pages hold."""

    row: BlockTable
    """``[P]`` fields, numpy; its pages are numbered from 0, in the order of ``chunks``."""
    num_pages: int
    chunks: list[Any]
    """Pages as ``adoption.read_pages`` gives them, so many at a time."""
    num_computed: int
    num_bytes: int


@dataclass
class SwapCosts:
    """What was measured, and what follows for the next preemption. Rates are moving averages; 0.0 = not yet."""

    tokens_per_second: float = 0.0
    """At which prompts are computed."""
    bytes_per_second: float = 0.0
    """At which pages are copied, one way."""

    def observe_prompt(self, tokens: int, seconds: float) -> None:
        """A step computed so many tokens."""
        self.tokens_per_second = _average(self.tokens_per_second, tokens, seconds)

    def observe_copy(self, num_bytes: int, seconds: float) -> None:
        """So many bytes went to or from the host."""
        self.bytes_per_second = _average(self.bytes_per_second, num_bytes, seconds)

    def swap_is_cheaper(self, num_tokens: int, num_bytes: int) -> bool:
        """Whether ``num_bytes`` go to the host and back sooner than ``num_tokens`` are computed again."""
        if not self.tokens_per_second or not self.bytes_per_second:
            return False
        return 2 * num_bytes / self.bytes_per_second < num_tokens / self.tokens_per_second


def _average(old: float, amount: float, seconds: float) -> float:
    new = amount / max(seconds, 1e-9)
    return new if old == 0.0 else 0.8 * old + 0.2 * new


def numbered(row: BlockTable) -> tuple[BlockTable, np.ndarray]:
    """A row whose pages are numbered from 0 in the order of their first entry, and the pages by that number.

    Padding becomes ``P``, which no page of a row can be numbered.
    """
    row = jax.tree.map(np.asarray, row)
    used = int(row.num_entries)
    pages, first, inverse = np.unique(row.pages[:used], return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    numbers = np.full(row.max_pages_per_seq, row.max_pages_per_seq, np.int32)
    numbers[:used] = rank[inverse]
    return replace(row, pages=numbers), pages[np.argsort(first)].astype(np.int32)  # type: ignore[arg-type]
