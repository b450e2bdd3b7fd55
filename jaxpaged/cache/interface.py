"""The operations that every KV cache has, as functions: ``op(cache, ...) -> cache``.

``KVCache`` is the protocol that models and generation loops are written against. PagedKVCache,
ContiguousKVCache and ContextKVCache implement it; a function here calls the method of its name.
All are pure, un-jitted, and independent of the values of ids, lengths and ranges at trace time. An
operation that can fail returns ``ok bool[]`` and, when it is false, the cache unchanged.

``seq`` is an id i32[] in [0, S), ``ALL`` (any negative id) for every sequence, or a mask bool[S].
Ranges are ``[p0, p1)`` in positions; ``p0 < 0`` is 0 and ``p1 < 0`` is the end, as in llama.cpp's
``llama_memory_seq_*``. Every range argument may be i32[S], one value a sequence.
"""

from __future__ import annotations

from typing import Protocol, Self, TypeVar

import jax
import numpy as np
from jax import Array

from jaxpaged.cache.checks import step_rows
from jaxpaged.cache.windows import Windows
from jaxpaged.pages.batch import Batch
from jaxpaged.pages.rope import Rope

ALL = -1
"""In place of a sequence's id: every sequence."""

Integer = Array | int


class KVCache(Protocol):
    """The interface of a KV cache, for models and generation loops."""

    @property
    def max_seqs(self) -> int: ...
    @property
    def lengths(self) -> Array: ...
    @property
    def pages_used(self) -> Array: ...
    @property
    def pages_free(self) -> Array: ...
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
    ) -> tuple[Array, Self]: ...
    def reserve(
        self, num_new: Array, *, num_tokens: int | None = None, max_new: int | None = None
    ) -> tuple[Self, Batch, Array]: ...
    def can_reserve(self, num_new: Array) -> Array: ...
    def without_unseen(self) -> Self: ...
    def can_reserve_each(self, num_new: Array) -> Array: ...
    def has_room(self, num_new: Array) -> Array: ...
    def pages_needed(self, num_new: Array, *, limit: int | None = None, step: int | None = None) -> Array: ...
    def whole_pages(self, num_tokens: Array) -> Array: ...
    def clear(self, *, scrub: bool = False) -> Self: ...
    def seq_copy(
        self, src: Integer, dst: Integer, p0: Integer = 0, p1: Integer = -1
    ) -> tuple[Self, Array]: ...
    def seq_remove(self, seq: Integer, p0: Integer = 0, p1: Integer = -1) -> tuple[Self, Array]: ...
    def seq_keep(self, seq: Integer) -> tuple[Self, Array]: ...
    def seq_shift(self, seq: Integer, p0: Integer, p1: Integer, delta: Integer) -> tuple[Self, Array]: ...
    def seq_reorder(self, source: Array) -> Self: ...
    def seq_drop_unseen(self, window: int) -> Self: ...
    def seq_position_min(self) -> Array: ...
    def seq_position_max(self) -> Array: ...


Cache = TypeVar("Cache", bound=KVCache)


def reserve(
    cache: Cache, num_new: Array, *, num_tokens: int | None = None, max_new: int | None = None
) -> tuple[Cache, Batch, Array]:
    """Makes room for ``num_new`` more tokens of each sequence, for all of them or for none.

    Tokens go behind a sequence's last entry while its page is not shared and has free slots; a
    shared last page is copied first (copy-on-write, on any write); the rest get fresh pages. A
    quantized page of a residual format has no free slots. The cost depends on S and ``num_tokens``,
    not on N or P, and pages are copied only where they are shared.

    Args:
      cache: the state.
      num_new: i32[S], tokens to add to each sequence; 0 leaves it alone.
      num_tokens: T, the static number of rows of the step, at least ``sum(num_new)``. Default:
        ``sum(num_new)``, which must then be concrete.
      max_new: static bound on the tokens of one sequence; 1 for a decode step, which then compiles
        to less. Default: T.

    In a cache with a ``window``, pages that no further token sees are freed first, even if the rest
    then fails.

    Returns:
      ``(cache, batch, ok bool[])``. ``batch`` maps rows to sequences, positions and slots; it is all
      padding when not ok. Not ok: too few free pages, a row of the table too narrow, more tokens
      than rows or than ``max_new``, or a negative count.

    Raises:
      ValueError: ``num_new`` is not ``[S]``, or traced without ``num_tokens``.
    """
    return cache.reserve(num_new, num_tokens=num_tokens, max_new=max_new)


class OutOfPages(RuntimeError):
    """The pool has fewer free pages than an operation needs; nothing was changed."""

    def __init__(self, requested: int, free: int) -> None:
        self.requested, self.free = requested, free
        super().__init__(f"out of pages: {requested} requested, {free} free")


_reserve_donating = jax.jit(reserve, static_argnames="num_tokens", donate_argnames="cache")


@jax.jit
def _needs(cache: KVCache, num_new: Array) -> tuple[Array, Array, Array]:
    seen = cache.without_unseen()
    return seen.pages_needed(num_new), seen.has_room(num_new), seen.pages_free


def reserve_or_raise(cache: Cache, num_new: Array, *, num_tokens: int | None = None) -> tuple[Cache, Batch]:
    """``reserve`` for host code: jitted, with an exception in place of ``ok``.

    ``cache`` is donated when it succeeds, and untouched when it raises.

    Raises:
      OutOfPages: too few free pages; names how many were requested and how many are free.
      ValueError: a negative count, a sequence longer than its row of the cache, or more tokens than
        ``num_tokens``.
    """
    counts = np.asarray(num_new)
    rows = step_rows(counts, cache.max_seqs, num_tokens)
    if (counts < 0).any():
        raise ValueError(f"num_new must not be negative, got {counts.min()}")
    if counts.sum() > rows:
        raise ValueError(f"num_new asks for {counts.sum()} tokens, the step has {rows} rows")
    needed, has_room, pages_free = (np.asarray(x) for x in _needs(cache, counts))
    if not has_room.all():
        raise ValueError(f"sequence {int(np.argmin(has_room))} has no room for its new tokens in {cache!r}")
    each = np.atleast_1d(needed.sum(axis=0)), np.atleast_1d(pages_free)
    for requested, free in zip(*each, strict=True):  # one number for each layer group
        if requested > free:
            raise OutOfPages(int(requested), int(free))
    cache, batch, _ = _reserve_donating(cache, counts, num_tokens=rows)
    return cache, batch


def can_reserve(cache: KVCache, num_new: Array) -> Array:
    """bool[]: True if ``reserve(cache, num_new)`` would succeed, given rows enough for the tokens."""
    return cache.can_reserve(num_new)


def pages_needed(cache: KVCache, num_new: Array) -> Array:
    """i32[S]: pages that ``reserve(cache, num_new)`` would allocate, copies of shared pages included; i32[S,
    G] in a cache of several layer groups."""
    return cache.without_unseen().pages_needed(num_new)


def clear(cache: Cache, *, scrub: bool = False) -> Cache:
    """Empties every sequence. ``scrub`` (static) also overwrites all keys and values with zeros."""
    return cache.clear(scrub=scrub)


def seq_copy(
    cache: Cache, src: Integer, dst: Integer, p0: Integer = 0, p1: Integer = -1
) -> tuple[Cache, Array]:
    """Copies the tokens of ``src`` in [p0, p1) to the empty sequence ``dst``.

    A paged cache shares the pages and moves no key or value; a contiguous one copies the row, and
    only a prefix.

    Returns:
      ``(cache, ok bool[])``. Not ok: an id outside [0, S), ``dst`` is not empty, or the cache has a
      window and no longer all that the next token of ``dst`` would see.
    """
    return cache.seq_copy(src, dst, p0, p1)


def seq_remove(cache: Cache, seq: Integer, p0: Integer = 0, p1: Integer = -1) -> tuple[Cache, Array]:
    """Removes the tokens of ``seq`` in [p0, p1). No key or value moves; unreferenced pages are freed.

    The cost is O(P) for each sequence removed from, independent of S, N and depth.

    Args:
      cache: the state.
      seq: an id, ``ALL``, or bool[S].
      p0, p1: any range, aligned to pages or not. A contiguous cache removes tails only.

    Returns:
      ``(cache, ok bool[])``. Not ok: the id is too large, or an entry has to be split and the
      table's row is full; tokens at the end are removed, and those that the next one then sees are
      outside of the cache's window and gone. Removing whole sequences never fails for known ids.
    """
    return cache.seq_remove(seq, p0, p1)


def seq_keep(cache: Cache, seq: Integer) -> tuple[Cache, Array]:
    """Removes every sequence but ``seq``.

    Returns:
      ``(cache, ok bool[])``. Not ok: the id is outside [0, S).
    """
    return cache.seq_keep(seq)


def seq_shift(cache: Cache, seq: Integer, p0: Integer, p1: Integer, delta: Integer) -> tuple[Cache, Array]:
    """Adds ``delta`` to the positions of ``seq`` in [p0, p1). No key moves, not even on shared pages.

    Keys stay rotated as they were written; the entry records by how much (``BlockTable.rotation``)
    and attention rotates the query by the difference. Tokens whose position becomes negative are
    removed. A contiguous cache refuses (``ok`` False), since its positions are its slots.

    Returns:
      ``(cache, ok bool[])``. Not ok: the id is too large; positions would collide, change order or
      leave int32; an entry has to be split and the table's row is full.

    Raises:
      ValueError: the cache was created without ``rope=``, so attention could not follow the shift.
    """
    return cache.seq_shift(seq, p0, p1, delta)


def seq_reorder(cache: Cache, source: Array) -> Cache:
    """Makes each sequence i a copy of what ``source[i]`` was; for beams, and many forks at once.

    Args:
      cache: the state.
      source: i32[S], in [0, S]; S makes the sequence empty.
    """
    return cache.seq_reorder(source)


def seq_length(cache: KVCache) -> Array:
    """i32[S]: number of tokens of each sequence; 0 when empty."""
    return cache.lengths


def seq_position_min(cache: KVCache) -> Array:
    """i32[S]: smallest position of each sequence; -1 when empty."""
    return cache.seq_position_min()


def seq_position_max(cache: KVCache) -> Array:
    """i32[S]: largest position of each sequence; -1 when empty."""
    return cache.seq_position_max()
