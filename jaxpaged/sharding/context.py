"""ContextKVCache: pages of one sequence on several devices of a mesh axis, for contexts too long
for one.

All of it runs inside ``jax.shard_map(..., check_vma=False)``, one program on every device of the
axis (a rank). Allocator and table are replicated metadata, edited by the code of ``PagedKVCache``.
Of the N pages in them rank r of C stores those with ``page % C == r``, page p at index ``p // C``
of its arrays: new pages go to the ranks in turn, and a sequence may use the whole pool. Each rank
attends to the entries whose pages it stores, and the attention states are merged as those of
disjoint sets of keys: two collectives a layer, whose size depends on the step's queries and not on
the context.

Sources of the ideas: split-KV decoding (Flash-Decoding, Dao et al., 2023; the merge,
arXiv:2501.01005), keys distributed over devices (Ring Attention, arXiv:2310.01889; context
parallelism, arXiv:2411.01783, which communicates queries as here).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxpaged.attention import paged_attention
from jaxpaged.cache import reservation
from jaxpaged.cache.checks import step_rows, storage_formats
from jaxpaged.cache.page_pool import PagePool
from jaxpaged.cache.paged import PagedKVCache, create_table
from jaxpaged.cache.reservation import PageCopies
from jaxpaged.cache.windows import Windows, by_window
from jaxpaged.pages import allocator as pages_of
from jaxpaged.pages import block_table as tables
from jaxpaged.pages.batch import Batch
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.rope import Rope


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class ContextKVCache(PagePool):
    """Part of one rank of S sequences in a pool of N pages over C ranks, for L layers.

    ``allocator`` and ``table`` are replicated metadata of the whole pool. ``k_pages``, ``v_pages``
    and ``local_table`` differ between ranks (``context_specs``).
    """

    local_table: BlockTable
    """``[S, P]``: compacted entries of ``table`` with pages of this rank, as local page numbers (N
    / C = no entry). Updated by ``reserve`` only, for the attention of its step."""
    axis: str = field(metadata={"static": True})
    """Name of the mesh axis."""
    axis_size: int = field(metadata={"static": True})
    """C."""

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
        axis_size: int,
        axis: str = "context",
        page_size: int = 32,
        max_seq_len: int | None = None,
        window: int | None = None,
        rope: Rope | None = None,
        dtype: DTypeLike | None = None,
        k_dtype: DTypeLike | None = None,
        v_dtype: DTypeLike | None = None,
        hadamard: bool | None = None,
        layout: str | None = None,
        implementation: str | None = None,
    ) -> ContextKVCache:
        """Creates one rank's part of an empty cache, equal on all ranks. Needs no mesh.

        Args:
          num_layers, num_kv_heads, head_dim, v_head_dim: as for ``PagedKVCache.create``.
          page_size, max_seq_len, window, rope, dtype, k_dtype, v_dtype, hadamard, layout, implementation: likewise.
          num_pages: N, pages of all ranks together, a multiple of C.
          max_seqs: S.
          axis_size: C, devices of the mesh axis.
          axis: name of the mesh axis.

        Raises:
          ValueError: an impossible size, N is not a multiple of C, or a residual format, whose
            staging slots are not distributed.

        Example:
          >>> create = functools.partial(ContextKVCache.create, axis_size=8, **sizes)  # doctest: +SKIP
          >>> specs = context_specs(jax.eval_shape(create))  # doctest: +SKIP
          >>> start = jax.shard_map(create, mesh=mesh, in_specs=(), out_specs=specs, check_vma=False)  # doctest: +SKIP
          >>> cache = jax.jit(start)()  # doctest: +SKIP
        """
        if axis_size < 1:
            raise ValueError(f"axis_size must be positive, got {axis_size}")
        if num_pages < 1 or num_pages % axis_size:
            raise ValueError(
                f"num_pages must be a positive multiple of axis_size, as each of {axis_size} ranks keeps as many; got "
                f"{num_pages}"
            )
        k_format, v_format = storage_formats(dtype, k_dtype, v_dtype, hadamard)
        for storage in (k_format, v_format):
            if storage.has_residual:
                raise ValueError(
                    f"{storage.name} quantizes whole pages, which a context over several devices does not support; "
                    "choose a format that quantizes rows"
                )
        table = create_table(max_seqs, max_seq_len, num_pages, page_size)
        local = PagedKVCache.create(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            num_pages=num_pages // axis_size,
            max_seqs=max_seqs,
            page_size=page_size,
            max_seq_len=1,  # the table below replaces it
            dtype=dtype,
            k_dtype=k_dtype,
            v_dtype=v_dtype,
            hadamard=hadamard,
            layout=layout,
            implementation=implementation,
        )
        return cls(
            allocator=pages_of.create(num_pages),
            table=table,
            rope=rope,
            k_pages=local.k_pages,
            v_pages=local.v_pages,
            staging=None,
            local_table=tables.create(max_seqs, table.max_pages_per_seq, num_pages // axis_size),
            num_layers=num_layers,
            page_size=page_size,
            head_dim=head_dim,
            v_head_dim=local.v_head_dim,
            k_format=local.k_format,
            v_format=local.v_format,
            axis=axis,
            axis_size=axis_size,
            window=window,
            implementation=implementation,
        )

    def __repr__(self) -> str:
        return (
            f"ContextKVCache({self.num_layers} layers, {self.num_pages} pages of {self.page_size} tokens over "
            f"{self.axis_size} devices of {self.axis!r}, k {self.k_format.title}, v {self.v_format.title}, "
            f"{self.max_seqs} sequences of up to {self.max_pages_per_seq} pages)"
        )

    @property
    def num_local_pages(self) -> int:
        """N / C, static: pages of one rank; also the local number of "no page"."""
        return self.num_pages // self.axis_size

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
    ) -> tuple[Array, ContextKVCache]:
        """Writes keys and values of one layer and step to pages, and attends to the pages of all
        ranks.

        Arguments are those of ``PagedKVCache.attend``, replicated; ``batch`` is of the last
        ``reserve``.

        Returns:
          ``(out [T, num_q_heads, v_head_dim], cache)``, out in the dtype of q, replicated. Attention
          of each rank is rounded to that dtype, and merged in float32.
        """
        del group
        window = self._window(window)
        cache = self.write(layer, k, v, batch)
        out, lse = by_window(
            window,
            layer,
            self.num_layers,
            lambda window: paged_attention(
                q,
                cache.k_pages,
                cache.v_pages,
                self.local_table,
                batch,
                scale=scale,
                window=window,
                soft_cap=soft_cap,
                rope=self.rotation(rope),
                first_page=layer * self.num_local_pages,
                v_head_dim=self.v_head_dim,
                implementation=self.implementation,
                return_lse=True,
            ),
        )
        return merge_over_axis(out, lse, self.axis, sinks), cache

    def reserve(
        self, num_new: Array, *, num_tokens: int | None = None, max_new: int | None = None
    ) -> tuple[ContextKVCache, Batch, Array]:
        """Reserves slots in the whole pool, see ``interface.reserve``; ``batch`` has global page
        numbers.

        A shared page that is written is copied to the rank of the new page, with one collective a
        copy. The local table is rebuilt, O(S * P) once a step.

        Raises:
          ValueError: as ``interface.reserve``, or the mesh axis has another size than the cache.
        """
        if (size := lax.axis_size(self.axis)) != self.axis_size:
            raise ValueError(
                f"the cache was created for {self.axis_size} ranks, the mesh axis {self.axis!r} has {size}"
            )
        made = reservation.reserve(
            self.without_unseen().metadata, num_new, step_rows(num_new, self.max_seqs, num_tokens), max_new
        )
        cache = replace(self._copy_pages(made.copies), allocator=made.allocator, table=made.table)
        return replace(cache, local_table=cache._make_local_table()), made.batch, made.ok

    def _is_local(self, page: Array) -> Array:
        """True for global pages of this rank; arbitrary for "no page"."""
        return page % self.axis_size == lax.axis_index(self.axis)

    def local_page(self, page: Array) -> Array:
        """Local numbers of global pages; N / C for those of other ranks and "no page"."""
        # "No page" is N, a multiple of C, and becomes N / C where it counts as local.
        return jnp.where(self._is_local(page), page // self.axis_size, self.num_local_pages)

    def _make_local_table(self) -> BlockTable:
        """Entries of the replicated table with pages of this rank."""
        table = self.table
        s, p = table.pages.shape
        mine = self._is_local(table.pages) & (lax.iota(jnp.int32, p) < table.num_entries[:, None])
        column = jnp.where(mine, jnp.cumsum(mine, axis=1, dtype=jnp.int32) - 1, p)
        fields = (
            self.local_page(table.pages),
            table.first_slot,
            table.num_tokens,
            table.position,
            table.rotation,
        )
        # One scatter of rows of fields is faster than five of single numbers, as in
        # ``tables.keep``.
        padding = jnp.array([self.num_local_pages, 0, 0, 0, 0], jnp.int32)
        kept = jnp.broadcast_to(padding, (s, p, len(fields)))
        kept = kept.at[lax.iota(jnp.int32, s)[:, None], column].set(jnp.stack(fields, axis=-1), mode="drop")
        pages, first_slot, num_tokens, position, rotation = jnp.moveaxis(kept, -1, 0)
        num_entries = jnp.sum(mine, axis=1, dtype=jnp.int32)
        return BlockTable(pages, first_slot, num_tokens, position, rotation, num_entries)

    def _copy_pages(self, copies: PageCopies) -> ContextKVCache:
        """Copies pages in every layer.

        A loop, so that a step without copies neither touches the pool nor communicates.
        """

        def copy_one(j: Array, pools: list[Array]) -> list[Array]:
            i, layer = jnp.divmod(j, self.num_layers)
            source, target = copies.source[i], copies.target[i]
            first = layer * self.num_local_pages
            words = [_as_words(pool[first + source // self.axis_size]) for pool in pools]
            # The rank of the page sends it, the others add zeros.
            sent = jnp.where(self._is_local(source), jnp.concatenate(words), 0)
            received = jnp.split(lax.psum(sent, self.axis), _ends([len(x) for x in words]))
            return [
                pool.at[self.pool_page(layer, self.local_page(target))].set(
                    _from_words(x, pool.shape[1:], pool.dtype), mode="drop"
                )
                for pool, x in zip(pools, received, strict=True)
            ]

        pools, structure = jax.tree.flatten((self.k_pages, self.v_pages))
        pools = lax.fori_loop(0, copies.num * self.num_layers, copy_one, pools)
        k_pages, v_pages = jax.tree.unflatten(structure, pools)
        return replace(self, k_pages=k_pages, v_pages=v_pages)


def context_specs(cache: ContextKVCache) -> Any:
    """Partition specs of a cache, for ``in_specs`` and ``out_specs`` of ``jax.shard_map``.

    Pages and ``local_table`` are split along their first axis by the cache's mesh axis: a global
    page array is ``[C * L * (N / C), ...]``, with page p of layer l at index ``(p % C * L + l) * (N / C)
    + p // C``, and the table
    ``[C * S, P]``. All else is replicated, as a Batch is.

    Args:
      cache: of one rank, or global; arrays may be ``jax.ShapeDtypeStruct``.

    Returns:
      A ContextKVCache with a ``PartitionSpec`` in place of each array.
    """
    split, replicated = PartitionSpec(cache.axis), PartitionSpec()
    local = {name: getattr(cache, name) for name in ("k_pages", "v_pages", "local_table")}
    specs = jax.tree.map(lambda _: replicated, cache)
    return replace(specs, **jax.tree.map(lambda _: split, local))


def merge_over_axis(out: Array, lse: Array, axis: str, sinks: Array | None = None) -> Array:
    """Merges the attention of the ranks of a mesh axis, each over its own keys.

    ``out = sum_r exp(lse_r) out_r / (sum_r exp(lse_r) + exp(sink))``, with the largest exponent
    factored out, in two collectives, a maximum and a sum. A rank without keys (lse = -inf) does not
    contribute; without keys on any rank, out is zero.

    Args:
      out: [T, num_q_heads, head_dim], attention of this rank; zeros without keys.
      lse: f32[T, num_q_heads], logarithm of its softmax denominator, without sinks.
      axis: name of the mesh axis.
      sinks: f32[num_q_heads], score added to the denominator of each head, once; None = no sinks.

    Returns:
      [T, num_q_heads, head_dim] in the dtype of ``out``, replicated.

    Raises:
      ValueError: ``sinks`` has another shape.

    Reference: FlashInfer's merge of attention states, arXiv:2501.01005.
    """
    tokens, num_q_heads, head_dim = out.shape
    highest = lax.pmax(lse, axis)
    if sinks is not None:
        if sinks.shape != (num_q_heads,):
            raise ValueError(
                f"sinks must have shape {(num_q_heads,)}, one for each query head, got {sinks.shape}"
            )
        highest = jnp.maximum(highest, sinks.astype(jnp.float32))
    base = jnp.where(jnp.isneginf(highest), 0, highest)  # -inf minus -inf would be NaN
    weight = jnp.exp(lse - base)
    weighted = weight[..., None] * out.astype(jnp.float32)
    # Concatenated, for one collective.
    sums = lax.psum(jnp.concatenate([weighted.reshape(tokens, -1), weight], axis=1), axis)
    weighted = sums[:, : num_q_heads * head_dim].reshape(out.shape)
    total = sums[:, num_q_heads * head_dim :]
    if sinks is not None:
        total = total + jnp.exp(sinks.astype(jnp.float32) - base)
    return (weighted / jnp.where(total > 0, total, 1)[..., None]).astype(out.dtype)


def _as_words(x: Array) -> Array:
    """Bits of an array as u32[n], which adding zeros does not change, in any dtype, NaN and -0.0
    included.

    Narrow numbers are joined at a distance, the first of the first half with the first of the
    second. ``bitcast_convert_type`` joins neighbours, in an array with a last axis of 2, and XLA
    for TPUs converts the whole pool to that before it takes the page.
    """
    width = 8 * x.dtype.itemsize
    bits = lax.bitcast_convert_type(x, f"uint{width}").reshape(-1).astype(jnp.uint32)
    parts = jnp.split(bits, 32 // width)
    return sum((part << (width * i) for i, part in enumerate(parts[1:], 1)), parts[0])


def _from_words(words: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Inverse of ``_as_words``."""
    width = 8 * jnp.dtype(dtype).itemsize
    parts = [(words >> (width * i)).astype(f"uint{width}") for i in range(32 // width)]
    return lax.bitcast_convert_type(jnp.concatenate(parts).reshape(shape), dtype)


def _ends(sizes: list[int]) -> list[int]:
    """Indices at which to split a concatenation of arrays of these sizes."""
    return [sum(sizes[:i]) for i in range(1, len(sizes))]
