"""Batch: which tokens of which sequences one step computes, and where their keys and values go."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array

from jaxpaged.pages.residual import FinalizedPages


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """The tokens of one step, ragged: prompts of any length beside single decode tokens.

    T tokens are packed by sequence: those of sequence ``s`` are ``cu_q_lens[s] .. cu_q_lens[s + 1]``. What is
    left of T is padding; it is written nowhere, and attends to nothing. A cache makes a Batch in ``reserve``.

    Shapes: S = max_seqs, T = tokens of the step.
    """

    sequence: Array
    """i32[T]: the sequence of each token; S = padding."""
    position: Array
    """i32[T]: logical position of each token in its sequence; 0 for padding."""
    rope_positions: Array
    """i32[T]: the position at which a token's key and query are rotated: ``position`` plus the rotation of the
    entry it is written to."""
    page: Array
    """i32[T]: physical page each token is written to; one past the last page = written nowhere."""
    slot: Array
    """i32[T]: slot within that page."""
    cu_q_lens: Array
    """i32[S + 1]: cumulative number of tokens by sequence, from 0."""
    max_q_len: int | None = field(default=None, metadata={"static": True})
    """Static bound on the tokens of one sequence; None = T. A step of single tokens (1) compiles to less."""
    finalized: FinalizedPages | None = None
    """The pages that the step fills, where full pages are sealed; None elsewhere."""

    @property
    def num_tokens(self) -> int:
        """T, static: the rows of the step, padding included."""
        return self.sequence.shape[0]

    @property
    def max_seqs(self) -> int:
        """S, static."""
        return self.cu_q_lens.shape[0] - 1

    @property
    def q_lens(self) -> Array:
        """i32[S]: tokens of each sequence in this step."""
        return self.cu_q_lens[1:] - self.cu_q_lens[:-1]

    @property
    def valid(self) -> Array:
        """bool[T]: False for padding."""
        return self.sequence < self.max_seqs

    @property
    def last_rows(self) -> Array:
        """i32[S]: row of each sequence's last token, the one whose logits predict what follows.

        A sequence without tokens has no such row and gets an arbitrary valid one.
        """
        return jnp.clip(self.cu_q_lens[1:] - 1, 0, self.num_tokens - 1)


def pack(num_new: Array, num_tokens: int) -> tuple[Array, Array, Array]:
    """Lays ``num_new[S]`` tokens of each sequence one sequence after the other into ``num_tokens`` rows.

    Args:
      num_new: i32[S], tokens of each sequence.
      num_tokens: T, static; rows beyond ``sum(num_new)`` are padding.

    Returns:
      ``(sequence i32[T], offset i32[T], cu_q_lens i32[S + 1])``: the sequence of each row (S = padding), which of
      that sequence's new tokens it is (0 for padding), and the cumulative counts.
    """
    num_new = jnp.asarray(num_new, jnp.int32)
    max_seqs = num_new.shape[0]
    cu_q_lens = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(num_new, dtype=jnp.int32)])
    row = jnp.arange(num_tokens, dtype=jnp.int32)
    # Each sequence's end raises the count of the rows behind it by one; empty sequences add up.
    ends = jnp.zeros(num_tokens, jnp.int32).at[cu_q_lens[1:]].add(1, mode="drop")
    sequence = jnp.minimum(jnp.cumsum(ends, dtype=jnp.int32), max_seqs)
    offset = jnp.where(sequence < max_seqs, row - cu_q_lens[jnp.minimum(sequence, max_seqs - 1)], 0)
    return sequence, offset, cu_q_lens
