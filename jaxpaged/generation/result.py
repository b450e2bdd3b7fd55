"""Results of generations."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax import Array

RUNNING = 0
"""``finish_reason`` of rows of padding, and of sequences that still run."""
FINISH_STOP = 1
"""``finish_reason``: a stop token."""
FINISH_LENGTH = 2
"""``finish_reason``: the limit of tokens."""
FINISH_OUT_OF_PAGES = 3
"""``finish_reason``: the pool ran out of pages."""
FINISH_NAN = 4
"""``finish_reason``: the logits held NaN."""


class ResultBase:
    """A dataclass of arrays whose ``repr`` shows their dtypes and shapes, and does not fetch
    them."""

    def __repr__(self) -> str:
        arrays = ", ".join(
            f"{name}={x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else f"{name}={x!r}"
            for name, x in vars(self).items()
        )
        return f"{type(self).__name__}({arrays})"


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class GenerateResult(ResultBase):
    """Result of ``generate``. Sample j of prompt i is row ``i * n + j`` of R; rows behind the last
    are padding."""

    tokens: Array
    """i32[R, M]: generated tokens, without the stop token, padded with -1."""
    num_tokens: Array
    """i32[R]: number of generated tokens."""
    finish_reason: Array
    """i32[R]: FINISH_STOP, FINISH_LENGTH, FINISH_OUT_OF_PAGES or FINISH_NAN; RUNNING in padding."""
    logprobs: Array
    """f32[R, M]: log-probabilities of ``tokens``, by the model's logits at temperature 1, before
    penalties and truncation; f32[R, 0] unless asked for."""
    stop_logprob: Array
    """f32[R]: log-probability of the stop token that ended a row, likewise; 0 where none did."""
    top_tokens: Array
    """i32[R, M, k]: likeliest tokens in place of each, likeliest first; -1 in padding."""
    top_logprobs: Array
    """f32[R, M, k]: their log-probabilities."""
    drafted: Array
    """i32[R]: number of drafted tokens."""
    accepted: Array
    """i32[R]: number of drafted tokens that are part of the text."""
    pages_peak: Array
    """i32[]: largest number of pages in use after any step; i32[G] with G layer groups."""
    num_steps: Array
    """i32[]: runs of the model."""

    def token_lists(self) -> list[list[int]]:
        """Generated tokens of each row on the host, without padding and without rows of padding."""
        rows = zip(*jax.device_get((self.tokens, self.num_tokens, self.finish_reason)), strict=True)
        return [tokens[:count].tolist() for tokens, count, reason in rows if reason != RUNNING]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class BeamResult(ResultBase):
    """Result of ``beam_search``; best sequences first.

    Shapes: B = prompts that the cache has sequences for (max_seqs // num_beams), R =
    num_return_sequences.
    """

    tokens: Array
    """i32[B, R, M]: generated tokens, without the stop token, padded with -1."""
    num_tokens: Array
    """i32[B, R]: number of generated tokens."""
    score: Array
    """f32[B, R]: sum of log-probabilities, including the stop token's, over length **
    length_penalty; -inf if there is no such sequence."""
    finish_reason: Array
    """i32[B, R]: FINISH_STOP, FINISH_LENGTH or FINISH_OUT_OF_PAGES; FINISH_NAN in all R if logits
    of the search held NaN; RUNNING if there is no such sequence and the search is complete."""
    complete: Array
    """bool[B]: False if the search ended early, out of pages or with NaN."""
    num_steps: Array
    """i32[]: steps that gave beams a token."""
    pages_peak: Array
    """i32[]: largest number of pages in use after any step; i32[G] with G layer groups."""
    unshared_peak: Array
    """i32[]: the same if no sequences shared pages."""
    pages_mean: Array
    """f32[]: pages in use, mean over the steps of the search."""
    unshared_mean: Array
    """f32[]: the same if no sequences shared pages."""
