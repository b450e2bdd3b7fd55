"""Device: cache, weights and compiled programs of an engine, on one device or on a mesh.

On a mesh every program runs on all devices, for all data shards together. Where only one of them
has something to do, the others are given arguments that change nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jaxpaged.cache.contiguous import ContiguousKVCache
from jaxpaged.cache.groups import GroupedKVCache, map_parts, parts_of
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.compilation import background
from jaxpaged.compilation.executable_cache import cached_compile
from jaxpaged.engine import programs
from jaxpaged.engine.programs import Edit, StepInput, StepOutput, StepShape
from jaxpaged.engine.slots import SlotTable
from jaxpaged.generation.loop import Model
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.sharding.mesh import num_shards
from jaxpaged.sharding.multihost import fetch
from jaxpaged.sharding.specs import BATCH, CACHE, PARAMS, PER_DEVICE, ShardedCache, mesh_of, over_mesh, put

_COMPILING = 2
"""Programs that are compiled at a time."""
PAGES_PER_COPY = 8
"""Pages in one copy to or from the host."""

Progress = Callable[[int, int, str], None]
"""``(programs compiled, number of programs, name of the next one)``"""


@dataclass(frozen=True)
class Program:
    """A program compiled at start-up: ``function(*static, [params,] cache, *arguments)``."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    """Example arguments of one data shard, with which the program changes nothing."""
    in_specs: tuple[PartitionSpec, ...]
    """Spec of each argument."""
    out_specs: tuple[PartitionSpec, ...] = ()
    """Spec of each result after the cache."""
    static: tuple[Any, ...] = ()
    reads_params: bool = False


class Device:
    """Cache, weights and programs on the accelerators.

    Args:
      model, params, cache: of the engine.
      decode_rows, prompt_rows: rows of each step program.
      decode_steps: decode steps in one program, at most.
      num_recent: tokens that penalties can cover.
      vocab_size: tokens of the model.
    """

    def __init__(
        self,
        model: Model,
        params: Any,
        cache: PagedKVCache | GroupedKVCache | ContiguousKVCache | ShardedCache,
        *,
        decode_rows: Sequence[int],
        prompt_rows: Sequence[int],
        decode_steps: int,
        num_recent: int,
        vocab_size: int,
    ) -> None:
        self.cache: Any = cache
        self.mesh = mesh_of(cache)
        self.num_shards = num_shards(self.mesh)
        self.devices_per_shard = 1 if self.mesh is None else self.mesh.size // self.num_shards
        self.local: Any = (
            cache.local if isinstance(cache, ShardedCache) else jax.eval_shape(lambda x: x, cache)
        )
        """Cache of one device, with shapes in place of arrays."""
        self.slots = [SlotTable(self.local.max_seqs, vocab_size) for _ in range(self.num_shards)]
        """Parameters of the running sequences, for each data shard."""
        self.compiled = 0
        self._model, self._params = model, params
        self._shapes = [StepShape(rows, True, decode_steps) for rows in decode_rows]
        self._shapes += [StepShape(rows, False, 1) for rows in prompt_rows]
        self._programs: dict[str, tuple[Program, Any]] = {}
        self._slot_params: Any = None
        self._masks_shape = self.local.max_seqs, -(-vocab_size // 32)
        self._no_masks: Any = None
        no_recent = np.full((self.local.max_seqs, num_recent), -1, np.int32)
        self._no_recent: Any = jax.device_put(no_recent) if self.mesh is None else no_recent

    @property
    def swaps(self) -> bool:
        """True if pages can be swapped to the host: not with residual pages outside the pool."""
        paged = bool(self.parts) and all(part.staging is None for part in self.parts)
        return paged and (self.mesh is None or jax.process_count() == 1)

    @property
    def parts(self) -> tuple[PagedKVCache, ...]:
        """Cache of one device in each layer group, with shapes in place of arrays; none without
        pages."""
        return parts_of(self.local) if isinstance(self.local, PagedKVCache | GroupedKVCache) else ()

    def metadata(self, shard: int) -> Any:
        """The cache with allocator and table of a data shard; on a mesh, with shapes in place of
        pages."""
        if self.mesh is None:
            return self.cache
        names = ("allocator", "table", "staging")

        def of(local: PagedKVCache, part: Any) -> PagedKVCache:
            host = {name: fetch(getattr(part, name)) for name in names}
            return replace(local, **jax.tree.map(lambda x: x[shard], host))

        return map_parts(of, self.local, parts_of(self.cache.parts))

    # Programs

    def compile(self, progress: Progress | None = None) -> None:
        """Compiles every program once, and the kernels they call. Nothing is compiled afterwards."""
        todo = list(self.to_compile())
        # In parallel, since XLA compiles much of a program on one thread; on a mesh in turn, since
        # processes must compile in the same order.
        with ThreadPoolExecutor(_COMPILING if self.mesh is None else 1) as pool:
            compiled = [pool.submit(self._compile, program) for program in todo]
            for i, (program, future) in enumerate(zip(todo, compiled, strict=True)):
                if progress is not None:
                    progress(i, len(todo), program.name)
                self._programs[program.name] = program, future.result()
        background.wait()
        if progress is not None:
            progress(len(todo), len(todo), "")
        self.compiled = len(todo)

    def _compile(self, program: Program) -> Any:
        params, spec = ((self._params,), (PARAMS,)) if program.reads_params else ((), ())
        arguments = (*params, self.cache, *self._arguments(program, {}))
        function = over_mesh(
            functools.partial(program.function, *program.static),
            (*spec, CACHE, *program.in_specs),
            (CACHE, *program.out_specs) if program.out_specs else CACHE,
            gather=True,
        )
        lower = functools.partial(jax.jit(function, donate_argnums=len(params)).lower, *arguments)
        return cached_compile(lower, f"engine.{program.name}", program.static, arguments).program

    def to_compile(self) -> Iterator[Program]:
        """All programs of this engine."""
        s = self.local.max_seqs
        one, two, three = (BATCH,), (BATCH,) * 2, (BATCH,) * 3
        masks = np.zeros(self._masks_shape, np.int32)
        for shape in self._shapes:
            given, static = (self.slots[0].params, masks, self.no_work(shape)), (self._model, shape)
            yield Program(name_of(shape), programs.step, given, three, one, static, reads_params=True)
        if not self.parts:
            yield Program("remove", programs.remove, (np.zeros(s, bool),), one)
            return
        yield Program("edit", programs.edit, (tuple(map(Edit.none, self.parts)),), one, two)
        yield Program("shift", programs.shift, (np.int32(s), np.int32(0), np.int32(0)), three, two)
        for g, part in enumerate(self.parts if self.swaps else ()):
            pages = np.full(PAGES_PER_COPY, part.num_pages, np.int32)
            yield Program(f"read_pages {g}", programs.read_pages, (pages,), one, (PER_DEVICE,), (g,))
            data = self._no_data(part)
            yield Program(
                f"write_pages {g}", programs.write_pages, (pages, data), (BATCH, PER_DEVICE), (), (g,)
            )
            row = np.zeros(part.max_pages_per_seq, np.int32)
            empty: Any = (np.full_like(row, part.num_pages), row, row, row, row, np.int32(0))
            no_sequence = (np.int32(s), BlockTable(*empty), np.int32(0))
            yield Program(f"allocate {g}", programs.allocate, no_sequence, three, two, (g,))

    def _no_data(self, part: PagedKVCache) -> Any:
        """Zeros in the shape of ``PAGES_PER_COPY`` pages of each device of a data shard, see
        ``sharing.PagesOfLayers``."""
        rows = self.devices_per_shard * PAGES_PER_COPY
        return jax.tree.map(
            lambda pool: np.zeros((rows, part.num_layers, *pool.shape[1:]), pool.dtype),
            (part.k_pages, part.v_pages),
        )

    def _joined(self, parts: Sequence[Any], spec: PartitionSpec = BATCH) -> Any:
        """Values of all data shards as one, on the mesh; without a mesh, the only value as it is."""
        if self.mesh is None:
            return parts[0]
        combine: Callable[..., np.ndarray] = np.concatenate if spec == PER_DEVICE else np.stack
        return put(self.mesh, jax.tree.map(lambda *xs: combine(xs), *parts), spec)

    def _split(self, value: Any, spec: PartitionSpec = BATCH) -> Sequence[Any]:
        """Inverse of ``_joined``, for a result; without a mesh, it stays on the device."""
        if self.mesh is None:
            return (value,)
        host, count = jax.tree.map(np.asarray, value), self.num_shards
        if spec == PER_DEVICE:
            host = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), host)
        return [jax.tree.map(lambda x, d=d: x[d], host) for d in range(count)]

    def _arguments(self, program: Program, given: Mapping[int, tuple[Any, ...]]) -> list[Any]:
        """Arguments of a program: those given for some data shards, and no work for the others."""
        rows = [given.get(shard, program.arguments) for shard in range(self.num_shards)]
        return list(map(self._joined, zip(*rows, strict=True), program.in_specs))

    def run(self, name: str, shard: int, *arguments: Any) -> tuple[Any, ...]:
        """Runs a program for one data shard; returns the shard's results after the cache."""
        program, compiled = self._programs[name]
        out = compiled(self.cache, *self._arguments(program, {shard: arguments}))
        self.cache, *rest = out if isinstance(out, tuple) else (out,)
        return tuple(self._split(x, spec)[shard] for x, spec in zip(rest, program.out_specs, strict=True))

    # Steps

    def shape(self, num_rows: int, *, decode: bool) -> StepShape:
        """The smallest program for ``num_rows`` tokens, or for as many sequences that decode."""
        fitting = (x for x in self._shapes if x.decode == decode and x.rows >= num_rows)
        return min(fitting, key=lambda x: x.rows)

    def no_work(self, shape: StepShape) -> StepInput:
        """Input of a step of one data shard that computes nothing, on the host."""
        s = self.local.max_seqs
        num_new, left, position = (np.zeros(s, np.int32) for _ in range(3))
        return StepInput(
            num_new=num_new,
            tokens=np.zeros(shape.rows, np.int32),
            samples=np.zeros(s, bool),
            left=left,
            position=position,
            recent=self._no_recent,
            mu=np.zeros(s, np.float32),
            constrained=np.zeros(s, bool),
            steps=np.int32(1),
            stop_early=np.bool_(False),
        )

    def step(
        self, shape: StepShape, given: Sequence[StepInput], masks: Sequence[Mapping[int, np.ndarray]]
    ) -> Sequence[StepOutput]:
        """Runs a step of all data shards; without a mesh, its output is still on the device.

        Args:
          masks: of each data shard, the packed masks of its constrained sequences.
        """
        _, compiled = self._programs[name_of(shape)]
        if any(table.changed for table in self.slots):
            params = self._joined([table.take() for table in self.slots])
            self._slot_params = jax.device_put(params) if self.mesh is None else params
        joined = self._joined_masks(masks)
        self.cache, out = compiled(self._params, self.cache, self._slot_params, joined, self._joined(given))
        return self._split(out)

    def _joined_masks(self, masks: Sequence[Mapping[int, np.ndarray]]) -> Any:
        """Masks of all sequences; where there are none, those of the last such step, which are on the
        device already."""
        if self._no_masks is not None and not any(masks):
            return self._no_masks
        tables = [np.zeros(self._masks_shape, np.int32) for _ in masks]
        for table, rows in zip(tables, masks, strict=True):
            for slot, mask in rows.items():
                table[slot] = mask
        joined = self._joined(tables)
        if not any(masks):
            joined = self._no_masks = jax.device_put(joined) if self.mesh is None else joined
        return joined


def name_of(shape: StepShape) -> str:
    """Name of a step's program."""
    return f"{'decode' if shape.decode else 'prompt'} {shape.rows}"
