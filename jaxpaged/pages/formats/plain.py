"""Pages of plain numbers, ``[num_pages, num_kv_heads, page_size, head_dim]``, and the same in rows of a TPU's lanes."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

LANES = 128
"""Numbers in a row of a TPU's tile. XLA pads rows to it, or lays pages out across it to save the padding."""


def lane_width(head_dim: int) -> int:
    """Numbers in a row of lanes that holds heads of ``head_dim``."""
    return -(-head_dim // LANES) * LANES


def tokens_per_row(width: int, head_dim: int) -> int:
    """How many tokens lie side by side in a row of ``width`` numbers of a page array."""
    return 1 if width % head_dim else width // head_dim


def token_rows(pages: Array, head_dim: int) -> Array:
    """``pages [..., rows, width]`` of any layout as ``[..., page_size, head_dim]``.

    The bytes of plain pages and of packed ones are the same; where padding is cut off, it is copied.
    """
    if pages.shape[-1] % head_dim:
        return pages[..., :head_dim]
    return pages.reshape(*pages.shape[:-2], -1, head_dim)


@dataclass(frozen=True)
class PageFormat:
    """Pages of plain numbers, ``[num_pages, num_kv_heads, page_size, head_dim]`` in ``dtype``."""

    name: str
    dtype: DTypeLike

    has_residual = False
    """Whether a page is kept in 16 bits until it is full (``sealed.ResidualFormat``)."""
    hadamard = False
    """Whether rows are turned before they are stored (``hadamard.turn``)."""

    @property
    def title(self) -> str:
        """The name, and whether rows are turned."""
        return self.name

    def check(self, page_size: int, head_dim: int) -> None:
        """Raises ``ValueError`` where pages or heads of these sizes cannot be stored."""

    def for_values(self) -> PageFormat:
        """The format of the same name for pages of values."""
        return self

    def with_hadamard(self, hadamard: bool) -> PageFormat:
        """This format with rows turned, or not; plain numbers never are."""
        return self

    def bytes_per_page(self, num_kv_heads: int, page_size: int, head_dim: int) -> int:
        """Bytes of one page of one layer, keys or values alone."""
        return num_kv_heads * page_size * head_dim * np.dtype(self.dtype).itemsize

    def create(self, num_pages: int, num_kv_heads: int, page_size: int, head_dim: int) -> Array:
        """Zeroed pages."""
        return jnp.zeros((num_pages, num_kv_heads, page_size, head_dim), self.dtype)

    def write(self, pages: Array, page: Array, slot: Array, rows: Array) -> Array:
        """Writes ``rows [T, num_kv_heads, head_dim]`` at ``(page i32[T], slot i32[T])``; page N is dropped."""
        # Rows of one matrix, because XLA:TPU turns the whole pool around to scatter into its third axis.
        _, num_kv_heads, page_size, head_dim = pages.shape
        index = (page[:, None] * num_kv_heads + jnp.arange(num_kv_heads)) * page_size + slot[:, None]
        matrix = pages.reshape(-1, head_dim).at[index].set(self.round(rows), mode="drop")
        return matrix.reshape(pages.shape)

    def round(self, rows: Array) -> Array:
        """Numbers as they are stored."""
        return rows.astype(self.dtype)

    def read(self, pages: Array, page: Array, slot: Array) -> Array:
        """The rows at ``(page i32[T], slot i32[T])`` as they are stored; ``put`` puts them back bit by bit."""
        return self.rows(pages, page, slot)

    def rows(self, pages: Array, page: Array, slot: Array) -> Array:
        """``[T, num_kv_heads, head_dim]``: the numbers at ``(page i32[T], slot i32[T])``."""
        return pages[page, :, slot]

    def put(self, pages: Array, page: Array, slot: Array, stored: Array) -> Array:
        """Writes what ``read`` gave."""
        return self.write(pages, page, slot, stored)

    def copy(self, pages: Array, source: Array, target: Array) -> Array:
        """Copies page ``source i32[]`` over page ``target i32[]``."""
        return pages.at[target].set(pages[source])

    def gather(self, pages: Array, page: Array, slot: Array, target: Array) -> Array:
        """Fills page ``target i32[]`` with the rows at ``(page i32[page_size], slot i32[page_size])``, read before."""
        return pages.at[target].set(pages[page, :, slot].swapaxes(0, 1))

    def on_lanes(self, head_dim: int) -> PageFormat:
        """This format with rows of 128 numbers; itself, where heads fill them as they are."""
        return self if head_dim % LANES == 0 else LanePageFormat(self.name, self.dtype, head_dim)


@dataclass(frozen=True)
class LanePageFormat(PageFormat):
    """Pages of plain numbers in rows that fill a TPU's lanes, ``[num_pages, num_kv_heads, rows, width]``.

    Where head_dim divides 128, ``128 / head_dim`` consecutive tokens of a head share a row of 128: the bytes of a plain
    page. Other heads are padded with zeros to the next multiple of 128. A TPU's memory is tiled in rows of 128: of
    narrower ones XLA makes arrays whose minor axis is the pages', which a kernel could read only after a copy of the
    pool.
    """

    head_dim: int

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return lane_width(self.head_dim)

    @property
    def packed(self) -> int:
        """Tokens in a row."""
        return tokens_per_row(self.width, self.head_dim)

    def bytes_per_page(self, num_kv_heads: int, page_size: int, head_dim: int) -> int:
        return super().bytes_per_page(num_kv_heads, -(-page_size // self.packed), self.width)

    def create(self, num_pages: int, num_kv_heads: int, page_size: int, head_dim: int) -> Array:
        """Zeroed pages.

        Raises:
          ValueError: the page has fewer tokens than a row, or heads are not those that the format was made for.
        """
        if head_dim != self.head_dim:
            raise ValueError(f"head_dim is {head_dim}, the pages are laid out for {self.head_dim}")
        if page_size < self.packed:
            raise ValueError(
                f"a row of {self.width} numbers holds {self.packed} tokens of head_dim {head_dim}, "
                f"page_size must be at least that, got {page_size}"
            )
        return super().create(num_pages, num_kv_heads, page_size // self.packed, self.width)

    def write(self, pages: Array, page: Array, slot: Array, rows: Array) -> Array:
        if self.packed == 1:
            return super().write(pages, page, slot, self._padded(rows))
        # One pass for each place in a row, so that no two tokens of a pass share one: whole rows are read, changed in
        # that place and written. They are rows of one matrix, because XLA:TPU turns the whole pool around to scatter
        # into its third axis after it gathered from it.
        num_pages, num_kv_heads, page_rows, width = pages.shape
        index = (page[:, None] * num_kv_heads + jnp.arange(num_kv_heads)) * page_rows
        index += (slot // self.packed)[:, None]
        new = self.round(jnp.tile(rows, self.packed).reshape(-1, width))
        place_of_lane = jnp.arange(width) // self.head_dim
        flat = pages.reshape(-1, width)
        for place in range(self.packed):
            here = (page < num_pages) & (slot % self.packed == place)
            at = jnp.where(here[:, None], index, len(flat)).reshape(-1)
            old = flat.at[at].get(mode="clip")
            flat = flat.at[at].set(jnp.where(place_of_lane == place, new, old), mode="drop")
        return flat.reshape(pages.shape)

    def rows(self, pages: Array, page: Array, slot: Array) -> Array:
        rows = pages[page, :, slot // self.packed]
        if self.packed == 1:
            return rows[..., : self.head_dim]
        parts = rows.reshape(*rows.shape[:-1], self.packed, self.head_dim)
        part = (slot % self.packed)[:, None, None, None]
        return jnp.take_along_axis(parts, part, axis=2)[:, :, 0]

    def gather(self, pages: Array, page: Array, slot: Array, target: Array) -> Array:
        rows = self._padded(self.rows(pages, page, slot)).swapaxes(0, 1)
        return pages.at[target].set(rows.reshape(pages.shape[1:]))

    def _padded(self, rows: Array) -> Array:
        return jnp.pad(rows, ((0, 0), (0, 0), (0, self.width // self.packed - self.head_dim)))


@dataclass(frozen=True)
class Float8Format(PageFormat):
    """8-bit floats, 4 bits of exponent and 3 of mantissa, without scales (arXiv:2209.05433).

    Numbers beyond the largest, 448, become it: the format has no infinity, and a plain cast would give NaN.
    """

    def round(self, rows: Array) -> Array:
        largest = float(jnp.finfo(self.dtype).max)
        return jnp.clip(rows, -largest, largest).astype(self.dtype)

    def read(self, pages: Array, page: Array, slot: Array) -> Array:
        """As bytes: files of tensors are read without knowing these floats."""
        return lax.bitcast_convert_type(self.rows(pages, page, slot), jnp.uint8)

    def put(self, pages: Array, page: Array, slot: Array, stored: Array) -> Array:
        return self.write(pages, page, slot, lax.bitcast_convert_type(stored, self.dtype))

    def on_lanes(self, head_dim: int) -> PageFormat:
        return self if head_dim % LANES == 0 else LaneFloat8Format(self.name, self.dtype, head_dim)


@dataclass(frozen=True)
class LaneFloat8Format(LanePageFormat):
    """8-bit floats in rows of lanes."""

    round, read, put = Float8Format.round, Float8Format.read, Float8Format.put
