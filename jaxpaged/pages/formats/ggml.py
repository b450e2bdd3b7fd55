"""ggml's blocks of 32 numbers: encoding, with ggml's rounding, and decoding.

Encoders return the bytes of the ``gguf`` package's quantizers. Where those round a product before
adding to it, a ``maximum`` between the two keeps compilers from fusing them into one operation that
rounds once.

4-bit codes are packed as in ggml: byte j of 16 has number j in its low half and number j + 16 in its
high half. Fifth bits of 32 codes are 4 bytes, number j in bit ``j % 8`` of byte ``j // 8``.

Source: ggml's ``ggml-quants.c`` (github.com/ggml-org/llama.cpp), the ``_ref`` quantizers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from jaxpaged.pages.formats.codebooks import IQ4_NL_VALUES

BLOCK = 32
"""Numbers per block."""
Blocks = Mapping[str, Array]
"""Parts of blocks by name, ``[..., width]`` each."""


def pack_nibbles(codes: Array) -> Array:
    """u8[..., 16]: packs 4-bit codes ``[..., 32]``."""
    codes = codes.astype(jnp.uint8)
    return codes[..., :16] | codes[..., 16:] << 4


def unpack_nibbles(packed: Array) -> Array:
    """i8[..., 32]: inverse of ``pack_nibbles``."""
    return jnp.concatenate([packed & 15, packed >> 4], axis=-1).astype(jnp.int8)


def pack_fifth_bits(codes: Array) -> Array:
    """u8[..., 4]: packs the fifth bits of codes ``[..., 32]``."""
    bits = (codes.astype(jnp.uint8) >> 4).reshape(*codes.shape[:-1], 4, 8)
    return jnp.sum(bits << jnp.arange(8, dtype=jnp.uint8), axis=-1, dtype=jnp.uint8)


def unpack_fifth_bits(packed: Array) -> Array:
    """i8[..., 32], 0 or 16: inverse of ``pack_fifth_bits``."""
    bits = packed[..., None] >> jnp.arange(8, dtype=jnp.uint8) & 1
    return bits.reshape(*packed.shape[:-1], 32).astype(jnp.int8) << 4


def _divided(x: Array, divisor: int) -> Array:
    """``x / divisor``, rounded once. XLA would multiply by the rounded inverse of a constant."""
    return x / jnp.where(x == x, np.float32(divisor), 0)


def _inverse(d: Array) -> Array:
    return jnp.where(d == 0, 0, 1 / jnp.where(d == 0, 1, d))


def _signed_extreme(x: Array) -> Array:
    """``[..., 1]``: number of largest magnitude, the first if there are several."""
    first = lax.argmax(jnp.abs(x), x.ndim - 1, jnp.int32)[..., None]
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)
    # Selected, not gathered: XLA:TPU gathers one number at a time.
    return jnp.max(jnp.where(index == first, x, -jnp.inf), axis=-1, keepdims=True)


class BlockCode:
    """Encoding of a block of 32 numbers; subclasses have no state."""

    parts: ClassVar[dict[str, tuple[int, DTypeLike]]]
    """Width per block and dtype of each part, in the order of ggml's struct."""

    @property
    def bytes(self) -> int:
        """Bytes per block."""
        return sum(width * np.dtype(dtype).itemsize for width, dtype in self.parts.values())

    def encode(self, x: Array) -> dict[str, Array]:
        """Parts of blocks ``x f32[..., 32]``."""
        raise NotImplementedError

    def decode(self, blocks: Blocks) -> Array:
        """f32[..., 32]: numbers of blocks."""
        raise NotImplementedError


@dataclass(frozen=True)
class Q8_0(BlockCode):
    """``x = d * q``, 8-bit q from -127 to 127."""

    parts: ClassVar = {"scales": (1, jnp.float16), "codes": (32, jnp.int8)}

    def encode(self, x: Array) -> dict[str, Array]:
        d = _divided(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 127)
        codes = lax.round(x * _inverse(d), lax.RoundingMethod.AWAY_FROM_ZERO)
        return {"scales": d.astype(jnp.float16), "codes": codes.astype(jnp.int8)}

    def decode(self, blocks: Blocks) -> Array:
        return blocks["codes"].astype(jnp.float32) * blocks["scales"].astype(jnp.float32)


def _encode_symmetric(x: Array, half: int) -> tuple[Array, Array]:
    """``(d, codes f32)``: codes from 0 to ``2 * half - 1``; the largest magnitude is ``-half * d``."""
    d = _divided(_signed_extreme(x), -half)
    product = jnp.maximum(x * _inverse(d), -half - 1)
    return d, jnp.clip(jnp.floor(product + (half + 0.5)), 0, 2 * half - 1)


def _encode_affine(x: Array, most: int) -> tuple[Array, Array, Array]:
    """``(d, m, codes f32)``: codes from 0 to ``most``, from the smallest number to the largest."""
    low, high = jnp.min(x, axis=-1, keepdims=True), jnp.max(x, axis=-1, keepdims=True)
    d = _divided(high - low, most)
    product = jnp.maximum((x - low) * _inverse(d), 0)
    return d, low, jnp.clip(jnp.floor(product + 0.5), 0, most)


@dataclass(frozen=True)
class Q4_0(BlockCode):
    """``x = d * (q - 8)``, 4-bit q."""

    parts: ClassVar = {"scales": (1, jnp.float16), "codes": (16, jnp.uint8)}

    def encode(self, x: Array) -> dict[str, Array]:
        d, codes = _encode_symmetric(x, 8)
        return {"scales": d.astype(jnp.float16), "codes": pack_nibbles(codes)}

    def decode(self, blocks: Blocks) -> Array:
        return (unpack_nibbles(blocks["codes"]) - 8).astype(jnp.float32) * blocks["scales"].astype(
            jnp.float32
        )


@dataclass(frozen=True)
class Q4_1(BlockCode):
    """``x = d * q + m``, 4-bit q."""

    parts: ClassVar = {"scales": (1, jnp.float16), "minima": (1, jnp.float16), "codes": (16, jnp.uint8)}

    def encode(self, x: Array) -> dict[str, Array]:
        d, m, codes = _encode_affine(x, 15)
        return {
            "scales": d.astype(jnp.float16),
            "minima": m.astype(jnp.float16),
            "codes": pack_nibbles(codes),
        }

    def decode(self, blocks: Blocks) -> Array:
        scales, minima = (blocks[name].astype(jnp.float32) for name in ("scales", "minima"))
        return unpack_nibbles(blocks["codes"]).astype(jnp.float32) * scales + minima


@dataclass(frozen=True)
class Q5_0(BlockCode):
    """``x = d * (q - 16)``, 5-bit q."""

    parts: ClassVar = {"scales": (1, jnp.float16), "fifth_bits": (4, jnp.uint8), "codes": (16, jnp.uint8)}

    def encode(self, x: Array) -> dict[str, Array]:
        d, codes = _encode_symmetric(x, 16)
        return {
            "scales": d.astype(jnp.float16),
            "fifth_bits": pack_fifth_bits(codes),
            "codes": pack_nibbles(codes.astype(jnp.uint8) & 15),
        }

    def decode(self, blocks: Blocks) -> Array:
        codes = unpack_nibbles(blocks["codes"]) + unpack_fifth_bits(blocks["fifth_bits"]) - 16
        return codes.astype(jnp.float32) * blocks["scales"].astype(jnp.float32)


@dataclass(frozen=True)
class Q5_1(BlockCode):
    """``x = d * q + m``, 5-bit q."""

    parts: ClassVar = {
        "scales": (1, jnp.float16),
        "minima": (1, jnp.float16),
        "fifth_bits": (4, jnp.uint8),
        "codes": (16, jnp.uint8),
    }

    def encode(self, x: Array) -> dict[str, Array]:
        d, m, codes = _encode_affine(x, 31)
        return {
            "scales": d.astype(jnp.float16),
            "minima": m.astype(jnp.float16),
            "fifth_bits": pack_fifth_bits(codes),
            "codes": pack_nibbles(codes.astype(jnp.uint8) & 15),
        }

    def decode(self, blocks: Blocks) -> Array:
        scales, minima = (blocks[name].astype(jnp.float32) for name in ("scales", "minima"))
        codes = unpack_nibbles(blocks["codes"]) + unpack_fifth_bits(blocks["fifth_bits"])
        return codes.astype(jnp.float32) * scales + minima


@dataclass(frozen=True)
class IQ4_NL(BlockCode):
    """``x = d * IQ4_NL_VALUES[q]``, 4-bit q."""

    parts: ClassVar = {"scales": (1, jnp.float16), "codes": (16, jnp.uint8)}

    def encode(self, x: Array) -> dict[str, Array]:
        # Codes map the extreme to the codebook's; the scale is then fitted, weighted by x squared.
        values = np.asarray(IQ4_NL_VALUES, np.float32)
        d = _divided(_signed_extreme(x), IQ4_NL_VALUES[0])
        y = x * _inverse(d)
        above = jnp.clip(jnp.sum(y[..., None] >= values, axis=-1, dtype=jnp.int32), 1, 15)
        low, high = jnp.asarray(values)[above - 1], jnp.asarray(values)[above]
        codes = jnp.where(y - low < high - y, above - 1, above)
        q = jnp.asarray(values)[codes]
        fitted = jnp.sum(x * x * q * x, -1, keepdims=True) * _inverse(
            jnp.sum(x * x * q * q, -1, keepdims=True)
        )
        return {"scales": fitted.astype(jnp.float16), "codes": pack_nibbles(codes)}

    def decode(self, blocks: Blocks) -> Array:
        values = jnp.asarray(IQ4_NL_VALUES, jnp.float32)[unpack_nibbles(blocks["codes"])]
        return values * blocks["scales"].astype(jnp.float32)
