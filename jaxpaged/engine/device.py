"""Device: cache, weights and compiled programs of an engine, behind methods that take host data."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxpaged.cache.contiguous import ContiguousKVCache
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.compilation import background
from jaxpaged.compilation.executable_cache import cached_compile
from jaxpaged.engine import programs
from jaxpaged.engine.programs import Edit, StepInput, StepOutput, StepShape, TableState
from jaxpaged.engine.slots import SlotTable
from jaxpaged.engine.swap import SwappedPages, numbered
from jaxpaged.generation.loop import Model
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.sharding.specs import BATCH, CACHE, GATHERED, PARAMS, PER_DEVICE
from jaxpaged.storage import snapshots
from jaxpaged.storage.snapshot_file import Snapshot

_COMPILING = 2
"""Programs that are compiled at a time."""
_PAGES_PER_COPY = 8
"""Pages in one copy to or from the host."""

Progress = Callable[[int, int, str], None]
"""``(programs compiled, number of programs, name of the next one)``"""


class HostTable:
    """``TableState`` on the host; each field is fetched at its first use."""

    def __init__(self, state: TableState) -> None:
        self._state = state

    @functools.cached_property
    def num_free(self) -> int:
        return int(self._state.num_free)

    @functools.cached_property
    def free_slots(self) -> np.ndarray:
        return np.asarray(self._state.free_slots)

    @functools.cached_property
    def pages(self) -> np.ndarray:
        return np.asarray(self._state.pages)

    @functools.cached_property
    def page_tokens(self) -> np.ndarray:
        return np.asarray(self._state.page_tokens)


@dataclass(frozen=True)
class Program:
    """A program compiled at start-up: ``function(*static, [params,] cache, *arguments)``."""

    name: str
    function: Callable[..., Any]
    static: tuple[Any, ...]
    arguments: tuple[Any, ...]
    """Example arguments, with which the program changes nothing."""
    in_kinds: tuple[str, ...]
    """Sharding kind of each argument."""
    out_kinds: tuple[str, ...]
    """Sharding kind of each result after the cache."""
    reads_params: bool = False

    @property
    def kinds(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Sharding kinds of all arguments but the static ones, and of all results."""
        return (*((PARAMS,) if self.reads_params else ()), CACHE, *self.in_kinds), (CACHE, *self.out_kinds)


class Device:
    """Cache, weights and programs on the accelerator. state: the block table as it is now."""

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
        self._cache = cache
        self.paged = isinstance(self.cache, PagedKVCache)
        self.slots = SlotTable(self.cache.max_seqs)
        self.compiled = 0
        self.compile_seconds = 0.0
        self._model, self._params = model, params
        self._shapes = [StepShape(rows, True, decode_steps) for rows in decode_rows]
        self._shapes += [StepShape(rows, False, 1) for rows in prompt_rows]
        self._programs: dict[str, Any] = {}
        self._no_recent = self._to_device(np.full((self.cache.max_seqs, num_recent), -1, np.int32))
        self.num_recent = num_recent
        self.state = self._fetch()

    @property
    def cache(self) -> Any:
        """The cache; on a mesh, the part of one device with shapes in place of arrays."""
        return self._cache

    def _to_device(self, x: np.ndarray) -> Any:
        return jax.device_put(x)

    def _fetch(self) -> HostTable:
        return HostTable(jax.tree.map(np.asarray, programs.table_state(self.cache)))

    def table(self) -> BlockTable:
        """The block table on the host."""
        return jax.tree.map(np.asarray, self.metadata().table)

    def metadata(self) -> Any:
        """The cache with its allocator and table; on a mesh, with shapes in place of pages."""
        return self.cache

    def snapshot(
        self, path: str | os.PathLike[str], slot: int, token_ids: Sequence[int], fingerprint: str
    ) -> None:
        """Writes a sequence to a file."""
        snapshots.snapshot(self.cache, path, seq=slot, token_ids=token_ids, fingerprint=fingerprint)

    def restore(self, saved: Snapshot, slot: int) -> None:
        """Fills an empty sequence from a file; unchanged if it raises."""
        self._cache = snapshots.restore(self.cache, saved, seq=slot)
        self.state = self._fetch()

    @property
    def swaps(self) -> bool:
        """True if pages can be swapped to the host: not with residual pages outside the pool."""
        return isinstance(self.cache, PagedKVCache) and self.cache.staging is None

    def compile(self, progress: Progress | None = None) -> None:
        """Compiles every program once, and the kernels they call. Nothing is compiled afterwards."""
        start = time.monotonic()
        todo = list(self.to_compile())
        # In parallel, since XLA compiles much of a program on one thread.
        with ThreadPoolExecutor(_COMPILING) as pool:
            compiled = [pool.submit(self._compile, program) for program in todo]
            for i, (program, future) in enumerate(zip(todo, compiled, strict=True)):
                if progress is not None:
                    progress(i, len(todo), program.name)
                self._programs[program.name] = future.result()
        background.wait()
        if progress is not None:
            progress(len(todo), len(todo), "")
        self.compiled = len(todo)
        self.compile_seconds = time.monotonic() - start

    def _compile(self, program: Program) -> Any:
        params = (self._params,) if program.reads_params else ()
        arguments = (*params, self._cache, *program.arguments)
        function = functools.partial(program.function, *program.static)
        lower = jax.jit(function, donate_argnums=len(params)).lower
        name = f"engine.{program.name}"
        return cached_compile(functools.partial(lower, *arguments), name, program.static, arguments).program

    def to_compile(self) -> Iterator[Program]:
        """All programs of this engine."""
        cache, s = self.cache, self.cache.max_seqs
        for shape in self._shapes:
            empty = self.step_input(shape, np.zeros(s, np.int32), np.zeros(shape.rows, np.int32))
            yield Program(
                name_of(shape),
                programs.step,
                (self._model, shape),
                (self.slots.on_device(), empty),
                (BATCH, BATCH),
                (GATHERED,),
                reads_params=True,
            )
        if not isinstance(cache, PagedKVCache):
            yield Program("remove", programs.remove, (), (np.zeros(s, bool),), (BATCH,), ())
            return
        yield Program("edit", programs.edit, (), (self._empty_edit(),), (BATCH,), (GATHERED, GATHERED))
        three = (BATCH, BATCH, BATCH)
        nobody = (np.int32(s), np.int32(0), np.int32(0))
        yield Program("shift", programs.shift, (), nobody, three, (GATHERED, GATHERED))
        if self.swaps:
            no_pages = np.full(_PAGES_PER_COPY, cache.num_pages, np.int32)
            yield Program("read_pages", programs.read_pages, (), (no_pages,), (BATCH,), (PER_DEVICE,))
            data = jax.tree.map(self._no_data, (cache.k_pages, cache.v_pages))
            yield Program("write_pages", programs.write_pages, (), (no_pages, data), (BATCH, PER_DEVICE), ())
            no_sequence = (np.int32(s), self._empty_row(), np.int32(0))
            yield Program("allocate", programs.allocate, (), no_sequence, three, (GATHERED, GATHERED))

    def _no_data(self, pool: Any) -> np.ndarray:
        """Zeros in the shape of ``_PAGES_PER_COPY`` pages, see ``sharing.PagesOfLayers``."""
        return np.zeros((_PAGES_PER_COPY, self.cache.num_layers, *pool.shape[1:]), pool.dtype)

    def _empty_row(self) -> BlockTable:
        cache = self.cache
        row = np.zeros(cache.max_pages_per_seq, np.int32)
        given: Any = (np.full_like(row, cache.num_pages), row, row, row, row, np.int32(0))
        return BlockTable(*given)

    def _run(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        """Runs a program on the cache; returns its other results."""
        out = self._programs[name](self._cache, *arguments)
        self._cache, *rest = out if isinstance(out, tuple) else (out,)
        return tuple(rest)

    # Steps

    def decode_shape(self, num_rows: int) -> StepShape:
        """The smallest decode program for ``num_rows`` sequences."""
        return min((x for x in self._shapes if x.decode and x.rows >= num_rows), key=lambda x: x.rows)

    def prompt_shape(self, num_rows: int) -> StepShape:
        """The smallest prefill program for ``num_rows`` tokens."""
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
        """Input of a step from host data; arguments left out are zero."""
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
        """Runs a step; its output is still on the device."""
        program = self._programs[name_of(shape)]
        self._cache, out = program(self._params, self._cache, self.slots.on_device(), given)
        self.state = HostTable(out.table)
        return out

    # Edits

    def _empty_edit(self) -> Edit:
        s, p, n = self.cache.max_seqs, self.cache.max_pages_per_seq, self.cache.num_pages
        rows = programs.ATTACHED_PER_EDIT
        return Edit(
            pinned=np.full(p, n, np.int32),
            removed=np.zeros(s, bool),
            attached=np.full(rows, s, np.int32),
            attached_pages=np.full((rows, p), n, np.int32),
            attached_tokens=np.zeros(rows, np.int32),
            unpinned=np.full(p, n, np.int32),
        )

    def edit(
        self, *, pinned: Sequence[int] = (), removed: Sequence[int] = (), unpinned: Sequence[int] = ()
    ) -> None:
        """Pins pages, removes sequences, unpins pages, in this order."""
        if not self.paged:
            if removed:
                marked = np.zeros(self.cache.max_seqs, bool)
                marked[list(removed)] = True
                self._run("remove", marked)
            return
        width = self.cache.max_pages_per_seq
        for i in range(width, len(pinned), width):  # more than fit one edit
            self._edit(pinned=pinned[i : i + width])
        if pinned or removed or unpinned:
            self._edit(pinned=pinned[:width], removed=removed, unpinned=unpinned[:width])
        for i in range(width, len(unpinned), width):
            self._edit(unpinned=unpinned[i : i + width])

    def attach(self, rows: Sequence[tuple[int, Sequence[int], int]]) -> None:
        """Attaches pages to empty sequences. rows: ``(sequence, pages, tokens held)`` of each."""
        for i in range(0, len(rows), programs.ATTACHED_PER_EDIT):
            self._edit(attached=rows[i : i + programs.ATTACHED_PER_EDIT])

    def _edit(
        self,
        *,
        pinned: Sequence[int] = (),
        removed: Sequence[int] = (),
        attached: Sequence[tuple[int, Sequence[int], int]] = (),
        unpinned: Sequence[int] = (),
    ) -> None:
        given = self._empty_edit()
        _put(given.pinned, pinned)
        given.removed[list(removed)] = True
        _put(given.unpinned, unpinned)
        for i, (slot, pages, count) in enumerate(attached):
            given.attached[i], given.attached_tokens[i] = slot, count
            _put(given.attached_pages[i], pages)
        ok, state = self._run("edit", given)
        self.state = HostTable(state)
        assert ok, f"pages could not be attached to sequences {[slot for slot, _, _ in attached]}"

    def shift(self, slot: int, keep: int, discard: int) -> bool:
        """Removes tokens of a sequence after the first ``keep``; False if its row is too narrow."""
        ok, state = self._run("shift", np.int32(slot), np.int32(keep), np.int32(discard))
        self.state = HostTable(state)
        return bool(ok)

    # Pages to and from the host

    def swap_out(self, slot: int, num_computed: int) -> SwappedPages:
        """Copies a sequence to host memory; it also stays in the cache."""
        table = self.table()
        row, pages = numbered(BlockTable(*(getattr(table, name)[slot] for name in _FIELDS)))
        chunks = []
        for i in range(0, len(pages), _PAGES_PER_COPY):
            asked = np.zeros(_PAGES_PER_COPY, np.int32)
            asked[: len(pages) - i] = pages[i : i + _PAGES_PER_COPY]
            (data,) = self._run("read_pages", asked)
            chunks.append(jax.tree.map(np.array, data))
        num_bytes = sum(leaf.nbytes for chunk in chunks for leaf in jax.tree.leaves(chunk))
        return SwappedPages(row, len(pages), chunks, num_computed, num_bytes)

    def swap_in(self, slot: int, swapped: SwappedPages) -> None:
        """Restores a copy made by ``swap_out`` into an empty sequence; enough pages must be free."""
        count = np.int32(swapped.num_pages)
        ok, state = self._run("allocate", np.int32(slot), swapped.row, count)
        self.state = HostTable(state)
        assert ok, f"a swapped sequence of {count} pages does not fit into sequence {slot}"
        numbers = np.full(swapped.num_pages, self.cache.num_pages, np.int32)
        used = int(swapped.row.num_entries)
        numbers[np.asarray(swapped.row.pages[:used])] = self.state.pages[slot, :used]
        for i, chunk in enumerate(swapped.chunks):
            asked = np.full(_PAGES_PER_COPY, self.cache.num_pages, np.int32)
            _put(asked, numbers[i * _PAGES_PER_COPY : (i + 1) * _PAGES_PER_COPY])
            self._run("write_pages", asked, chunk)


def name_of(shape: StepShape) -> str:
    """Name of a step's program."""
    return f"{'decode' if shape.decode else 'prompt'} {shape.rows}"


_FIELDS = ("pages", "first_slot", "num_tokens", "position", "rotation", "num_entries")


def _put(row: Any, values: Sequence[int] | np.ndarray) -> None:
    row[: len(values)] = values
