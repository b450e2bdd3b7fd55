"""kivi4 and kivi2: keys quantized by channel over the tokens of a page, values by token.

Some channels of keys are large in every token. A scale per channel keeps them from costing the
others precision, which blocks along a head cannot; values have no such channels. Source of the
idea: KIVI, arXiv:2402.02750.

A number is ``scale * code + minimum``, both f16. Codes of 32 numbers of a token are packed as in
ggml: 4-bit codes in 16 bytes; 2-bit codes in 8, number ``j + 8 * i`` in bits ``2 * i`` of byte j.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxpaged.pages.formats.ggml import BLOCK
from jaxpaged.pages.formats.residual import PageCode


@dataclass(frozen=True)
class Kivi(PageCode):
    """Codes of ``bits`` bits, with scales by channel or by token."""

    bits: int
    """2 or 4."""
    by_channel: bool
    """True for a scale per channel and page, False for one per 32 numbers of a token."""

    def check(self, name: str, page_size: int, head_dim: int) -> None:
        if head_dim % BLOCK:
            raise ValueError(
                f"{name} packs the codes of {BLOCK} numbers of a token: head_dim must be a multiple of {BLOCK}, "
                f"got {head_dim}"
            )

    def parts(self, page_size: int, head_dim: int) -> dict[str, tuple[tuple[int, ...], DTypeLike]]:
        scales = (head_dim,) if self.by_channel else (page_size, head_dim // BLOCK)
        return {
            "scales": (scales, jnp.float16),
            "minima": (scales, jnp.float16),
            "codes": ((page_size, head_dim * self.bits // 8), jnp.uint8),
        }

    def encode(self, x: Array) -> dict[str, Array]:
        grouped = x if self.by_channel else x.reshape(*x.shape[:-1], -1, BLOCK)
        axis = -2 if self.by_channel else -1
        low, high = (f(grouped, axis=axis, keepdims=True) for f in (jnp.min, jnp.max))
        # Codes are computed from scales and minimums as stored, in 16 bits.
        minima = low.astype(jnp.float16)
        scales = ((high - minima.astype(jnp.float32)) / (2**self.bits - 1)).astype(jnp.float16)
        step = scales.astype(jnp.float32)
        codes = jnp.round((grouped - minima.astype(jnp.float32)) / jnp.where(step == 0, 1, step))
        codes = jnp.clip(codes, 0, 2**self.bits - 1).astype(jnp.uint8).reshape(*x.shape[:-1], -1, BLOCK)
        width = BLOCK * self.bits // 8
        fields = codes.reshape(*codes.shape[:-1], 8 // self.bits, width)
        shifts = jnp.arange(0, 8, self.bits, dtype=jnp.uint8)[:, None]
        packed = jnp.sum(fields << shifts, axis=-2, dtype=jnp.uint8)
        return {
            "scales": jnp.squeeze(scales, axis),
            "minima": jnp.squeeze(minima, axis),
            "codes": packed.reshape(*x.shape[:-1], -1),
        }

    def decode(self, parts: Mapping[str, Array], page_size: int, head_dim: int) -> Array:
        width = BLOCK * self.bits // 8
        packed = parts["codes"].reshape(*parts["codes"].shape[:-1], head_dim // BLOCK, 1, width)
        shifts = jnp.arange(0, 8, self.bits, dtype=jnp.uint8)[:, None]
        codes = (packed >> shifts & (2**self.bits - 1)).astype(jnp.float32)
        codes = codes.reshape(*packed.shape[:-2], BLOCK)
        scales, minima = (parts[name].astype(jnp.float32) for name in ("scales", "minima"))
        if self.by_channel:
            codes = codes.reshape(*codes.shape[:-2], head_dim)
            return codes * scales[..., None, :] + minima[..., None, :]
        numbers = codes * scales[..., None] + minima[..., None]
        return numbers.reshape(*numbers.shape[:-2], head_dim)
