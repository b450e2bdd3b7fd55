"""PagePool: sequences together with their pages; the common part of paged caches."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array

from jaxpaged.attention.base import Pages
from jaxpaged.cache.checks import check_layer, check_step_rows
from jaxpaged.cache.reservation import Metadata
from jaxpaged.cache.sequences import Sequences
from jaxpaged.pages import allocator as pages_of
from jaxpaged.pages import block_table as tables
from jaxpaged.pages import residual
from jaxpaged.pages.batch import Batch
from jaxpaged.pages.formats import BlockPages, PageFormat, ResidualFormat, ResidualPages
from jaxpaged.pages.residual import StagingSlots


@dataclass(frozen=True, repr=False)
class PagePool(Sequences):
    """Keys and values of S sequences in N pages, for L layers."""

    k_pages: tuple[Pages, ...]
    """L of: array ``[num_pages, num_kv_heads, page_size, head_dim]`` in the format's dtype, or as its
    layout has it, or quantized pages (``formats.BlockPages``)."""
    v_pages: tuple[Pages, ...]
    """Values, like ``k_pages``."""
    staging: StagingSlots | None
    """Staging slots of residual pages; None where no format has them."""
    page_size: int = field(metadata={"static": True})
    head_dim: int = field(metadata={"static": True})
    k_format: PageFormat = field(metadata={"static": True})
    v_format: PageFormat = field(metadata={"static": True})

    @property
    def num_layers(self) -> int:
        """L, static."""
        return len(self.k_pages)

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads of the pages here, static."""
        return self.k_pages[0].shape[1] if self.k_pages else 0

    @property
    def metadata(self) -> Metadata:
        """Allocator, table and staging slots."""
        return Metadata(self.allocator, self.table, self.staging, self.page_size)

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page: keys and values, all layers."""
        pools = [p.parts if isinstance(p, BlockPages) else p for p in self.k_pages + self.v_pages]
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pools)) // self.k_pages[0].shape[0]

    @property
    def bytes_of_staging(self) -> int:
        """Bytes of all staging slots; 0 where no format has residual pages."""
        staged = [p.residual for p in self.k_pages + self.v_pages if isinstance(p, ResidualPages)]
        return sum(x.size * x.dtype.itemsize for x in staged)

    def local_page(self, page: Array) -> Array:
        """Index of ``page`` in the arrays here, out of range for pages that are elsewhere."""
        return page

    def write(self, layer: int, k: Array, v: Array, batch: Batch) -> Self:
        """Writes a step's keys and values of one layer to their pages; arguments as for ``attend``."""
        layer = check_layer(layer, self.num_layers)
        page = self.local_page(batch.page)
        check_step_rows(k, v, batch.num_tokens, self.num_kv_heads, self.head_dim)

        def written(storage: PageFormat, pages: Any, rows: Array) -> Pages:
            if isinstance(storage, ResidualFormat):
                assert self.staging is not None, "made by create"
                assert batch.finalized is not None, "made by reserve"
                return storage.write_step(pages, self.staging, batch.finalized, page, batch.slot, rows)
            return storage.write(pages, page, batch.slot, rows)

        k_pages = written(self.k_format, self.k_pages[layer], k)
        v_pages = written(self.v_format, self.v_pages[layer], v)
        return replace(
            self,
            k_pages=(*self.k_pages[:layer], k_pages, *self.k_pages[layer + 1 :]),
            v_pages=(*self.v_pages[:layer], v_pages, *self.v_pages[layer + 1 :]),
        )

    def pages(self, layer: int) -> tuple[Pages, Pages]:
        """Keys and values of one layer, as ``paged_attention`` takes them."""
        k, v = (self.as_read(pages) for pages in (self.k_pages[layer], self.v_pages[layer]))
        return k, v

    def as_read(self, pages: Pages) -> Pages:
        """Pages of a layer together with the staging slots of its residual ones."""
        if isinstance(pages, ResidualPages) and self.staging is not None:
            return replace(pages, slot_of_page=self.staging.slot_of_page)
        return pages

    def clear(self, *, scrub: bool = False) -> Self:
        """See ``interface.clear``."""
        k_pages, v_pages = self.k_pages, self.v_pages
        if scrub:
            k_pages, v_pages = jax.tree.map(jnp.zeros_like, (k_pages, v_pages))
        return replace(
            self,
            allocator=pages_of.create(self.num_pages),
            table=tables.empty_like(self.table, self.num_pages),
            k_pages=k_pages,
            v_pages=v_pages,
            staging=None if self.staging is None else residual.create(self.num_pages, self.max_seqs),
        )
