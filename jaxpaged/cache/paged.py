"""PagedKVCache: sequences, their block table and their pages as one value, and attention over it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxpaged.attention import paged_attention
from jaxpaged.attention.api import check_implementation, default_platform
from jaxpaged.attention.base import Pages
from jaxpaged.cache import reservation
from jaxpaged.cache.checks import (
    check_layer,
    check_rows,
    check_sizes,
    check_step_rows,
    step_rows,
    storage_formats,
    values_dim,
)
from jaxpaged.cache.head_sharding import REPLICATED, HeadAxis, head_axis, over_heads, repeated, split_heads
from jaxpaged.cache.page_pool import PagePool
from jaxpaged.cache.reservation import PageCopies
from jaxpaged.cache.windows import Windows, by_window
from jaxpaged.pages import allocator as pages_of
from jaxpaged.pages import block_table as tables
from jaxpaged.pages import residual
from jaxpaged.pages.batch import Batch
from jaxpaged.pages.formats import (
    LANES,
    PageFormat,
    ResidualFormat,
    check_page_size,
    heads_title,
)
from jaxpaged.pages.rope import Rope


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class PagedKVCache(PagePool):
    """Keys and values of S sequences in a pool of N pages, for L layers.

    ``k_pages`` and ``v_pages`` hold the pages of all layers, so that layers can run in a scan with
    the cache in its carry. Every operation is pure and un-jitted; jit
    your step with the cache donated, or each step copies the pool.

    Reference: PagedAttention, arXiv:2309.06180.
    """

    @classmethod
    def create(
        cls,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        num_pages: int,
        max_seqs: int,
        page_size: int = 32,
        max_seq_len: int | None = None,
        window: int | None = None,
        rope: Rope | None = None,
        dtype: DTypeLike | None = None,
        k_dtype: DTypeLike | None = None,
        v_dtype: DTypeLike | None = None,
        hadamard: bool | None = None,
        layout: str | None = None,
        sharding: NamedSharding | None = None,
        implementation: str | None = None,
    ) -> PagedKVCache:
        """Creates an empty cache.

        Args:
          num_layers: L.
          num_kv_heads: key/value heads of the model.
          head_dim: dimensions of one head.
          v_head_dim: those of a head of values, where they are others.
          num_pages: N, pages of the pool; each exists in every layer.
          max_seqs: S.
          page_size: tokens per page, a power of two from 8 to 256.
          max_seq_len: tokens that one sequence may hold. Default: the whole pool. The block table
            has ``ceil(max_seq_len / page_size) + 1`` entries a sequence, and their memory and the
            cost of whole-table operations follow it: set it where the pool is large.
          window: tokens that a query sees in every layer, its own included; None = all. Pages before it
            are freed by ``reserve``, so that a sequence never holds more than ``window / page_size + 2``
            pages behind what a step adds.
          rope: rotary embedding of the model, needed by ``seq_shift`` alone; ``Rope.create(())`` for
            a model that has none.
          dtype: page format, a name of ``PAGE_FORMATS`` or the dtype of plain pages (jnp.bfloat16,
            "bfloat16"). Default: bf16 where JAX computes on a GPU or TPU, f32 on a CPU.
          k_dtype, v_dtype: formats of keys and of values, where they differ from it.
          hadamard: True to apply a Hadamard transform to rows before quantizing, which spreads
            outliers over a head. Default: the better one as measured per format
            (docs/guides/quantization.md).
          layout: "plain" pages, or rows that fill the "lanes" of a TPU (``formats.LanePageFormat``);
            they differ where head_dim is no multiple of 128. Default: lanes where JAX computes on a
            TPU and a page fills a row of them, plain elsewhere.
          sharding: ``NamedSharding(mesh, PartitionSpec(None, axis))``: the KV heads of pages are split
            over a mesh axis, and ``attend`` computes each device's heads there; with fewer KV heads
            than devices, several devices have the same. Not needed where the axis is explicit.
          implementation: of ``paged_attention``, for ``attend``; default the first of
            ``attention.candidates()`` that serves. One that is named and cannot serve raises.

        Raises:
          ValueError: a size is impossible, a format cannot store heads or pages of these sizes, or an
            implementation is unknown; the message names it and what is allowed.
        """
        check_implementation(implementation)
        check_sizes(num_layers=num_layers, num_kv_heads=num_kv_heads, head_dim=head_dim)
        v_dim = values_dim(head_dim, v_head_dim)
        if window is not None:
            check_sizes(window=window)
        check_page_size(page_size)
        k_format, v_format = storage_formats(dtype, k_dtype, v_dtype, hadamard)
        if layout not in (None, "plain", "lanes"):
            raise ValueError(f'layout must be "plain" or "lanes", got {layout!r}')
        for storage, dim in ((k_format, head_dim), (v_format, v_dim)):
            storage.check(page_size, dim)
        fills_a_row = page_size * min(head_dim, v_dim) >= LANES
        if layout == "lanes" or (layout is None and fills_a_row and default_platform() == "tpu"):
            k_format, v_format = k_format.on_lanes(head_dim), v_format.on_lanes(v_dim)
        local_heads = num_kv_heads
        if sharding is not None:
            axis, num_heads = split_heads(sharding, num_kv_heads)
            local_heads = num_heads // sharding.mesh.shape[axis]
        check_rows(num_layers * num_pages * local_heads * page_size)

        def create_pool(storage: PageFormat, dim: int) -> Pages:
            staged = {"num_residual": num_layers * max_seqs} if storage.has_residual else {}

            def create() -> Pages:
                return storage.create(num_layers * num_pages, local_heads, page_size, dim, **staged)

            if sharding is None:
                return create()
            pool: Pages = jax.jit(
                jax.shard_map(
                    create, mesh=sharding.mesh, in_specs=(), out_specs=sharding.spec, check_vma=False
                )
            )()
            return pool

        has_residual = k_format.has_residual or v_format.has_residual
        return cls(
            allocator=pages_of.create(num_pages),
            table=create_table(max_seqs, max_seq_len, num_pages, page_size),
            rope=rope,
            k_pages=create_pool(k_format, head_dim),
            v_pages=create_pool(v_format, v_dim),
            staging=residual.create(num_pages, max_seqs) if has_residual else None,
            num_layers=num_layers,
            page_size=page_size,
            head_dim=head_dim,
            v_head_dim=v_dim,
            k_format=k_format,
            v_format=v_format,
            window=window,
            sharding=sharding,
            implementation=implementation,
        )

    def __repr__(self) -> str:
        return (
            f"PagedKVCache({self.num_layers} layers, {self.num_pages} pages of {self.page_size} tokens, "
            f"{heads_title(self.num_kv_heads, self.head_dim, self.v_head_dim)}, k {self.k_format.title}, "
            f"v {self.v_format.title}, "
            f"{self.max_seqs} sequences of up to {self.max_pages_per_seq} pages)"
        )

    @property
    def kind(self) -> str:
        """Name of this kind of cache in tables and flags."""
        return "paged"

    def attend(
        self,
        layer: Array | int,
        q: Array,
        k: Array | None,
        v: Array | None,
        batch: Batch,
        *,
        scale: float | None = None,
        window: Windows = None,
        soft_cap: float | None = None,
        sinks: Array | None = None,
        rope: Rope | None = None,
        group: int | None = None,
    ) -> tuple[Array, PagedKVCache]:
        """Writes a step's keys and values of one layer to their pages, and attends.

        Args:
          layer: i32[], index of the layer; may be traced.
          q: ``[T, num_q_heads, head_dim]``, rotated at ``batch.rope_positions``.
          k: ``[T, num_kv_heads, head_dim]``, rotated likewise. None, as ``v`` then is: nothing is
            written, since another model layer with this index has, whose keys and values this one
            reads.
          v: ``[T, num_kv_heads, v_head_dim]``.
          batch: from this step's ``reserve``.
          scale, soft_cap, sinks: as for ``paged_attention``.
          window: tokens that a query sees, or one of each layer, in a tuple; default the cache's.
          rope: rotary embedding of this layer, where it differs from the cache's.
          group: ignored; caches of several layer groups need it, see ``GroupedKVCache``.

        Returns:
          ``(out [T, num_q_heads, v_head_dim], cache)``.

        Raises:
          ValueError: a wrong layer, shape or dtype; a window that is wider than the cache's.
        """
        del group
        window = self._window(window)
        axis = head_axis(self.k_pages, self.sharding)
        if axis is not None:
            return self._attend_on_devices(
                axis, layer, q, k, v, batch, sinks, scale=scale, window=window, soft_cap=soft_cap, rope=rope
            )
        cache = self.write(layer, k, v, batch)
        out = by_window(
            window,
            layer,
            self.num_layers,
            lambda window: paged_attention(
                q,
                cache.as_read(cache.k_pages),
                cache.as_read(cache.v_pages),
                self.table,
                batch,
                scale=scale,
                window=window,
                soft_cap=soft_cap,
                sinks=sinks,
                rope=self.rotation(rope),
                first_page=layer * self.num_pages,
                v_head_dim=self.v_head_dim,
                implementation=self.implementation,
            ),
        )
        return out, cache

    def _attend_on_devices(
        self,
        axis: HeadAxis,
        layer: Array | int,
        q: Array,
        k: Array | None,
        v: Array | None,
        batch: Batch,
        sinks: Array | None,
        **options: Any,
    ) -> tuple[Array, PagedKVCache]:
        """``attend`` with each device's heads."""
        if k is not None and v is not None:
            k, v = (repeated(rows, self.num_kv_heads) for rows in (k, v))
            check_step_rows(k, v, batch.num_tokens, self.num_kv_heads, self.head_dim, self.v_head_dim)
        heads = axis.heads
        specs = self.partition_specs(axis.name)

        def attend(
            cache: PagedKVCache,
            layer: Array | int,
            batch: Batch,
            sinks: Array | None,
            q: Array,
            k: Array | None,
            v: Array | None,
        ) -> tuple[Array, PagedKVCache]:
            return cache.attend(layer, q, k, v, batch, sinks=sinks, **options)

        in_specs = specs, REPLICATED, REPLICATED, PartitionSpec(axis.name), heads, heads, heads
        out: tuple[Array, PagedKVCache] = over_heads(
            axis,
            attend,
            in_specs,
            (heads, specs),
            self,
            check_layer(layer, self.num_layers),
            batch,
            sinks,
            q,
            k,
            v,
        )
        return out

    def reserve(
        self, num_new: Array, *, num_tokens: int | None = None, max_new: int | None = None
    ) -> tuple[PagedKVCache, Batch, Array]:
        """See ``jaxpaged.reserve``."""
        rows = step_rows(num_new, self.max_seqs, num_tokens)
        made = reservation.reserve(self.without_unseen().metadata, num_new, rows, max_new)
        k_pages, v_pages = self._copy_pages(made.copies)
        cache = replace(
            self,
            allocator=made.allocator,
            table=made.table,
            staging=made.staging,
            k_pages=k_pages,
            v_pages=v_pages,
        )
        return cache, made.batch, made.ok

    def _copy_pages(self, copies: PageCopies) -> tuple[Pages, Pages]:
        """Copies pages in every layer. A loop, so that a step without copies does not touch the pool."""

        def copy_one(j: Array, pools: tuple[Any, Any]) -> tuple[Any, Any]:
            i, layer = jnp.divmod(j, self.num_layers)

            def copy(storage: PageFormat, pages: Any) -> Any:
                if isinstance(storage, ResidualFormat):  # only residual pages are written, and so copied
                    assert copies.staging is not None
                    first = layer * self.max_seqs
                    source, target = copies.staging.source[i], copies.staging.target[i]
                    return storage.copy_residual(pages, first + source, first + target)
                first = layer * self.num_pages
                return storage.copy(pages, first + copies.source[i], first + copies.target[i])

            k_pages, v_pages = pools
            return copy(self.k_format, k_pages), copy(self.v_format, v_pages)

        pools = self.k_pages, self.v_pages
        return jax.lax.fori_loop(0, copies.num * self.num_layers, copy_one, pools)


def create_table(max_seqs: int, max_seq_len: int | None, num_pages: int, page_size: int) -> tables.BlockTable:
    """An empty table for sequences of ``max_seq_len`` tokens, by default of the whole pool.

    One entry more than whole pages: a context shift leaves the pages at both ends partly used.

    Raises:
      ValueError: a size is not positive.
    """
    if max_seq_len is None:
        return tables.create(max_seqs, num_pages, num_pages)
    check_sizes(max_seq_len=max_seq_len)
    return tables.create(max_seqs, -(-max_seq_len // page_size) + 1, num_pages)
