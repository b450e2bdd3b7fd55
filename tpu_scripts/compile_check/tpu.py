"""Compiles the TPU kernels for every TPU, without one.

    pip install "jax[tpu]"
    python -m tpu_scripts.compile_check.tpu [--quick] [--bundles] [--target v5e:2x2] [--json FILE]

Needs: libtpu, which the line above installs.

libtpu brings the compilers that run on a TPU's host, Mosaic and LLO among them: what does not fit into VMEM, is not
aligned, or has no instruction fails here as it fails there. Nothing runs, so there are no times but those of compiling.
The last table compiles whole steps of a model (compile_check.steps).
docs/internals/kernels_tpu.md explains the tables. Exit status: 0; 1 if something did not compile; 2 without libtpu.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxpaged.attention.base import make_config
from jaxpaged.attention.cases import LLAMA_3_8B, MODELS, SMOLLM2_135M
from jaxpaged.attention.tpu import backend as mosaic_tpu
from jaxpaged.attention.tpu.block_sizes import describe
from jaxpaged.pages.formats import BlockFormat, page_format
from jaxpaged.pages.formats.ggml import BLOCK
from jaxpaged.pages.formats.lane_blocks import LaneBlockFormat
from tpu_scripts import common
from tpu_scripts.common import Parser, note
from tpu_scripts.compile_check.devices import (
    CONTEXT,
    FAILED,
    LLAMA_3_8B_PRODUCTS,
    MASKS,
    NOT_CHECKED,
    OK,
    Compiler,
    cell,
    environment,
    num_bytes,
    same_heads,
)
from tpu_scripts.compile_check.steps import step_rows
from tpu_scripts.compile_check.value_heads import value_head_rows
from tpu_scripts.workers import Worker, WorkerFailed, run_as_worker

TARGETS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
DECODE_BATCH, PREFILL_CHUNK = 8, 512
POOL_TOKENS = 1 << 17
KINDS = ("decode", "prefill")
BATCHES = (1, 64)
"""Other numbers of sequences of a decode step, of pages of 32 tokens."""
QUANTIZED = ("q8_0/q4_0", "q8_0", "q4_0")
"""Formats of quantized pages, of keys and values."""
MATRIX_UNITS = {"v4": (4, 128), "v5e": (4, 128), "v5p": (4, 128), "v6e": (2, 256), "tpu7x": (2, 256)}
"""Matrix units of a core, and their width: multiply-adds per cycle are their number times the width squared."""
ALU_SLOTS, LOAD_SLOTS, PUSH_SLOTS = 4, 3, 2
"""Vector operations, vector loads and weight registers that one bundle starts at most, as seen in the bundles."""
TABLES = {
    "kernels": "target, model, kind, page_size, dtype, blocks, vmem_mib, temp_mib, code_mib, seconds, result",
    "layout": "target, layout, kind, pool_mib, temp_mib, alias_mib, accessed_mib, code_mib, result",
    "products": "target, weights, kind, temp_mib, code_mib, seconds, result",
    "steps": "target, model, weights, pages, kind, pool_mib, alias_mib, temp_mib, most_mib, code_mib, seconds, result",
    "bundles": "target, kind, block, kernel, bundles, least, total, result",
}
"""Columns of each table."""
HEADS = {
    "page_size": "page",
    "dtype": "pages of",
    "vmem_mib": "VMEM MiB",
    "pool_mib": "pool MiB",
    "alias_mib": "in place MiB",
    "accessed_mib": "accessed MiB",
    "temp_mib": "temp MiB",
    "most_mib": "at most MiB",
    "code_mib": "code MiB",
    "seconds": "s",
    "layout": "pool",
    "block": "K/V block",
    "bundles": "bundles per block",
    "total": "bundles of the kernel",
}


def main() -> int:
    if run_as_worker(work):
        return OK
    parser = Parser(__doc__, json=None)
    parser.flag("--quick", "only pages of 32 tokens, one pair of quantized formats")
    parser.flag("--bundles", "count the bundles of the inner loops")
    parser.add("--target", "only this target; may be repeated", action="append", choices=TARGETS)
    args = parser.parse()
    found = environment("tpu")
    if found is None:
        note('needs libtpu, the compiler of TPUs: pip install "jax[tpu]" (a TPU is not needed)')
        return NOT_CHECKED
    rows: list[dict[str, Any]] = []
    for target in args.target or TARGETS:  # a process for each: libtpu can be set up once per process
        task = {"target": target, "quick": args.quick, "bundles": args.bundles}
        with tempfile.TemporaryDirectory() as dump:
            flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
            dumped = {"LIBTPU_INIT_ARGS": flags, "JAXPAGED_LLO_DUMP": dump} if args.bundles else {}
            variables = {**found, **dumped, "JAXPAGED_ATTENTION": "mosaic_tpu"}
            with Worker("tpu_scripts.compile_check.tpu", task, variables, limit=1500) as worker:
                try:
                    rows += worker.rows()
                except WorkerFailed as reason:
                    rows.append({"table": "kernels", "target": target, "model": "all", "result": str(reason)})
    print_tables(rows)
    common.write_json(args.json, {"rows": rows}, measured=False)
    failed = sum(row["result"] != "ok" for row in rows)
    print(f"\n{len(rows) - failed} programs compiled, {failed} did not")
    return FAILED if failed else OK


def print_tables(rows: list[dict[str, Any]]) -> None:
    for name, columns in TABLES.items():
        names = columns.split(", ")
        chosen = [row for row in rows if row["table"] == name]
        if chosen:
            heads = [HEADS.get(column, column) for column in names]
            if name == "products":
                heads[2] = "rows of activations"
            elif name == "layout":
                heads[2] = "program"
            elif name == "steps":
                heads[4] = "step"
            print(f"\n{common.head(*heads, left=heads)}")
            for row in chosen:
                print(common.row(*(cell(row, column) for column in names)))


def work(target: str, quick: bool, bundles: bool) -> Iterator[dict[str, Any]]:
    """Compiles everything for a target."""
    compiler = TpuCompiler(target)
    for row in bundle_rows(compiler) if bundles else compiler.rows(quick):
        yield row | {"target": target}


class TpuCompiler(Compiler):
    """Compiles for one TPU."""

    def rows(self, quick: bool) -> Iterator[dict[str, Any]]:
        for page_size in (32,) if quick else (8, 16, 32, 64):
            for names, kind in itertools.product(same_heads(MODELS), KINDS):
                yield self.attention(names, kind, page_size)
        if not quick:
            for names, count in itertools.product(same_heads(MODELS), BATCHES):
                yield self.attention(names, "decode", 32, batch=count)
        for kind in KINDS:
            yield self.attention(["Llama-3-8B"], kind, 32, dtype="f32")
        blocks = {name: heads for name, heads in MODELS.items() if heads["head_dim"] % BLOCK == 0}
        for dtype in QUANTIZED[:1] if quick else QUANTIZED:
            for page_size in (32,) if quick else (16, 32, 64):
                for names, kind in itertools.product(same_heads(blocks), KINDS):
                    yield self.attention(names, kind, page_size, dtype=dtype)
        for row, model, dtype, kind in value_head_rows(self, self.compile, quick):
            yield row | {"table": "kernels", "model": model, "dtype": dtype, "kind": kind, "page_size": 32}
        for layout, dtype in (("plain", "bf16"), ("lanes", "bf16"), ("lanes", "q8_0"), ("lanes", "q4_0")):
            yield from self.layout(layout, dtype)
        yield from self.products(quick)
        for row in step_rows(self, self.compile, quick):
            yield row | {"table": "steps"}

    def products(self, quick: bool) -> Iterator[dict[str, Any]]:
        """Rows of activations times quantized weights: Llama-3-8B's, and of whole-block types SmolLM2-135M's."""
        from jaxpaged_model.quantized import lanes, tpu_kernel
        from jaxpaged_model.quantized.formats import WEIGHT_FORMATS

        for name, fmt in WEIGHT_FORMATS.items():
            sizes = [*LLAMA_3_8B_PRODUCTS[: 1 if quick else 2], *([] if fmt.has_steps else [(960, 576)])]
            for rows, columns in sizes:
                parts = self.arrays(lanes.part_shapes(fmt, rows, columns))
                for tokens, dtype in ((8, jnp.bfloat16), (8, jnp.float32), (512, jnp.bfloat16)):
                    x = self.array(tokens, columns, dtype=dtype)
                    _, row = self.compile(partial(tpu_kernel.matmul, fmt), x, parts)
                    kind = f"{tokens} {jnp.dtype(dtype).name}"
                    yield row | {"table": "products", "weights": f"{name} {rows} x {columns}", "kind": kind}

    def pages(self, heads: dict[str, int], page_size: int, dtype: str, layout: str) -> tuple[Any, Any]:
        """A format and a pool of one layer; quantized rows are Hadamard-transformed, which is the longer program."""
        storage = page_format(dtype)
        if isinstance(storage, BlockFormat):
            storage = storage.with_hadamard(True)
        if layout == "lanes":
            storage = storage.on_lanes(heads["head_dim"])
        return storage, self.pool(storage, POOL_TOKENS // page_size, heads, page_size)

    def attention(
        self,
        names: list[str],
        kind: str,
        page_size: int,
        *,
        dtype: str = "bf16",
        layout: str = "lanes",
        rope: bool = True,
        write_first: bool = False,
        batch: int = DECODE_BATCH,
    ) -> dict[str, Any]:
        """Row of attention: of a decode batch, or of a chunk of one prompt; with the donated write before it, too.

        ``dtype``: format of pages, or of keys and of values: "q8_0/q4_0".
        """
        heads, masks = MODELS[names[0]], MASKS.get(names[0], {})
        tokens, max_seqs, max_q_len = (batch, batch, 1) if kind == "decode" else (PREFILL_CHUNK, 1, None)
        q_dtype = jnp.float32 if dtype == "f32" else jnp.bfloat16
        head_dim, num_kv_heads = heads["head_dim"], heads["num_kv_heads"]
        q = self.array(tokens, heads["num_q_heads"], head_dim, dtype=q_dtype)
        new = self.array(tokens, num_kv_heads, head_dim, dtype=q_dtype)
        k_name, _, v_name = dtype.partition("/")
        k_storage, k_pool = self.pages(heads, page_size, k_name, layout)
        v_storage, v_pool = self.pages(heads, page_size, v_name or k_name, layout)
        table, rows, angles = self.step(tokens, max_q_len, max_seqs, page_size, head_dim)
        config = make_config(head_dim, None, masks.get("window"), masks.get("soft_cap"))
        rest = q, table, rows, angles if rope else None

        def attend(k_pages: Any, v_pages: Any, q: Any, table: Any, batch: Any, rope: Any) -> Any:
            return mosaic_tpu.paged_attention(q, k_pages, v_pages, table, batch, config, None, rope)

        def write_and_attend(k_pages: Any, v_pages: Any, k: Any, v: Any, *rest: Any) -> Any:
            batch = rest[2]
            k_pages = k_storage.write(k_pages, batch.page, batch.slot, k)
            v_pages = v_storage.write(v_pages, batch.page, batch.slot, v)
            return attend(k_pages, v_pages, *rest), k_pages, v_pages

        if write_first:
            _, row = self.compile(write_and_attend, k_pool, v_pool, new, new, *rest, donate=(0, 1))
        else:
            _, row = self.compile(attend, k_pool, v_pool, *rest)
        k_stored, v_stored = (
            storage if isinstance(storage, LaneBlockFormat) else pool.dtype
            for storage, pool in ((k_storage, k_pool), (v_storage, v_pool))
        )
        entries = table.max_pages_per_seq
        options = {"q_dtype": q_dtype, "max_seqs": max_seqs, "max_pages_per_seq": entries, "rope": rope}
        sizes = describe(q.shape, k_pool.shape, k_stored, max_q_len, v_dtype=v_stored, **options)
        row |= {name: sizes[name] for name in ("vmem_bytes", "smem_bytes", "bytes_per_token")}
        return row | {
            "table": "kernels",
            "model": ", ".join(names),
            "kind": kind if batch == DECODE_BATCH else f"{kind} of {batch}",
            "page_size": page_size,
            "dtype": dtype,
            "layout": layout,
            "blocks": f"{sizes['blocks'].pages} pages x {sizes['blocks'].queries} queries",
            "pool_bytes": num_bytes((k_pool, v_pool)),
        }

    def layout(self, layout: str, dtype: str) -> Iterator[dict[str, Any]]:
        """Rows of what a step does to pools of head_dim 64: attends, writes, and both with donated pools."""
        storage, pool = self.pages(SMOLLM2_135M, 32, dtype, layout)
        attention = partial(self.attention, ["SmolLM2-135M"], page_size=32, dtype=dtype, layout=layout)

        def write(tokens: int) -> dict[str, Any]:
            heads = SMOLLM2_135M["num_kv_heads"], SMOLLM2_135M["head_dim"]
            indices, rows = self.array(tokens), self.array(tokens, *heads, dtype=jnp.bfloat16)
            return self.compile(storage.write, pool, indices, indices, rows, donate=(0,))[1]

        programs = {
            "attention": attention(kind="decode"),
            f"write of {DECODE_BATCH} keys": write(DECODE_BATCH),
            "donated step": attention(kind="decode", write_first=True),
        }
        if layout == "lanes":
            programs[f"write of {PREFILL_CHUNK} keys"] = write(PREFILL_CHUNK)
            programs["donated chunk"] = attention(kind="prefill", write_first=True)
        name = f"{layout} {dtype} {list(pool.shape)}"
        for kind, row in programs.items():
            yield row | {"table": "layout", "layout": name, "pool_bytes": num_bytes(pool), "kind": kind}


# --- bundles ------------------------------------------------------------------------------------------------


def bundle_rows(compiler: TpuCompiler) -> Iterator[dict[str, Any]]:
    """Rows of the bundles of one K/V block: ours, and those of JAX's kernel, compiled alike.

    Llama-3-8B's heads, bfloat16 and quantized, pages of 32 tokens; blocks as this project chooses them.
    """
    for kind, dtype in itertools.product(KINDS, ("bf16", "q8_0", "q4_0")):
        row = compiler.attention(["Llama-3-8B"], kind, 32, rope=False, dtype=dtype)
        pages, queries = (int(n) for n in re.findall(r"\d+", row["blocks"]))
        shared = {
            "table": "bundles",
            "kind": kind,
            "block": f"{pages * 32} tokens x {queries} queries",
            "least": least_bundles(compiler.target, LLAMA_3_8B, pages * 32, queries),
        }
        rows_of_scores = queries * LLAMA_3_8B["num_q_heads"] // LLAMA_3_8B["num_kv_heads"]
        at_once = 8 if rows_of_scores <= 32 and dtype == "bf16" else 2
        ours = shared | loops(f"paged_attention_{queries}x{pages}", LLAMA_3_8B["num_kv_heads"] // at_once)
        yield row | ours | {"kernel": "jaxpaged" if dtype == "bf16" else f"jaxpaged, {dtype}"}
        if dtype == "bf16":
            row = jax_kernel(compiler, kind, pages, max(queries, 8))
            theirs = loops("ragged_paged_attention", 1)
            yield row | shared | theirs | {"kernel": "jax ragged_paged_attention"}


def jax_kernel(compiler: TpuCompiler, kind: str, pages: int, queries: int) -> dict[str, Any]:
    """Compiles JAX's own kernel for the same work; its query blocks have at least 8 rows, its pages K beside V."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    heads, dim = LLAMA_3_8B["num_q_heads"], LLAMA_3_8B["head_dim"]
    tokens, max_seqs = (DECODE_BATCH, DECODE_BATCH) if kind == "decode" else (PREFILL_CHUNK, 1)
    blocks = {"num_kv_pages_per_block": pages, "num_queries_per_block": queries}
    attend = partial(ragged_paged_attention, sm_scale=dim**-0.5, **blocks, vmem_limit_bytes=64 << 20)
    combined = (POOL_TOKENS // 32, 32, 2 * LLAMA_3_8B["num_kv_heads"], dim)
    return compiler.compile(
        attend,
        compiler.array(tokens, heads, dim, dtype=jnp.bfloat16),
        compiler.array(*combined, dtype=jnp.bfloat16),
        compiler.array(max_seqs),
        compiler.array(max_seqs, CONTEXT // 32),
        compiler.array(max_seqs + 1),
        compiler.array(1),
    )[1]


def least_bundles(target: str, heads: dict[str, Any], tokens: int, queries: int) -> int:
    """Lower bound of the bundles of the products and the softmax of one K/V block, all heads.

    The busiest unit decides: the matrix units (two products of rows x tokens x head_dim, a head that is narrower than
    they are taking their whole width, or, where rows are few, the loading of keys and values as weights); the vector
    units (scale, compare, select, maximum, subtract, sum and half a conversion per score; two operations per number of
    the weighted sum); the one unit for powers.
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
    """Bundles of a kernel's last dump, which is removed: of the loop with its products, ``trips`` times, and of all."""
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
    """Splits the bundles of a kernel where the loop depth changes or a loop begins."""
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


if __name__ == "__main__":
    sys.exit(main())
