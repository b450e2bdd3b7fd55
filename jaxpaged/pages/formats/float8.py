"""Pages of 8-bit floats, stored as their bits.

XLA computes on few machines with 8-bit floats, not even moves them: on a CPU it would convert the
whole pool to float16 and back for every write.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxpaged.pages.formats.blocks import BlockFormat, BlockPages, Parts
from jaxpaged.pages.formats.plain import scatter_rows


@dataclass(frozen=True)
class Float8Format(BlockFormat):
    """8-bit floats, 4 bits of exponent and 3 of mantissa, without scales (arXiv:2209.05433).

    Numbers are clipped to +-448: the format has no infinity, and a cast would make NaN. The only
    part of a page is ``codes u8[N, num_kv_heads, page_size, head_dim]``.
    """

    code: Any = None

    def check(self, page_size: int, head_dim: int) -> None:
        """Accepts any page and head."""

    def with_hadamard(self, hadamard: bool) -> Float8Format:
        return self

    def bytes_per_page(self, num_kv_heads: int, page_size: int, head_dim: int) -> int:
        return num_kv_heads * page_size * head_dim

    def create(self, num_pages: int, num_kv_heads: int, page_size: int, head_dim: int) -> BlockPages:  # type: ignore[override]
        """Creates zeroed pages."""
        codes = jnp.zeros((num_pages, num_kv_heads, page_size, head_dim), jnp.uint8)
        return BlockPages({"codes": codes}, self, page_size, head_dim)

    def round(self, rows: Array) -> Array:
        """``rows`` as 8-bit floats."""
        largest = float(jnp.finfo(self.dtype).max)
        return jnp.clip(rows, -largest, largest).astype(self.dtype)

    def encode(self, rows: Array) -> dict[str, Array]:
        return {"codes": lax.bitcast_convert_type(self.round(rows), jnp.uint8)}

    def decode(self, parts: Parts) -> Array:
        return lax.bitcast_convert_type(parts["codes"], self.dtype).astype(jnp.float32)

    def read(self, pages: BlockPages, page: Array, slot: Array) -> Array:  # type: ignore[override]
        """u8: the bits of rows."""
        return pages.parts["codes"][page, :, slot]

    def write(self, pages: BlockPages, page: Array, slot: Array, rows: Array) -> BlockPages:  # type: ignore[override]
        return self.put(pages, page, slot, self.encode(rows)["codes"])

    def put(self, pages: BlockPages, page: Array, slot: Array, stored: Array) -> BlockPages:  # type: ignore[override]
        codes = scatter_rows(pages.parts["codes"], page, slot, stored)
        return replace(pages, parts={"codes": codes})
