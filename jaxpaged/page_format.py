"""How rows of keys and values lie in a page: the seam between a cache and its storage.

A format makes the page arrays, writes rows into them and reads pages back; nothing else in the project looks
inside a page array. Formats with one number a value are here; block-quantized ones keep their scales beside the values.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

MIN_PAGE_SIZE, MAX_PAGE_SIZE = 8, 256


@dataclass(frozen=True)
class PageFormat:
    """Pages of plain numbers, ``[num_pages, num_kv_heads, page_size, head_dim]`` in ``dtype``."""

    name: str
    dtype: DTypeLike

    def bytes_per_page(self, num_kv_heads: int, page_size: int, head_dim: int) -> int:
        """Bytes of one page of one layer, keys or values alone."""
        return num_kv_heads * page_size * head_dim * np.dtype(self.dtype).itemsize

    def create(self, num_pages: int, num_kv_heads: int, page_size: int, head_dim: int) -> Array:
        """Zeroed pages."""
        return jnp.zeros((num_pages, num_kv_heads, page_size, head_dim), self.dtype)

    def write(self, pages: Array, page: Array, slot: Array, rows: Array) -> Array:
        """Writes ``rows [T, num_kv_heads, head_dim]`` at ``(page i32[T], slot i32[T])``; page N is dropped."""
        return pages.at[page, :, slot].set(rows.astype(self.dtype), mode="drop")

    def read(self, pages: Array, page: Array, slot: Array) -> Array:
        """The rows at ``(page i32[T], slot i32[T])`` as they are stored; ``write`` puts them back bit by bit."""
        return pages[page, :, slot]

    def copy(self, pages: Array, source: Array, target: Array) -> Array:
        """Copies page ``source i32[]`` over page ``target i32[]``."""
        return pages.at[target].set(pages[source])

    def gather(self, pages: Array, page: Array, slot: Array, target: Array) -> Array:
        """Fills page ``target i32[]`` with the rows at ``(page i32[page_size], slot i32[page_size])``, read before."""
        return pages.at[target].set(pages[page, :, slot].swapaxes(0, 1))


PAGE_FORMATS = {
    "f32": PageFormat("f32", jnp.float32),
    "bf16": PageFormat("bf16", jnp.bfloat16),
    "f16": PageFormat("f16", jnp.float16),
}


def page_format(name: str) -> PageFormat:
    """The format called ``name``.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in PAGE_FORMATS:
        raise ValueError(f"page format {name!r} is not known; known are {', '.join(PAGE_FORMATS)}")
    return PAGE_FORMATS[name]


def check_page_size(page_size: int) -> int:
    """``page_size`` itself, if it is a power of two from 8 to 256.

    Raises:
      ValueError: it is not.
    """
    if not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
        raise ValueError(
            f"page_size must be a power of two from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE}, got {page_size}"
        )
    return page_size
