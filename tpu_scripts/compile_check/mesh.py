"""Compiles whole steps of a model for eight TPUs and four GPUs, without one, and counts what devices tell each other.

    python -m tpu_scripts.compile_check.mesh [--quick] [--platform tpu] [--target v5e:2x4] [--mesh data=2,tensor=4]

Needs: pip install -e ".[model,tpu]", or ".[model]" and jax-cuda13-plugin, jax-cuda13-pjrt (both of jax's version),
nvidia-cuda-nvcc and absl-py. No driver and no device.

The model has the sizes of Llama-3.1-8B and fewer layers, in bfloat16; pages of 32 tokens, 8 sequences of up to 8192 on
each data shard. On each mesh: a step of one token a sequence, a step of 512 tokens of prompts, both with their reserve,
attention by the platform's own kernel and the likeliest token; the reserve alone, and every operation on sequences. On
the first mesh of a platform also the loop of ``generate``. Compilers are the real ones; nothing runs, so the times are
those of compiling.

Right is: every program compiles; a step sums twice a layer over "tensor", with a context that is spread it merges with
two more over "context", and there is no other collective, but for the copy of a shared page between the devices of a
context; operations on sequences have none; every layer has its kernel; and pools are written where they lie, without
room for a copy. Exit status: 0, all of it is right; 1, something is not; 2, nothing could be checked.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tpu_scripts.compile_check.gpu import H200, ptxas_folder
from tpu_scripts.compile_check.hlo import Contents, contents_of

ROOT = Path(__file__).resolve().parents[2]
CHIPS_8 = ("data=2,tensor=4", "tensor=8", "data=8", "context=2,tensor=4")
CHIPS_4 = ("data=2,tensor=2", "tensor=4", "data=4", "context=2,tensor=2")
TARGETS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "v5e:2x4": ("tpu", CHIPS_8),
    "v6e:2x4": ("tpu", CHIPS_8),
    "H200:1x1x4": ("gpu", CHIPS_4),
}
"""Platform and meshes of each; of a GPU the numbers are slices, hosts of each, and GPUs of each: four on one host."""
KERNELS = {"tpu": "mosaic_tpu", "gpu": "mosaic_gpu"}
PAGE_SIZE, CONTEXT, MAX_SEQS, PROMPT = 32, 8192, 8, 512
POOL_TOKENS = 1 << 19
"""Tokens of a pool: more than a chip's inner memory holds, where compilers would keep a small pool for a while."""
STEPS = {"decode": MAX_SEQS, "prompt": PROMPT}
"""Programs that run the model once, and the tokens of each."""
QUERIES = ("seq_length", "seq_position_min", "seq_position_max")
"""Programs that change nothing: the cache stays as it is."""
WINDOW = 4096
"""What a layer sees, where pages behind it are given back."""
WORKER_SECONDS = 7200
COLUMNS = {
    "target": "target", "mesh": "mesh", "program": "program", "result": "result", "seconds": "s",
    "collectives": "collectives", "payload": "bytes of each", "kernels": "kernels", "argument_bytes": "arguments MiB",
    "pool_bytes": "of them pool", "temp_bytes": "temp MiB",
}  # fmt: skip


# --- what has to be in it ---------------------------------------------------------------------------------------


def expected(program: str, axes: Mapping[str, int], layers: int) -> Counter[tuple[str, str, bool]]:
    """How many collectives a program should have: of ``(kind, over, in_loop)``.

    Of ``generate`` those in its loops, which are two: one reads prompts, the other decodes.
    """
    counts: Counter[tuple[str, str, bool]] = Counter()
    runs = {"generate": 2}.get(program, int(program in STEPS))
    for axis in ("tensor", "context"):
        if axes[axis] > 1 and runs:
            counts["all-reduce", axis, program == "generate"] += runs * 2 * layers
    if axes["context"] > 1 and (runs or program == "reserve"):
        counts["all-reduce", "context", True] += runs or 1  # copies of shared pages
    return counts


def verdict(
    program: str, axes: Mapping[str, int], layers: int, found: Contents, memory: Mapping[str, int]
) -> str:
    """ "ok", or what is wrong.

    Args:
      memory: ``alias_bytes``, ``temp_bytes`` and ``pool_bytes`` of one device.
    """
    # Sums over one device move nothing; compilers are free to leave them.
    told = [one for one in found.collectives if one.over]
    if program == "generate":  # behind its loops every device is told every shard's result
        told = [one for one in told if one.in_loop or one.over != "data"]
    counts = Counter((one.kind, one.over, one.in_loop) for one in told)
    wanted = expected(program, axes, layers)
    problems = []
    if counts != wanted:
        problems.append(f"collectives: {_listed(wanted)} expected, {_listed(counts)} found")
    if (program in STEPS or program == "generate") and (found.kernels < layers or found.kernels % layers):
        problems.append(f"{found.kernels} attention kernels in {layers} layers")
    if program not in QUERIES and memory["alias_bytes"] < memory["pool_bytes"]:
        problems.append(f"pool not in place: {memory['alias_bytes']} of {memory['pool_bytes']} bytes aliased")
    # Keys or values of one layer; nothing else that is large has to be kept for a while.
    if memory["temp_bytes"] >= memory["pool_bytes"] // (2 * layers):
        problems.append(f"{memory['temp_bytes']} bytes of temporaries: room for a copy of a layer's pool")
    return "; ".join(problems) or "ok"


def _listed(counts: Mapping[tuple[str, str, bool], int]) -> str:
    parts = [
        f"{count} {kind} over {over or 'one device'}{' in a loop' * in_loop}"
        for (kind, over, in_loop), count in sorted(counts.items())
    ]
    return ", ".join(parts) or "none"


def row_of(found: Contents) -> dict[str, Any]:
    """What a row of the table says of a program's contents."""
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


# --- in the process of one mesh ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A function, what it is given and gives, and shapes in the place of arrays."""

    function: Callable[..., Any]
    takes: tuple[str, ...]
    gives: str | tuple[str, ...]
    arguments: tuple[Any, ...]


class MeshCompiler:
    """Compiles programs for a mesh of devices that are not there."""

    def __init__(self, target: str, mesh: str, layers: int) -> None:
        import jax
        import jax.numpy as jnp
        from jax.experimental import topologies
        from jaxpaged_model.config import ModelConfig, RopeScaling
        from jaxpaged_model.llama import abstract_params, functional

        from jaxpaged import PagedKVCache
        from jaxpaged.sharding.context import ContextKVCache
        from jaxpaged.sharding.mesh import CONTEXT as SPREAD
        from jaxpaged.sharding.mesh import (
            DATA,
            PARAMS,
            SPECS,
            TENSOR,
            ShardedCache,
            cache_specs,
            make_mesh,
            parse_mesh,
        )

        self.platform = TARGETS[target][0]
        if self.platform == "gpu":
            topology = topologies.get_topology_desc(
                platform="cuda", target_config=H200, topology=target.partition(":")[2]
            )
        else:
            topology = topologies.get_topology_desc(target, platform="tpu")
        self.mesh = make_mesh(**parse_mesh(mesh), devices=topology.devices)
        self.axes = dict(self.mesh.shape)
        scaling = RopeScaling("llama3", factor=8.0, original_context_length=8192)
        config = ModelConfig(
            "llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=layers, num_q_heads=32,
            num_kv_heads=8, head_dim=128, context_length=131072, rope_theta=500000.0, rope_scaling=scaling,
        )  # fmt: skip
        local = config.shard(self.axes[TENSOR])
        self.layers = layers
        self.model = functional(local, jnp.bfloat16, axis=TENSOR)
        entries = CONTEXT // PAGE_SIZE
        sizes: dict[str, Any] = {
            "num_layers": layers, "num_kv_heads": local.num_kv_heads, "head_dim": local.head_dim,
            "num_pages": POOL_TOKENS // PAGE_SIZE, "page_size": PAGE_SIZE,
            "max_seqs": MAX_SEQS, "max_pages_per_seq": entries,
            "dtype": "bf16", "layout": "lanes" if self.platform == "tpu" else "plain",
        }  # fmt: skip

        def make_cache() -> Any:
            if self.axes[SPREAD] > 1:
                return ContextKVCache.create(**sizes, axis_size=self.axes[SPREAD])
            return PagedKVCache.create(**sizes)

        def make_params() -> Any:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_params(local, jnp.bfloat16))

        own = jax.eval_shape(make_cache)
        self.pool_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((own.k_pages, own.v_pages)))
        self.cache = ShardedCache(self.stack(make_cache, cache_specs(own)), self.mesh, config.num_kv_heads)
        self.params = self.stack(make_params, SPECS[PARAMS])
        self.shards = self.axes[DATA]

    def stack(self, make: Callable[[], Any], specs: Any) -> Any:
        """What ``make`` makes on each device, as it lies over the mesh: shapes and shardings."""
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        from jaxpaged.sharding.mesh import stacked

        def placed(spec: Any, part: Any) -> Any:
            sharding = NamedSharding(self.mesh, spec)
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part)

        whole = jax.eval_shape(
            jax.shard_map(
                lambda: stacked(make(), specs), mesh=self.mesh, in_specs=(), out_specs=specs, check_vma=False
            )
        )
        return jax.tree.map(placed, specs, whole, is_leaf=lambda node: isinstance(node, PartitionSpec))

    def rows(self, *shape: int, dtype: Any = np.int32) -> Any:
        """An argument that each data shard has of its own."""
        import jax.numpy as jnp

        from jaxpaged.sharding.mesh import BATCH, SPECS

        return self.stack(lambda: jnp.zeros(shape, dtype), SPECS[BATCH])

    def programs(self, quick: bool, whole: bool) -> Iterator[tuple[str, Program]]:
        """All of them; ``whole``: the loop of ``generate`` too."""
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec

        from jaxpaged.cache import sequences
        from jaxpaged.sharding.mesh import BATCH, CACHE, PARAMS, REPLICATED

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
            takes, gives = (PARAMS, CACHE, BATCH, BATCH), (CACHE, BATCH)
            yield name, Program(functools.partial(step, tokens), takes, gives, given)

        def edit(function: Any, gives: Any, *given: Any) -> Program:
            takes = tuple(REPLICATED if x is same else BATCH for x in given)
            return Program(function, (CACHE, *takes), gives, (self.cache, *given))

        def reserve(cache: Any, num_new: Any) -> Any:
            return cache.reserve(num_new, num_tokens=PROMPT)

        yield "reserve", edit(reserve, (CACHE, BATCH, BATCH), counts)
        if quick:
            return
        pair = (CACHE, BATCH)
        yield "seq_remove", edit(sequences.seq_remove, pair, marked, same, same)
        yield "seq_copy", edit(sequences.seq_copy, pair, same, same, same, same)
        yield "seq_keep", edit(sequences.seq_keep, pair, same)
        yield "seq_shift", edit(sequences.seq_shift, pair, same, same, same, same)
        yield "seq_reorder", edit(sequences.seq_reorder, CACHE, counts)
        yield "seq_drop_unseen", edit(lambda c: sequences.seq_drop_unseen(c, WINDOW), CACHE)
        for query in QUERIES:
            yield query, edit(getattr(sequences, query), BATCH)
        if whole:
            yield "generate", self.generate()

    def generate(self) -> Program:
        """The whole loop, for a prompt for each sequence."""
        import jax

        from jaxpaged.generation import loop as generation
        from jaxpaged.generation.request import make_request
        from jaxpaged.sharding.mesh import BATCH, CACHE, GATHERED, PARAMS, SPECS

        prompts = [[1] * PROMPT] * MAX_SEQS
        # As of one shard; on the mesh each has as much.
        request, shape = make_request(
            MAX_SEQS,
            prompts,
            64,
            None,
            (2,),
            PROMPT,
            keep=False,
            num_samples=1,
            context_shift=None,
            window=None,
        )
        given = self.stack(
            lambda: jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), request), SPECS[BATCH]
        )
        loop = functools.partial(generation._generate, self.model, shape)
        return Program(loop, (PARAMS, CACHE, BATCH), (GATHERED, CACHE), (self.params, self.cache, given))

    def compile(self, name: str, program: Program) -> dict[str, Any]:
        """The row of one program."""
        import jax

        from jaxpaged.sharding.mesh import CACHE, over_mesh

        start = time.perf_counter()
        lowered_for = {"gpu": "cuda"}.get(self.platform, self.platform)
        function = over_mesh(program.function, program.takes, program.gives)
        donated = () if name in QUERIES else program.takes.index(CACHE)
        try:
            traced = jax.jit(function, donate_argnums=donated).trace(*program.arguments)
            compiled = traced.lower(lowering_platforms=(lowered_for,)).compile()
        except Exception as error:  # compilers' have no public name, and whatever it is, it is the result
            return {"result": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        seconds, sizes = time.perf_counter() - start, compiled.memory_analysis()
        memory = {
            "argument_bytes": sizes.argument_size_in_bytes,
            "alias_bytes": sizes.alias_size_in_bytes,
            "temp_bytes": sizes.temp_size_in_bytes,
            "code_bytes": sizes.generated_code_size_in_bytes,
            "pool_bytes": self.pool_bytes,
        }
        found = contents_of(compiled.as_text(), self.axes)
        result = verdict(name, self.axes, self.layers, found, memory)
        return {"result": result, "seconds": round(seconds, 1), **row_of(found), **memory}


def work(target: str, mesh: str, layers: int, quick: bool, rows: Path) -> None:
    """Compiles everything for one mesh: a line of the table and a line of JSON each."""
    compiler = MeshCompiler(target, mesh, layers)
    platform, meshes = TARGETS[target]
    first = next(name for name, (other, _) in TARGETS.items() if other == platform)
    whole = (target, mesh) == (first, meshes[0])
    for name, program in compiler.programs(quick, whole):
        row = {"target": target, "mesh": mesh, "program": name, "layers": layers}
        row |= compiler.compile(name, program)
        print_row(row)
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")


# --- all of them ------------------------------------------------------------------------------------------------


def print_row(row: Mapping[str, Any]) -> None:
    def cell(name: str) -> str:
        value = row.get(name, "")
        return f"{value / 2**20:.1f}" if name.endswith("_bytes") and value != "" else str(value)

    print("| " + " | ".join(map(cell, COLUMNS)) + " |", flush=True)


def environment_of(platform: str) -> dict[str, str] | None:
    """What a worker's environment has more; None where the platform's compiler is not here, or what a model needs."""
    if importlib.util.find_spec("flax") is None:
        return None
    shared = {"JAX_PLATFORMS": "cpu", "JAXPAGED_ATTENTION": KERNELS[platform]}
    if platform == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            return None
        return shared | {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any that exists; the topology is named when compiling
            "TPU_LOG_DIR": "disabled",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
    folder = ptxas_folder()
    if importlib.util.find_spec("jax_cuda13_plugin") is None or folder is None:
        return None
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return shared | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "PATH": path}


def run_worker(
    target: str, mesh: str, layers: int, quick: bool, environment: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Compiles for one mesh in a process of its own: a compiler that aborts takes no other mesh with it."""
    with tempfile.TemporaryDirectory() as folder:
        rows, said = Path(folder) / "rows.jsonl", Path(folder) / "stderr"
        command = [sys.executable, "-m", "tpu_scripts.compile_check.mesh", "--worker", str(rows)]
        command += ["--target", target, "--mesh", mesh, "--layers", str(layers)] + ["--quick"] * quick
        problem = ""
        with said.open("w") as errors:
            try:
                done = subprocess.run(
                    command, env={**os.environ, **environment}, cwd=ROOT, stderr=errors, check=False,
                    timeout=WORKER_SECONDS,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                problem = f"not done after {WORKER_SECONDS} s"
            else:
                if done.returncode:
                    problem = f"exit status {done.returncode}: {' '.join(said.read_text().split())[-300:]}"
        found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    if problem:
        found.append({"target": target, "mesh": mesh, "program": "all others", "result": problem})
        print_row(found[-1])
    return found


def main() -> int:
    from jaxpaged.sharding.mesh import MeshError, parse_mesh
    from tpu_scripts.common import Parser, add_json, check_writable, positive

    parser = Parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="decode and reserve, on one mesh of a platform")
    parser.add_argument("--platform", choices=KERNELS, help="this one alone")
    parser.add_argument("--target", action="append", choices=TARGETS, help="this one alone; may be repeated")
    parser.add_argument("--mesh", action="append", metavar="AXES", help="this one alone; may be repeated")
    parser.add_argument("--layers", type=positive, default=2, help="of the model (default: %(default)s)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    add_json(parser)
    args = parser.parse_args()
    if args.worker is not None:
        work(args.target[0], args.mesh[0], args.layers, args.quick, args.worker)
        return 0
    check_writable(parser, args.json)
    for mesh in args.mesh or ():
        try:
            parse_mesh(mesh)
        except MeshError as error:
            parser.error(f"--mesh: {error}")
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for target in args.target or TARGETS:
        platform, meshes = TARGETS[target]
        environment = environment_of(platform)
        if environment is None or args.platform not in (None, platform) or (args.quick and platform in seen):
            continue
        if not seen:
            print(f"| {' | '.join(COLUMNS.values())} |\n|{'---|' * len(COLUMNS)}", flush=True)
        seen.add(platform)
        for mesh in args.mesh or (meshes[:1] if args.quick else meshes):
            rows += run_worker(target, mesh, args.layers, args.quick, environment)
    failed = [row for row in rows if row["result"] != "ok"]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if not rows:
        print("needs flax, and libtpu or CUDA's compiler; --help says what to install", file=sys.stderr)
        return 2
    print(f"\n{len(rows) - len(failed)} programs are right, {len(failed)} are not")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
