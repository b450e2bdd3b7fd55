"""Compiles whole steps of a model for eight TPUs and four GPUs, without one, and counts the collectives.

    python -m tpu_scripts.compile_check.mesh [--quick] [--platform tpu] [--target v5e:2x4] [--mesh data=2,tensor=4]

Needs: pip install -e ".[model,tpu]", or ".[model]" and jax-cuda13-plugin, jax-cuda13-pjrt (both of jax's version),
nvidia-cuda-nvcc and absl-py. No driver and no device.

The model has the sizes of Llama-3.1-8B and fewer layers, in bfloat16; pages of 32 tokens, 8 sequences of up to 8192 on
each data shard. On each mesh: a step of one token per sequence, a step of 512 tokens of prompts, both with their
reserve, attention by the platform's own kernel and the likeliest token; the reserve alone, and every operation on
sequences. On the first mesh of a platform also the loop of ``generate``. Compilers are the real ones; nothing runs, so
the times are those of compiling.

A program is right if it compiles; if a step has, in the loop over layers (on a GPU in each layer), two sums over
"tensor", two more over "context" where a context is sharded, and no other collective, except for the copy of a shared
page between the devices of a context; if operations on sequences have no collective; if layers have a kernel; and if
pools are updated in place, without memory for a copy. Exit status: 0, all of them are right; 1, one is not; 2, nothing
could be checked.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxpaged import PagedKVCache
from jaxpaged.cache import interface
from jaxpaged.compilation.options import compiler_options
from jaxpaged.generation.loop import run
from jaxpaged.generation.request import Request
from jaxpaged.sharding import mesh as sharding
from jaxpaged.sharding.context import ContextKVCache
from jaxpaged.sharding.specs import (
    BATCH,
    CACHE,
    PARAMS,
    REPLICATED,
    ShardedCache,
    cache_specs,
    over_mesh,
    stacked,
)
from tpu_scripts import common
from tpu_scripts.common import Parser, note, positive
from tpu_scripts.compile_check import devices
from tpu_scripts.compile_check.devices import CONTEXT, FAILED, NOT_CHECKED, OK, cell, num_bytes
from tpu_scripts.compile_check.hlo import Contents, contents_of
from tpu_scripts.workers import Worker, WorkerFailed, run_as_worker

CHIPS_8 = ("data=2,tensor=4", "tensor=8", "data=8", "context=2,tensor=4")
CHIPS_4 = ("data=2,tensor=2", "tensor=4", "data=4", "context=2,tensor=2")
TARGETS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "v5e:2x4": ("tpu", CHIPS_8),
    "v6e:2x4": ("tpu", CHIPS_8),
    "H200:1x1x4": ("gpu", CHIPS_4),
}
"""Platform and meshes of each target."""
KERNELS = {"tpu": "mosaic_tpu", "gpu": "mosaic_gpu"}
PAGE_SIZE, MAX_SEQS, PROMPT = 32, 8, 512
POOL_TOKENS = 1 << 19
"""Tokens of a pool; a smaller one might fit into a chip's own memory, where compilers would keep it for a while."""
STEPS = {"decode": MAX_SEQS, "prompt": PROMPT}
"""Programs that run the model once, and their tokens."""
QUERIES = ("seq_length", "seq_position_min", "seq_position_max")
"""Programs that leave the cache as it is."""
WINDOW = 4096
"""Sliding window of seq_drop_unseen."""
COLUMNS = {
    "target": "target",
    "mesh": "mesh",
    "program": "program",
    "result": "result",
    "seconds": "s",
    "collectives": "collectives",
    "payload": "bytes of each",
    "kernels": "kernels",
    "argument_mib": "arguments MiB",
    "pool_mib": "of them pool",
    "temp_mib": "temp MiB",
}


# --- expected programs -----------------------------------------------------------------------------------------


def expected(program: str, axes: Mapping[str, int], unrolled: int = 0) -> Counter[tuple[str, str, bool]]:
    """Expected numbers of collectives of a program, by ``(kind, over, in_loop)``.

    Layers are one loop, of which there are two in ``generate``: one prefills, the other decodes; or there are
    ``unrolled`` of them.
    """
    counts: Counter[tuple[str, str, bool]] = Counter()
    runs = {"generate": 2}.get(program, int(program in STEPS))
    for axis in ("tensor", "context"):
        if axes[axis] > 1 and runs:
            counts["all-reduce", axis, not unrolled or program == "generate"] += runs * 2 * (unrolled or 1)
    if axes["context"] > 1 and (runs or program == "reserve"):
        counts["all-reduce", "context", True] += runs or 1  # copies of shared pages
    return counts


def verdict(
    program: str,
    axes: Mapping[str, int],
    layers: int,
    found: Contents,
    memory: Mapping[str, int],
    unrolled: bool = False,
) -> str:
    """Returns "ok", or what is wrong.

    Args:
      unrolled: True if layers are no loop.
      memory: ``alias_bytes``, ``temp_bytes`` and ``pool_bytes`` of one device.
    """
    # Sums over one device move nothing; compilers are free to leave them.
    sent = [one for one in found.collectives if one.over]
    if program == "generate":  # behind its loops the results of all shards are gathered
        sent = [one for one in sent if one.in_loop or one.over != "data"]
    counts = Counter((one.kind, one.over, one.in_loop) for one in sent)
    wanted = expected(program, axes, layers * unrolled)
    problems = []
    if counts != wanted:
        problems.append(f"collectives: {_listed(wanted)} expected, {_listed(counts)} found")
    if (program in STEPS or program == "generate") and not found.kernels:
        problems.append("no attention kernel")
    if program not in QUERIES and memory["alias_bytes"] < memory["pool_bytes"]:
        problems.append(f"pool not in place: {memory['alias_bytes']} of {memory['pool_bytes']} bytes aliased")
    # Keys or values of one layer; no other large temporary is needed.
    if memory["temp_bytes"] >= memory["pool_bytes"] // (2 * layers):
        problems.append(f"{memory['temp_bytes']} bytes of temporaries: as large as a copy of a layer's pool")
    return "; ".join(problems) or "ok"


def _listed(counts: Mapping[tuple[str, str, bool], int]) -> str:
    parts = [
        f"{count} {kind} over {over or 'one device'}{' in a loop' * in_loop}"
        for (kind, over, in_loop), count in sorted(counts.items())
    ]
    return ", ".join(parts) or "none"


def row_of(found: Contents) -> dict[str, Any]:
    """Columns of the table that describe a program's contents."""
    counts = Counter((one.kind, one.over, one.in_loop) for one in found.collectives)
    payloads = {
        key: sorted({one.payload for one in found.collectives if (one.kind, one.over, one.in_loop) == key})
        for key in sorted(counts)
    }
    return {
        "collectives": _listed(counts),
        "payload": "; ".join(" or ".join(map(str, sizes)) for sizes in payloads.values()),
        "each": [
            {"kind": key[0], "over": key[1], "in_loop": key[2], "count": counts[key], "bytes": sizes}
            for key, sizes in payloads.items()
        ],
        "kernels": found.kernels,
    }


# --- in a worker --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A function, the specs of its arguments and results, and shapes in place of arrays."""

    function: Callable[..., Any]
    in_specs: tuple[Any, ...]
    out_specs: Any
    arguments: tuple[Any, ...]


class MeshCompiler:
    """Compiles programs for a mesh of devices."""

    def __init__(self, target: str, mesh: str, layers: int) -> None:
        from jaxpaged_model.config import ModelConfig, RopeScaling
        from jaxpaged_model.llama import abstract_params, functional

        self.platform = TARGETS[target][0]
        devices.trace_models_for(self.platform)
        self.mesh = sharding.make_mesh(**sharding.parse_mesh(mesh), devices=devices.devices(target))
        self.axes = dict(self.mesh.shape)
        scaling = RopeScaling("llama3", factor=8.0, original_context_length=8192)
        # Llama-3.1-8B: vocab_size, hidden_size, intermediate_size, num_layers, num_q_heads, num_kv_heads, head_dim, ...
        sizes_8b = (128256, 4096, 14336, layers, 32, 8, 128, 131072)
        config = ModelConfig("llama", *sizes_8b, rope_theta=500000.0, rope_scaling=scaling)
        local = config.shard(self.axes["tensor"])
        self.layers = layers
        self.model = functional(local, jnp.bfloat16, axis="tensor")
        sizes: dict[str, Any] = {
            **local.cache_spec,
            "num_pages": POOL_TOKENS // PAGE_SIZE,
            "page_size": PAGE_SIZE,
            "max_seqs": MAX_SEQS,
            "max_seq_len": CONTEXT - PAGE_SIZE,
            "dtype": "bf16",
            "layout": "lanes" if self.platform == "tpu" else "plain",
        }

        def make_cache() -> Any:
            if self.axes["context"] > 1:
                return ContextKVCache.create(**sizes, axis_size=self.axes["context"])
            return PagedKVCache.create(**sizes)

        def make_params() -> Any:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_params(local, jnp.bfloat16))

        own = jax.eval_shape(make_cache)
        self.pool_bytes = num_bytes((own.k_pages, own.v_pages))
        whole = self.stack(make_cache, cache_specs(own))
        self.cache = ShardedCache(whole, self.mesh, config.num_kv_heads)
        self.params = self.stack(make_params, PARAMS)

    def stack(self, make: Callable[[], Any], specs: Any) -> Any:
        """Shapes and shardings of what ``make`` returns on each device, stacked over the mesh."""

        def placed(spec: Any, part: Any) -> Any:
            named = NamedSharding(self.mesh, spec)
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=named), part)

        def on_device() -> Any:
            return stacked(make(), specs)

        sharded = jax.shard_map(on_device, mesh=self.mesh, in_specs=(), out_specs=specs, check_vma=False)
        whole = jax.eval_shape(sharded)
        return jax.tree.map(placed, specs, whole, is_leaf=lambda node: isinstance(node, PartitionSpec))

    def rows(self, *shape: int, dtype: Any = np.int32) -> Any:
        """Argument of which each data shard has its own."""
        return self.stack(lambda: jnp.zeros(shape, dtype), BATCH)

    def programs(self, quick: bool, whole: bool) -> Iterator[tuple[str, Program]]:
        """Yields names and programs; ``whole``: with the loop of ``generate``."""
        same = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(self.mesh, PartitionSpec()))
        counts, marked = self.rows(MAX_SEQS), self.rows(MAX_SEQS, dtype=bool)

        def step(tokens: int, params: Any, cache: Any, ids: Any, num_new: Any) -> Any:
            most = 1 if tokens == MAX_SEQS else tokens
            cache, batch, _ = cache.reserve(num_new, num_tokens=tokens, max_new=most)
            logits, cache = self.model(params, ids, cache, batch, batch.last_rows)
            return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

        for name, tokens in STEPS.items():
            if quick and name != "decode":
                continue
            given = self.params, self.cache, self.rows(tokens), counts
            specs = (PARAMS, CACHE, BATCH, BATCH), (CACHE, BATCH)
            yield name, Program(functools.partial(step, tokens), *specs, given)

        def edit(function: Any, out_specs: Any, *given: Any) -> Program:
            in_specs = tuple(REPLICATED if x is same else BATCH for x in given)
            return Program(function, (CACHE, *in_specs), out_specs, (self.cache, *given))

        def reserve(cache: Any, num_new: Any) -> Any:
            return cache.reserve(num_new, num_tokens=PROMPT)

        yield "reserve", edit(reserve, (CACHE, BATCH, BATCH), counts)
        if quick:
            return
        pair = (CACHE, BATCH)
        yield "seq_remove", edit(interface.seq_remove, pair, marked, same, same)
        yield "seq_copy", edit(interface.seq_copy, pair, same, same, same, same)
        yield "seq_keep", edit(interface.seq_keep, pair, same)
        yield "seq_shift", edit(interface.seq_shift, pair, same, same, same, same)
        yield "seq_reorder", edit(interface.seq_reorder, CACHE, counts)
        yield "seq_drop_unseen", edit(lambda c: c.seq_drop_unseen(WINDOW), CACHE)
        for query in QUERIES:
            yield query, edit(getattr(interface, query), BATCH)
        if whole:
            yield "generate", self.generate()

    def generate(self) -> Program:
        """The whole loop, for one prompt per sequence."""
        prompts = [[1] * PROMPT] * MAX_SEQS
        # The request of one shard; each has as much.
        cache = types.SimpleNamespace(max_seqs=MAX_SEQS)
        request = Request.create(cache, prompts, max_new_tokens=64, stop_ids=(2,), batch_size=PROMPT)
        given = self.stack(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), request), BATCH)
        loop = functools.partial(run, self.model)
        return Program(loop, (PARAMS, CACHE, BATCH), (BATCH, CACHE), (self.params, self.cache, given))

    def compile(self, name: str, program: Program) -> dict[str, Any]:
        """Compiles and checks one program."""
        start = time.perf_counter()
        lowered_for = {"gpu": "cuda"}.get(self.platform, self.platform)
        function = over_mesh(program.function, program.in_specs, program.out_specs, gather=name == "generate")
        donated = () if name in QUERIES else program.in_specs.index(CACHE)
        try:
            traced = jax.jit(function, donate_argnums=donated).trace(*program.arguments)
            lowered = traced.lower(lowering_platforms=(lowered_for,))
            compiled = lowered.compile(compiler_options=compiler_options(self.platform))
        except Exception as error:  # compilers' have no public name, and whatever it is, it is the result
            return {"result": devices.one_line(error)}
        seconds = round(time.perf_counter() - start, 1)
        memory = {**devices.sizes_of(compiled), "pool_bytes": self.pool_bytes}
        found = contents_of(compiled.as_text(), self.axes)
        # Dense weights on GPUs: ``jaxpaged_model.layers.by_layer``.
        result = verdict(name, self.axes, self.layers, found, memory, unrolled=self.platform == "gpu")
        return {"result": result, "seconds": seconds, **row_of(found), **memory}


def work(target: str, mesh: str, layers: int, quick: bool) -> Iterator[dict[str, Any]]:
    """Compiles everything for one mesh."""
    compiler = MeshCompiler(target, mesh, layers)
    platform, meshes = TARGETS[target]
    first = next(name for name, (other, _) in TARGETS.items() if other == platform)
    for name, program in compiler.programs(quick, whole=(target, mesh) == (first, meshes[0])):
        yield {"program": name, **compiler.compile(name, program)}


# --- all meshes ---------------------------------------------------------------------------------------------


def environment_of(platform: str) -> dict[str, str] | None:
    """Variables of a worker; None if the platform's compiler or the model's libraries are not installed."""
    found = devices.environment(platform)
    if found is None or importlib.util.find_spec("flax") is None:
        return None
    return found | {"JAXPAGED_ATTENTION": KERNELS[platform]}


def run_worker(task: Mapping[str, Any], environment: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yields the rows of one mesh, from a process of its own: a compiler that aborts affects no other mesh."""
    with Worker("tpu_scripts.compile_check.mesh", task, environment, limit=3600) as worker:
        try:
            yield from worker.rows()
        except WorkerFailed as reason:
            yield {"program": "all others", "result": str(reason)}


def main() -> int:
    if run_as_worker(work):
        return OK
    parser = Parser(__doc__, json=None)
    parser.flag("--quick", "decode and reserve, on one mesh of a platform")
    parser.add("--platform", "only this platform", choices=KERNELS)
    parser.add("--target", "only this target; may be repeated", action="append", choices=TARGETS)
    parser.add("--mesh", "only this mesh; may be repeated", action="append")
    parser.add("--layers", "layers of the model", positive, 2)
    args = parser.parse()
    for mesh in args.mesh or ():
        try:
            sharding.parse_mesh(mesh)
        except sharding.MeshError as error:
            parser.error(f"--mesh: {error}")
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for target in args.target or TARGETS:
        platform, meshes = TARGETS[target]
        environment = environment_of(platform)
        if environment is None or args.platform not in (None, platform) or (args.quick and platform in seen):
            continue
        if not seen:
            print(common.head(*COLUMNS.values(), left=tuple(COLUMNS.values())), flush=True)
        seen.add(platform)
        for mesh in args.mesh or (meshes[:1] if args.quick else meshes):
            where = {"target": target, "mesh": mesh, "layers": args.layers}
            for row in run_worker({**where, "quick": args.quick}, environment):
                rows.append({**where, **row})
                print(common.row(*(cell(rows[-1], column) for column in COLUMNS)), flush=True)
    failed = sum(row["result"] != "ok" for row in rows)
    if not rows:
        note("needs flax, and libtpu or CUDA's compiler; --help says what to install")
        return NOT_CHECKED
    common.write_json(args.json, {"rows": rows}, measured=False)
    print(f"\n{len(rows) - failed} programs are right, {failed} are not")
    return FAILED if failed else OK


if __name__ == "__main__":
    sys.exit(main())
