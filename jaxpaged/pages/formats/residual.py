"""Pages that are quantized as a whole, once they are full.

Until then a page's numbers are kept in 16 bits, in one of a few open pages (``staging.StagingSlots``). What shares a
scale is the format's: super-blocks of 256 numbers (``k_quants.py``), or one channel of all tokens (``kivi.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from jaxpaged.pages.formats import hadamard
from jaxpaged.pages.formats.blocks import BlockFormat, BlockPages, taken
from jaxpaged.pages.residual import FinalizedPages, StagingSlots

RESIDUAL_DTYPE = jnp.float16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ResidualPages(BlockPages):
    """One layer's sealed pages, ``[num_pages, num_kv_heads, ...]`` each part, and its open ones."""

    residual: Array = field(kw_only=True)
    """f16[S, num_kv_heads, page_size, head_dim]: turned, if the format turns rows."""
    slot_of_page: Array | None = field(kw_only=True, default=None)
    """i32[N], where attention reads: ``StagingSlots.slot_of_page``; S = sealed."""


class PageCode:
    """What a full page of one KV head is stored as; subclasses are values without state."""

    def check(self, name: str, page_size: int, head_dim: int) -> None:
        """Raises ``ValueError`` where pages or heads of these sizes cannot be stored."""
        raise NotImplementedError

    def parts(self, page_size: int, head_dim: int) -> dict[str, tuple[tuple[int, ...], DTypeLike]]:
        """Shape and dtype of each part."""
        raise NotImplementedError

    def encode(self, x: Array) -> dict[str, Array]:
        """``f32[..., page_size, head_dim]`` as parts, ``[..., *shape]`` each."""
        raise NotImplementedError

    def decode(self, parts: Mapping[str, Array], page_size: int, head_dim: int) -> Array:
        """f32[..., page_size, head_dim]"""
        raise NotImplementedError


@dataclass(frozen=True)
class ResidualFormat(BlockFormat):
    """Pages sealed when they are full."""

    code: PageCode  # type: ignore[assignment]
    value_code: PageCode | None = None
    """What pages of values are stored as, if not as those of keys."""

    has_residual = True

    def for_values(self) -> ResidualFormat:
        return self if self.value_code is None else replace(self, code=self.value_code, value_code=None)

    def check(self, page_size: int, head_dim: int) -> None:
        self.code.check(self.name, page_size, head_dim)

    def bytes_per_page(self, num_kv_heads: int, page_size: int, head_dim: int) -> int:
        """Bytes of a sealed page of one layer, keys or values alone."""
        parts = self.code.parts(page_size, head_dim).values()
        return num_kv_heads * sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in parts)

    def create(  # type: ignore[override]
        self, num_pages: int, num_kv_heads: int, page_size: int, head_dim: int, *, num_residual: int = 1
    ) -> ResidualPages:
        """Zeroed pages, ``num_residual`` open ones among them."""
        self.check(page_size, head_dim)
        parts = {
            name: jnp.zeros((num_pages, num_kv_heads, *shape), dtype)
            for name, (shape, dtype) in self.code.parts(page_size, head_dim).items()
        }
        opened = jnp.zeros((num_residual, num_kv_heads, page_size, head_dim), RESIDUAL_DTYPE)
        return ResidualPages(parts, self, page_size, head_dim, residual=opened)

    def write_step(
        self,
        pages: ResidualPages,
        staging: StagingSlots,
        finalized: FinalizedPages,
        page: Array,
        slot: Array,
        rows: Array,
    ) -> ResidualPages:
        """Writes a step's rows to open pages, and seals the pages that are full with them.

        Args:
          pages: of a layer.
          staging: as they are behind the step: what it fills is no longer open.
          finalized: what it fills.
          page, slot: i32[T], where each row goes; page N is dropped.
          rows: [T, num_kv_heads, head_dim].
        """
        rows = hadamard.transform(rows) if self.hadamard else rows.astype(jnp.float32)
        last, slots = len(rows) - 1, jnp.arange(pages.page_size)

        def seal(i: Array, parts: dict[str, Array]) -> dict[str, Array]:
            begun = lax.dynamic_index_in_dim(
                pages.residual, finalized.staging_slot[i], keepdims=False
            ).astype(jnp.float32)
            row = finalized.first_row[i] + slots - finalized.first_slot[i]
            fresh = rows.at[jnp.clip(row, 0, last)].get(mode="clip").swapaxes(0, 1)
            full = jnp.where((slots >= finalized.first_slot[i])[:, None], fresh, begun)
            encoded = self.code.encode(full)
            return {name: part.at[finalized.page[i]].set(encoded[name]) for name, part in parts.items()}

        # First what is sealed: a place may be another page's from this step on.
        parts = lax.fori_loop(0, finalized.count, seal, pages.parts)
        opened = pages.residual.at[staging.slot(page), :, slot].set(rows.astype(RESIDUAL_DTYPE), mode="drop")
        return replace(pages, parts=parts, residual=opened)

    def copy_residual(self, pages: ResidualPages, source: Array, target: Array) -> ResidualPages:
        """Copies the open page at place ``source i32[]`` to place ``target i32[]``."""
        return replace(pages, residual=pages.residual.at[target].set(pages.residual[source]))

    def decode(self, parts: Mapping[str, Array], page_size: int, head_dim: int) -> Array:  # type: ignore[override]
        """f32[..., page_size, head_dim] of the parts of pages, as they were stored: turned, if rows are."""
        return self.code.decode(parts, page_size, head_dim)

    def load(self, pages: ResidualPages, page: Array, *, slices: bool = False) -> Array:  # type: ignore[override]
        """f32[..., num_kv_heads, page_size, head_dim]: the pages ``page i32[...]``, open ones too, as stored."""
        parts = {name: taken(part, page, slices) for name, part in pages.parts.items()}
        sealed = self.decode(parts, pages.page_size, pages.head_dim)
        if pages.slot_of_page is None:
            return sealed
        place = pages.slot_of_page[page]
        opened = taken(pages.residual, jnp.minimum(place, len(pages.residual) - 1), slices).astype(
            jnp.float32
        )
        return jnp.where((place < len(pages.residual))[..., None, None, None], opened, sealed)

    def gather(self, pages: ResidualPages, page: Array, slot: Array, target: Array) -> ResidualPages:  # type: ignore[override]
        """Quantizes into page ``target i32[]`` the rows at ``(page i32[page_size], slot i32[page_size])``, read before.

        They are quantized anew, which costs them a little.
        """
        loaded = self.load(pages, page)  # [page_size, KV, page_size, D]
        rows = jnp.take_along_axis(loaded, slot[:, None, None, None], axis=2)[:, :, 0].swapaxes(0, 1)
        encoded = self.code.encode(rows)
        return replace(
            pages, parts={name: part.at[target].set(encoded[name]) for name, part in pages.parts.items()}
        )

    def encode(self, rows: Array) -> dict[str, Array]:
        """``rows [..., page_size, head_dim]``, a page of them, as the parts that are stored."""
        return self.code.encode(hadamard.transform(rows) if self.hadamard else rows.astype(jnp.float32))

    def write(self, *args: Any) -> Any:
        raise TypeError(f"{self.name} writes whole steps: write_step")

    read = put = copy = write  # type: ignore[assignment]
