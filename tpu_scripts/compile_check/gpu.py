"""Compiles the GPU kernels for a Hopper GPU, on a machine that has none: registers, shared memory, spills.

    pip install jax-cuda13-plugin==J jax-cuda13-pjrt==J nvidia-cuda-nvcc    # J: the version of jax; no driver, no GPU
    python -m tpu_scripts.compile_check.gpu [--quick] [--json FILE]

Needs: the packages above.

Every model of ``jaxpaged.attention.cases.MODELS``, decode steps of 1, 8 and 64 sequences and a chunk of 512 prompt
tokens, pages of 16, 32 and 64 tokens, bfloat16, with the rotation offsets that a model passes. Models of head_dim 64,
128 and 256 also with quantized pages, of 32 and 64 tokens. It goes all the way to machine code for sm_90a, so what does
not fit a block's shared memory or its registers shows as on hardware; times do not. More rows compile a whole donated
step of one layer, the write of its keys and values and the attention, and check that XLA works on the pool in place.
The last ones compile products with quantized weights, of each type that a GGUF file may have, and whole steps of a
model (compile_check.steps).

Exit status: 0, all compiled and nothing spilled; 1, something did not; 2, a package is missing.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxpaged.attention.base import make_config
from jaxpaged.attention.cases import MODELS
from jaxpaged.pages.formats import page_format
from tpu_scripts import common
from tpu_scripts.common import Parser, note
from tpu_scripts.compile_check.devices import (
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

NUM_PAGES, PROMPT, PROMPT_SEQS = 8192, 512, 8
QUANTIZED = ("q8_0", "q8_0/q4_0", "q4_0", "q4_0 Hadamard")
"""Formats of keys and values; "Hadamard": rows are stored under a Hadamard transform."""
QUANTIZED_MODELS = ("SmolLM2-135M", "Llama-3-8B", "Gemma-2-9B", "Gemma-3-1B", "Gemma-3-4B", "Phi-4-mini")
COLUMNS = {
    "models": "model",
    "pages": "pages",
    "kind": "kind",
    "page_size": "page size",
    "blocks": "blocks",
    "splits": "splits",
    "shared_memory_bytes": "shared memory",
    "blocks_per_sm": "blocks/SM",
    "registers": "registers",
    "spill_bytes": "spills",
    "temp_bytes": "temp bytes",
    "seconds": "seconds",
    "result": "result",
}


def main() -> int:
    if run_as_worker(work):
        return OK
    parser = Parser(__doc__, json=None)
    parser.flag("--quick", "only pages of 32 tokens, batch 8 and prompts")
    args = parser.parse()
    found = environment("gpu")
    if found is None:
        note(
            "needs jax-cuda13-plugin and jax-cuda13-pjrt of jax's version, and nvidia-cuda-nvcc (pip install)"
        )
        return NOT_CHECKED
    rows: list[dict[str, Any]] = []
    heads = COLUMNS.values()
    print(common.head(*heads, left=("model", "pages", "kind", "result")), flush=True)
    # The variables are set before jax starts: no driver is looked for, and Mosaic keeps the report of ptxas.
    with tempfile.TemporaryDirectory() as dump:
        variables = {**found, "MOSAIC_GPU_DUMP_TO": dump, "JAXPAGED_ATTENTION": "mosaic_gpu"}
        with Worker("tpu_scripts.compile_check.gpu", {"quick": args.quick}, variables) as worker:
            try:
                for row in worker.rows():
                    rows.append(row)
                    print(common.row(*(cell(row, name) for name in COLUMNS)), flush=True)
            except WorkerFailed as reason:
                rows.append({"models": "all others", "result": str(reason)})
                print(common.row("all others", str(reason)))
    failed = sum(row["result"] != "ok" for row in rows)
    print(f"\n{len(rows)} programs, {failed} failed; jax {jax.__version__}, sm_90a")
    common.write_json(args.json, {"rows": rows}, measured=False)
    return FAILED if failed else OK


def work(quick: bool) -> Iterator[dict[str, Any]]:
    """Compiles every case."""
    compiler = GpuCompiler(Path(os.environ["MOSAIC_GPU_DUMP_TO"]))
    for number, row in enumerate(compiler.rows(quick)):
        if number == 0 and row.get("registers") == "as above":
            row["result"] = "ptxas reported nothing"
        yield row


def formats_of(pages: str) -> list[Any]:
    """Formats of keys and of values, such as "q8_0/q4_0"."""
    names, _, hadamard = pages.partition(" ")
    k_name, _, v_name = names.partition("/")
    return [page_format(name).with_hadamard(bool(hadamard)) for name in (k_name, v_name or k_name)]


class GpuCompiler(Compiler):
    """Compiles for one H200, and reads the report of ptxas."""

    def __init__(self, dump: Path) -> None:
        super().__init__("H200:1x1x1")
        self.dump = dump

    def rows(self, quick: bool) -> Iterator[dict[str, Any]]:
        from jaxpaged_model.quantized.formats import WEIGHT_FORMATS

        steps = [(batch, 1) for batch in ((8,) if quick else (1, 8, 64))] + [(PROMPT, None)]
        for page_size in (32,) if quick else (16, 32, 64):
            for names, step in itertools.product(same_heads(MODELS), steps):
                yield self.attention(names, *step, page_size, "bf16")
        for page_size in (32,) if quick else (32, 64):
            for name, pages, step in itertools.product(QUANTIZED_MODELS, QUANTIZED, ((8, 1), (PROMPT, None))):
                yield self.attention([name], *step, page_size, pages)
        for row, heads, pages, kind in value_head_rows(self, self.report, quick):
            yield {"models": heads, "pages": pages, "kind": kind, "page_size": 32} | row
        for head_dim, pages in itertools.product((64, 128), ("bf16", "q8_0", "q4_0")):
            yield self.donated_step(head_dim, pages)
        for name, sizes in itertools.product(WEIGHT_FORMATS, LLAMA_3_8B_PRODUCTS[: 1 if quick else 2]):
            yield self.product(name, *sizes)
        for row in step_rows(self, self.report, quick):
            models = f"{row.pop('model')}, {row.pop('weights')} weights"
            yield {"models": models, "pages": row.pop("pages"), "kind": f"{row.pop('kind')} step"} | row

    def arguments(
        self, heads: dict[str, int], tokens: int, max_q_len: int | None, page_size: int, pages: str
    ) -> tuple[Any, ...]:
        """``(q, k_pages, v_pages, table, batch, rope)`` of a step."""
        max_seqs = tokens if max_q_len == 1 else PROMPT_SEQS
        pools = [self.pool(storage, NUM_PAGES, heads, page_size) for storage in formats_of(pages)]
        q = self.array(tokens, heads["num_q_heads"], heads["head_dim"], dtype=jnp.bfloat16)
        return q, *pools, *self.step(tokens, max_q_len, max_seqs, page_size, heads["head_dim"])

    def attention(
        self, names: list[str], tokens: int, max_q_len: int | None, page_size: int, pages: str
    ) -> dict[str, Any]:
        """Row of attention alone."""
        from jaxpaged.attention.gpu import backend as mosaic_gpu

        heads, masks = MODELS[names[0]], MASKS.get(names[0], {})
        config = make_config(heads["head_dim"], None, masks.get("window"), masks.get("soft_cap"))

        def attend(q: Any, k_pages: Any, v_pages: Any, table: Any, batch: Any, rope: Any) -> Any:
            return mosaic_gpu.paged_attention(q, k_pages, v_pages, table, batch, config, None, rope)

        given = self.arguments(heads, tokens, max_q_len, page_size, pages)
        q, k_pages, _, table, *_ = given
        kind = f"decode {tokens}" if max_q_len == 1 else f"prompt {tokens}"
        row = {"models": ", ".join(names), "pages": pages, "kind": kind, "page_size": page_size}
        stored = k_pages.dtype if pages == "bf16" else tuple(formats_of(pages))
        sizes = mosaic_gpu.describe(
            q.shape,
            k_pages.shape,
            stored,
            max_q_len,
            table.max_seqs,
            table.max_pages_per_seq,
            q_dtype=q.dtype,
        )
        planned = sizes["shared_memory_bytes"]
        row |= {name: sizes[name] for name in ("blocks", "splits", "blocks_per_sm", "shared_memory_bytes")}
        row |= self.report(attend, *given)[1]
        if row["result"] == "ok" and row["shared_memory_bytes"] != planned:
            row["result"] = f"shared memory planned: {planned}"
        return row

    def donated_step(self, head_dim: int, pages: str) -> dict[str, Any]:
        """Row of a layer's donated step, which has to write and read the pool in place."""
        from jaxpaged.attention.gpu import backend as mosaic_gpu

        write = formats_of(pages)[0].write
        config = make_config(head_dim, None, None, None)

        def step(k_pages: Any, v_pages: Any, q: Any, k: Any, table: Any, batch: Any, rope: Any) -> Any:
            k_pages = write(k_pages, batch.page, batch.slot, k)
            v_pages = write(v_pages, batch.page, batch.slot, k)
            out, _ = mosaic_gpu.paged_attention(q, k_pages, v_pages, table, batch, config, None, rope)
            return k_pages, v_pages, out

        heads = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": head_dim}
        q, *pools, table, batch, rope = self.arguments(heads, 8, 1, 32, pages)
        k = self.array(8, 8, head_dim, dtype=q.dtype)
        row = {
            "models": f"donated step, head_dim {head_dim}",
            "pages": pages,
            "kind": "decode 8",
            "page_size": 32,
        }
        program, found = self.report(step, *pools, q, k, table, batch, rope, donate=(0, 1))
        row |= found
        if program is not None:
            pool = row["pool_bytes"] = num_bytes(pools)
            # Whatever the compiler calls the numbers of a pool, it has as many rows as the pool.
            copies = re.findall(rf"= \w+\[{NUM_PAGES},\S* (?:copy|transpose)", program.as_text())
            if row["alias_bytes"] < pool or row["temp_bytes"] * 8 > pool or copies:
                aliased = f"{row['alias_bytes']} of {pool} bytes aliased"
                row["result"] = f"not in place: {aliased}, {len(copies)} copies"
        return row

    def product(self, name: str, rows: int, columns: int) -> dict[str, Any]:
        """Row of eight rows of activations times a matrix."""
        from jaxpaged_model.quantized import gpu_kernel, lanes
        from jaxpaged_model.quantized.formats import WEIGHT_FORMATS

        fmt = WEIGHT_FORMATS[name]
        parts = self.arrays(lanes.part_shapes(fmt, rows, columns))
        x = self.array(8, columns, dtype=jnp.bfloat16)
        row = {"models": f"{name} weights, {rows} x {columns}", "kind": "product 8"}
        return row | self.report(partial(gpu_kernel.matmul, fmt), x, parts)[1]

    def report(
        self, function: Any, *arguments: Any, donate: tuple[int, ...] = ()
    ) -> tuple[Any, dict[str, Any]]:
        """Compiles, and adds registers, spills and shared memory to the sizes."""
        program, row = self.compile(function, *arguments, donate=donate)
        if program is None:
            return program, row
        text = "".join(file.read_text() for file in self.dump.glob("*.ptxas"))
        resources = "".join(file.read_text() for file in self.dump.glob("*.resources.txt"))
        for file in self.dump.iterdir():
            file.unlink()
        # Not every jax reports all: nothing for a kernel that is the same as an earlier one, 0.10 no shared memory.
        row["registers"] = ", ".join(re.findall(r"Used (\d+) registers", text)) or "as above"
        row["spill_bytes"] = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
        if found := re.search(r"smem_scratch_bytes=(\d+)", resources):
            row["shared_memory_bytes"] = int(found[1])
        if row["spill_bytes"]:
            row["result"] = "spills"
        return program, row


if __name__ == "__main__":
    sys.exit(main())
