"""Building an engine from flags and a loaded model: sizes of pool and context."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh
from jaxpaged_model.config import ModelConfig

from jaxpaged.app import processes
from jaxpaged.app.cache_type import CacheType, check_hadamard
from jaxpaged.app.errors import InputError, out_of_memory_is_input, say
from jaxpaged.app.kv_report import readable
from jaxpaged.app.loading import ReadyModel
from jaxpaged.app.memory import free_memory
from jaxpaged.app.server.lockstep import LockstepEngine
from jaxpaged.app.server.options import ServeOptions
from jaxpaged.cache.contiguous import ContiguousKVCache
from jaxpaged.cache.creation import create_untouched
from jaxpaged.cache.groups import LayerGroup, parts_of
from jaxpaged.cache.sequences import pages_held
from jaxpaged.engine import Engine, EngineConfig
from jaxpaged.sharding.mesh import CONTEXT, TENSOR, num_shards
from jaxpaged.sharding.multihost import broadcast_object
from jaxpaged.sharding.specs import ShardedCache

_SPARE_PAGES = 3
"""Block table entries of a sequence beyond its context: context shifts split some."""
_SHIFT_PAGES = 2
_SMALLEST_CONTEXT = 8
_SHARE_OF_CPU, _SHARE_OF_DEVICE = 0.25, 0.8
"""Default share of the free memory for the pool; less on a CPU, where other programs use it too."""


@dataclass(frozen=True)
class PoolPlan:
    """Sizes of the cache of an engine; on a mesh, of one data shard."""

    context: int
    """Tokens of a sequence."""
    num_seqs: int
    num_pages: tuple[int, ...]
    """Pages of each layer group; empty = contiguous."""
    num_bytes: int
    groups: tuple[LayerGroup, ...] | None = None
    """None = one pool for all layers."""

    def line(self, options: ServeOptions, cache_type: CacheType, shards: int = 1) -> str:
        """Description of the cache, one line."""
        size = f"{readable(self.num_bytes)} of {cache_type}"
        if shards > 1:
            size += f", in each of {shards} data shards"
        if not self.num_pages:
            return f"KV cache = contiguous, {self.num_seqs} slots of {self.context} tokens, {size}"
        first, *others = self.num_pages
        windows = [group.window for group in (self.groups or ())[1:]]
        more = "".join(f" and {n} for windows of {w}" for n, w in zip(others, windows, strict=True))
        return (
            f"KV cache = paged, {first} pages of {options.page_size} tokens{more}, {size}: "
            f"{first * options.page_size} tokens for up to {self.num_seqs} sequences of up to {self.context}"
        )


def check_mesh(text: str | None) -> None:
    """Checks ``--mesh`` before a model is loaded.

    Raises:
      InputError: not a mesh, or one with an axis that the server does not support.
    """
    if text is not None and processes.mesh_sizes(text).get(CONTEXT, 1) > 1:
        raise InputError(
            f"--mesh {text}: the server knows the axes data and tensor; context is for generate and bench"
        )


def build_engine(options: ServeOptions, ready: ReadyModel) -> Engine:
    """Builds the engine of a model, not yet compiled; describes its cache on stderr.

    Raises:
      InputError: inconsistent sizes, or not enough memory.
    """
    check_hadamard(options.hadamard, options.cache_type_k, options.cache_type_v)
    cache_type = CacheType.of(
        options.cache_type_k or ready.dtype, options.cache_type_v or ready.dtype, options.hadamard
    )
    config, mesh = ready.loaded.config, ready.loaded.mesh
    plan = plan_pool(options, cache_type, config, mesh)
    if options.log:
        say(plan.line(options, cache_type, num_shards(mesh)))
        if plan.context > config.context_length:
            say(
                f"warning: -c {plan.context} is more than the {config.context_length} tokens the model was trained for"
            )

    def create() -> Any:
        """Creates the cache of one device."""
        local = ready.loaded.local_config
        if not plan.num_pages:
            return cache_type.contiguous(local, max_seqs=plan.num_seqs, max_length=plan.context)
        sizes: dict[str, Any] = {
            "max_seqs": plan.num_seqs,
            "page_size": options.page_size,
            "max_seq_len": plan.context + _SPARE_PAGES * options.page_size,
        }
        if plan.groups is None:
            return cache_type.paged(local, num_pages=plan.num_pages[0], **sizes)
        groups, step = plan.groups, max(options.step_tokens, plan.num_seqs)
        return cache_type.paged(local, groups=groups, num_pages=plan.num_pages, step_tokens=step, **sizes)

    cache: Any
    with out_of_memory_is_input("choose fewer --kv-pages, or less --kv-memory"):
        cache = (
            create_untouched(create)
            if mesh is None
            else ShardedCache.create(mesh, create, config.num_kv_heads)
        )
        jax.block_until_ready(cache)
    sizes = EngineConfig(
        n_ctx=plan.context,
        vocab_size=ready.loaded.vocab_size,
        max_batch_tokens=options.step_tokens,
        decode_steps=options.decode_steps,
        max_waiting=options.max_queue,
        prefix_cache=options.prefix_cache,
        context_shift=options.context_shift,
        swap_bytes=options.swap_space,
        fingerprint=ready.loaded.fingerprint,
        skips_padding=ready.loaded.skips_padding,
        lockstep=processes.count() > 1,
    )
    engine = Engine if processes.count() == 1 else LockstepEngine
    return engine(ready.call, ready.loaded.params, cache, sizes)


def plan_pool(
    options: ServeOptions, cache_type: CacheType, config: ModelConfig, mesh: Mesh | None = None
) -> PoolPlan:
    """Sizes of a cache from flags and free memory; on a mesh, of one data shard.

    ``--kv-pages``, ``--kv-memory`` in bytes and ``-np`` are totals, divided among the shards.

    Raises:
      InputError: the memory, or the requested pool, does not fit one context.
    """
    shards = num_shards(mesh)
    tensor = 1 if mesh is None else mesh.shape[TENSOR]
    parallel = -(-options.parallel // shards)
    config = config.shard(tensor)
    context = options.ctx_size or config.context_length
    if context < _SMALLEST_CONTEXT:
        raise InputError(f"-c {context}: a context has at least {_SMALLEST_CONTEXT} tokens")
    if not options.paged:
        return _contiguous(options, cache_type, config, context, mesh)
    ps, spare = options.page_size, _SHIFT_PAGES if options.context_shift else 0
    fills = parallel * (-(-context // ps) + spare)
    groups = None if options.swa_full else _groups(config, context)
    one: dict[str, Any] = {"num_pages": 1, "max_seqs": 1, "page_size": ps, "max_seq_len": ps}
    abstract = parts_of(jax.eval_shape(lambda: cache_type.paged(config, groups=groups, **one)))
    page_bytes, *window_bytes = (
        part.bytes_per_page * tensor for part in abstract
    )  # on all devices of a shard
    extra = parallel * sum(part.bytes_of_staging for part in abstract) * tensor
    window_pages = [
        min(fills, parallel * _window_pages(group, options)) for group in (groups[1:] if groups else ())
    ]
    extra += sum(pages * size for pages, size in zip(window_pages, window_bytes, strict=True))
    if options.kv_pages is not None:
        pages = options.kv_pages // shards
    else:
        budget = broadcast_object(_budget(options.kv_memory, mesh)) - extra
        pages = budget // page_bytes
        if options.kv_memory is None:
            pages = min(pages, fills)
    room = (pages - spare) * ps
    if room < (context if options.ctx_size else _SMALLEST_CONTEXT):
        raise InputError(
            f"{max(pages, 0)} pages of {ps} tokens ({readable(page_bytes)} each) do not fit one sequence of "
            f"{options.ctx_size or _SMALLEST_CONTEXT} tokens; choose a shorter context (-c), more --kv-memory or "
            "smaller -ctk and -ctv"
        )
    if room < context:
        say(f"context = {room} tokens, as many as fit the pool; the model was trained for {context}")
        context = room
    return PoolPlan(context, parallel, (pages, *window_pages), pages * page_bytes + extra, groups)


def _groups(config: ModelConfig, context: int) -> tuple[LayerGroup, ...] | None:
    """Layer groups of an engine's cache; None if no window is shorter than the context.

    The first one keeps all tokens, even if its layers see a window: texts are shared by their beginnings.
    """
    first, *others = config.groups
    if all(group.window is None or group.window >= context for group in others):
        return None
    return replace(first, window=None), *others


def _window_pages(group: LayerGroup, options: ServeOptions) -> int:
    """Pages a sequence of a group with a window: those that it holds, and those of two windows that the
    prefix cache keeps of it, at the end of its prompt and of its text."""
    assert group.window is not None, "only the first group sees everything"
    held = pages_held(group.window, max(options.step_tokens, options.parallel), options.page_size)
    return held + 2 * (-(-group.window // options.page_size) + 1) * options.prefix_cache


def _contiguous(
    options: ServeOptions, cache_type: CacheType, config: ModelConfig, context: int, mesh: Mesh | None
) -> PoolPlan:
    shards = num_shards(mesh)
    tensor = 1 if mesh is None else mesh.shape[TENSOR]
    parallel = -(-options.parallel // shards)

    def num_bytes(rows: int) -> int:
        cache = jax.eval_shape(lambda: cache_type.contiguous(config, max_seqs=rows, max_length=context))
        assert isinstance(cache, ContiguousKVCache)
        return tensor * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((cache.k, cache.v)))

    each = num_bytes(1)
    rows = min(parallel, broadcast_object(_budget(options.kv_memory, mesh)) // each)
    if rows < 1:
        raise InputError(
            f"one slot of {context} tokens takes {readable(each)}, and not even one fits the memory; "
            "choose a shorter context (-c) or more --kv-memory"
        )
    if rows < parallel:
        say(f"slots = {rows * shards}, as many as fit the memory; -np asks for {options.parallel}")
    return PoolPlan(context, rows, (), rows * each)


def _budget(kv_memory: float | int | None, mesh: Mesh | None) -> int:
    """Bytes for keys and values of one data shard: as requested, or a share of the free memory."""
    shards = num_shards(mesh)
    if isinstance(kv_memory, int):
        return kv_memory // shards
    usual = _SHARE_OF_CPU if jax.default_backend() == "cpu" else _SHARE_OF_DEVICE
    free = free_memory()
    if mesh is not None:
        # An accelerator's memory is its own; the devices of a CPU share one.
        free = free // shards if jax.default_backend() == "cpu" else free * mesh.shape[TENSOR]
    return int((usual if kv_memory is None else kv_memory) * free)
