"""PagedKVCache: sequences and their pages as one value; making room in it, and attention to it.

What edits sequences and touches no page is in ``sequences.py``; this room takes pages, copies and writes them. Every
operation is pure, ``op(cache, ...) -> cache``, and un-jitted. One that can fail returns ``ok`` and, when it is false,
the cache unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpaged import allocator as pages_of
from jaxpaged import block_table as tables
from jaxpaged import sequences as seqs
from jaxpaged.attention import paged_attention
from jaxpaged.attention.api import default_platform
from jaxpaged.batch import Batch, pack
from jaxpaged.block_table import BlockTable
from jaxpaged.page_format import LANES, PageFormat, check_page_size, page_format
from jaxpaged.rope import Rope
from jaxpaged.sequences import Sequences


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

    k_pages: tuple[Array, ...]
    """L arrays ``[num_pages, num_kv_heads, page_size, head_dim]`` in the format's dtype, or as its layout has them."""
    v_pages: tuple[Array, ...]
    """As ``k_pages``."""
    page_size: int = field(metadata={"static": True})
    format: PageFormat = field(metadata={"static": True})

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
        max_entries: int | None = None,
        dtype: str = "f32",
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
          max_entries: P, entries a sequence can have; default N, so that one sequence can take the whole pool.
          dtype: name of the page format: "f32", "bf16" or "f16".
          layout: "plain" pages, or rows that fill the "lanes" of a TPU (``page_format.LanePageFormat``), which differ
            where head_dim is no multiple of 128. Default: lanes where JAX computes on a TPU and a page fills a row of
            them, plain elsewhere.

        Raises:
          ValueError: a size is impossible; the message names it and what is allowed.
        """
        for name, value in (
            ("num_layers", num_layers),
            ("num_kv_heads", num_kv_heads),
            ("head_dim", head_dim),
        ):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        storage = page_format(dtype)
        if layout not in (None, "plain", "lanes"):
            raise ValueError(f'layout must be "plain" or "lanes", got {layout!r}')
        fills_a_row = page_size * head_dim >= LANES
        if layout == "lanes" or (layout is None and fills_a_row and default_platform() == "tpu"):
            storage = storage.on_lanes(head_dim)
        shape = (num_pages, num_kv_heads, check_page_size(page_size), head_dim)
        return cls(
            pages_of.create(num_pages),
            tables.create(max_seqs, num_pages if max_entries is None else max_entries, num_pages),
            tuple(storage.create(*shape) for _ in range(num_layers)),
            tuple(storage.create(*shape) for _ in range(num_layers)),
            page_size,
            storage,
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
        return sum(x.size * x.dtype.itemsize for x in self.k_pages + self.v_pages) // self.num_pages

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
        k_pages = self.format.write(self.k_pages[layer], batch.page, batch.slot, k)
        v_pages = self.format.write(self.v_pages[layer], batch.page, batch.slot, v)
        out = paged_attention(
            q,
            k_pages,
            v_pages,
            self.table,
            batch,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            sinks=sinks,
            rope=rope,
        )
        return out, replace(
            self,
            k_pages=_replaced(self.k_pages, layer, k_pages),
            v_pages=_replaced(self.v_pages, layer, v_pages),
        )

    def reserve(
        self, num_new: Array, *, num_tokens: int | None = None, max_new: int | None = None
    ) -> tuple[PagedKVCache, Batch, Array]:
        """See ``reserve``."""
        return reserve(self, num_new, num_tokens=num_tokens, max_new=max_new)

    def fits(self, num_new: Array) -> Array:
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


def _replaced(layers: tuple[Array, ...], layer: int, value: Array) -> tuple[Array, ...]:
    return (*layers[:layer], value, *layers[layer + 1 :])


@dataclass(frozen=True)
class _Plan:
    """What room for ``num_new`` more tokens takes, sequence by sequence (``[S]`` each)."""

    last: tables.Entry
    """The last entry, with page N for an empty sequence."""
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


def _plan(cache: PagedKVCache, num_new: Array) -> _Plan:
    n, table = cache.num_pages, cache.table
    num_new = jnp.asarray(num_new, jnp.int32)
    last = tables.last_entry(table)
    last = replace(last, pages=jnp.where(table.num_entries > 0, last.pages, n))
    room = jnp.where(last.pages < n, cache.page_size - last.first_slot - last.num_tokens, 0)
    into_last = jnp.clip(num_new, 0, room)
    count = cache.allocator.ref_counts.at[last.pages].get(mode="fill", fill_value=0)
    shared = (into_last > 0) & (count > 1)
    # Of sequences that share a page and write to it in this very step, each takes a copy until one is left
    # with the original to itself.
    ids = jnp.arange(cache.max_seqs)
    rivals = shared[None, :] & (last.pages[None, :] == last.pages[:, None]) & (ids[None, :] < ids[:, None])
    copied = shared & (count - jnp.sum(rivals, axis=1, dtype=jnp.int32) > 1)
    fresh = -(-jnp.maximum(num_new - into_last, 0) // cache.page_size)
    representable = (num_new >= 0) & (table.num_entries + fresh <= cache.max_entries)
    return _Plan(last, into_last, copied, fresh, representable)


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
    copied first (copy-on-write, on any write); what is left gets fresh pages. The cost depends on S and
    ``num_tokens``, not on N or P, and pages are copied only where they are shared.

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
    allocator = replace(allocator, ref_counts=allocator.ref_counts.at[sources].add(-1, mode="drop"))
    k_pages, v_pages = _copy_pages(cache, sources, taken, num_copied)

    start = tables.position_max(table) + 1
    entry_seq, entry_rank, fresh_before = pack(fresh, max_fresh)
    owner = jnp.minimum(entry_seq, s - 1)
    entry = table.num_entries[owner] + entry_rank
    taken_fresh = taken.at[num_copied + jnp.arange(max_fresh)].get(mode="fill", fill_value=n)
    rest = (num_new - into_last)[owner] - entry_rank * ps
    grown = jnp.where(into_last > 0, table.num_entries - 1, cache.max_entries)
    ids = jnp.arange(s)

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

    sequence, offset, cu_q_lens = pack(num_new, t)
    valid, row = sequence < s, jnp.minimum(sequence, s - 1)
    beyond = offset - into_last[row]
    fresh_index = fresh_before[row] + jnp.maximum(beyond, 0) // ps
    page = jnp.where(beyond < 0, last_page[row], taken_fresh.at[fresh_index].get(mode="fill", fill_value=n))
    slot = jnp.where(beyond < 0, (plan.last.first_slot + plan.last.num_tokens)[row] + offset, beyond % ps)
    position = jnp.where(valid, start[row] + offset, 0)
    batch = Batch(
        sequence=sequence,
        position=position,
        rope_positions=position + jnp.where(valid, plan.last.rotation[row], 0),
        page=jnp.where(valid, page, n),
        slot=jnp.where(valid, slot, 0),
        cu_q_lens=cu_q_lens,
        max_q_len=max_new,
    )
    return replace(cache, allocator=allocator, table=table, k_pages=k_pages, v_pages=v_pages), batch, ok


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
    cache: PagedKVCache, sources: Array, targets: Array, count: Array
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Copies ``count`` pages in every layer. A loop, so that a step without copies does not touch the pool."""

    def copy_one(i: Array, pages: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(cache.format.copy(p, sources[i], targets[i]) for p in pages)

    pages = jax.lax.fori_loop(0, count, copy_one, cache.k_pages + cache.v_pages)
    return pages[: cache.num_layers], pages[cache.num_layers :]


def clear(cache: PagedKVCache, *, scrub: bool = False) -> PagedKVCache:
    """Empties every sequence. ``scrub`` (static) also overwrites the pages with zeros, so that nothing can be read."""
    k_pages, v_pages = cache.k_pages, cache.v_pages
    if scrub:
        k_pages, v_pages = jax.tree.map(jnp.zeros_like, (k_pages, v_pages))
    table = tables.empty_like(cache.table, cache.num_pages)
    return replace(
        cache, allocator=pages_of.create(cache.num_pages), table=table, k_pages=k_pages, v_pages=v_pages
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
        raise ValueError(f"sequence {seq} would need more than max_entries = {cache.max_entries} entries")
    free = int(cache.allocator.num_free)
    if needed.sum() > free:
        raise OutOfPages(int(needed.sum()), free)
    cache, batch, _ = _reserve_donating(cache, counts, num_tokens=rows)
    return cache, batch
