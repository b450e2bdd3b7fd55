"""Residual formats: pages that are quantized as a whole, once they are full.

Until then a page is residual: in 16 bits, in a staging slot (``pages.residual``). Numbers that share
a scale span tokens: super-blocks of 256 numbers (``k_quants.py``), or a channel (``kivi.py``).
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
from jaxpaged.pages.formats.blocks import BlockFormat, BlockPages, take_pages
from jaxpaged.pages.residual import FinalizedPages, StagingSlots

RESIDUAL_DTYPE = jnp.float16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ResidualPages(BlockPages):
    """Quantized and residual pages of L layers: page p of layer l is ``l * N + p`` of the pool, and
    staging slot s ``l * S + s``."""

    residual: Array = field(kw_only=True)
    """f16[L * S, num_kv_heads, page_size, head_dim]: staging slots; rows are transformed if
    ``hadamard``."""
    slot_of_page: Array | None = field(kw_only=True, default=None)
    """i32[N]: ``StagingSlots.slot_of_page``, S = quantized; present only where attention reads."""

    def staging_slots(self) -> tuple[Array, int]:
        """``(slot_of_page, S)``; without ``slot_of_page`` all pages count as quantized, of one layer."""
        num_pages, num_slots = self.shape[0], len(self.residual)
        if self.slot_of_page is None:
            return jnp.full(num_pages, num_slots, jnp.int32), num_slots
        return self.slot_of_page, num_slots * len(self.slot_of_page) // num_pages


class PageCode:
    """Encoding of a full page of one KV head; subclasses are frozen dataclasses."""

    def check(self, name: str, page_size: int, head_dim: int) -> None:
        """Raises ``ValueError`` if pages or heads of these sizes cannot be stored."""
        raise NotImplementedError

    def parts(self, page_size: int, head_dim: int) -> dict[str, tuple[tuple[int, ...], DTypeLike]]:
        """Shape and dtype of each part of a page."""
        raise NotImplementedError

    def encode(self, x: Array) -> dict[str, Array]:
        """Parts, ``[..., *shape]`` each, of pages ``x f32[..., page_size, head_dim]``."""
        raise NotImplementedError

    def decode(self, parts: Mapping[str, Array], page_size: int, head_dim: int) -> Array:
        """f32[..., page_size, head_dim]: numbers of pages."""
        raise NotImplementedError


@dataclass(frozen=True)
class ResidualFormat(BlockFormat):
    """Format of pages that are quantized when they are full."""

    code: PageCode  # type: ignore[assignment]
    value_code: PageCode | None = None
    """Encoding of values, if another one than of keys."""

    has_residual = True

    def for_values(self) -> ResidualFormat:
        return self if self.value_code is None else replace(self, code=self.value_code, value_code=None)

    def check(self, page_size: int, head_dim: int) -> None:
        self.code.check(self.name, page_size, head_dim)

    def bytes_per_page(self, num_kv_heads: int, page_size: int, head_dim: int) -> int:
        """Bytes of a quantized page of one layer, keys or values alone."""
        parts = self.code.parts(page_size, head_dim).values()
        return num_kv_heads * sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in parts)

    def create(  # type: ignore[override]
        self, num_pages: int, num_kv_heads: int, page_size: int, head_dim: int, *, num_residual: int = 1
    ) -> ResidualPages:
        """Creates zeroed pages with ``num_residual`` staging slots."""
        self.check(page_size, head_dim)
        parts = {
            name: jnp.zeros((num_pages, num_kv_heads, *shape), dtype)
            for name, (shape, dtype) in self.code.parts(page_size, head_dim).items()
        }
        slots = jnp.zeros((num_residual, num_kv_heads, page_size, head_dim), RESIDUAL_DTYPE)
        return ResidualPages(parts, self, page_size, head_dim, residual=slots)

    def write_step(
        self,
        pages: ResidualPages,
        staging: StagingSlots,
        finalized: FinalizedPages,
        page: Array,
        slot: Array,
        rows: Array,
        layer: Array | int = 0,
    ) -> ResidualPages:
        """Writes a step's rows to residual pages, and quantizes the pages that it fills.

        Args:
          pages: pages of all layers.
          staging: staging slots after the step, without the pages that it fills.
          finalized: pages that it fills.
          page, slot: i32[T], target of each row; page N = not written.
          rows: [T, num_kv_heads, head_dim].
          layer: i32[], layer of the rows.
        """
        num_slots = staging.num_slots
        first_page, first_slot = layer * len(staging.slot_of_page), layer * num_slots
        rows = hadamard.transform(rows) if self.hadamard else rows.astype(jnp.float32)
        last, slots = len(rows) - 1, jnp.arange(pages.page_size, dtype=jnp.int32)

        def finalize(i: Array, parts: dict[str, Array]) -> dict[str, Array]:
            staging_slot = first_slot + jnp.minimum(finalized.staging_slot[i], num_slots - 1)
            staged = lax.dynamic_index_in_dim(pages.residual, staging_slot, keepdims=False)
            row = finalized.first_row[i] + slots - finalized.first_slot[i]
            fresh = rows.at[jnp.clip(row, 0, last)].get(mode="clip").swapaxes(0, 1)
            full = jnp.where((slots >= finalized.first_slot[i])[:, None], fresh, staged.astype(jnp.float32))
            encoded, target = self.code.encode(full), first_page + finalized.page[i]
            return {name: part.at[target].set(encoded[name]) for name, part in parts.items()}

        # Pages are finalized first, because this step may assign their slots to other pages.
        parts = lax.fori_loop(0, finalized.count, finalize, pages.parts)
        target = staging.slot(page)
        target = jnp.where(target < num_slots, first_slot + target, len(pages.residual))
        residual = pages.residual.at[target, :, slot].set(rows.astype(RESIDUAL_DTYPE), mode="drop")
        return replace(pages, parts=parts, residual=residual)

    def copy_residual(self, pages: ResidualPages, source: Array, target: Array) -> ResidualPages:
        """Copies staging slot ``source i32[]`` to slot ``target i32[]``."""
        return replace(pages, residual=pages.residual.at[target].set(pages.residual[source]))

    def decode(self, parts: Mapping[str, Array], page_size: int, head_dim: int) -> Array:  # type: ignore[override]
        """f32[..., page_size, head_dim]: dequantized parts of pages, still transformed if ``hadamard``."""
        return self.code.decode(parts, page_size, head_dim)

    def load(self, pages: ResidualPages, page: Array, *, slices: bool = False) -> Array:  # type: ignore[override]
        """f32[..., num_kv_heads, page_size, head_dim]: pages ``page i32[...]``, residual ones too."""
        parts = {name: take_pages(part, page, slices) for name, part in pages.parts.items()}
        quantized = self.decode(parts, pages.page_size, pages.head_dim)
        if pages.slot_of_page is None:
            return quantized
        slot_of_page, num_slots = pages.staging_slots()
        layer, own = jnp.divmod(page, len(slot_of_page))
        slot = slot_of_page[own]
        staged = layer * num_slots + jnp.minimum(slot, num_slots - 1)
        residual = take_pages(pages.residual, staged, slices)
        return jnp.where((slot < num_slots)[..., None, None, None], residual.astype(jnp.float32), quantized)

    def gather(self, pages: ResidualPages, page: Array, slot: Array, target: Array) -> ResidualPages:  # type: ignore[override]
        """Fills page ``target i32[]`` with the rows at ``(page i32[page_size], slot i32[page_size])``.

        Requantizes them, at a small loss.
        """
        loaded = self.load(pages, page)  # [page_size, KV, page_size, D]
        rows = jnp.take_along_axis(loaded, slot[:, None, None, None], axis=2)[:, :, 0].swapaxes(0, 1)
        encoded = self.code.encode(rows)
        return replace(
            pages, parts={name: part.at[target].set(encoded[name]) for name, part in pages.parts.items()}
        )

    def encode(self, rows: Array) -> dict[str, Array]:
        """Quantizes whole pages of ``rows [..., page_size, head_dim]`` to parts."""
        return self.code.encode(hadamard.transform(rows) if self.hadamard else rows.astype(jnp.float32))

    def write(self, *args: Any) -> Any:
        raise TypeError(f"{self.name} quantizes whole pages: use write_step")

    read = put = copy = write  # type: ignore[assignment]
