"""Quantized pages as a TPU's kernel reads them: codes and scales in rows that fill its 128 lanes.

The numbers are those of ``blocks.BlockFormat``, code for code and scale for scale; only where they lie differs. With
rows of ``width`` lanes as ``plain.LanePageFormat`` has them (neighbouring tokens of a head side by side, or one token
padded), R of them a page, and B = ``width / 32`` blocks in each:

- ``codes i8[N, KV, R, width]``, signed. Of 4 bits ``[N, KV, R / 2, width]``: a byte holds what two neighbouring rows
  have at its lane, the first in its low half, which is the order in which a TPU unpacks them.
- ``scales i16[N, ceil(KV * B / m), m * R]``, at least 2 rows: the bits of float16, which Mosaic does not know. Along
  the lanes lie the scales that one block has in all rows, as they meet the columns of a tile of scores; where R is less
  than 128, ``m = 128 / R`` blocks lie side by side. Block b of head h is number ``h * B + b``; numbers go down, then
  right.

Units of a pool are written as a whole, with what they held before: a row of bytes that tokens share, and the scales of
a page. A step writes each unit once, with all its tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from jaxpaged.pages.formats import ggml
from jaxpaged.pages.formats.blocks import BlockFormat, BlockPages, Parts, taken
from jaxpaged.pages.formats.ggml import BLOCK
from jaxpaged.pages.formats.plain import LANES, lane_width, token_rows, tokens_per_row

_UNITS_AT_ONCE = 64
"""Units that are written together, where a step writes to more than its tokens could fill."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LaneBlockPages(BlockPages):
    """One layer's quantized keys or values, in rows of lanes."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return *self.parts["codes"].shape[:2], self.page_size, self.head_dim  # type: ignore[return-value]


@dataclass(frozen=True)
class LaneBlockFormat(BlockFormat):
    """Rows of blocks of q8_0 or q4_0, in rows of lanes."""

    head_dim: int = field(kw_only=True)

    @classmethod
    def of(cls, storage: BlockFormat, head_dim: int) -> LaneBlockFormat:
        """``storage`` for heads of ``head_dim``."""
        return cls(storage.name, storage.dtype, storage.code, storage.hadamard, head_dim=head_dim)

    @property
    def bits(self) -> int:
        """Of a code."""
        return 4 if isinstance(self.code, ggml.Q4_0) else 8

    @property
    def width(self) -> int:
        """Lanes of a row."""
        return lane_width(self.head_dim)

    @property
    def tokens(self) -> int:
        """Tokens that share a row of bytes."""
        return tokens_per_row(self.width, self.head_dim) * 8 // self.bits

    def page_parts(self, num_kv_heads: int, page_size: int) -> dict[str, tuple[tuple[int, ...], DTypeLike]]:
        """Shape and dtype of the parts of one page."""
        rows = page_size // tokens_per_row(self.width, self.head_dim)
        side_by_side = max(1, LANES // rows)
        # Of single rows XLA:TPU makes an array with pages along its tiles, which a kernel cannot read where it lies.
        blocks = max(2, -(-num_kv_heads * self.width // BLOCK // side_by_side))
        return {
            "codes": ((num_kv_heads, page_size // self.tokens, self.width), jnp.int8),
            "scales": ((blocks, side_by_side * rows), jnp.int16),
        }

    def bytes_per_page(self, num_kv_heads: int, page_size: int, head_dim: int) -> int:
        """Bytes of one page of one layer, those that pad its rows too."""
        parts = self.page_parts(num_kv_heads, page_size).values()
        return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in parts)

    def create(self, num_pages: int, num_kv_heads: int, page_size: int, head_dim: int) -> LaneBlockPages:  # type: ignore[override]
        """Zeroed pages.

        Raises:
          ValueError: heads are no whole number of blocks, or not those that the format was made for.
        """
        self.check(page_size, head_dim)
        if head_dim != self.head_dim:
            raise ValueError(f"head_dim is {head_dim}, the pages are laid out for {self.head_dim}")
        parts = {
            name: jnp.zeros((num_pages, *shape), dtype)
            for name, (shape, dtype) in self.page_parts(num_kv_heads, page_size).items()
        }
        return LaneBlockPages(parts, self, page_size, head_dim)

    def read(self, pages: BlockPages, page: Array, slot: Array) -> dict[str, Array]:  # type: ignore[override]
        codes = self._from_bytes(pages.parts["codes"][page, :, slot // self.tokens][:, :, None])
        scales = self._from_lanes(pages.parts["scales"][page], *pages.shape[1:3])

        def one(tokens: Array, place: Array) -> Array:
            """Of ``[T, KV, tokens, ...]`` the one at ``place i32[T]``."""
            return jnp.take_along_axis(tokens, place[:, None, None, None], axis=2)[:, :, 0]

        return self._stored(one(codes, slot % self.tokens), one(scales, slot))

    def put(self, pages: BlockPages, page: Array, slot: Array, stored: Parts) -> BlockPages:  # type: ignore[override]
        codes, scales = self._split(stored)
        num_kv_heads, rows, width = pages.parts["codes"].shape[1:]
        row, place = slot // self.tokens, slot % self.tokens
        # Rows of one matrix, because XLA:TPU turns the whole pool around to scatter into its third axis.
        matrix = pages.parts["codes"].reshape(-1, width)
        index = (page[:, None] * num_kv_heads + jnp.arange(num_kv_heads)) * rows + row[:, None]
        if self.tokens == 1:
            matrix = matrix.at[index].set(self._to_bytes(codes[:, :, None])[:, :, 0], mode="drop")
        else:
            units = _units(page * rows + row, place, self.tokens)
            matrix = _write_units(matrix, index, units, codes, lambda x: self._to_bytes(x)[:, :, 0])
        units = _units(page, slot, pages.page_size)
        parts = {
            "codes": matrix.reshape(pages.parts["codes"].shape),
            "scales": _write_units(pages.parts["scales"], page, units, scales, self._to_lanes),
        }
        return replace(pages, parts=parts)

    def gather(self, pages: BlockPages, page: Array, slot: Array, target: Array) -> BlockPages:  # type: ignore[override]
        codes, scales = (x.swapaxes(0, 1) for x in self._split(self.read(pages, page, slot)))
        new = {"codes": self._to_bytes(codes), "scales": self._to_lanes(scales)}
        return replace(
            pages, parts={name: part.at[target].set(new[name]) for name, part in pages.parts.items()}
        )

    def load(self, pages: BlockPages, page: Array, *, slices: bool = False) -> Array:
        codes, scales = (taken(pages.parts[name], page, slices) for name in ("codes", "scales"))
        return self.decode(self._stored(self._from_bytes(codes), self._from_lanes(scales, *pages.shape[1:3])))

    def on_lanes(self, head_dim: int) -> LaneBlockFormat:
        return self

    # --- between what is stored, [..., width of a part], and signed codes, i8[..., head_dim], with the bits of scales

    def _split(self, stored: Parts) -> tuple[Array, Array]:
        """``(codes i8[..., head_dim], scales i16[..., head_dim / 32])``, codes signed."""
        codes = stored["codes"]
        if self.bits == 4:
            blocks = ggml.unpack_nibbles(codes.reshape(*codes.shape[:-1], -1, BLOCK // 2)) - 8
            codes = blocks.reshape(*codes.shape[:-1], self.head_dim)
        return codes, lax.bitcast_convert_type(stored["scales"], jnp.int16)

    def _stored(self, codes: Array, scales: Array) -> dict[str, Array]:
        if self.bits == 4:
            blocks = ggml.pack_nibbles(codes.reshape(*codes.shape[:-1], -1, BLOCK) + 8)
            codes = blocks.reshape(*codes.shape[:-1], -1)
        return {"scales": lax.bitcast_convert_type(scales, jnp.float16), "codes": codes}

    # --- between tokens, [..., tokens, numbers], and rows of lanes

    def _to_bytes(self, codes: Array) -> Array:
        """i8[..., rows of bytes, width] of ``codes i8[..., tokens, head_dim]``."""
        rows = _rows(codes, self.width)
        if self.bits == 8:
            return rows
        return rows[..., 0::2, :] & 15 | rows[..., 1::2, :] << 4

    def _from_bytes(self, codes: Array) -> Array:
        if self.bits == 4:
            pairs = jnp.stack([codes << 4 >> 4, codes >> 4], axis=-2)
            codes = pairs.reshape(*codes.shape[:-2], -1, self.width)
        return token_rows(codes, self.head_dim)

    def _to_lanes(self, scales: Array) -> Array:
        """i16[..., *] as a page has them, of ``scales i16[..., KV, page_size, head_dim / 32]``."""
        num_kv_heads, page_size = scales.shape[-3:-1]
        blocks, lanes = self.page_parts(num_kv_heads, page_size)["scales"][0]
        columns = _rows(scales, self.width // BLOCK).swapaxes(-1, -2)  # [..., KV, B, R]
        columns = columns.reshape(*scales.shape[:-3], -1, columns.shape[-1])
        side_by_side = lanes // columns.shape[-1]
        missing = blocks * side_by_side - columns.shape[-2]
        columns = jnp.pad(columns, ((0, 0),) * (columns.ndim - 2) + ((0, missing), (0, 0)))
        columns = columns.reshape(*scales.shape[:-3], side_by_side, blocks, -1).swapaxes(-2, -3)
        return columns.reshape(*scales.shape[:-3], blocks, lanes)

    def _from_lanes(self, lanes: Array, num_kv_heads: int, page_size: int) -> Array:
        rows = page_size // tokens_per_row(self.width, self.head_dim)
        columns = lanes.reshape(*lanes.shape[:-1], -1, rows).swapaxes(-2, -3)
        columns = columns.reshape(*lanes.shape[:-2], -1, rows)[..., : num_kv_heads * self.width // BLOCK, :]
        columns = columns.reshape(*lanes.shape[:-2], num_kv_heads, -1, rows).swapaxes(-1, -2)
        return token_rows(columns, self.head_dim // BLOCK)


@dataclass(frozen=True)
class PackedBlockFormat(BlockFormat):
    """A format of blocks that there are rows of lanes for."""

    def on_lanes(self, head_dim: int) -> LaneBlockFormat:
        return LaneBlockFormat.of(self, head_dim)


def half_to_float(bits: Array) -> Array:
    """f32 of the bits of float16, in i32; what float16 has no number for becomes one, so that zero times it is zero."""
    magnitude = bits & 0x7FFF
    normal = lax.bitcast_convert_type((magnitude << 13) + (112 << 23), jnp.float32)
    x = jnp.where(magnitude < 1 << 10, magnitude.astype(jnp.float32) * 2.0**-24, normal)
    return jnp.where(bits & 0x8000 != 0, -x, x)


def _rows(tokens: Array, width: int) -> Array:
    """``tokens [..., tokens, n]`` in rows of ``width``: what ``plain.token_rows`` takes apart."""
    n = tokens.shape[-1]
    if width % n:
        return jnp.pad(tokens, ((0, 0),) * (tokens.ndim - 1) + ((0, width - n),))
    return tokens.reshape(*tokens.shape[:-2], -1, width)


class _Units(NamedTuple):
    """The units of a pool that a step of T tokens writes to, one after the other; at most T of them."""

    first: Array
    """i32[T]: the first token of each; T behind the last unit."""
    tokens: Array
    """i32[T, places]: the token for each place; T = none."""
    total: Array
    """i32[]: how many there are."""


def _units(unit: Array, place: Array, places: int) -> _Units:
    """From ``unit, place i32[T]``, where each token goes. The same for every layer of a step: XLA makes it once."""
    most = len(unit)
    ids = jnp.arange(most)
    first = jnp.argmax(unit[:, None] == unit, axis=1)
    counted = jnp.cumsum(first == ids)
    number = counted[first] - 1
    return _Units(
        jnp.full(most, most).at[number].set(first),
        jnp.full((most, places), most).at[number, place].set(ids),
        counted[-1],
    )


def _write_units(
    pool: Array, index: Array, units: _Units, numbers: Array, laid_out: Callable[[Array], Array]
) -> Array:
    """``pool`` with the numbers of a step's tokens; around them units stay as they were.

    Args:
      pool: integers, of units along its first axis.
      index: i32[T, ...], where the unit of each token is; outside = nowhere.
      units: whose tokens are together.
      numbers: [T, KV, n].
      laid_out: ``[U, KV, places, n]`` as units, ``[U, ...]``.
    """
    most, places = units.tokens.shape
    at_once = min(most, max(_UNITS_AT_ONCE, 2 * -(-most // places)))

    def write(i: Array | int, pool: Array) -> Array:
        chosen = i * at_once + jnp.arange(at_once)
        first, tokens = (x.at[chosen].get(mode="fill", fill_value=most) for x in (units.first, units.tokens))
        at = index.at[first].get(mode="fill", fill_value=len(pool))
        new = numbers.reshape(most, -1).at[tokens].get(mode="fill", fill_value=0)
        new = new.reshape(at_once, places, *numbers.shape[1:]).swapaxes(1, 2)
        covered = jnp.where(tokens < most, -1, 0).astype(pool.dtype)[:, None, :, None]
        mask = laid_out(jnp.broadcast_to(covered, new.shape))
        old = pool.at[at].get(mode="clip")
        return pool.at[at].set(old & ~mask | laid_out(new), mode="drop")

    if at_once == most:
        return write(0, pool)
    return lax.fori_loop(0, -(-units.total // at_once), write, pool)
