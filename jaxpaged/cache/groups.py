"""Layer groups: a cache for models whose layers do not all keep the same keys and values.

Layers of a group have heads of the same number and size, see equally far, and share a table and a
pool. Most models of today mix layers that see a window of some hundred tokens with layers that see
everything; the first kind then keeps its window alone.

Reference: the hybrid KV cache manager of vLLM; Jenga, arXiv:2503.18292.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jaxpaged.cache.checks import check_layer, check_sizes, values_dim
from jaxpaged.cache.interface import Cache, Integer
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.cache.sequences import Sequences, pages_held
from jaxpaged.cache.windows import Windows
from jaxpaged.pages import block_table as tables
from jaxpaged.pages.batch import Batch, GroupRows
from jaxpaged.pages.rope import Rope


@dataclass(frozen=True)
class LayerGroup:
    """Layers that keep the same kind of keys and values, and see equally far."""

    layers: tuple[int, ...]
    """Indices in the model."""
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    """Tokens that a query sees, its own included; None = all."""
    v_head_dim: int | None = None
    """Numbers of a head of values, where they are not ``head_dim``."""
    k_dtype: DTypeLike | None = None
    """Format of keys, where it is not the cache's; likewise ``v_dtype``."""
    v_dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a layer group needs at least one layer")
        check_sizes(num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)
        values_dim(self.head_dim, self.v_head_dim)
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 token, or None for all, got {self.window}")

    @property
    def title(self) -> str:
        """Layers and window, for messages and pictures: "layers 0-4, 6; window 512"."""
        starts = [layer for layer in self.layers if layer - 1 not in self.layers]
        ends = [layer for layer in self.layers if layer + 1 not in self.layers]
        runs = [f"{a}" if a == b else f"{a}-{b}" for a, b in zip(sorted(starts), sorted(ends), strict=True)]
        noun = "layer" if len(self.layers) == 1 else "layers"
        return f"{noun} {', '.join(runs)}" + (f"; window {self.window}" if self.window is not None else "")

    def pages_per_seq(self, num_tokens: int, page_size: int, step_tokens: int = 1) -> int:
        """Pages that a sequence of ``num_tokens`` tokens holds at most, of which one step adds
        ``step_tokens``."""
        every = -(-num_tokens // page_size)
        if self.window is None:
            return every
        return min(every, pages_held(self.window, step_tokens, page_size))


_SPARE_ENTRIES = 3
"""Table entries of a sequence beyond the pages that it holds: shifts and removals split some."""


def check_groups(groups: Sequence[LayerGroup]) -> int:
    """Number of layers of all groups, which are each in one of them.

    Raises:
      ValueError: a layer is in no group, or in two.
    """
    if not groups:
        raise ValueError("groups must be at least 1, got 0")
    layers = sorted(layer for group in groups for layer in group.layers)
    if layers != list(range(len(layers))):
        raise ValueError(f"groups must have each layer from 0 on once, got layers {layers}")
    return len(layers)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class GroupedKVCache:
    """A paged cache of several layer groups, each with a table and a pool of its own.

    Its operations are those of every cache (``interface``). One that can fail does all of its work in
    all groups, or none. A group with a window frees what no further token sees; taking back tokens
    (``seq_remove`` at the end, ``seq_copy`` of a beginning) fails where a next token would miss some of
    them. Numbers of pages have one entry for each group.
    """

    parts: tuple[PagedKVCache, ...]
    """The cache of each group, or its part on a device (``ContextKVCache``); the first sees furthest."""
    groups: tuple[LayerGroup, ...] = field(metadata={"static": True})

    @classmethod
    def create(
        cls,
        groups: Sequence[LayerGroup],
        *,
        num_pages: int | Sequence[int],
        max_seqs: int,
        page_size: int = 32,
        max_seq_len: int | None = None,
        step_tokens: int = 512,
        make: Callable[..., Any] = PagedKVCache.create,
        **options: Any,
    ) -> GroupedKVCache:
        """Creates an empty cache.

        Args:
          groups: at least one; those that see furthest come first in the cache.
          num_pages: pages of each group; or one number, which groups with a window do not exceed: they
            get what ``max_seqs`` sequences hold at most.
          max_seqs, page_size, max_seq_len, options: as for ``PagedKVCache.create``.
          step_tokens: tokens of one sequence that a ``reserve`` adds at most. A group with a window
            holds as many beside it.
          make: creates the cache of one group.

        Raises:
          ValueError: see ``check_groups`` and ``make``.
        """
        check_groups(groups)
        check_sizes(max_seqs=max_seqs, step_tokens=step_tokens)
        given = [num_pages] * len(groups) if isinstance(num_pages, int) else list(num_pages)
        if len(given) != len(groups):
            raise ValueError(
                f"num_pages must have one entry for each of {len(groups)} groups, got {len(given)}"
            )
        ordered = sorted(zip(groups, given, strict=True), key=lambda item: -_reach(item[0]))
        parts = []
        for group, pages in ordered:
            width = max_seq_len
            if group.window is not None:
                held = pages_held(group.window, step_tokens, page_size)
                pages = min(pages, max_seqs * held) if isinstance(num_pages, int) else pages
                width = min((held + _SPARE_ENTRIES) * page_size, max_seq_len or pages * page_size)
            own = {name: getattr(group, name) for name in ("v_head_dim", "k_dtype", "v_dtype")}
            own = {name: value for name, value in own.items() if value is not None}
            parts.append(
                make(
                    num_layers=len(group.layers),
                    num_kv_heads=group.num_kv_heads,
                    head_dim=group.head_dim,
                    window=group.window,
                    num_pages=pages,
                    max_seqs=max_seqs,
                    page_size=page_size,
                    max_seq_len=width,
                    **{**options, **own},
                )
            )
        return cls(tuple(parts), tuple(group for group, _ in ordered))

    def __repr__(self) -> str:
        return f"GroupedKVCache({', '.join(map(repr, self.parts))})"

    # Layers

    @functools.cached_property
    def _places(self) -> dict[int, tuple[int, int]]:
        """Group of each layer, and its index there."""
        return {layer: (g, i) for g, group in enumerate(self.groups) for i, layer in enumerate(group.layers)}

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
    ) -> tuple[Array, GroupedKVCache]:
        """Writes a step's keys and values of one layer to their pages, and attends.

        Args:
          layer: i32[], index of the layer in the model.
          q, k, v, batch, scale, soft_cap, sinks, rope: as for ``PagedKVCache.attend``.
          window: default that of the group; a narrower one.
          group: index in ``groups`` of a layer that is traced: pools of several groups cannot be chosen
            in a program without copying them. Scan over layers of one group, or over periods of the
            model, with one layer of each kind in the body.

        Raises:
          ValueError: as for ``PagedKVCache.attend``; a traced layer without ``group``, or a layer of
            another group.
        """
        layer = check_layer(layer, len(self._places))
        at: Array | int
        if isinstance(layer, int):
            own, at = self._places[layer]
            if group not in (None, own):
                raise ValueError(f"layer {layer} is in group {own}, not in {group}")
            group = own
        elif group is None or not 0 <= group < len(self.groups):
            raise ValueError(
                f"a layer that is traced needs group=, an index below {len(self.groups)}, got {group}"
            )
        else:
            index_of = np.zeros(len(self._places), np.int32)
            index_of[list(self.groups[group].layers)] = np.arange(len(self.groups[group].layers))
            at = jnp.asarray(index_of)[layer]
        out, part = self.parts[group].attend(
            at, q, k, v, batch.of_group(group), scale=scale, window=window, soft_cap=soft_cap,
            sinks=sinks, rope=rope,
        )  # fmt: skip
        return out, self._with(group, part)

    def _with(self, group: int, part: PagedKVCache) -> GroupedKVCache:
        return replace(self, parts=(*self.parts[:group], part, *self.parts[group + 1 :]))

    # Sizes and state

    @property
    def kind(self) -> str:
        """Name of this kind of cache in tables and flags."""
        return self.parts[0].kind

    @property
    def max_seqs(self) -> int:
        """S, static."""
        return self.parts[0].max_seqs

    @property
    def page_size(self) -> int:
        """Tokens of a page, static, the same in all groups."""
        return self.parts[0].page_size

    @property
    def num_layers(self) -> int:
        """Layers of all groups, static."""
        return len(self._places)

    @property
    def rope(self) -> Rope | None:
        return self.parts[0].rope

    @property
    def pages_used(self) -> Array:
        """i32[G]: pages of each group that are not free."""
        return jnp.stack([part.pages_used for part in self.parts])

    @property
    def pages_free(self) -> Array:
        """i32[G]: free pages of each group."""
        return jnp.stack([part.pages_free for part in self.parts])

    @property
    def lengths(self) -> Array:
        """i32[S]: tokens of each sequence, in the group that sees furthest."""
        return self.parts[0].lengths

    def seq_position_min(self) -> Array:
        """i32[S]: smallest position of each sequence, in the group that sees furthest; -1 when empty."""
        return self.parts[0].seq_position_min()

    def seq_position_max(self) -> Array:
        """i32[S]: largest position of each sequence; -1 when empty."""
        return self.parts[0].seq_position_max()

    def partition_specs(self, tensor: str | None = None) -> GroupedKVCache:
        """See ``PagedKVCache.partition_specs``."""
        return replace(self, parts=tuple(part.partition_specs(tensor) for part in self.parts))

    # Reservation

    def reserve(
        self, num_new: Array, *, num_tokens: int | None = None, max_new: int | None = None
    ) -> tuple[GroupedKVCache, Batch, Array]:
        """See ``jaxpaged.reserve``."""
        # Once, and not again by each part: two uses of a state are a copy of it.
        seen = [replace(part.without_unseen(), window=None) for part in self.parts]
        ok = functools.reduce(jnp.logical_and, (part.has_pages(num_new) for part in seen))
        given = jnp.where(ok, num_new, 0)
        made = [part.reserve(given, num_tokens=num_tokens, max_new=max_new) for part in seen]
        ok &= functools.reduce(jnp.logical_and, (fits for _, _, fits in made))
        rows = tuple(GroupRows(batch.page, batch.slot, batch.finalized) for _, batch, _ in made)
        batch = replace(made[0][1], of_groups=rows)
        parts = (replace(new, window=old.window) for (new, _, _), old in zip(made, self.parts, strict=True))
        return replace(self, parts=tuple(parts)), batch, ok

    def can_reserve(self, num_new: Array) -> Array:
        """See ``jaxpaged.can_reserve``."""
        return self._all(lambda part: part.can_reserve(num_new))

    def without_unseen(self) -> GroupedKVCache:
        """See ``Sequences.without_unseen``."""
        return replace(self, parts=tuple(part.without_unseen() for part in self.parts))

    def can_reserve_each(self, num_new: Array) -> Array:
        """See ``Sequences.can_reserve_each``."""
        return self._all(lambda part: part.can_reserve_each(num_new))

    def has_room(self, num_new: Array) -> Array:
        """See ``Sequences.has_room``."""
        return self._all(lambda part: part.has_room(num_new))

    def pages_needed(self, num_new: Array, *, limit: int | None = None, step: int | None = None) -> Array:
        """i32[S, G]: see ``Sequences.pages_needed``."""
        needed = [part.pages_needed(num_new, limit=limit, step=step) for part in self.parts]
        return jnp.stack(needed, axis=-1)

    def whole_pages(self, num_tokens: Array) -> Array:
        """i32[..., G]: see ``Sequences.whole_pages``."""
        return jnp.stack([part.whole_pages(num_tokens) for part in self.parts], axis=-1)

    def _all(self, condition: Callable[[PagedKVCache], Array]) -> Array:
        return functools.reduce(jnp.logical_and, map(condition, self.parts))

    # Sequences

    def _edited(
        self, edit: Callable[[PagedKVCache], tuple[PagedKVCache, Array]], *, can_fail: bool = True
    ) -> tuple[GroupedKVCache, Array]:
        """Edits every group, or none of them, where one fails or would miss what a next token sees."""
        # Of groups with a window, ``_sees_enough`` knows exactly what they lack.
        edited = [edit(part if i == 0 else replace(part, window=None)) for i, part in enumerate(self.parts)]
        after = replace(
            self,
            parts=tuple(
                replace(new, window=old.window) for (new, _), old in zip(edited, self.parts, strict=True)
            ),
        )
        ok = functools.reduce(jnp.logical_and, (fits for _, fits in edited))
        if not can_fail:
            return after, ok
        ok &= after._sees_enough()
        # The pools are the same in both, and no operation of their own.
        parts = tuple(
            replace(
                new,
                allocator=jax.tree.map(functools.partial(jnp.where, ok), new.allocator, old.allocator),
                table=tables.choose(ok, new.table, old.table),
            )
            for new, old in zip(after.parts, self.parts, strict=True)
        )
        return replace(self, parts=parts), ok

    def _sees_enough(self) -> Array:
        """bool[]: True if groups with a window hold what the next token of each sequence sees in the
        group that sees furthest."""
        ok = jnp.bool_(True)
        end = self.seq_position_max() + 1
        for part in self.parts[1:]:
            if part.window is None:
                continue
            begin = end + 1 - part.window
            ok &= jnp.all(_tokens_from(self.parts[0], begin) == _tokens_from(part, begin))
        return ok

    def clear(self, *, scrub: bool = False) -> GroupedKVCache:
        """See ``jaxpaged.clear``."""
        return replace(self, parts=tuple(part.clear(scrub=scrub) for part in self.parts))

    def seq_copy(
        self, src: Integer, dst: Integer, p0: Integer = 0, p1: Integer = -1
    ) -> tuple[GroupedKVCache, Array]:
        """See ``jaxpaged.seq_copy``."""
        return self._edited(lambda part: part.seq_copy(src, dst, p0, p1))

    def seq_remove(self, seq: Integer, p0: Integer = 0, p1: Integer = -1) -> tuple[GroupedKVCache, Array]:
        """See ``jaxpaged.seq_remove``."""
        whole = isinstance(p0, int) and isinstance(p1, int) and p0 <= 0 and p1 < 0
        return self._edited(lambda part: part.seq_remove(seq, p0, p1), can_fail=not whole)

    def seq_keep(self, seq: Integer) -> tuple[GroupedKVCache, Array]:
        """See ``jaxpaged.seq_keep``."""
        return self._edited(lambda part: part.seq_keep(seq), can_fail=False)

    def seq_shift(
        self, seq: Integer, p0: Integer, p1: Integer, delta: Integer
    ) -> tuple[GroupedKVCache, Array]:
        """See ``jaxpaged.seq_shift``."""
        return self._edited(lambda part: part.seq_shift(seq, p0, p1, delta))

    def seq_reorder(self, source: Array) -> GroupedKVCache:
        """See ``jaxpaged.seq_reorder``."""
        return replace(self, parts=tuple(part.seq_reorder(source) for part in self.parts))

    def seq_drop_unseen(self, window: int) -> GroupedKVCache:
        """See ``Sequences.seq_drop_unseen``."""
        return replace(self, parts=tuple(part.seq_drop_unseen(window) for part in self.parts))


def create_cache(
    groups: Sequence[LayerGroup], *, num_pages: int | Sequence[int], **sizes: Any
) -> PagedKVCache | GroupedKVCache:
    """Creates an empty cache for a model: of one pool where all layers are of one group.

    Args:
      groups, num_pages, sizes: as for ``GroupedKVCache.create``.
    """
    grouped = GroupedKVCache.create(groups, num_pages=num_pages, **sizes)
    return grouped if len(groups) > 1 else grouped.parts[0]


def parts_of(cache: Any) -> tuple[Any, ...]:
    """The cache of each layer group; a cache of one group is its own part."""
    return cache.parts if isinstance(cache, GroupedKVCache) else (cache,)


def with_parts(cache: Cache, parts: Sequence[Any]) -> Cache:
    """Inverse of ``parts_of``, for changed parts."""
    if isinstance(cache, GroupedKVCache):
        return replace(cache, parts=tuple(parts))
    (part,) = parts
    return part


def map_parts(function: Callable[..., Any], cache: Cache, *others: Sequence[Any]) -> Cache:
    """The cache with ``function(part, ...)`` of each layer group, and of one of each of ``others``."""
    return with_parts(cache, [function(*one) for one in zip(parts_of(cache), *others, strict=True)])


def _reach(group: LayerGroup) -> float:
    return float("inf") if group.window is None else group.window


def _tokens_from(part: Sequences, begin: Array) -> Array:
    """i32[S]: tokens of each sequence at positions ``begin i32[S]`` and behind."""
    table = part.table
    skipped = jnp.clip(begin[:, None] - table.position, 0, table.num_tokens)
    return jnp.sum(table.num_tokens - skipped, axis=1, dtype=jnp.int32)
