"""Checks of arguments that all caches share: static sizes and formats, and shapes at trace time."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jaxpaged.attention.api import default_platform
from jaxpaged.pages.formats import PageFormat, formats_of


def check_sizes(**sizes: int) -> None:
    """Raises ``ValueError`` for a size below 1, by its name."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}")


def check_rows(rows: int) -> None:
    """Raises ``ValueError`` if a pool has too many rows for int32, which indexes them.

    Offsets in bytes are 64-bit everywhere: 2^31 rows of 128 numbers are 512 GiB in bf16.
    """
    if rows >= 2**31:
        raise ValueError(
            f"layers * pages * KV heads * page_size must be below 2^31 on one device, got {rows}; "
            "split the pool over devices"
        )


def storage_formats(
    dtype: DTypeLike | None,
    k_dtype: DTypeLike | None = None,
    v_dtype: DTypeLike | None = None,
    hadamard: bool | None = None,
) -> tuple[PageFormat, PageFormat]:
    """Formats of keys and values; by default bf16 where JAX computes on a GPU or TPU, f32 on a CPU.

    Raises:
      ValueError: a format that is not known.
    """
    if dtype is None:
        dtype = "f32" if default_platform() == "cpu" else "bf16"
    return formats_of(dtype, k_dtype, v_dtype, hadamard)


def values_dim(head_dim: int, v_head_dim: int | None) -> int:
    """Numbers of a head of values: ``v_head_dim``, by default those of keys.

    Raises:
      ValueError: it is below 1.
    """
    if v_head_dim is None:
        return head_dim
    check_sizes(v_head_dim=v_head_dim)
    return v_head_dim


def check_layer(layer: Array | int, num_layers: int) -> Array | int:
    """``layer``, an integer; if its value is known, it must be in [0, num_layers).

    Raises:
      ValueError: it is not.
    """
    if isinstance(layer, jax.core.Tracer):
        if layer.ndim or not jnp.issubdtype(layer.dtype, jnp.integer):
            raise ValueError(f"layer must be one integer, got {layer.dtype}{list(layer.shape)}")
        return layer.astype(jnp.int32)
    try:
        index = operator.index(layer)
    except TypeError:
        raise ValueError(f"layer must be one integer, got {layer!r}") from None
    if not 0 <= index < num_layers:
        raise ValueError(f"layer must be in [0, {num_layers}), got {index}")
    return index


def check_step_rows(
    k: Array, v: Array, num_tokens: int, num_kv_heads: int, head_dim: int, v_head_dim: int
) -> None:
    """Checks a step's keys and values, which a write would otherwise broadcast.

    Raises:
      ValueError: one is not ``[num_tokens, num_kv_heads, head_dim]``, of values ``v_head_dim``, or not of
        floating point.
    """
    dim = "head_dim" if v_head_dim == head_dim else "v_head_dim"
    for name, rows, last, size in (("k", k, "head_dim", head_dim), ("v", v, dim, v_head_dim)):
        expected = num_tokens, num_kv_heads, size
        if jnp.shape(rows) != expected:
            raise ValueError(
                f"{name} must be [tokens, num_kv_heads, {last}] = {expected}, got {jnp.shape(rows)}"
            )
        if not jnp.issubdtype(rows.dtype, jnp.floating):
            raise ValueError(f"{name} must be of floating point, got {rows.dtype}")


def step_rows(num_new: Array | np.ndarray, max_seqs: int, num_tokens: int | None) -> int:
    """T, the static number of rows of a step: ``num_tokens``, or the sum of a concrete ``num_new``.

    Raises:
      ValueError: ``num_new`` is not i32[S], or traced while ``num_tokens`` is left out.
    """
    if not isinstance(num_new, Array):
        num_new = np.asarray(num_new)
    if np.shape(num_new) != (max_seqs,):
        raise ValueError(
            f"num_new must have one count per sequence, [{max_seqs}], got shape {np.shape(num_new)}"
        )
    if not jnp.issubdtype(jnp.result_type(num_new), jnp.integer):
        raise ValueError(f"num_new must be of integers, got {jnp.result_type(num_new)}")
    if num_tokens is not None:
        if num_tokens < 1:
            raise ValueError(f"num_tokens must be positive, got {num_tokens}")
        return num_tokens
    if isinstance(num_new, jax.core.Tracer):
        raise ValueError("num_tokens must be given under jit: it is the static number of rows of the step")
    return max(1, int(np.maximum(np.asarray(num_new), 0).sum()))


def sequence_mask(seq: Any, max_seqs: int) -> Array:
    """bool[S] of ``seq``, an id, ``ALL`` (any negative id) or bool[S]; all False for an id >= S.

    Raises:
      ValueError: a mask of another shape, or ids that are not one integer.
    """
    seq = jnp.asarray(seq)
    if seq.dtype == jnp.bool_:
        if seq.shape != (max_seqs,):
            raise ValueError(f"a mask of sequences must have shape ({max_seqs},), got {seq.shape}")
        return seq
    if seq.ndim or not jnp.issubdtype(seq.dtype, jnp.integer):
        raise ValueError(
            f"a sequence must be one integer or bool[{max_seqs}], got {seq.dtype}{list(seq.shape)}"
        )
    return (seq < 0) | (jnp.arange(max_seqs, dtype=jnp.int32) == seq)
