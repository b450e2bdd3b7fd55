"""PagePool: sequences together with their pages; the common part of paged caches."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from jaxpaged.attention.base import Pages
from jaxpaged.cache.checks import check_layer, check_step_rows
from jaxpaged.cache.reservation import Metadata
from jaxpaged.cache.sequences import Sequences
from jaxpaged.cache.windows import Windows
from jaxpaged.pages import allocator as pages_of
from jaxpaged.pages import block_table as tables
from jaxpaged.pages import residual
from jaxpaged.pages.batch import Batch
from jaxpaged.pages.formats import BlockPages, PageFormat, ResidualFormat, ResidualPages
from jaxpaged.pages.residual import StagingSlots


@dataclass(frozen=True, repr=False)
class PagePool(Sequences):
    """Keys and values of S sequences in N pages, for L layers.

    All layers share one allocator and one table: page p of a sequence is page p of every layer, at
    index ``layer * N + p`` of the pool.
    """

    k_pages: Pages
    """Pool of keys: array ``[L * N, num_kv_heads, page_size, head_dim]`` in the format's dtype, or as
    its layout has it, or quantized pages (``formats.BlockPages``)."""
    v_pages: Pages
    """Pool of values, like ``k_pages``, with heads of ``v_head_dim``."""
    staging: StagingSlots | None
    """Staging slots of residual pages; None where no format has them."""
    num_layers: int = field(metadata={"static": True})
    """L."""
    page_size: int = field(metadata={"static": True})
    head_dim: int = field(metadata={"static": True})
    """Numbers of a head of queries and keys."""
    v_head_dim: int = field(metadata={"static": True})
    """Numbers of a head of values, and of results."""
    k_format: PageFormat = field(metadata={"static": True})
    v_format: PageFormat = field(metadata={"static": True})
    sharding: NamedSharding | None = field(default=None, kw_only=True, metadata={"static": True})
    """Sharding of the pages over their KV heads, ``PartitionSpec(None, axis)``; None on one device."""
    implementation: str | None = field(default=None, kw_only=True, metadata={"static": True})
    """Implementation of ``paged_attention`` that ``attend`` calls; None = the first that serves."""

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads of the pages here, static."""
        return self.k_pages.shape[1]

    @property
    def num_local_pages(self) -> int:
        """Pages of one layer in the arrays here, static; also the local number of "no page"."""
        return self.num_pages

    def partition_specs(self, tensor: str | None = None) -> Self:
        """Partition specs of the cache's arrays, in a cache of specs: for ``in_shardings`` of ``jit``,
        ``in_specs`` of ``shard_map``, or ``device_put``.

        Args:
          tensor: mesh axis that KV heads are split over; default that of ``sharding``, or none. All
            else is replicated.
        """
        if tensor is None and self.sharding is not None:
            tensor = self.sharding.spec[1]
        heads: Any = PartitionSpec() if tensor is None else PartitionSpec(None, tensor)
        same: Any = PartitionSpec()
        return replace(
            self,
            allocator=same,
            table=same,
            k_pages=heads,
            v_pages=heads,
            staging=None if self.staging is None else same,
        )

    @property
    def metadata(self) -> Metadata:
        """Allocator, table and staging slots."""
        return Metadata(self.allocator, self.table, self.staging, self.page_size)

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page: keys and values, all layers."""
        pools = [p.parts if isinstance(p, BlockPages) else p for p in (self.k_pages, self.v_pages)]
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pools)) // self.num_local_pages

    @property
    def bytes_of_staging(self) -> int:
        """Bytes of all staging slots; 0 where no format has residual pages."""
        staged = [p.residual for p in (self.k_pages, self.v_pages) if isinstance(p, ResidualPages)]
        return sum(x.size * x.dtype.itemsize for x in staged)

    def local_page(self, page: Array) -> Array:
        """Local number of ``page``; ``num_local_pages`` for "no page" and pages that are elsewhere."""
        return page

    def _window(self, window: Windows) -> Windows:
        """``window`` of ``attend``: by default the cache's.

        Raises:
          ValueError: it is wider than the cache's, which has freed what lies before that.
        """
        if self.window is None:
            return window
        wide = [one for one in (window if isinstance(window, tuple) else (window,)) if one != self.window]
        if window is None:
            return self.window
        if any(one is None or one > self.window for one in wide):
            raise ValueError(f"window must be at most the cache's {self.window} tokens, got {window}")
        return window

    def write(self, layer: Array | int, k: Array | None, v: Array | None, batch: Batch) -> Self:
        """Writes a step's keys and values of one layer to their pages; arguments as for ``attend``."""
        layer = check_layer(layer, self.num_layers)
        if k is None or v is None:
            if k is not v:
                raise ValueError("k and v must both be arrays or both None, for a layer that writes none")
            return self
        page = self.local_page(batch.page)
        check_step_rows(k, v, batch.num_tokens, self.num_kv_heads, self.head_dim, self.v_head_dim)

        def written(storage: PageFormat, pages: Any, rows: Array) -> Pages:
            if isinstance(storage, ResidualFormat):
                assert self.staging is not None, "made by create"
                assert batch.finalized is not None, "made by reserve"
                return storage.write_step(pages, self.staging, batch.finalized, page, batch.slot, rows, layer)
            return storage.write(pages, self.pool_page(layer, page), batch.slot, rows)

        return replace(
            self,
            k_pages=written(self.k_format, self.k_pages, k),
            v_pages=written(self.v_format, self.v_pages, v),
        )

    def pool_page(self, layer: Array | int, page: Array) -> Array:
        """Index in the pool of local pages of a layer; ``L * N``, which is dropped, for "no page"."""
        n = self.num_local_pages
        return jnp.where(page < n, layer * n + page, self.num_layers * n)

    def pages(self, layer: int) -> tuple[Pages, Pages]:
        """Copies of one layer's keys and values, as ``paged_attention`` takes them; to look at."""
        layers = jax.tree.map(
            lambda pool: pool.reshape(self.num_layers, -1, *pool.shape[1:])[layer],
            (self.k_pages, self.v_pages),
        )
        k, v = map(self.as_read, layers)
        return k, v

    def as_read(self, pages: Pages) -> Pages:
        """Pages together with the staging slots of the residual ones, as ``paged_attention`` takes them."""
        if isinstance(pages, ResidualPages) and self.staging is not None:
            return replace(pages, slot_of_page=self.staging.slot_of_page)
        return pages

    def clear(self, *, scrub: bool = False) -> Self:
        """See ``jaxpaged.clear``."""
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
