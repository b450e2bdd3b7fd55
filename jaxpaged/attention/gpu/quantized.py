"""Quantized pages in the GPU kernel: from codes in shared memory to a tile of float16, which a
wgmma can read.

The copy engine brings codes and factors as they lie in the pool; no page is ever dequantized in
global memory. Codes are taken as words of 16 bits, two or four to a word, and apart by bits: a
float16 of exponent 10 whose lowest bits are a code is the number 1024 + code. So a mask, a
difference and a product make two numbers at once, and what is rounded is the product of code and
scale, once, to the 11 bits of float16.

First codes of all words, then second ones, and so on: the columns of a tile have another order than
the numbers of a head. Neither products nor the softmax mind, as long as queries come in the order
of the keys' tile (``to_columns``) and results leave that of the values' (``to_numbers``).

Sources: numbers by their bits, "Who Says Elephants Can't Run" (arXiv:2211.10017) and CUTLASS'
mixed-input products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCK = 32
"""Numbers that share a scale."""
WORD = jnp.int16
_WORD_BITS = 16
_WHOLE = ((),) if jax.__version_info__ < (0, 11) else ()
"""jax 0.10 wants the index of a load apart from its reference; later versions warn of that."""


class Code(NamedTuple):
    """Code of a format's numbers."""

    bits: int
    """Bits of a code: 8, signed, or 4."""
    zero: int = 0
    """Number subtracted from a code of 4 bits."""
    factors: tuple[str, ...] = ("scales",)
    """Parts of a page with one number a block: what codes are multiplied with, and what is added
    then."""

    @property
    def per_word(self) -> int:
        """Codes of a word."""
        return _WORD_BITS // self.bits


CODES = {"q8_0": Code(8), "q4_0": Code(4, zero=8), "q4_1": Code(4, factors=("scales", "minima"))}
"""By the names of the formats that the kernel reads."""


def to_columns(x: Array, code: Code, parts: int) -> Array:
    """``x [..., D]``, one for each number of a head, in the order of a tile's columns.

    Each of ``parts`` equal parts of a head is ordered by itself. A block is coded as ggml does: of
    4 bits, a byte has number j in its low half and number j + 16 in its high one.
    """
    halves = code.per_word // 2
    split = x.reshape(*x.shape[:-1], parts, -1, halves, BLOCK // (2 * halves), 2)
    return jnp.moveaxis(split, (-1, -3), (-4, -3)).reshape(x.shape)


def to_numbers(x: Array, code: Code, parts: int) -> Array:
    """``x [..., D]``, one for each column of a tile, in the order of a head's numbers: undoes
    ``to_columns``."""
    halves = code.per_word // 2
    split = x.reshape(*x.shape[:-1], parts, 2, halves, -1, BLOCK // (2 * halves))
    return jnp.moveaxis(split, (-4, -3), (-1, -3)).reshape(x.shape)


def as_words(codes: Array) -> Array:
    """i16[..., n / 2] of bytes ``[..., n]``: the same memory."""
    return lax.bitcast_convert_type(codes.reshape(*codes.shape[:-1], -1, 2), WORD)


def load(ref: Any, layout: Any) -> Array:
    """A reference's content in registers, from shared or from global memory."""
    return plgpu.load(ref, *_WHOLE, layout=layout, optimized=False)


def chunks(size: int, width: int) -> list[Any]:
    """Slices of at most ``width`` that make up ``size``."""
    return [pl.ds(start, min(width, size - start)) for start in range(0, size, width)]


def dequantize(words: Any, factors: list[Any], tile: Any, code: Code, width: int, live: Array | None) -> None:
    """Writes the numbers of a step's codes.

    Args:
      words: i16[64, W], a reference; W words of each token.
      factors: one reference f16[64, blocks] for each of ``code.factors``.
      tile: f16[64, W * code.per_word], the reference that is written.
      code: what the words hold.
      width: columns of a tile in shared memory.
      live: bool[64] in the layout of rows, the tokens whose numbers count: others become 0,
        whatever their factors are, NaN too. None = all.
    """
    layout, rows_of, columns_of = (
        plgpu.Layout.WGMMA,
        plgpu.Layout.WGMMA.reduce(1),
        plgpu.Layout.WGMMA.reduce(0),
    )
    num_words, block_words = words.shape[1], BLOCK // code.per_word
    for first in range(0, num_words, width):
        packed = load(words.at[:, pl.ds(first, width)], layout)
        column = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=columns_of)
        column = lax.broadcast_in_dim(column, packed.shape, [1])

        def spread(factor: Any, first: int = first, column: Array = column) -> Array:
            """The factor of each word's block: which block that is, is known of every register when
            it is compiled."""
            found: Any = None
            for block in reversed(range(width // block_words)):
                here = load(factor.at[:, first // block_words + block], rows_of)
                here = here if live is None else jnp.where(live, here, 0)
                here = lax.broadcast_in_dim(here, column.shape, [0])
                found = here if found is None else jnp.where(column < (block + 1) * block_words, here, found)
            return found

        scale, *added = (spread(factor) for factor in factors)
        for place, numbers in enumerate(_numbers(packed, code)):
            numbers = numbers * scale
            for minimum in added:
                numbers += minimum
            tile[:, pl.ds(place * num_words + first, width)] = numbers


def _numbers(words: Array, code: Code) -> Iterator[Array]:
    """Numbers of the codes at each place of ``words``, without factors: float16, exact."""
    # A byte swap is one instruction for two words, a shift of both is five. The barrier keeps the compiler from finding
    # out that half of the swap's result is not looked at.
    swapped = lax.optimization_barrier(words << 8 | lax.shift_right_logical(words, WORD(8)))
    for low in (words, swapped):
        if code.bits == 8:
            # Turning the sign bit adds 128.
            yield _as_float((low & 0xFF) ^ 0x6480) - 1152
        else:
            yield _as_float(low & 0xF | 0x6400) - (1024 + code.zero)
            yield _as_float(low & 0xF0 | 0x6400) * (1 / 16) - (64 + code.zero)


def _as_float(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float16)


def hadamard_signs(n: int) -> Array:
    """f16[n, n] in registers, n at most 64: Sylvester's matrix, of 1 and -1."""
    row, column = (
        plgpu.broadcasted_iota(jnp.int32, (n, n), axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)
    )
    common = row & column
    common ^= common >> 3
    odd = (common ^ common >> 1 ^ common >> 2) & 1  # whether an odd number of its 6 bits is set
    return (1 - 2 * odd).astype(jnp.float16)
