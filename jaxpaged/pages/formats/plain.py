"""Pages of plain numbers, also in rows that fill a TPU's lanes."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

LANES = 128
"""Numbers per row of a TPU tile. XLA pads rows to it, or transposes the pool to avoid padding."""


def heads_title(num_kv_heads: int, head_dim: int, v_head_dim: int) -> str:
    """Number and size of KV heads, for people: "8 KV heads of 128", or "of 192 and 128" of keys and values."""
    sizes = f"{head_dim}" if v_head_dim == head_dim else f"{head_dim} and {v_head_dim}"
    return f"{num_kv_heads} KV heads of {sizes}"


def lane_width(head_dim: int) -> int:
    """Numbers per row of TPU lanes for heads of ``head_dim``."""
    return -(-head_dim // LANES) * LANES


def tokens_per_row(width: int, head_dim: int) -> int:
    """Number of tokens in a row of ``width`` numbers of a page array."""
    return 1 if width % head_dim else width // head_dim


def token_rows(pages: Array, head_dim: int) -> Array:
    """Reshapes ``pages [..., rows, width]`` of any layout to ``[..., page_size, head_dim]``.

    Plain and packed pages have the same bytes; removing padding copies them.
    """
    if pages.shape[-1] % head_dim:
        return pages[..., :head_dim]
    return pages.reshape(*pages.shape[:-2], -1, head_dim)


def scatter_rows(pages: Array, page: Array, slot: Array, rows: Array) -> Array:
    """``pages [N, KV, page_size, D]`` with ``rows [T, KV, D]`` at ``(page i32[T], slot i32[T])``; N drops a
    row."""
    # A matrix, because XLA:TPU transposes the whole pool to scatter into its third axis.
    _, num_kv_heads, page_size, head_dim = pages.shape
    head = jnp.arange(num_kv_heads, dtype=jnp.int32)
    index = (page[:, None] * num_kv_heads + head) * page_size + slot[:, None]
    matrix = pages.reshape(-1, head_dim)
    if index.size == 1:  # XLA makes an update of a slice of a single row, and copies the pool for it
        index, rows = (
            jnp.pad(index, ((0, 1), (0, 0)), constant_values=len(matrix)),
            jnp.tile(rows, (2, 1, 1)),
        )
    return matrix.at[index].set(rows, mode="drop").reshape(pages.shape)


@dataclass(frozen=True)
class PageFormat:
    """Format of plain numbers, ``[num_pages, num_kv_heads, page_size, head_dim]`` of ``dtype``."""

    name: str
    dtype: DTypeLike

    has_residual = False
    """True if pages stay in 16 bits until they are full (``residual.ResidualFormat``)."""
    hadamard = False
    """True if rows are stored transformed (``hadamard.transform``)."""

    @property
    def title(self) -> str:
        """Name of the format, with "+hadamard" if rows are transformed."""
        return self.name

    def check(self, page_size: int, head_dim: int) -> None:
        """Raises ``ValueError`` if pages or heads of these sizes cannot be stored."""

    def for_values(self) -> PageFormat:
        """Format of the same name for values."""
        return self

    def with_hadamard(self, hadamard: bool) -> PageFormat:
        """This format with rows transformed or not; plain numbers never are."""
        return self

    def bytes_per_page(self, num_kv_heads: int, page_size: int, head_dim: int) -> int:
        """Bytes of a page of one layer, keys or values alone."""
        return num_kv_heads * page_size * head_dim * np.dtype(self.dtype).itemsize

    def create(self, num_pages: int, num_kv_heads: int, page_size: int, head_dim: int) -> Array:
        """Creates zeroed pages."""
        return jnp.zeros((num_pages, num_kv_heads, page_size, head_dim), self.dtype)

    def write(self, pages: Array, page: Array, slot: Array, rows: Array) -> Array:
        """Writes ``rows [T, num_kv_heads, head_dim]`` to ``(page i32[T], slot i32[T])``; N drops a row."""
        return scatter_rows(pages, page, slot, self.round(rows))

    def round(self, rows: Array) -> Array:
        """Casts ``rows`` to the stored dtype."""
        return rows.astype(self.dtype)

    def read(self, pages: Array, page: Array, slot: Array) -> Array:
        """Rows at ``(page i32[T], slot i32[T])`` as stored; ``put`` writes them back bit for bit."""
        return self.rows(pages, page, slot)

    def rows(self, pages: Array, page: Array, slot: Array) -> Array:
        """``[T, num_kv_heads, head_dim]``: numbers at ``(page i32[T], slot i32[T])``."""
        return pages[page, :, slot]

    def put(self, pages: Array, page: Array, slot: Array, stored: Array) -> Array:
        """Writes rows that ``read`` returned."""
        return self.write(pages, page, slot, stored)

    def copy(self, pages: Array, source: Array, target: Array) -> Array:
        """Copies page ``source i32[]`` over page ``target i32[]``."""
        return pages.at[target].set(pages[source])

    def gather(self, pages: Array, page: Array, slot: Array, target: Array) -> Array:
        """Fills page ``target i32[]`` with the rows at ``(page i32[page_size], slot i32[page_size])``.

        All of them are read before the page is written, so it may be one of them.
        """
        return pages.at[target].set(pages[page, :, slot].swapaxes(0, 1))

    def on_lanes(self, head_dim: int) -> PageFormat:
        """This format with rows of 128 numbers; itself if head_dim is a multiple of 128."""
        return self if head_dim % LANES == 0 else LanePageFormat(self.name, self.dtype, head_dim)


@dataclass(frozen=True)
class LanePageFormat(PageFormat):
    """Plain numbers in rows that fill a TPU's lanes: ``[num_pages, num_kv_heads, rows, width]``.

    If head_dim divides 128, ``128 / head_dim`` consecutive tokens of a head share a row of 128; the
    bytes are those of a plain page. Other heads are padded with zeros to a multiple of 128. TPU
    memory is tiled in rows of 128: with narrower rows, XLA makes pages the minor axis, and a kernel
    would need a copy of the pool.
    """

    head_dim: int

    @property
    def width(self) -> int:
        """Numbers per row."""
        return lane_width(self.head_dim)

    @property
    def packed(self) -> int:
        """Tokens per row."""
        return tokens_per_row(self.width, self.head_dim)

    def bytes_per_page(self, num_kv_heads: int, page_size: int, head_dim: int) -> int:
        return super().bytes_per_page(num_kv_heads, -(-page_size // self.packed), self.width)

    def create(self, num_pages: int, num_kv_heads: int, page_size: int, head_dim: int) -> Array:
        """Creates zeroed pages.

        Raises:
          ValueError: a page is smaller than a row, or head_dim is not the format's.
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
        # Reads, changes and writes whole rows, in one pass per position in a row, so that no two tokens
        # of a pass share a row. Rows of a matrix, as in PageFormat.write.
        num_pages, num_kv_heads, page_rows, width = pages.shape
        index = (page[:, None] * num_kv_heads + jnp.arange(num_kv_heads, dtype=jnp.int32)) * page_rows
        index += (slot // self.packed)[:, None]
        new = self.round(jnp.tile(rows, self.packed).reshape(-1, width))
        position_of_lane = jnp.arange(width, dtype=jnp.int32) // self.head_dim
        flat = pages.reshape(-1, width)
        for position in range(self.packed):
            here = (page < num_pages) & (slot % self.packed == position)
            at = jnp.where(here[:, None], index, len(flat)).reshape(-1)
            old = flat.at[at].get(mode="clip")
            flat = flat.at[at].set(jnp.where(position_of_lane == position, new, old), mode="drop")
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
