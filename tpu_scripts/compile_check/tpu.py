"""Compiles the TPU kernels for every TPU, without one: `pip install "jax[tpu]"` is all it needs.

    python -m tpu_scripts.compile_check.tpu [--quick] [--bundles] [--target v5e:2x2] [--json FILE]

libtpu brings the compilers that run on a TPU's host, Mosaic and LLO among them: what does not fit into VMEM, is not
aligned, or has no instruction fails here as it fails there. Nothing runs, so there are no times but those of compiling.
``docs/kernels_tpu.md`` says how to read the tables. Exit status: 0, 1 if something did not compile, 2 without libtpu.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TARGETS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
MASKS: dict[str, dict[str, Any]] = {
    "Mistral-7B": {"window": 4096},
    "Gemma-2-9B": {"window": 4096, "soft_cap": 50.0},
}
"""What models mask beyond causality; their heads alone do not say it."""
DECODE_BATCH, PREFILL_CHUNK, CONTEXT = 8, 512, 8192
POOL_TOKENS = 1 << 17
QUANTIZED = ("q8_0/q4_0", "q8_0", "q4_0")
"""Formats of quantized pages, of keys and values."""
MATRIX_UNITS = {"v4": (4, 128), "v5e": (4, 128), "v5p": (4, 128), "v6e": (2, 256), "tpu7x": (2, 256)}
"""Matrix units of a core, and their width: multiply-adds a cycle are their number times the width squared."""
ALU_SLOTS, LOAD_SLOTS, PUSH_SLOTS = 4, 3, 2
"""Vector operations, vector loads and weight registers that one bundle starts at most, as seen in the bundles."""
WORKER_SECONDS = 1500


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="pages of 32 tokens, one pair of quantized formats"
    )
    parser.add_argument("--bundles", action="store_true", help="count the bundles of the inner loops")
    parser.add_argument("--target", action="append", choices=TARGETS, help="this one alone; may be repeated")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        print(
            'needs libtpu, the compiler of TPUs: pip install "jax[tpu]" (a TPU is not needed)',
            file=sys.stderr,
        )
        return 2
    if options.worker:
        work(options.worker, options.quick, options.bundles)
        return 0
    rows: list[dict[str, Any]] = []
    for target in options.target or TARGETS:
        rows += run_worker(target, options.quick, options.bundles)
    print_tables(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    failed = [row for row in rows if row["reason"]]
    print(f"\n{len(rows) - len(failed)} programs compiled, {len(failed)} did not")
    return 1 if failed else 0


def run_worker(target: str, quick: bool, bundles: bool) -> list[dict[str, Any]]:
    """Compiles for one target in a process of its own: libtpu can be set up once in each."""
    with tempfile.TemporaryDirectory() as dump:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any that exists; the topology is named when compiling
            "TPU_LOG_DIR": "disabled",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
        command = [sys.executable, "-m", "tpu_scripts.compile_check.tpu", "--worker", target]
        command += ["--quick"] * quick
        if bundles:
            command.append("--bundles")
            environment["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
            environment["JAXPAGED_LLO_DUMP"] = dump
        folder = Path(__file__).parents[2]
        try:
            done = subprocess.run(
                command, env=environment, cwd=folder, capture_output=True, text=True, timeout=WORKER_SECONDS
            )
        except subprocess.TimeoutExpired:
            return [failure(target, f"not done after {WORKER_SECONDS} s")]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        rows.append(failure(target, done.stderr.strip()[-300:] or f"exit status {done.returncode}"))
    return rows


def failure(target: str, reason: str) -> dict[str, Any]:
    return {"table": "kernels", "target": target, "model": "all", "kind": "", "reason": reason}


# --- in the process of one target ----------------------------------------------------------------------------


def work(target: str, quick: bool, bundles: bool) -> None:
    """Compiles everything for a target; prints one JSON object a line."""
    compiler = Compiler(target)
    from jaxpaged.attention.cases import MODELS

    if bundles:
        for row in bundle_rows(compiler):
            print(json.dumps(row), flush=True)
        return
    for page_size in (32,) if quick else (8, 16, 32, 64):
        for names in same_program(MODELS):
            for kind in ("decode", "prefill"):
                row = compiler.attention(names, MODELS[names[0]], kind, page_size)
                print(json.dumps(row), flush=True)
    for kind in ("decode", "prefill"):
        print(
            json.dumps(compiler.attention(["Llama-3-8B"], MODELS["Llama-3-8B"], kind, 32, dtype="f32")),
            flush=True,
        )
    for dtype in QUANTIZED[:1] if quick else QUANTIZED:
        for page_size in (32,) if quick else (16, 32, 64):
            for names in same_program(MODELS):
                for kind in ("decode", "prefill"):
                    row = compiler.attention(names, MODELS[names[0]], kind, page_size, dtype=dtype)
                    print(json.dumps(row), flush=True)
    for layout, dtype in (
        ("plain", "bf16"),
        ("lanes", "bf16"),
        *(("lanes", dtype) for dtype in QUANTIZED[1:]),
    ):
        for row in compiler.layout(layout, dtype):
            print(json.dumps(row), flush=True)
    for row in compiler.products(quick):
        print(json.dumps(row), flush=True)


def same_program(models: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Names of models, those together whose attention is the same program."""
    groups: dict[str, list[str]] = {}
    for name, heads in models.items():
        groups.setdefault(json.dumps(heads | MASKS.get(name, {})), []).append(name)
    return list(groups.values())


def size_of(pool: Any) -> int:
    """Bytes of the arrays of a pool."""
    import jax

    return sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(pool))


class Compiler:
    """Compiles for one TPU that is not there."""

    def __init__(self, target: str) -> None:
        import numpy as np
        from jax.experimental import topologies
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        self.target = target
        topology = topologies.get_topology_desc(target, platform="tpu")
        # Some operations are lowered for the device of the mesh at hand, so there has to be one.
        self.mesh = Mesh(np.array(topology.devices[:1]), ("device",))
        self.sharding = NamedSharding(self.mesh, PartitionSpec())

    def array(self, shape: tuple[int, ...], dtype: Any) -> Any:
        import jax

        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding)

    def compile(self, function: Any, *arguments: Any, donate: tuple[int, ...] = ()) -> dict[str, Any]:
        """Sizes of the compiled program, or the reason why there is none."""
        import jax

        start = time.perf_counter()
        try:
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                traced = jax.jit(function, donate_argnums=donate).trace(*arguments)
                program = traced.lower(lowering_platforms=("tpu",)).compile()
        except Exception as error:  # Mosaic's have no public name, and whatever it is, it is the result
            return {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "seconds": 0.0}
        memory, cost = program.memory_analysis(), program.cost_analysis()
        return {
            "reason": "",
            "seconds": round(time.perf_counter() - start, 1),
            "temp_bytes": memory.temp_size_in_bytes,
            "code_bytes": memory.generated_code_size_in_bytes,
            "alias_bytes": memory.alias_size_in_bytes,
            "accessed_bytes": int(cost.get("bytes accessed", 0)),
        }

    def products(self, quick: bool) -> Iterator[dict[str, Any]]:
        """Activations times quantized weights of each type: Llama-3-8B's, and of whole blocks alone SmolLM2-135M's."""
        import jax.numpy as jnp
        from jaxpaged_model.quantized import lanes, tpu_kernel
        from jaxpaged_model.quantized.formats import WEIGHT_FORMATS

        for name, fmt in WEIGHT_FORMATS.items():
            sizes = [(6144, 4096)] if quick else [(6144, 4096), (4096, 14336)]
            sizes += [] if fmt.has_steps else [(960, 576)]
            for rows, columns in sizes:
                shapes = lanes.part_shapes(fmt, rows, columns).items()
                parts = {part: self.array(shape.shape, shape.dtype) for part, shape in shapes}
                for tokens, dtype in ((8, jnp.bfloat16), (8, jnp.float32), (512, jnp.bfloat16)):
                    function = functools.partial(tpu_kernel.matmul, fmt)
                    compiled = self.compile(function, self.array((tokens, columns), dtype), parts)
                    yield {
                        "table": "products",
                        "target": self.target,
                        "weights": f"{name} {rows} x {columns}",
                        "kind": f"{tokens} {jnp.dtype(dtype).name}",
                        **compiled,
                    }

    def pages(self, heads: dict[str, Any], page_size: int, dtype: str, layout: str) -> tuple[Any, Any]:
        """The format, and a pool of one layer. Quantized rows are turned first, which makes the longer programs."""
        import jax

        from jaxpaged.pages.formats import BlockFormat, page_format

        storage = page_format(dtype)
        if isinstance(storage, BlockFormat):
            storage = storage.with_hadamard(True)
        if layout == "lanes":
            storage = storage.on_lanes(heads["head_dim"])
        sizes = POOL_TOKENS // page_size, heads["num_kv_heads"], page_size, heads["head_dim"]
        pool = jax.eval_shape(lambda: storage.create(*sizes))
        return storage, jax.tree.map(lambda part: self.array(part.shape, part.dtype), pool)

    def attention(
        self,
        names: list[str],
        heads: dict[str, Any],
        kind: str,
        page_size: int,
        *,
        dtype: str = "bf16",
        layout: str = "lanes",
        rope: bool = True,
        step: bool = False,
    ) -> dict[str, Any]:
        """One row: attention of a decode batch, or of a chunk of one prompt; ``step``: the write before it, too.

        ``dtype``: name of the format of pages, of keys and of values where they differ: "q8_0/q4_0".
        """
        import jax.numpy as jnp

        from jaxpaged.attention.base import make_config
        from jaxpaged.attention.tpu import backend as mosaic_tpu
        from jaxpaged.attention.tpu.block_sizes import describe
        from jaxpaged.pages.batch import Batch
        from jaxpaged.pages.block_table import BlockTable
        from jaxpaged.pages.formats.lane_blocks import LaneBlockFormat
        from jaxpaged.pages.rope import Rope

        tokens, max_seqs, max_q_len = PREFILL_CHUNK, 1, None
        if kind == "decode":
            tokens, max_seqs, max_q_len = DECODE_BATCH, DECODE_BATCH, 1
        q_dtype = jnp.float32 if dtype == "f32" else jnp.bfloat16
        head_dim, num_kv_heads = heads["head_dim"], heads["num_kv_heads"]
        q = self.array((tokens, heads["num_q_heads"], head_dim), q_dtype)
        rows = self.array((tokens, num_kv_heads, head_dim), q_dtype)
        names_of = dtype.split("/")
        (k_storage, k_pool), (v_storage, v_pool) = (
            self.pages(heads, page_size, name, layout) for name in (names_of[0], names_of[-1])
        )
        entries = CONTEXT // page_size

        def integers(*shape: int) -> Any:
            return self.array(shape, jnp.int32)

        table = BlockTable(*(integers(max_seqs, entries) for _ in range(5)), integers(max_seqs))
        batch = Batch(*(integers(tokens) for _ in range(5)), integers(max_seqs + 1), max_q_len=max_q_len)
        masks = MASKS.get(names[0], {})
        config = make_config(head_dim, None, masks.get("window"), masks.get("soft_cap"))
        turns = Rope.create([1e4 ** (-2 * i / head_dim) for i in range(head_dim // 2)]) if rope else None

        def attend(k_pages: Any, v_pages: Any, q: Any, table: Any, batch: Any, rope: Any) -> Any:
            return mosaic_tpu.paged_attention(q, k_pages, v_pages, table, batch, config, None, rope)

        def write_and_attend(k_pages: Any, v_pages: Any, k: Any, v: Any, *rest: Any) -> Any:
            batch = rest[2]
            k_pages = k_storage.write(k_pages, batch.page, batch.slot, k)
            v_pages = v_storage.write(v_pages, batch.page, batch.slot, v)
            return attend(k_pages, v_pages, *rest), k_pages, v_pages

        if step:
            result = self.compile(
                write_and_attend, k_pool, v_pool, rows, rows, q, table, batch, turns, donate=(0, 1)
            )
        else:
            result = self.compile(attend, k_pool, v_pool, q, table, batch, turns)
        options = {"q_dtype": q_dtype, "max_seqs": max_seqs, "max_pages_per_seq": entries, "rope": rope}
        k_stored, v_stored = (
            storage if isinstance(storage, LaneBlockFormat) else pool.dtype
            for storage, pool in ((k_storage, k_pool), (v_storage, v_pool))
        )
        told = describe(q.shape, k_pool.shape, k_stored, max_q_len, v_dtype=v_stored, **options)
        return result | {
            "table": "kernels",
            "target": self.target,
            "model": ", ".join(names),
            "kind": kind,
            "page_size": page_size,
            "dtype": dtype,
            "layout": layout,
            "blocks": f"{told['blocks'].pages} pages x {told['blocks'].queries} queries",
            "vmem_bytes": told["vmem_bytes"],
            "smem_bytes": told["smem_bytes"],
            "bytes_per_token": told["bytes_per_token"],
            "pool_bytes": size_of(k_pool) + size_of(v_pool),
        }

    def layout(self, layout: str, dtype: str) -> list[dict[str, Any]]:
        """Rows about what a step does to pools of head_dim 64: attends, writes, and both with donated pools."""
        import jax.numpy as jnp

        from jaxpaged.attention.cases import SMOLLM2_135M as HEADS

        storage, pool = self.pages(HEADS, 32, dtype, layout)

        def write(tokens: int) -> dict[str, Any]:
            indices = self.array((tokens,), jnp.int32)
            rows = self.array((tokens, HEADS["num_kv_heads"], HEADS["head_dim"]), jnp.bfloat16)
            return self.compile(storage.write, pool, indices, indices, rows, donate=(0,))

        def attention(kind: str, step: bool) -> dict[str, Any]:
            return self.attention(["SmolLM2-135M"], HEADS, kind, 32, dtype=dtype, layout=layout, step=step)

        programs = {
            "attention": attention("decode", False),
            f"write of {DECODE_BATCH} keys": write(DECODE_BATCH),
            "donated step": attention("decode", True),
        }
        if layout == "lanes":
            programs[f"write of {PREFILL_CHUNK} keys"] = write(PREFILL_CHUNK)
            programs["donated chunk"] = attention("prefill", True)
        shared = {
            "table": "layout",
            "target": self.target,
            "layout": f"{layout} {dtype} {list(pool.shape)}",
            "pool_bytes": size_of(pool),
        }
        return [row | shared | {"kind": kind} for kind, row in programs.items()]


# --- bundles -------------------------------------------------------------------------------------------------


def bundle_rows(compiler: Compiler) -> list[dict[str, Any]]:
    """Rows about the bundles of one K/V block: ours, and those of JAX's kernel, compiled alike.

    Llama-3-8B's heads, bfloat16 and quantized, pages of 32 tokens; blocks as this project chooses them.
    """
    from jaxpaged.attention.cases import LLAMA_3_8B

    found = []
    for kind, dtype in itertools.product(("decode", "prefill"), ("bf16", "q8_0", "q4_0")):
        row = compiler.attention(["Llama-3-8B"], LLAMA_3_8B, kind, 32, rope=False, dtype=dtype)
        pages, queries = (int(n) for n in re.findall(r"\d+", row["blocks"]))
        shared = {
            "table": "bundles",
            "target": compiler.target,
            "kind": kind,
            "block": f"{pages * 32} tokens x {queries} queries",
            "least": least_bundles(compiler.target, LLAMA_3_8B, pages * 32, queries),
        }
        rows_of_scores = queries * LLAMA_3_8B["num_q_heads"] // LLAMA_3_8B["num_kv_heads"]
        at_once = 8 if rows_of_scores <= 32 and dtype == "bf16" else 2
        ours = shared | loops(f"paged_attention_{queries}x{pages}", LLAMA_3_8B["num_kv_heads"] // at_once)
        found.append(row | ours | {"kernel": "jaxpaged" if dtype == "bf16" else f"jaxpaged, {dtype}"})
        if dtype != "bf16":
            continue
        theirs = jax_kernel(compiler, kind, pages, max(queries, 8))
        found.append(
            theirs | shared | loops("ragged_paged_attention", 1) | {"kernel": "jax ragged_paged_attention"}
        )
    return found


def jax_kernel(compiler: Compiler, kind: str, pages: int, queries: int) -> dict[str, Any]:
    """JAX's own kernel over the same work; its blocks of queries have 8 rows at least, its pages hold K beside V."""
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    from jaxpaged.attention.cases import LLAMA_3_8B

    heads, dim = LLAMA_3_8B["num_q_heads"], LLAMA_3_8B["head_dim"]
    tokens, max_seqs = (DECODE_BATCH, DECODE_BATCH) if kind == "decode" else (PREFILL_CHUNK, 1)

    def attend(q: Any, kv: Any, lens: Any, indices: Any, cu_q_lens: Any, count: Any) -> Any:
        return ragged_paged_attention(
            q, kv, lens, indices, cu_q_lens, count, sm_scale=dim**-0.5, num_kv_pages_per_block=pages,
            num_queries_per_block=queries, vmem_limit_bytes=64 << 20,
        )  # fmt: skip

    def integers(*shape: int) -> Any:
        return compiler.array(shape, jnp.int32)

    return compiler.compile(
        attend,
        compiler.array((tokens, heads, dim), jnp.bfloat16),
        compiler.array((POOL_TOKENS // 32, 32, 2 * LLAMA_3_8B["num_kv_heads"], dim), jnp.bfloat16),
        integers(max_seqs),
        integers(max_seqs, CONTEXT // 32),
        integers(max_seqs + 1),
        integers(1),
    )


def least_bundles(target: str, heads: dict[str, Any], tokens: int, queries: int) -> int:
    """Bundles that the products and the softmax of one K/V block take at least, all heads.

    The busiest unit decides: the matrix units (two products of rows x tokens x head_dim, a head that is narrower than
    they are taking their whole width, or, where rows are few, the loading of keys and values as weights); the vector
    units (scale, compare, select, maximum, subtract, sum and half a conversion a score; two operations a number of the
    weighted sum); the one unit for powers.
    """
    units, width = MATRIX_UNITS[target.split(":")[0]]
    dim = heads["head_dim"]
    rows = queries * heads["num_q_heads"] // heads["num_kv_heads"]
    rows += -rows % 8
    registers = 2 * tokens * dim * 2 // 4096  # of keys and values, bfloat16
    scores = rows * tokens
    matrix = max(2 * scores * -(-dim // width) / (units * width), registers / PUSH_SLOTS)
    vector = (6.5 * scores + 2 * rows * dim) / 1024 / ALU_SLOTS
    return round(heads["num_kv_heads"] * max(matrix, vector, scores / 1024, registers / LOAD_SLOTS))


def loops(kernel: str, trips: int) -> dict[str, Any]:
    """Bundles of a kernel's last dump, which is removed: those of the loop with its products, and all.

    ``trips``: how often that loop runs for one K/V block.
    """
    folder = Path(os.environ["JAXPAGED_LLO_DUMP"])
    files = [
        path for path in folder.glob(f"*{kernel}*final_bundles.txt") if "schedule-analysis" not in path.name
    ]
    if not files:
        return {"bundles": None, "total": None}
    regions = read_regions(max(files, key=lambda path: path.stat().st_mtime))
    for path in folder.iterdir():
        path.unlink()
    products = sum(region["bundles"] for region in regions if region["instructions"]["vmatmul"])
    instructions: Counter[str] = sum(
        (region["instructions"] for region in regions if region["instructions"]["vmatmul"]), Counter()
    )
    return {
        "bundles": products * trips,
        "total": sum(region["bundles"] for region in regions),
        "instructions": {name: count * trips for name, count in instructions.items()},
    }


def read_regions(path: Path) -> list[dict[str, Any]]:
    """The bundles of a kernel, cut where the loop depth changes or a loop begins."""
    regions: list[dict[str, Any]] = []
    for line in path.open():
        bundle = re.match(r"\s*(?:\d+:)?\s*(?:0x[0-9a-f]+|0)\s*([A-Z]{2})?\s*:([ >]*)\{(.*)", line)
        if not bundle:
            continue
        depth = bundle[2].count(">")
        if not regions or regions[-1]["depth"] != depth or bundle[1] in ("LB", "LH"):
            regions.append({"depth": depth, "bundles": 0, "instructions": Counter()})
        regions[-1]["bundles"] += 1
        regions[-1]["instructions"].update(
            re.findall(r"\b(vmatmul|vmatpush|vpow2|vld|vst|vpop)\b", bundle[3])
        )
    return regions


# --- tables --------------------------------------------------------------------------------------------------


def print_tables(rows: list[dict[str, Any]]) -> None:
    def mib(row: dict[str, Any], name: str) -> str:
        return f"{row[name] / 2**20:.2f}" if name in row else ""

    def table(name: str, header: str, cells: Any) -> None:
        chosen = [row for row in rows if row["table"] == name]
        if chosen:
            print(f"\n| {header} |\n|{'---|' * (header.count('|') + 1)}")
            for row in chosen:
                print("| " + " | ".join(str(cell) for cell in cells(row)) + " |")

    table(
        "kernels",
        "target | model | kind | page | pages of | blocks | VMEM MiB | temp MiB | code MiB | s | result",
        lambda row: (
            row["target"],
            row["model"],
            row["kind"],
            row.get("page_size", ""),
            row.get("dtype", ""),
            row.get("blocks", ""),
            mib(row, "vmem_bytes"),
            mib(row, "temp_bytes"),
            mib(row, "code_bytes"),
            row.get("seconds", ""),
            row["reason"] or "ok",
        ),
    )
    table(
        "layout",
        "target | pool | program | one pool MiB | temp MiB | in place MiB | accessed MiB | code MiB | result",
        lambda row: (
            row["target"],
            row["layout"],
            row["kind"],
            mib(row, "pool_bytes"),
            mib(row, "temp_bytes"),
            mib(row, "alias_bytes"),
            mib(row, "accessed_bytes"),
            mib(row, "code_bytes"),
            row["reason"] or "ok",
        ),
    )
    table(
        "products",
        "target | weights | rows of activations | temp MiB | code MiB | s | result",
        lambda row: (
            row["target"],
            row["weights"],
            row["kind"],
            mib(row, "temp_bytes"),
            mib(row, "code_bytes"),
            row["seconds"],
            row["reason"] or "ok",
        ),
    )
    table(
        "bundles",
        "target | kind | K/V block | kernel | bundles a block | least | bundles of the kernel | result",
        lambda row: (
            row["target"],
            row["kind"],
            row["block"],
            row["kernel"],
            row["bundles"],
            row["least"],
            row["total"],
            row["reason"] or "ok",
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
