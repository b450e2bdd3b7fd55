"""Rotary position embeddings, as far as a cache must know them: to turn a query by a difference of positions."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rope:
    """The frequencies that a model's queries and keys are rotated with.

    A token at position p turns pair i of the first ``2 * H`` dimensions by ``p * inv_freq[i]`` radians; the dimensions
    behind them are left alone. Source: RoFormer, arXiv:2104.09864.
    """

    phase_step: Array
    """u32[H]: turns a position, in units of 2**-32.

    Angles are multiplied out in integers that wrap as turns do. A difference of angles is then exactly the angle of the
    difference, at any position, which is what shifting relies on; float32 products lose 4 decimals by position 1,000.
    """
    interleaved: bool = field(default=False, metadata={"static": True})
    """Whether pair i is the dimensions ``(2i, 2i + 1)``; otherwise it is ``(i, i + H)``."""

    @classmethod
    def create(cls, inv_freq: ArrayLike, *, interleaved: bool = False) -> Rope:
        """From ``inv_freq [H]`` in radians a position, known when tracing; kept to 1e-9.

        Raises:
          ValueError: it is not one row of numbers.
        """
        inv_freq = np.asarray(inv_freq, np.float64)
        if inv_freq.ndim != 1 or inv_freq.size == 0:
            raise ValueError(f"inv_freq must be one number a pair of dimensions, got shape {inv_freq.shape}")
        turns = np.round(np.mod(inv_freq / (2 * np.pi), 1) * 2.0**32).astype(np.uint64)
        return cls(jnp.asarray(turns.astype(np.uint32)), interleaved)

    @property
    def rotary_dim(self) -> int:
        """2 * H, static: how many dimensions of a head turn."""
        return 2 * self.phase_step.shape[0]

    def cos_sin(self, positions: Array) -> tuple[Array, Array]:
        """cos and sin of the rotation at ``positions i32[...]``: ``f32[..., H]``, exactly 1 and 0 at position 0."""
        angle = jnp.asarray(positions).astype(jnp.uint32)[..., None] * self.phase_step
        radians = jax.lax.bitcast_convert_type(angle, jnp.int32) * np.float32(2 * np.pi / 2**32)
        return jnp.cos(radians), jnp.sin(radians)

    def rotate_by(self, x: Array, cos: Array, sin: Array) -> Array:
        """``x [..., D]`` turned by angles whose ``cos`` and ``sin``, ``[..., H]``, broadcast against it."""
        half, dim = self.phase_step.shape[0], self.rotary_dim
        rotary = x[..., :dim].astype(jnp.float32)
        if self.interleaved:
            first, second = rotary[..., 0::2], rotary[..., 1::2]
        else:
            first, second = rotary[..., :half], rotary[..., half:]
        pair = first * cos - second * sin, second * cos + first * sin
        turned = (
            jnp.stack(pair, axis=-1).reshape(rotary.shape)
            if self.interleaved
            else jnp.concatenate(pair, axis=-1)
        ).astype(x.dtype)
        return turned if dim == x.shape[-1] else jnp.concatenate([turned, x[..., dim:]], axis=-1)

    def rotate(self, x: Array, positions: Array) -> Array:
        """``x [T, heads, D]`` rotated at ``positions i32[T]``."""
        cos, sin = self.cos_sin(positions)
        return self.rotate_by(x, cos[:, None], sin[:, None])
