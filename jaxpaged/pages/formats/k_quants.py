"""q4_k: super-blocks of 256 numbers, 8 blocks with scales and minimums of 6 bits.

A super-block runs along head_dim and on to the next token, within one KV head of a page; block b of
a page is numbers ``32 * b ..`` of its concatenated rows. Parts are those of ggml's ``block_q4_K``,
with the same packing: a number is ``d * scale * q - dmin * minimum``. The quantizer follows ggml's
reference, a weighted search over 21 scales per block, but sums in another order, so ties may be
broken differently.

Source: ggml's ``ggml-quants.c`` (github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from jaxpaged.pages.formats.ggml import BLOCK
from jaxpaged.pages.formats.residual import PageCode

SUPER_BLOCK = 256
_BLOCKS = SUPER_BLOCK // BLOCK
_STEPS = 21


@dataclass(frozen=True)
class Q4_K(PageCode):
    """4 bits per number, 4.5 with scales."""

    def check(self, name: str, page_size: int, head_dim: int) -> None:
        if page_size * head_dim % SUPER_BLOCK:
            fitting = [size for size in (8, 16, 32, 64, 128, 256) if size * head_dim % SUPER_BLOCK == 0]
            sizes = ", ".join(map(str, fitting))
            fit = f"page sizes that fit are {sizes}" if fitting else "no page size fits"
            raise ValueError(
                f"{name} stores super-blocks of {SUPER_BLOCK} numbers: page_size * head_dim must be a multiple of it, "
                f"got {page_size} * {head_dim}; for head_dim {head_dim} {fit}"
            )

    def parts(self, page_size: int, head_dim: int) -> dict[str, tuple[tuple[int, ...], DTypeLike]]:
        count = page_size * head_dim // SUPER_BLOCK
        return {
            "scales": ((count,), jnp.float16),
            "minima": ((count,), jnp.float16),
            "block_scales": ((count, 12), jnp.uint8),
            "codes": ((count, SUPER_BLOCK // 2), jnp.uint8),
        }

    def encode(self, x: Array) -> dict[str, Array]:
        blocks = x.reshape(*x.shape[:-2], -1, _BLOCKS, BLOCK)
        scale, minimum, codes = _fit(blocks)
        largest_scale, largest_minimum = (jnp.max(v, axis=-1, keepdims=True) for v in (scale, minimum))
        six_bits = [
            jnp.clip(jnp.round(jnp.where(most > 0, 63 / jnp.where(most > 0, most, 1), 0) * v), 0, 63)
            for v, most in ((scale, largest_scale), (minimum, largest_minimum))
        ]
        d, dmin = ((most / 63).astype(jnp.float16) for most in (largest_scale, largest_minimum))
        # Codes are recomputed from scales as stored, in 6 and 16 bits.
        stored, offset = (
            (big.astype(jnp.float32) * bits)[..., None] for big, bits in zip((d, dmin), six_bits, strict=True)
        )
        again = jnp.clip(jnp.round((blocks + offset) / jnp.where(stored == 0, 1, stored)), 0, 15)
        codes = jnp.where(stored == 0, codes, again).astype(jnp.uint8)
        pairs = codes.reshape(*codes.shape[:-2], _BLOCKS // 2, 2, BLOCK)
        return {
            "scales": d[..., 0],
            "minima": dmin[..., 0],
            "block_scales": _pack_six_bits(*six_bits),
            "codes": (pairs[..., 0, :] | pairs[..., 1, :] << 4).reshape(*codes.shape[:-2], -1),
        }

    def decode(self, parts: Mapping[str, Array], page_size: int, head_dim: int) -> Array:
        scale, minimum = _unpack_six_bits(parts["block_scales"])
        d, dmin = (parts[name].astype(jnp.float32)[..., None] for name in ("scales", "minima"))
        packed = parts["codes"].reshape(*parts["codes"].shape[:-1], _BLOCKS // 2, BLOCK)
        codes = jnp.stack([packed & 15, packed >> 4], axis=-2).reshape(*packed.shape[:-2], _BLOCKS, BLOCK)
        numbers = (d * scale)[..., None] * codes.astype(jnp.float32) - (dmin * minimum)[..., None]
        return numbers.reshape(*numbers.shape[:-3], page_size, head_dim)


def _fit(x: Array) -> tuple[Array, Array, Array]:
    """``(scale, minimum, codes)`` that fit blocks ``x [..., 32]`` best: ``x ~ scale * code - minimum``."""
    weights = jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True)) + jnp.abs(x)
    low, high = jnp.minimum(jnp.min(x, axis=-1), 0), jnp.max(x, axis=-1)
    spread = jnp.where(high > low, high - low, 1)
    sum_w, sum_x = jnp.sum(weights, axis=-1), jnp.sum(weights * x, axis=-1)

    def rounded(levels: Array) -> Array:
        return jnp.clip(jnp.round((levels / spread)[..., None] * (x - low[..., None])), 0, 15)

    def error(scale: Array, least: Array, codes: Array) -> Array:
        return jnp.sum(weights * (scale[..., None] * codes + least[..., None] - x) ** 2, axis=-1)

    def attempt(i: Array, best: tuple[Array, ...]) -> tuple[Array, ...]:
        codes = rounded(14 + 0.1 * i.astype(jnp.float32))
        weighted = weights * codes
        sum_l, sum_l2, sum_xl = (jnp.sum(v, axis=-1) for v in (weighted, weighted * codes, weighted * x))
        determinant = sum_w * sum_l2 - sum_l * sum_l
        safe = jnp.where(determinant > 0, determinant, 1)
        scale, least = (sum_w * sum_xl - sum_x * sum_l) / safe, (sum_l2 * sum_x - sum_l * sum_xl) / safe
        scale = jnp.where(least > 0, sum_xl / jnp.where(sum_l2 > 0, sum_l2, 1), scale)
        least = jnp.minimum(least, 0)
        found = (error(scale, least, codes), scale, least, codes)
        better = (determinant > 0) & (found[0] < best[0])
        return tuple(
            jnp.where(better.reshape(better.shape + (1,) * (new.ndim - better.ndim)), new, old)
            for new, old in zip(found, best, strict=True)
        )

    codes = rounded(jnp.float32(15))
    start = (error(spread / 15, low, codes), spread / 15, low, codes)
    _, scale, least, codes = lax.fori_loop(0, _STEPS, attempt, start)
    flat = high == low
    return jnp.where(flat, 0, scale), jnp.where(flat, -low, -least), jnp.where(flat[..., None], 0, codes)


def _pack_six_bits(scale: Array, minimum: Array) -> Array:
    """u8[..., 12]: packs 8 scales and 8 minimums of 6 bits.

    8 bytes have four of each, and in their upper bits two bits of the others; 4 bytes have the rest.
    """
    s, m = scale.astype(jnp.uint8), minimum.astype(jnp.uint8)
    head, tail = slice(0, 4), slice(4, 8)
    return jnp.concatenate(
        [
            s[..., head] | s[..., tail] >> 4 << 6,
            m[..., head] | m[..., tail] >> 4 << 6,
            s[..., tail] & 15 | m[..., tail] << 4,
        ],
        axis=-1,
    )


def _unpack_six_bits(packed: Array) -> tuple[Array, Array]:
    """f32[..., 8] each: inverse of ``_pack_six_bits``."""
    s, m, low = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scale = jnp.concatenate([s & 63, low & 15 | s >> 6 << 4], axis=-1)
    minimum = jnp.concatenate([m & 63, low >> 4 | m >> 6 << 4], axis=-1)
    return scale.astype(jnp.float32), minimum.astype(jnp.float32)


def ggml_bytes(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """u8[..., super-blocks * 144]: parts of pages as ggml's ``block_q4_K``; on the host."""
    blocks = [np.ascontiguousarray(parts[name])[..., None].view(np.uint8) for name in ("scales", "minima")]
    blocks += [parts["block_scales"], parts["codes"]]
    joined = np.concatenate(blocks, axis=-1)
    return joined.reshape(*joined.shape[:-2], -1)
