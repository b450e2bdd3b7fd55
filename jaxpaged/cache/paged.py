"""PagedKVCache: sequences and their pages as one value; making room in it, and attention to it.

What edits sequences and touches no page is in ``sequences.py``; this room takes pages, copies and writes them. Every
operation is pure, ``op(cache, ...) -> cache``, and un-jitted. One that can fail returns ``ok`` and, when it is false,
the cache unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpaged.attention import paged_attention
from jaxpaged.attention.api import default_platform
from jaxpaged.attention.base import Pages
from jaxpaged.cache import sequences as seqs
from jaxpaged.cache.sequences import Sequences
from jaxpaged.pages import allocator as pages_of
from jaxpaged.pages import block_table as tables
from jaxpaged.pages import residual as opened
from jaxpaged.pages.batch import Batch, pack
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.formats import (
    LANES,
    BlockPages,
    PageFormat,
    ResidualFormat,
    ResidualPages,
    check_page_size,
    formats_of,
)
from jaxpaged.pages.residual import Copies, FreshPages, LastPages, StagingSlots, plan_step
from jaxpaged.pages.rope import Rope


class OutOfPages(RuntimeError):
    """The pool has fewer free pages than an operation needs; nothing was changed."""

    def __init__(self, requested: int, free: int) -> None:
        self.requested, self.free = requested, free
        super().__init__(f"out of pages: {requested} asked for, {free} free")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedKVCache(Sequences):
    """Keys and values of S sequences in a pool of N pages, for L layers.

    ``k_pages`` and ``v_pages`` hold one array a layer (an array of all layers would be copied by ``lax.scan``).
    Source of the idea: PagedAttention (arXiv:2309.06180).
    """

    k_pages: tuple[Pages, ...]
    """L of them: arrays ``[num_pages, num_kv_heads, page_size, head_dim]`` in the format's dtype, or as its layout has
    them, or quantized pages (``page_format.BlockPages``)."""
    v_pages: tuple[Pages, ...]
    """As ``k_pages``."""
    staging: StagingSlots | None
    """Where pages are that are not sealed yet; None where no format seals pages."""
    page_size: int = field(metadata={"static": True})
    k_format: PageFormat = field(metadata={"static": True})
    v_format: PageFormat = field(metadata={"static": True})

    @classmethod
    def create(
        cls,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        max_seqs: int,
        page_size: int = 32,
        max_pages_per_seq: int | None = None,
        dtype: str = "f32",
        k_dtype: str | None = None,
        v_dtype: str | None = None,
        hadamard: bool | None = None,
        layout: str | None = None,
    ) -> PagedKVCache:
        """An empty cache.

        Args:
          num_layers: L.
          num_kv_heads: key/value heads of the model.
          head_dim: values of one head.
          num_pages: N, pages of the pool; each exists in every layer.
          max_seqs: S.
          page_size: tokens a page holds, a power of two from 8 to 256.
          max_pages_per_seq: P, entries a sequence can have; default N, so that one sequence can take the whole pool.
          dtype: name of the page format, one of ``PAGE_FORMATS``.
          k_dtype, v_dtype: that of keys and of values, where they differ from it.
          hadamard: whether quantized rows are turned first, so that outliers are spread over a head (``page_format.
            hadamard``). Default: as measured to be better for each format (docs/quantization.md).
          layout: "plain" pages, or rows that fill the "lanes" of a TPU (``page_format.LanePageFormat``), which differ
            where head_dim is no multiple of 128. Default: lanes where JAX computes on a TPU and a page fills a row of
            them, plain elsewhere.

        Raises:
          ValueError: a size is impossible, or a format cannot store heads or pages of these sizes; the message names it
            and what is allowed.
        """
        for name, value in (
            ("num_layers", num_layers),
            ("num_kv_heads", num_kv_heads),
            ("head_dim", head_dim),
        ):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        check_page_size(page_size)
        k_format, v_format = formats_of(dtype, k_dtype, v_dtype, hadamard)
        if layout not in (None, "plain", "lanes"):
            raise ValueError(f'layout must be "plain" or "lanes", got {layout!r}')
        for storage in (k_format, v_format):
            storage.check(page_size, head_dim)
        fills_a_row = page_size * head_dim >= LANES
        if layout == "lanes" or (layout is None and fills_a_row and default_platform() == "tpu"):
            k_format, v_format = k_format.on_lanes(head_dim), v_format.on_lanes(head_dim)
        shape = num_pages, num_kv_heads, page_size, head_dim

        def create_layers(storage: PageFormat) -> tuple[Pages, ...]:
            places = {"num_residual": max_seqs} if storage.has_residual else {}
            return tuple(storage.create(*shape, **places) for _ in range(num_layers))

        return cls(
            pages_of.create(num_pages),
            tables.create(max_seqs, num_pages if max_pages_per_seq is None else max_pages_per_seq, num_pages),
            create_layers(k_format),
            create_layers(v_format),
            opened.create(num_pages, max_seqs) if k_format.has_residual or v_format.has_residual else None,
            page_size,
            k_format,
            v_format,
        )

    @property
    def kind(self) -> str:
        return "paged"

    @property
    def num_layers(self) -> int:
        """L, static."""
        return len(self.k_pages)

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page: keys and values, all layers."""
        pools = [p.parts if isinstance(p, BlockPages) else p for p in self.k_pages + self.v_pages]
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pools)) // self.num_pages

    @property
    def bytes_of_staging(self) -> int:
        """Bytes of the pages that wait to be sealed, a place for each sequence; 0 where no format seals pages."""
        places = [p.open for p in self.k_pages + self.v_pages if isinstance(p, ResidualPages)]
        return sum(x.size * x.dtype.itemsize for x in places)

    def attend(
        self,
        layer: int,
        q: Array,
        k: Array,
        v: Array,
        batch: Batch,
        *,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks: Array | None = None,
        rope: Rope | None = None,
    ) -> tuple[Array, PagedKVCache]:
        """Writes one layer's keys and values of a step to their pages, and attends.

        Args:
          layer: which layer, from 0.
          q: ``[T, num_q_heads, head_dim]``, rotated at ``batch.rope_positions``.
          k: ``[T, num_kv_heads, head_dim]``, rotated likewise.
          v: ``[T, num_kv_heads, head_dim]``.
          batch: what ``reserve`` gave for this step.
          scale, window, soft_cap, sinks, rope: as ``paged_attention`` has them; ``rope`` is what q and k were rotated
            with, without which a ``seq_shift`` would not be seen.

        Returns:
          ``(out [T, num_q_heads, head_dim], cache)``.
        """
        cache = self.write(layer, k, v, batch)
        out = paged_attention(
            q,
            *cache.pages(layer),
            self.table,
            batch,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            sinks=sinks,
            rope=rope,
        )
        return out, cache

    def write(self, layer: int, k: Array, v: Array, batch: Batch) -> PagedKVCache:
        """Writes one layer's keys and values of a step to their pages, in the formats of the pages.

        Args:
          layer: which layer, from 0.
          k: ``[T, num_kv_heads, head_dim]``, rotated at ``batch.rope_positions``.
          v: ``[T, num_kv_heads, head_dim]``.
          batch: what ``reserve`` gave for this step.
        """

        def written(storage: PageFormat, pages: Any, rows: Array) -> Pages:
            if isinstance(storage, ResidualFormat):
                assert self.staging is not None, "made by create"
                assert batch.finalized is not None, "made by reserve"
                return storage.write_step(pages, self.staging, batch.finalized, batch.page, batch.slot, rows)
            return storage.write(pages, batch.page, batch.slot, rows)

        k_pages = written(self.k_format, self.k_pages[layer], k)
        v_pages = written(self.v_format, self.v_pages[layer], v)
        return replace(
            self,
            k_pages=_replaced(self.k_pages, layer, k_pages),
            v_pages=_replaced(self.v_pages, layer, v_pages),
        )

    def pages(self, layer: int) -> tuple[Pages, Pages]:
        """Keys and values of one layer, as ``paged_attention`` takes them."""
        k, v = (self.as_read(pages) for pages in (self.k_pages[layer], self.v_pages[layer]))
        return k, v

    def as_read(self, pages: Pages) -> Pages:
        """Pages of a layer with what tells their open ones from the sealed."""
        if isinstance(pages, ResidualPages) and self.staging is not None:
            return replace(pages, place=self.staging.place)
        return pages

    def reserve(
        self, num_new: Array, *, num_tokens: int | None = None, max_new: int | None = None
    ) -> tuple[PagedKVCache, Batch, Array]:
        """See ``reserve``."""
        return reserve(self, num_new, num_tokens=num_tokens, max_new=max_new)

    def can_reserve_each(self, num_new: Array) -> Array:
        """bool[S]: which sequences get their pages when served in order of their ids, those without room passed over.

        One that does not fit is expected to be removed: its shared page may then need no copy, and its own pages
        serve the others in the step after.
        """
        plan = _plan(self, num_new)
        free = self.allocator.num_free

        def serve(left: Array, ask: tuple[Array, Array]) -> tuple[Array, Array]:
            representable, needed = ask
            served = representable & (needed <= left)
            return left - jnp.where(served, needed, 0), served

        wanted = jnp.where(plan.representable, plan.needed, 0)
        return jax.lax.cond(
            jnp.sum(wanted) <= free,
            lambda: plan.representable,
            lambda: jax.lax.scan(serve, free, (plan.representable, wanted))[1],
        )

    def pages_needed(self, num_new: Array, *, limit: int | None = None) -> Array:
        """i32[S]: pages that ``num_new i32[S]`` more tokens take, copies of shared pages included.

        With ``limit`` a sequence never holds more tokens than that, because it forgets some as it goes: whole pages of
        them, and two that are partly used.
        """
        needed = _plan(self, num_new).needed
        if limit is None:
            return needed
        most = -(-limit // self.page_size) + 2
        return jnp.minimum(needed, jnp.maximum(most - self.table.num_entries, 0))

    def whole_pages(self, num_tokens: Array) -> Array:
        """How many pages ``num_tokens`` tokens fill to the last slot."""
        return num_tokens // self.page_size

    def seq_position_min(self) -> Array:
        """See ``sequences.seq_position_min``."""
        return seqs.seq_position_min(self)

    def seq_drop_unseen(self, window: int) -> PagedKVCache:
        """See ``sequences.seq_drop_unseen``."""
        return seqs.seq_drop_unseen(self, window)

    def seq_remove(
        self, seq: Array | int, p0: Array | int = 0, p1: Array | int = -1
    ) -> tuple[PagedKVCache, Array]:
        """See ``sequences.seq_remove``."""
        return seqs.seq_remove(self, seq, p0, p1)

    def seq_copy(
        self, src: Array | int, dst: Array | int, p0: Array | int = 0, p1: Array | int = -1
    ) -> tuple[PagedKVCache, Array]:
        """See ``sequences.seq_copy``."""
        return seqs.seq_copy(self, src, dst, p0, p1)

    def seq_shift(
        self, seq: Array | int, p0: Array | int, p1: Array | int, delta: Array | int
    ) -> tuple[PagedKVCache, Array]:
        """See ``sequences.seq_shift``."""
        return seqs.seq_shift(self, seq, p0, p1, delta)

    def seq_reorder(self, source: Array) -> PagedKVCache:
        """See ``sequences.seq_reorder``."""
        return seqs.seq_reorder(self, source)


def _replaced(layers: tuple[Pages, ...], layer: int, value: Pages) -> tuple[Pages, ...]:
    return (*layers[:layer], value, *layers[layer + 1 :])


@dataclass(frozen=True)
class _Plan:
    """What room for ``num_new`` more tokens takes, sequence by sequence (``[S]`` each)."""

    last: tables.Entry
    """The last entry, with page N for an empty sequence."""
    own: Array
    """i32: the entries of the sequence that move with a copy of its last page."""
    into_last: Array
    """i32: tokens that go behind the last entry, into its page."""
    copied: Array
    """bool: the last page is shared and has to be copied before that."""
    fresh: Array
    """i32: pages for the tokens left."""
    representable: Array
    """bool: the count is not negative, and the table's row is wide enough."""

    @property
    def needed(self) -> Array:
        """i32: pages to take from the pool."""
        return self.fresh + self.copied


def _last_entry(cache: PagedKVCache) -> tables.Entry:
    last = tables.last_entry(cache.table)
    return replace(last, pages=jnp.where(cache.table.num_entries > 0, last.pages, cache.num_pages))


def _room(cache: PagedKVCache, last: tables.Entry) -> Array:
    room = jnp.where(last.pages < cache.num_pages, cache.page_size - last.first_slot - last.num_tokens, 0)
    if cache.staging is not None:
        room = jnp.where(cache.staging.is_open(last.pages), room, 0)  # what is sealed is not written again
    return room


def room_in_last_page(cache: PagedKVCache) -> Array:
    """i32[S]: tokens that go right behind each sequence's last one before it takes another page.

    If the page is shared, the first of them takes a page all the same, for the copy.
    """
    return _room(cache, _last_entry(cache))


def _plan(cache: PagedKVCache, num_new: Array) -> _Plan:
    table = cache.table
    num_new = jnp.asarray(num_new, jnp.int32)
    last = _last_entry(cache)
    room = _room(cache, last)
    own = jnp.ones(cache.max_seqs, jnp.int32)
    if cache.staging is not None:
        # All entries of a sequence in its open page move with a copy: none is left behind in a page that nobody
        # would ever fill.
        own = jnp.sum(table.pages == last.pages[:, None], axis=1, dtype=jnp.int32)
    into_last = jnp.clip(num_new, 0, room)
    count = cache.allocator.ref_counts.at[last.pages].get(mode="fill", fill_value=0)
    shared = (into_last > 0) & (count > own)
    # Of sequences that share a page and write to it in this very step, each takes a copy until one is left
    # with the original to itself.
    ids = jnp.arange(cache.max_seqs)
    rivals = shared[None, :] & (last.pages[None, :] == last.pages[:, None]) & (ids[None, :] < ids[:, None])
    copied = shared & (count - jnp.sum(rivals * own, axis=1, dtype=jnp.int32) > own)
    fresh = -(-jnp.maximum(num_new - into_last, 0) // cache.page_size)
    representable = (num_new >= 0) & (table.num_entries + fresh <= cache.max_pages_per_seq)
    return _Plan(last, own, into_last, copied, fresh, representable)


def pages_needed(cache: PagedKVCache, num_new: Array) -> Array:
    """i32[S]: pages that ``reserve(cache, num_new)`` would take for each sequence, copies of shared pages included."""
    return _plan(cache, num_new).needed


def can_reserve(cache: PagedKVCache, num_new: Array) -> Array:
    """bool[]: whether ``reserve(cache, num_new)`` would succeed (given rows enough for the tokens)."""
    plan = _plan(cache, num_new)
    return jnp.all(plan.representable) & (jnp.sum(plan.needed) <= cache.allocator.num_free)


def reserve(
    cache: PagedKVCache, num_new: Array, *, num_tokens: int | None = None, max_new: int | None = None
) -> tuple[PagedKVCache, Batch, Array]:
    """Makes room for ``num_new`` more tokens of each sequence, for all of them or for none.

    Tokens go behind a sequence's last entry while its page is not shared and has room; a shared last page is
    copied first (copy-on-write, on any write); what is left gets fresh pages. A sealed page has no room. The cost
    depends on S and ``num_tokens``, not on N or P (formats that seal also compare the table's rows), and pages are
    copied only where they are shared.

    Args:
      cache: the state.
      num_new: i32[S], tokens to add to each sequence; 0 leaves it alone.
      num_tokens: T, the static number of rows of the step, at least ``sum(num_new)``. Default: ``sum(num_new)``,
        which must then be known, that is, not traced.
      max_new: static bound on the tokens of one sequence; 1 for a step of single tokens, which then compiles to
        less. Default: T.

    Returns:
      ``(cache, batch, ok bool[])``. ``batch`` says which rows are which sequence's tokens, at which position, and
      where they will be written; all of it is padding when not ok. Not ok: too few free pages, a row of the table
      too narrow, more tokens than rows or than ``max_new``, or a negative count.

    Raises:
      ValueError: ``num_new`` is not ``[S]``, or traced without ``num_tokens``.
    """
    t = _num_rows(num_new, cache.max_seqs, num_tokens)
    num_new = jnp.asarray(num_new, jnp.int32)
    s, n, ps, allocator, table = (
        cache.max_seqs,
        cache.num_pages,
        cache.page_size,
        cache.allocator,
        cache.table,
    )
    plan = _plan(cache, num_new)
    # Each fresh page holds at least one token, and each sequence leaves at most one page partly filled.
    max_fresh = min(t, t // ps + min(s, t))
    total = jnp.sum(plan.needed)
    ok = (
        jnp.all(plan.representable)
        & (jnp.sum(jnp.maximum(num_new, 0)) <= t)
        & jnp.all(num_new <= (t if max_new is None else max_new))
        & pages_of.can_allocate(allocator, total)
    )
    num_new = jnp.where(ok, num_new, 0)
    into_last, fresh = jnp.where(ok, plan.into_last, 0), jnp.where(ok, plan.fresh, 0)
    copied = plan.copied & ok
    num_copied = jnp.sum(copied, dtype=jnp.int32)
    max_copied = min(s, t)
    allocator, taken, _ = pages_of.allocate(
        allocator, jnp.where(ok, total, 0), max_count=max_copied + max_fresh
    )

    # Copies come first among the pages taken, then the fresh pages, sequence by sequence.
    copy_rank = jnp.cumsum(copied, dtype=jnp.int32) - 1
    last_page = jnp.where(copied, taken.at[copy_rank].get(mode="clip"), plan.last.pages)
    sources = jnp.full(max_copied, n).at[jnp.where(copied, copy_rank, s)].set(plan.last.pages, mode="drop")
    ref_counts = allocator.ref_counts.at[jnp.where(copied, plan.last.pages, n)].add(-plan.own, mode="drop")
    if cache.staging is not None:
        ref_counts = ref_counts.at[jnp.where(copied, last_page, n)].set(plan.own, mode="drop")
        moved = copied[:, None] & (table.pages == plan.last.pages[:, None])
        table = replace(table, pages=jnp.where(moved, last_page[:, None], table.pages))
    counted, allocator = cache.allocator.ref_counts, replace(allocator, ref_counts=ref_counts)
    taken_fresh = taken.at[num_copied + jnp.arange(max_fresh)].get(mode="fill", fill_value=n)

    start = tables.position_max(table) + 1
    entry_seq, entry_rank, fresh_before = pack(fresh, max_fresh)
    owner = jnp.minimum(entry_seq, s - 1)
    entry = table.num_entries[owner] + entry_rank
    rest = (num_new - into_last)[owner] - entry_rank * ps
    grown = jnp.where(into_last > 0, table.num_entries - 1, cache.max_pages_per_seq)
    ids = jnp.arange(s)

    sequence, offset, cu_q_lens = pack(num_new, t)
    first_slot = plan.last.first_slot + plan.last.num_tokens
    staging, finalized, places = cache.staging, None, None
    if staging is not None:
        staging, finalized, places = plan_step(
            staging,
            counted,
            LastPages(plan.last.pages, last_page, copied, copy_rank, into_last, first_slot, cu_q_lens[:-1]),
            FreshPages(taken_fresh, entry_seq, rest, cu_q_lens[owner] + into_last[owner] + entry_rank * ps),
            ps,
            max_copied,
        )
    k_pages, v_pages = _copy_pages(cache, sources, taken, places, num_copied)

    def put(values: Array, new: Array | int) -> Array:
        return values.at[entry_seq, entry].set(new, mode="drop")

    table = BlockTable(
        pages=put(table.pages.at[ids, grown].set(last_page, mode="drop"), taken_fresh),
        first_slot=put(table.first_slot, 0),
        num_tokens=put(table.num_tokens.at[ids, grown].add(into_last, mode="drop"), jnp.clip(rest, 0, ps)),
        position=put(table.position, (start + into_last)[owner] + entry_rank * ps),
        rotation=put(table.rotation, plan.last.rotation[owner]),
        num_entries=table.num_entries + fresh,
    )

    valid, row = sequence < s, jnp.minimum(sequence, s - 1)
    beyond = offset - into_last[row]
    fresh_index = fresh_before[row] + jnp.maximum(beyond, 0) // ps
    page = jnp.where(beyond < 0, last_page[row], taken_fresh.at[fresh_index].get(mode="fill", fill_value=n))
    slot = jnp.where(beyond < 0, first_slot[row] + offset, beyond % ps)
    position = jnp.where(valid, start[row] + offset, 0)
    batch = Batch(
        sequence=sequence,
        position=position,
        rope_positions=position + jnp.where(valid, plan.last.rotation[row], 0),
        page=jnp.where(valid, page, n),
        slot=jnp.where(valid, slot, 0),
        cu_q_lens=cu_q_lens,
        finalized=finalized,
        max_q_len=max_new,
    )
    cache = replace(
        cache, allocator=allocator, table=table, k_pages=k_pages, v_pages=v_pages, staging=staging
    )
    return cache, batch, ok


def _num_rows(num_new: Array | np.ndarray, max_seqs: int, num_tokens: int | None) -> int:
    if np.shape(num_new) != (max_seqs,):
        raise ValueError(
            f"num_new must have one count a sequence, [{max_seqs}], got shape {np.shape(num_new)}"
        )
    if num_tokens is not None:
        if num_tokens < 1:
            raise ValueError(f"num_tokens must be positive, got {num_tokens}")
        return num_tokens
    if isinstance(num_new, jax.core.Tracer):
        raise ValueError("num_tokens must be given under jit: it is the static number of rows of the step")
    return max(1, int(np.maximum(np.asarray(num_new), 0).sum()))


def _copy_pages(
    cache: PagedKVCache, sources: Array, targets: Array, places: Copies | None, count: Array
) -> tuple[tuple[Pages, ...], tuple[Pages, ...]]:
    """Copies ``count`` pages in every layer. A loop, so that a step without copies does not touch the pool."""

    def copy_one(i: Array, layers: tuple[Any, ...]) -> tuple[Any, ...]:
        def copy(storage: PageFormat, pages: Any) -> Any:
            if isinstance(storage, ResidualFormat):  # only open pages are ever written, and so copied
                assert places is not None
                return storage.copy_residual(pages, places.source[i], places.target[i])
            return storage.copy(pages, sources[i], targets[i])

        k_pages, v_pages = layers
        return tuple(copy(cache.k_format, p) for p in k_pages), tuple(
            copy(cache.v_format, p) for p in v_pages
        )

    return jax.lax.fori_loop(0, count, copy_one, (cache.k_pages, cache.v_pages))


def clear(cache: PagedKVCache, *, scrub: bool = False) -> PagedKVCache:
    """Empties every sequence. ``scrub`` (static) also overwrites the pages with zeros, so that nothing can be read."""
    k_pages, v_pages = cache.k_pages, cache.v_pages
    if scrub:
        k_pages, v_pages = jax.tree.map(jnp.zeros_like, (k_pages, v_pages))
    table = tables.empty_like(cache.table, cache.num_pages)
    staging = None if cache.staging is None else opened.create(cache.num_pages, cache.max_seqs)
    return replace(
        cache,
        allocator=pages_of.create(cache.num_pages),
        table=table,
        k_pages=k_pages,
        v_pages=v_pages,
        staging=staging,
    )


_reserve_donating = jax.jit(reserve, static_argnames="num_tokens", donate_argnames="cache")
_plan_needs = jax.jit(
    lambda cache, num_new: (_plan(cache, num_new).needed, _plan(cache, num_new).representable)
)


def reserve_or_raise(
    cache: PagedKVCache, num_new: Array, *, num_tokens: int | None = None
) -> tuple[PagedKVCache, Batch]:
    """``reserve`` for host code: jitted, and failure is an exception.

    ``cache`` is donated when it succeeds, and untouched when it raises.

    Raises:
      OutOfPages: too few free pages; names how many were asked for and how many are free.
      ValueError: a negative count, a sequence longer than the table's row, or more tokens than ``num_tokens``.
    """
    counts = np.asarray(num_new)
    rows = _num_rows(counts, cache.max_seqs, num_tokens)
    if (counts < 0).any():
        raise ValueError(f"num_new must not be negative, got {counts.min()}")
    if counts.sum() > rows:
        raise ValueError(f"num_new asks for {counts.sum()} tokens, the step has {rows} rows")
    needed, representable = (np.asarray(x) for x in _plan_needs(cache, counts))
    if not representable.all():
        seq = int(np.argmin(representable))
        raise ValueError(
            f"sequence {seq} would need more than max_pages_per_seq = {cache.max_pages_per_seq} entries"
        )
    free = int(cache.allocator.num_free)
    if needed.sum() > free:
        raise OutOfPages(int(needed.sum()), free)
    cache, batch, _ = _reserve_donating(cache, counts, num_tokens=rows)
    return cache, batch
