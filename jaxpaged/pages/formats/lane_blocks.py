"""Quantized pages as TPU kernels read them: codes and scales in rows that fill 128 lanes.

Codes and scales are those of ``blocks.BlockFormat``; only the layout differs. Rows of ``width``
lanes are as in ``plain.LanePageFormat`` (consecutive tokens of a head side by side, or one padded
token). With R rows per page and B = ``width / 32`` blocks per row:

- ``codes i8[N, KV, R, width]``, signed. 4-bit codes: ``[N, KV, R / 2, width]``; a byte has the codes
  of two consecutive rows in one lane, the first in its low half, in the order a TPU unpacks them.
  Rows of C = ``width / 128 > 1`` times 128 lanes are cut: ``[N, KV * C, R, 128]``, piece c of head h
  has index ``h * C + c``. XLA:TPU scatters rows of bytes in tiles of 8 rows, and kernels read tiles
  of 32; the two are the same memory for rows of one tile alone, else the pool is copied.
- ``scales i16[N, ceil(KV * B / m), m * R]``, at least 2 rows: bits of float16, which Mosaic lacks.
  The lanes of a row are the scales of one block in all rows, aligned with the columns of a tile of
  scores; if R < 128, ``m = 128 / R`` blocks are side by side. Block b of head h has index
  ``h * B + b``, in column-major order.

A write unit, the smallest part of a pool that can be written, holds several tokens: a row of bytes,
or the scales of a page. A step reads, merges and writes each unit once, with all its tokens.
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
from jaxpaged.pages.formats.blocks import BlockFormat, BlockPages, Parts, take_pages
from jaxpaged.pages.formats.ggml import BLOCK
from jaxpaged.pages.formats.plain import LANES, lane_width, token_rows, tokens_per_row

_UNITS_AT_ONCE = 64
"""Units written per iteration, if a step could touch more units than its tokens fill."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LaneBlockPages(BlockPages):
    """Quantized keys or values, in rows of TPU lanes."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        num_pages, pieces = self.parts["codes"].shape[:2]
        return num_pages, pieces * LANES // lane_width(self.head_dim), self.page_size, self.head_dim


@dataclass(frozen=True)
class LaneBlockFormat(BlockFormat):
    """Format of q8_0 or q4_0 blocks in rows of TPU lanes."""

    head_dim: int = field(kw_only=True)

    @classmethod
    def of(cls, storage: BlockFormat, head_dim: int) -> LaneBlockFormat:
        """The same format as ``storage`` for heads of ``head_dim``."""
        return cls(storage.name, storage.dtype, storage.code, storage.hadamard, head_dim=head_dim)

    @property
    def bits(self) -> int:
        """Bits per code."""
        return 4 if isinstance(self.code, ggml.Q4_0) else 8

    @property
    def width(self) -> int:
        """Lanes per row."""
        return lane_width(self.head_dim)

    @property
    def pieces(self) -> int:
        """C, pieces of 128 lanes of a row."""
        return self.width // LANES

    @property
    def tokens(self) -> int:
        """Tokens per row of bytes."""
        return tokens_per_row(self.width, self.head_dim) * 8 // self.bits

    def page_parts(self, num_kv_heads: int, page_size: int) -> dict[str, tuple[tuple[int, ...], DTypeLike]]:
        """Shape and dtype of each part of a page."""
        rows = page_size // tokens_per_row(self.width, self.head_dim)
        side_by_side = max(1, LANES // rows)
        # With a single row, XLA:TPU would tile over pages, which a kernel cannot read in place.
        blocks = max(2, -(-num_kv_heads * self.width // BLOCK // side_by_side))
        return {
            "codes": ((num_kv_heads * self.pieces, page_size // self.tokens, LANES), jnp.int8),
            "scales": ((blocks, side_by_side * rows), jnp.int16),
        }

    def bytes_per_page(self, num_kv_heads: int, page_size: int, head_dim: int) -> int:
        """Bytes of a page of one layer, padding included."""
        parts = self.page_parts(num_kv_heads, page_size).values()
        return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in parts)

    def create(self, num_pages: int, num_kv_heads: int, page_size: int, head_dim: int) -> LaneBlockPages:  # type: ignore[override]
        """Creates zeroed pages.

        Raises:
          ValueError: ``head_dim`` is no multiple of 32, or not the format's.
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

        def pick(tokens: Array, index: Array) -> Array:
            """``tokens[t, :, index[t]]`` for ``tokens [T, KV, tokens, n]``."""
            return jnp.take_along_axis(tokens, index[:, None, None, None], axis=2)[:, :, 0]

        return self._stored(pick(codes, slot % self.tokens), pick(scales, slot))

    def put(self, pages: BlockPages, page: Array, slot: Array, stored: Parts) -> BlockPages:  # type: ignore[override]
        codes, scales = self._split(stored)
        pieces, rows, _ = pages.parts["codes"].shape[1:]
        row, position = slot // self.tokens, slot % self.tokens
        # A matrix, because XLA:TPU transposes the whole pool to scatter into its third axis.
        matrix = pages.parts["codes"].reshape(-1, LANES)
        index = (page[:, None] * pieces + jnp.arange(pieces, dtype=jnp.int32)) * rows
        index += row[:, None]
        if self.tokens == 1:
            matrix = matrix.at[index].set(self._to_bytes(codes[:, :, None])[:, :, 0], mode="drop")
        else:
            units = _units(page * rows + row, position, self.tokens)
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
        codes, scales = (take_pages(pages.parts[name], page, slices) for name in ("codes", "scales"))
        return self.decode(self._stored(self._from_bytes(codes), self._from_lanes(scales, *pages.shape[1:3])))

    def on_lanes(self, head_dim: int) -> LaneBlockFormat:
        return self

    # --- between stored parts, [..., width], and signed codes, i8[..., head_dim], with bits of scales

    def _split(self, stored: Parts) -> tuple[Array, Array]:
        """``(codes i8[..., head_dim], scales i16[..., head_dim / 32])`` of stored parts."""
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

    # --- between tokens, [..., tokens, n], and rows of lanes

    def _to_bytes(self, codes: Array) -> Array:
        """i8[..., KV * C, rows, 128]: packs ``codes i8[..., KV, tokens, head_dim]``."""
        rows = _rows(codes, self.width)
        if self.bits == 4:
            rows = rows[..., 0::2, :] & 15 | rows[..., 1::2, :] << 4
        if self.pieces == 1:
            return rows
        cut = rows.reshape(*rows.shape[:-1], self.pieces, LANES).swapaxes(-2, -3)
        return cut.reshape(*rows.shape[:-3], -1, rows.shape[-2], LANES)

    def _from_bytes(self, codes: Array) -> Array:
        if self.pieces > 1:
            cut = codes.reshape(*codes.shape[:-3], -1, self.pieces, *codes.shape[-2:]).swapaxes(-2, -3)
            codes = cut.reshape(*cut.shape[:-2], self.width)
        if self.bits == 4:
            pairs = jnp.stack([codes << 4 >> 4, codes >> 4], axis=-2)
            codes = pairs.reshape(*codes.shape[:-2], -1, self.width)
        return token_rows(codes, self.head_dim)

    def _to_lanes(self, scales: Array) -> Array:
        """i16[..., rows, lanes] of ``scales i16[..., KV, page_size, head_dim / 32]``."""
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
    """Format of blocks that has a layout in TPU lanes."""

    def on_lanes(self, head_dim: int) -> LaneBlockFormat:
        return LaneBlockFormat.of(self, head_dim)


def half_to_float(bits: Array) -> Array:
    """f32: converts the bits of float16, in i32.

    Infinities and NaN become finite numbers, so that their product with 0 is 0.
    """
    magnitude = bits & 0x7FFF
    normal = lax.bitcast_convert_type((magnitude << 13) + (112 << 23), jnp.float32)
    x = jnp.where(magnitude < 1 << 10, magnitude.astype(jnp.float32) * 2.0**-24, normal)
    return jnp.where(bits & 0x8000 != 0, -x, x)


def _rows(tokens: Array, width: int) -> Array:
    """Lays out ``tokens [..., tokens, n]`` in rows of ``width``; inverse of ``plain.token_rows``."""
    n = tokens.shape[-1]
    if width % n:
        return jnp.pad(tokens, ((0, 0),) * (tokens.ndim - 1) + ((0, width - n),))
    return tokens.reshape(*tokens.shape[:-2], -1, width)


class _Units(NamedTuple):
    """Write units that a step of T tokens touches, at most T."""

    first: Array
    """i32[T]: first token of each unit; T = none."""
    tokens: Array
    """i32[T, positions]: token at each position of each unit; T = none."""
    total: Array
    """i32[]: number of units."""


def _units(unit: Array, position: Array, positions: int) -> _Units:
    """Units of a step, from the ``unit`` and the ``position`` in it of each token, i32[T].

    It is the same in every layer, and XLA computes it once per step.
    """
    most = len(unit)
    ids = jnp.arange(most, dtype=jnp.int32)
    first = lax.argmax(unit[:, None] == unit, 1, jnp.int32)
    count = jnp.cumsum(first == ids, dtype=jnp.int32)
    number = count[first] - 1
    return _Units(
        jnp.full(most, most, jnp.int32).at[number].set(first),
        jnp.full((most, positions), most, jnp.int32).at[number, position].set(ids),
        count[-1],
    )


def _write_units(
    pool: Array, index: Array, units: _Units, numbers: Array, lay_out: Callable[[Array], Array]
) -> Array:
    """Writes the numbers of a step's tokens to ``pool``; the rest of their units is unchanged.

    Args:
      pool: integers, units along its first axis.
      index: i32[T, ...], index of each token's unit; out of bounds = not written.
      units: units of the step.
      numbers: [T, KV, n].
      lay_out: converts ``[U, KV, positions, n]`` to units ``[U, ...]``.
    """
    most, positions = units.tokens.shape
    at_once = min(most, max(_UNITS_AT_ONCE, 2 * -(-most // positions)))

    def write(i: Array | int, pool: Array) -> Array:
        chosen = i * at_once + jnp.arange(at_once, dtype=jnp.int32)
        first, tokens = (x.at[chosen].get(mode="fill", fill_value=most) for x in (units.first, units.tokens))
        at = index.at[first].get(mode="fill", fill_value=len(pool))
        new = numbers.reshape(most, -1).at[tokens].get(mode="fill", fill_value=0)
        new = new.reshape(at_once, positions, *numbers.shape[1:]).swapaxes(1, 2)
        covered = -(tokens < most).astype(pool.dtype)[:, None, :, None]
        mask = lay_out(jnp.broadcast_to(covered, new.shape))
        old = pool.at[at].get(mode="clip")
        return pool.at[at].set(old & ~mask | lay_out(new), mode="drop")

    if at_once == most:
        return write(0, pool)
    return lax.fori_loop(0, -(-units.total // at_once), write, pool)
