"""Rotary position embeddings: the part a KV cache needs, rotating queries by position differences."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike


@jax.tree_util.register_static
@dataclass(frozen=True)
class Rope:
    """Frequencies that a model's queries and keys are rotated with; static, part of the program.

    A token at position p rotates pair i of the first ``2 * H`` dimensions of a head by
    ``p * inv_freq[i]`` radians; further dimensions stay as they are.

    Reference: RoFormer, arXiv:2104.09864.
    """

    steps: tuple[int, ...]
    """H phase increments per position, in units of 2**-32 revolutions.

    Phases are computed in integers that wrap as angles do. The difference of two phases is then
    exactly the phase of the difference at any position, which shifting relies on; float32 products
    lose 4 decimals by position 1,000.
    """
    interleaved: bool = field(default=False)
    """True if pair i is the dimensions ``(2i, 2i + 1)``, False if it is ``(i, i + H)``."""

    @classmethod
    def create(cls, inv_freq: ArrayLike, *, interleaved: bool = False) -> Rope:
        """Builds a Rope from ``inv_freq [H]``, radians per position, accurate to 1e-9.

        ``Rope.create(())`` is the Rope of a model without rotary embeddings.

        Raises:
          ValueError: ``inv_freq`` is not one-dimensional.
        """
        inv_freq = np.asarray(inv_freq, np.float64)
        if inv_freq.ndim != 1:
            raise ValueError(f"inv_freq must be [H], one number a pair of dimensions, got {inv_freq.shape}")
        steps = np.round(np.mod(inv_freq / (2 * np.pi), 1) * 2.0**32).astype(np.uint64) % 2**32
        return cls(tuple(steps.tolist()), interleaved)

    @property
    def phase_step(self) -> np.ndarray:
        """u32[H]: ``steps`` as an array."""
        return np.array(self.steps, np.uint32)

    @property
    def rotary_dim(self) -> int:
        """2 * H: number of rotated dimensions of a head; 0 for a model without rotary embeddings."""
        return 2 * len(self.steps)

    def cos_sin(self, positions: Array) -> tuple[Array, Array]:
        """``f32[..., H]`` cos and sin of the angles at ``positions i32[...]``; exactly 1 and 0 at 0."""
        phase = jnp.asarray(positions).astype(jnp.uint32)[..., None] * self.phase_step
        radians = jax.lax.bitcast_convert_type(phase, jnp.int32) * np.float32(2 * np.pi / 2**32)
        return jnp.cos(radians), jnp.sin(radians)

    def rotate_by(self, x: Array, cos: Array, sin: Array) -> Array:
        """``x [..., D]`` rotated by angles whose ``cos`` and ``sin``, ``[..., H]``, broadcast to it."""
        half, dim = len(self.steps), self.rotary_dim
        rotary = x[..., :dim].astype(jnp.float32)
        if self.interleaved:
            first, second = rotary[..., 0::2], rotary[..., 1::2]
        else:
            first, second = rotary[..., :half], rotary[..., half:]
        pair = first * cos - second * sin, second * cos + first * sin
        rotated = (
            jnp.stack(pair, axis=-1).reshape(rotary.shape)
            if self.interleaved
            else jnp.concatenate(pair, axis=-1)
        ).astype(x.dtype)
        return rotated if dim == x.shape[-1] else jnp.concatenate([rotated, x[..., dim:]], axis=-1)

    def rotate(self, x: Array, positions: Array) -> Array:
        """``x [T, heads, D]`` rotated at ``positions i32[T]``."""
        cos, sin = self.cos_sin(positions)
        return self.rotate_by(x, cos[:, None], sin[:, None])
