"""Batch: the tokens of a step, and the page slots for their keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxpaged.pages.residual import FinalizedPages


class GroupRows(NamedTuple):
    """Where one layer group writes the tokens of a step; fields as in ``Batch``."""

    page: Array
    slot: Array
    finalized: FinalizedPages | None

    def first(self, num_tokens: int) -> GroupRows:
        """The first ``num_tokens`` rows."""
        return GroupRows(self.page[:num_tokens], self.slot[:num_tokens], self.finalized)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Tokens of one step, ragged: prompts of any length beside single decode tokens.

    The T rows are packed by sequence: rows ``cu_q_lens[s]:cu_q_lens[s + 1]`` belong to sequence
    ``s``. The remaining rows are padding, which is not written and attends to nothing.
    ``reserve`` of a cache creates it. S = max_seqs, T = rows of the step.
    """

    sequence: Array
    """i32[T]: sequence of each token; S = padding."""
    position: Array
    """i32[T]: logical position of each token in its sequence; 0 for padding."""
    rope_positions: Array
    """i32[T]: position at which a token's key and query are rotated: ``position`` plus the rotation
    offset of the entry it is written to."""
    page: Array
    """i32[T]: physical page each token is written to; N = not written."""
    slot: Array
    """i32[T]: slot of each token within its page."""
    cu_q_lens: Array
    """i32[S + 1]: cumulative number of tokens by sequence, from 0."""
    max_q_len: int | None = field(default=None, metadata={"static": True})
    """Static bound on the tokens of one sequence; None = T. 1 compiles to a smaller program."""
    finalized: FinalizedPages | None = None
    """Residual pages that the step fills; None for formats that have none."""
    visible_end: Array | None = None
    """i32[T]: position behind the last one that each row's query sees; a row always sees up to its
    own position, so smaller numbers change nothing. None = causal attention, no row sees more.

    For text that sees itself in both directions: prompts of prefix-LMs, the tokens of an image. The
    keys have to be there: what sees each other belongs into one step. A window still limits what
    lies before a row, and nothing behind it.

    >>> prefix = dataclasses.replace(batch, visible_end=prompt_lengths[batch.sequence])  # doctest: +SKIP
    """
    of_groups: tuple[GroupRows, ...] = ()
    """Rows of each layer group, in a cache that has several; ``page``, ``slot`` and ``finalized`` are those of
    the first."""

    def of_group(self, group: int) -> Batch:
        """The step as one layer group sees it."""
        page, slot, finalized = self.of_groups[group]
        return replace(self, page=page, slot=slot, finalized=finalized, of_groups=())

    @property
    def num_tokens(self) -> int:
        """T, static: rows of the step, padding included."""
        return self.sequence.shape[0]

    @property
    def max_seqs(self) -> int:
        """S, static."""
        return self.cu_q_lens.shape[0] - 1

    @property
    def q_lens(self) -> Array:
        """i32[S]: number of tokens of each sequence."""
        return self.cu_q_lens[1:] - self.cu_q_lens[:-1]

    @property
    def valid(self) -> Array:
        """bool[T]: False for padding."""
        return self.sequence < self.max_seqs

    @property
    def num_valid(self) -> Array:
        """i32[]: rows that are no padding; they come first."""
        return self.cu_q_lens[-1]

    @property
    def last_visible(self) -> Array:
        """i32[T]: largest position that each row's query sees; ``position`` in causal attention."""
        if self.visible_end is None:
            return self.position
        return jnp.maximum(self.position + 1, self.visible_end) - 1

    def first(self, num_tokens: int, max_q_len: int | None = None) -> Batch:
        """The same step with its first ``num_tokens`` rows only; those behind them are padding."""
        rows = {
            name: getattr(self, name)[:num_tokens]
            for name in ("sequence", "position", "rope_positions", "page", "slot")
        }
        if self.visible_end is not None:
            rows["visible_end"] = self.visible_end[:num_tokens]
        groups = tuple(one.first(num_tokens) for one in self.of_groups)
        return replace(self, **rows, max_q_len=max_q_len, of_groups=groups)

    @property
    def last_rows(self) -> Array:
        """i32[S]: row of the last token of each sequence; an arbitrary valid row if it has none."""
        return jnp.clip(self.cu_q_lens[1:] - 1, 0, self.num_tokens - 1)


def pack(num_new: Array, num_tokens: int) -> tuple[Array, Array, Array]:
    """Packs the new tokens of all sequences, in order of sequence, into ``num_tokens`` rows.

    Args:
      num_new: i32[S], number of new tokens of each sequence.
      num_tokens: T, static; rows beyond ``sum(num_new)`` are padding.

    Returns:
      ``(sequence i32[T], offset i32[T], cu_q_lens i32[S + 1])``: sequence of each row (S =
      padding), its index among that sequence's new tokens (0 for padding), and cumulative counts.
    """
    num_new = jnp.asarray(num_new, jnp.int32)
    max_seqs = num_new.shape[0]
    cu_q_lens = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(num_new, dtype=jnp.int32)])
    row = jnp.arange(num_tokens, dtype=jnp.int32)
    # The sequence of a row is the number of sequences that end at it or before.
    ends = jnp.zeros(num_tokens, jnp.int32).at[cu_q_lens[1:]].add(1, mode="drop")
    sequence = jnp.minimum(jnp.cumsum(ends, dtype=jnp.int32), max_seqs)
    offset = jnp.where(sequence < max_seqs, row - cu_q_lens[jnp.minimum(sequence, max_seqs - 1)], 0)
    return sequence, offset, cu_q_lens
