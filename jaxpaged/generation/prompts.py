"""Arguments that all loops have in common, checked on the host and laid out in arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from jax import Array

PromptsLike = Sequence[npt.ArrayLike] | npt.NDArray[Any] | Array
"""Token ids: a sequence of lists or 1-D arrays, or one array ``[B, T]`` padded on the right."""

_INT_MAX = np.iinfo(np.int32).max


def bucket(count: int, smallest: int = 16) -> int:
    """Smallest of ``smallest * (1, 1.5, 2, 3, 4, 6, ...)`` that holds ``count``: few compiled
    shapes, and at most a third of padding beyond ``smallest``.
    """
    size = smallest
    while size < count:
        if size * 3 // 2 >= count:
            return size * 3 // 2
        size *= 2
    return size


def columns(count: int, rows: int) -> int:
    """Columns of an array ``[rows, columns]`` of tokens for rows of up to ``count``: 4,096 at least,
    or fewer where many rows make an array large, so that most requests share a program."""
    return bucket(count, max(16, min(4096, 65536 // rows)))


def chunk_size(num_tokens: int, batch_size: int, *, fixed: bool = False) -> int:
    """Tokens of a prefill step: steps of one size, as few as ``batch_size`` allows, with little
    padding.

    ``fixed``: steps of ``batch_size`` whatever the prompts, so that all share a program.

    Raises:
      ValueError: ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    if fixed:
        return batch_size
    steps = -(-num_tokens // batch_size)
    return min(bucket(-(-num_tokens // steps)), batch_size)


def token_lists(prompts: PromptsLike, prompt_lens: npt.ArrayLike | None = None) -> list[np.ndarray]:
    """Checks prompts and returns them as a list of ``i32[length]``.

    Args:
      prompts: see ``PromptsLike``.
      prompt_lens: i32[B], tokens of each prompt; what is behind them is padding. Default: no
        padding.

    Raises:
      ValueError: another rank or dtype, an empty prompt, an id that is negative or wider than 32
        bits, a length below 1 or beyond its prompt.
    """
    if isinstance(prompts, np.ndarray | Array) and prompts.ndim != 2:
        raise ValueError(
            f"prompts must be lists of token ids or an array [B, T], got {prompts.dtype}{list(prompts.shape)}"
        )
    rows = np.asarray(prompts) if isinstance(prompts, Array) else prompts
    ids = [_token_ids(f"prompt {i}", row) for i, row in enumerate(rows)]
    if prompt_lens is not None:
        lens = _integers("prompt_lens", prompt_lens, len(ids))
        for i, (row, length) in enumerate(zip(ids, lens, strict=True)):
            if not 1 <= length <= len(row):
                raise ValueError(f"prompt_lens[{i}] must be 1 to {len(row)}, got {length}")
        ids = [row[:length] for row, length in zip(ids, lens, strict=True)]
    for i, row in enumerate(ids):
        if len(row) == 0:
            raise ValueError(f"prompt {i} is empty: it needs at least one token")
        if row.min() < 0:
            raise ValueError(f"prompt {i} holds a negative token id, {row.min()}")
    return [row.astype(np.int32) for row in ids]


def _token_ids(name: str, ids: npt.ArrayLike) -> np.ndarray:
    """Integers ``[length]``, not yet checked for their range but for its upper end."""
    try:
        row = np.asarray(ids)
    except ValueError:  # lists of different lengths inside
        row = np.empty((0, 0))
    if row.shape == (0,):
        return row.astype(np.int32)
    if row.ndim != 1 or row.dtype.kind not in "iu":
        raise ValueError(f"{name} must be a list or 1-D array of integer token ids, got {_short(ids)}")
    if row.max() > _INT_MAX:
        raise ValueError(f"{name} holds a token id that does not fit 32 bits, {row.max()}")
    return row


def _integers(name: str, values: npt.ArrayLike, count: int) -> np.ndarray:
    """``values`` as integers ``[count]``."""
    column = np.asarray(values)
    if column.shape != (count,) or column.dtype.kind not in "iu":
        raise ValueError(f"{name} must be {count} integers, one for each prompt, got {_short(values)}")
    return column


def _short(value: Any) -> str:
    if hasattr(value, "shape"):
        return f"{value.dtype}{list(value.shape)}"
    text = repr(value)
    return text if len(text) < 40 else f"{text[:40]}..."


def token_limits(max_new_tokens: npt.ArrayLike, num_prompts: int, smallest: int) -> np.ndarray:
    """``max_new_tokens`` as i32[num_prompts].

    Raises:
      ValueError: neither one integer nor one for each prompt, or a limit below ``smallest``.
    """
    given = np.asarray(max_new_tokens)
    given = np.repeat(given, num_prompts) if given.ndim == 0 else given
    limits = _integers("max_new_tokens", given, num_prompts)
    if not smallest <= limits.min() <= limits.max() <= _INT_MAX:
        raise ValueError(
            f"max_new_tokens must be at least {smallest} and fit 32 bits, got {_short(max_new_tokens)}"
        )
    return limits.astype(np.int32)


def pack_stop_ids(stop_ids: npt.ArrayLike) -> np.ndarray:
    """i32[n]: stop tokens, each once, padded with -1 so that their number does not recompile.

    Raises:
      ValueError: not integers.
    """
    unique = np.unique(_token_ids("stop_ids", stop_ids))
    return np.pad(unique.astype(np.int32), (0, bucket(len(unique)) - len(unique)), constant_values=-1)
