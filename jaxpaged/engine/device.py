"""Device: the cache, the weights and the compiled programs of an engine, behind methods that take host data."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged import block_table as tables
from jaxpaged.block_table import BlockTable
from jaxpaged.cache import PagedKVCache
from jaxpaged.contiguous import ContiguousKVCache
from jaxpaged.engine import programs
from jaxpaged.engine.programs import Edit, StepInput, StepOutput, StepShape, TableView
from jaxpaged.engine.slots import SlotTable
from jaxpaged.engine.swap import SwappedPages, numbered
from jaxpaged.generation import Model
from jaxpaged.kept_programs import compiled

_PAGES_AT_ONCE = 8
"""Pages of one copy to or from the host."""

Progress = Callable[[int, int, str], None]
"""``(programs compiled, programs in all, the one that comes next)``"""


@dataclass(frozen=True)
class HostView:
    """``TableView`` on the host, fetched as far as it is looked at."""

    view: TableView

    @functools.cached_property
    def num_free(self) -> int:
        return int(self.view.num_free)

    @functools.cached_property
    def room(self) -> np.ndarray:
        return np.asarray(self.view.room)

    @functools.cached_property
    def pages(self) -> np.ndarray:
        return np.asarray(self.view.pages)

    @functools.cached_property
    def page_tokens(self) -> np.ndarray:
        return np.asarray(self.view.page_tokens)


class Device:
    """What runs where the model is. ``view`` is what the table looks like after everything that was asked for."""

    def __init__(
        self,
        model: Model,
        params: Any,
        cache: PagedKVCache | ContiguousKVCache,
        *,
        decode_rows: Sequence[int],
        prompt_rows: Sequence[int],
        decode_steps: int,
        num_recent: int,
    ) -> None:
        self.cache = cache
        self.paged = isinstance(cache, PagedKVCache)
        self.slots = SlotTable(cache.max_seqs)
        self.compiled = 0
        self.compile_seconds = 0.0
        self._model, self._params = model, params
        self._shapes = [StepShape(rows, True, decode_steps) for rows in decode_rows]
        self._shapes += [StepShape(rows, False, 1) for rows in prompt_rows]
        self._steps: dict[StepShape, Any] = {}
        self._programs: dict[str, Any] = {}
        self._no_recent = jax.device_put(np.full((cache.max_seqs, num_recent), -1, np.int32))
        self.num_recent = num_recent
        self.view = HostView(jax.tree.map(np.asarray, programs.view(cache)))

    @property
    def swaps(self) -> bool:
        """Whether pages can go to the host: not where open pages lie apart from the pool."""
        return isinstance(self.cache, PagedKVCache) and self.cache.open_pages is None

    def compile(self, progress: Progress | None = None) -> None:
        """Compiles every program there is, once; what comes later is an error in this room."""
        start = time.monotonic()
        todo = list(self._to_compile())
        for i, (name, keep, function, static, donated, arguments) in enumerate(todo):
            if progress is not None:
                progress(i, len(todo), name)
            lower = jax.jit(functools.partial(function, *static), donate_argnums=donated).lower
            kept = compiled(functools.partial(lower, *arguments), f"engine.{name}", static, arguments)
            keep(kept.program)
        if progress is not None:
            progress(len(todo), len(todo), "")
        self.compiled = len(todo)
        self.compile_seconds = time.monotonic() - start

    def _to_compile(
        self,
    ) -> Iterator[
        tuple[str, Callable[[Any], None], Callable[..., Any], tuple[Any, ...], int, tuple[Any, ...]]
    ]:
        """``(name, keep, function, static, donated, arguments)`` of each: ``function(*static, *arguments)``, whose
        donated argument is counted behind ``static``; ``keep`` takes the program."""
        cache, s = self.cache, self.cache.max_seqs

        def step_arguments(shape: StepShape) -> tuple[Any, ...]:
            empty = self.step_input(shape, np.zeros(s, np.int32), np.zeros(shape.rows, np.int32))
            return self._params, cache, self.slots.on_device(), empty

        for shape in self._shapes:
            name = f"{'decode' if shape.decode else 'prompt'} {shape.rows}"
            keep = functools.partial(self._steps.__setitem__, shape)
            yield name, keep, programs.step, (self._model, shape), 1, step_arguments(shape)

        def named(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
            keep = functools.partial(self._programs.__setitem__, name)
            return name, keep, function, (), 0, (cache, *arguments)

        none, counts = np.zeros(s, bool), np.zeros(s, np.int32)
        if not isinstance(cache, PagedKVCache):
            yield named("remove", programs.remove, none)
            return
        yield named("edit", programs.edit, self._empty_edit())
        yield named("shift", programs.shift, none, counts, counts)
        if self.swaps:
            pages = np.zeros(_PAGES_AT_ONCE, np.int32)
            yield named("take_out", programs.take_out, pages)
            data = jax.tree.map(
                lambda pool: np.zeros((_PAGES_AT_ONCE, *pool.shape[1:]), pool.dtype),
                (cache.k_pages, cache.v_pages),
            )
            yield named("put_back", programs.put_back, pages, data)
            row = jax.tree.map(np.asarray, tables.get_row(cache.table, jnp.int32(0)))
            yield named("place", programs.place, np.int32(0), row, np.int32(0))

    def replace_cache(self, cache: PagedKVCache) -> None:
        """Goes on with a cache that was edited elsewhere."""
        self.cache = cache
        self.view = HostView(jax.tree.map(np.asarray, programs.view(cache)))

    # Steps

    def decode_shape(self, num_rows: int) -> StepShape:
        """The smallest program for so many sequences of one token each."""
        return min((x for x in self._shapes if x.decode and x.rows >= num_rows), key=lambda x: x.rows)

    def prompt_shape(self, num_rows: int) -> StepShape:
        """The smallest program for so many tokens."""
        return min((x for x in self._shapes if not x.decode and x.rows >= num_rows), key=lambda x: x.rows)

    def step_input(
        self,
        shape: StepShape,
        num_new: np.ndarray,
        tokens: np.ndarray,
        *,
        samples: np.ndarray | None = None,
        left: np.ndarray | None = None,
        position: np.ndarray | None = None,
        recent: np.ndarray | None = None,
        steps: int = 1,
        stop_early: bool = False,
    ) -> StepInput:
        """Host data as the programs take it; what is left out is zero."""
        s = self.cache.max_seqs
        none = np.zeros(s, np.int32)
        return StepInput(
            num_new=num_new,
            tokens=tokens,
            samples=np.zeros(s, bool) if samples is None else samples,
            left=none if left is None else left,
            position=none if position is None else position,
            recent=self._no_recent if recent is None else recent,
            steps=np.int32(steps),
            stop_early=np.bool_(stop_early),
        )

    def step(self, shape: StepShape, given: StepInput) -> StepOutput:
        """One run of a step's program; its output is still on the device."""
        self.cache, out = self._steps[shape](self._params, self.cache, self.slots.on_device(), given)
        self.view = HostView(out.table)
        return out

    # Edits

    def _empty_edit(self) -> Edit:
        cache = self.cache
        assert isinstance(cache, PagedKVCache)
        s, p, n = cache.max_seqs, cache.max_entries, cache.num_pages
        return Edit(
            pinned=np.full(p, n, np.int32),
            removed=np.zeros(s, bool),
            adopted_pages=np.full((s, p), n, np.int32),
            adopted_tokens=np.zeros(s, np.int32),
            unpinned=np.full(p, n, np.int32),
        )

    def edit(
        self,
        *,
        pinned: Sequence[int] = (),
        removed: Sequence[int] = (),
        adopted: Sequence[tuple[int, Sequence[int], int]] = (),
        unpinned: Sequence[int] = (),
    ) -> None:
        """Pins pages, ends sequences, lets others begin with pages, unpins pages: in this order.

        Args:
          adopted: ``(sequence, pages, tokens)``.
        """
        if not (pinned or removed or adopted or unpinned):
            return
        if not self.paged:
            marked = np.zeros(self.cache.max_seqs, bool)
            marked[list(removed)] = True
            self.cache = self._programs["remove"](self.cache, marked)
            return
        given = self._empty_edit()
        width = given.pinned.shape[0]
        for i in range(width, len(pinned), width):  # more than one edit holds: pins before, unpins behind
            self.edit(pinned=pinned[i : i + width])
        _put(given.pinned, pinned[:width])
        _put(given.unpinned, unpinned[:width])
        given.removed[list(removed)] = True
        for slot, pages, count in adopted:
            _put(given.adopted_pages[slot], pages)
            given.adopted_tokens[slot] = count
        self.cache, ok, view = self._programs["edit"](self.cache, given)
        self.view = HostView(view)
        assert ok, f"sequences {[slot for slot, _, _ in adopted]} could not take up their pages"
        for i in range(width, len(unpinned), width):
            self.edit(unpinned=unpinned[i : i + width])

    def shift(self, slot: int, keep: int, discard: int) -> bool:
        """Forgets tokens of a sequence, and moves up those behind them; False: it has too many entries."""
        s = self.cache.max_seqs
        which, keeps, discards = np.zeros(s, bool), np.zeros(s, np.int32), np.zeros(s, np.int32)
        which[slot], keeps[slot], discards[slot] = True, keep, discard
        self.cache, ok, view = self._programs["shift"](self.cache, which, keeps, discards)
        self.view = HostView(view)
        return bool(ok)

    # Pages to and from the host

    def swap_out(self, slot: int, num_computed: int) -> SwappedPages:
        """Copies a sequence to host memory; it stays where it is."""
        assert isinstance(self.cache, PagedKVCache)
        table = jax.tree.map(np.asarray, self.cache.table)
        row, pages = numbered(BlockTable(*(getattr(table, name)[slot] for name in _FIELDS)))
        chunks = []
        for i in range(0, len(pages), _PAGES_AT_ONCE):
            asked = np.zeros(_PAGES_AT_ONCE, np.int32)
            asked[: len(pages) - i] = pages[i : i + _PAGES_AT_ONCE]
            self.cache, data = self._programs["take_out"](self.cache, asked)
            chunks.append(jax.tree.map(np.array, data))
        num_bytes = sum(leaf.nbytes for chunk in chunks for leaf in jax.tree.leaves(chunk))
        return SwappedPages(row, len(pages), chunks, num_computed, num_bytes)

    def swap_in(self, slot: int, swapped: SwappedPages) -> None:
        """Gives an empty sequence what ``swap_out`` took; there are pages enough."""
        assert isinstance(self.cache, PagedKVCache)
        count = np.int32(swapped.num_pages)
        self.cache, ok, view = self._programs["place"](self.cache, np.int32(slot), swapped.row, count)
        self.view = HostView(view)
        assert ok, f"no room for a swapped sequence of {count} pages in sequence {slot}"
        numbers = np.full(swapped.num_pages, self.cache.num_pages, np.int32)
        used = int(swapped.row.num_entries)
        numbers[np.asarray(swapped.row.pages[:used])] = self.view.pages[slot, :used]
        for i, chunk in enumerate(swapped.chunks):
            asked = np.full(_PAGES_AT_ONCE, self.cache.num_pages, np.int32)
            _put(asked, numbers[i * _PAGES_AT_ONCE : (i + 1) * _PAGES_AT_ONCE])
            self.cache = self._programs["put_back"](self.cache, asked, chunk)


_FIELDS = ("pages", "first_slot", "num_tokens", "position", "rotation", "num_entries")


def _put(row: Any, values: Sequence[int] | np.ndarray) -> None:
    row[: len(values)] = values
