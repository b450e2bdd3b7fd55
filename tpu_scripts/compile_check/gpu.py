"""Compiles the GPU kernel for a Hopper GPU, on a machine that has none: registers, shared memory, spills.

    pip install jax-cuda13-plugin==J jax-cuda13-pjrt==J nvidia-cuda-nvcc    # J: the version of jax; no driver, no GPU
    python -m tpu_scripts.compile_check.gpu [--quick] [--json FILE]

Every model of ``jaxpaged.attention.cases.MODELS``, decode steps of 1, 8 and 64 sequences and a chunk of 512 prompt
tokens, pages of 16, 32 and 64 tokens, bfloat16, with the rotations that a model passes. Models of head_dim 64, 128 and
256 also with quantized pages, of 32 and 64 tokens. It goes all the way to machine code for sm_90a, so what does not fit
a block's shared memory or its registers shows as on hardware; times do not. More rows compile a whole donated step of
one layer, the write of its keys and values and the attention, and check that XLA works on the pool in place. The last
ones compile products with quantized weights, of each type that a GGUF file may have.

Exit status: 0, all compiled and nothing spilled; 1, something did not; 2, a package is missing.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONTEXT, NUM_PAGES, PROMPT, PROMPT_SEQS = 8192, 8192, 512, 8
BATCHES = (1, 8, 64)
PAGE_SIZES = (16, 32, 64)
OPTIONS: dict[str, dict[str, Any]] = {
    "Mistral-7B": {"window": 4096},
    "Gemma-2-9B": {"window": 4096, "soft_cap": 50.0},
}
"""What else these models ask of attention."""
QUANTIZED = ("q8_0", "q8_0/q4_0", "q4_0", "q4_0 turned")
"""Formats of keys and values; "turned": rows are stored under a Hadamard turn."""
QUANTIZED_MODELS = ("SmolLM2-135M", "Llama-3-8B", "Gemma-2-9B")
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
    "ok": "ok",
}

# Facts of NVIDIA's data sheet and programming guide for compute capability 9.0, in the fields that XLA asks for.
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 62914560
  memory_bandwidth: 4800000000000
  device_memory_size: 150754820096
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
runtime_version { major: 13 minor: 0 patch: 0 }
dnn_version_info { major: 9 minor: 12 }
"""


def ptxas_folder() -> str | None:
    """Where ptxas is: on the path, or in the wheel ``nvidia-cuda-nvcc``."""
    found = shutil.which("ptxas")
    if found is not None:
        return str(Path(found).parent)
    try:
        files = importlib.metadata.files("nvidia-cuda-nvcc") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(Path(str(f.locate())).parent) for f in files if f.name == "ptxas"), None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="pages of 32 tokens, batch 8 and prompt alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--inside", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside is not None:
        compile_all(args.quick, args.json, args.inside)
        return
    folder = ptxas_folder()
    if importlib.util.find_spec("jax_cuda13_plugin") is None or folder is None:
        print(
            "needs jax-cuda13-plugin and jax-cuda13-pjrt of jax's version, and nvidia-cuda-nvcc (pip install)"
        )
        sys.exit(2)
    # Set before jax is imported: no driver is looked for, and Mosaic leaves ptxas' report behind.
    with tempfile.TemporaryDirectory() as dump:
        environment = os.environ | {
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "JAX_PLATFORMS": "cpu",
            "MOSAIC_GPU_DUMP_TO": dump,
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        }
        run = [sys.executable, "-m", "tpu_scripts.compile_check.gpu", *sys.argv[1:], "--inside", dump]
        done = subprocess.run(run, env=environment, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:  # otherwise it says of each kernel that there is no disassembler, and no more
        print(done.stderr, file=sys.stderr)
    sys.exit(done.returncode)


def compile_all(quick: bool, target: Path | None, dump: Path) -> None:
    """Compiles every case and prints a table; exits with 1 where something failed."""
    print("| " + " | ".join(COLUMNS.values()) + " |")
    print("|---|---|---|" + "---:|" * (len(COLUMNS) - 4) + "---|")
    rows = []
    cases = [functools.partial(compile_attention, dump, *case) for case in attention_cases(quick)]
    for compile_case in (
        *cases,
        *(
            functools.partial(compile_step, dump, head_dim, pages)
            for head_dim in (64, 128)
            for pages in ("bf16", "q8_0", "q4_0")
        ),
        *(functools.partial(compile_product, dump, *case) for case in product_cases(quick)),
    ):
        rows.append(compile_case())
        if rows[0].get("registers") == "as above":
            rows[0]["ok"] = "ptxas reported nothing"
        print("| " + " | ".join(str(rows[-1].get(name, "")) for name in COLUMNS) + " |", flush=True)
    failed = sum(row["ok"] != "ok" for row in rows)
    print(f"\n{len(rows)} programs, {failed} failed; jax {importlib.metadata.version('jax')}, sm_90a")
    if target is not None:
        target.write_text(json.dumps(rows, indent=1))
    sys.exit(failed > 0)


def attention_cases(
    quick: bool,
) -> list[tuple[str, dict[str, Any], dict[str, Any], int, int | None, int, str]]:
    """``(models, heads, options, tokens, max_q_len, page_size, pages)``; models of one shape are one case."""
    from jaxpaged.attention.cases import MODELS

    names: dict[str, list[str]] = {}
    shapes = {}
    for name, heads in MODELS.items():
        shape = heads, OPTIONS.get(name, {})
        shapes[repr(shape)] = shape
        names.setdefault(repr(shape), []).append(name)
    kinds = [(batch, 1) for batch in ((8,) if quick else BATCHES)] + [(PROMPT, None)]
    plain = [
        (", ".join(names[key]), *shapes[key], tokens, max_q_len, page_size, "bf16")
        for page_size in ((32,) if quick else PAGE_SIZES)
        for key in shapes
        for tokens, max_q_len in kinds
    ]
    quantized = [
        (name, MODELS[name], OPTIONS.get(name, {}), tokens, max_q_len, page_size, pages)
        for page_size in ((32,) if quick else (32, 64))
        for name in QUANTIZED_MODELS
        for pages in QUANTIZED
        for tokens, max_q_len in ((8, 1), (PROMPT, None))
    ]
    return plain + quantized


def formats_of(pages: str) -> tuple[Any, Any]:
    """The formats of keys and of values that ``pages`` names."""
    from jaxpaged.pages.formats import page_format

    names, _, turned = pages.partition(" ")
    k_name, _, v_name = names.partition("/")
    return page_format(k_name).with_hadamard(bool(turned)), page_format(v_name or k_name).with_hadamard(
        bool(turned)
    )


def describe_device() -> tuple[Any, Any]:
    """The mesh of one H200 that is not there, and the sharding of an array on it."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    mesh = Mesh(np.array(topology.devices), ("device",))
    return mesh, NamedSharding(mesh, PartitionSpec())


def arguments(
    heads: dict[str, Any], tokens: int, max_q_len: int | None, page_size: int, pages: str, sharding: Any
) -> tuple[Any, ...]:
    """``(q, k_pages, v_pages, table, batch, rope)`` without data."""
    import jax
    import jax.numpy as jnp

    from jaxpaged.pages.batch import Batch
    from jaxpaged.pages.block_table import BlockTable
    from jaxpaged.pages.rope import Rope

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    head_dim, max_seqs = heads["head_dim"], tokens if max_q_len == 1 else PROMPT_SEQS
    k_pages, v_pages = (
        jax.tree.map(
            lambda part: array(*part.shape, dtype=part.dtype),
            jax.eval_shape(
                functools.partial(one.create, NUM_PAGES, heads["num_kv_heads"], page_size, head_dim)
            ),
        )
        for one in formats_of(pages)
    )
    table = BlockTable(*[array(max_seqs, CONTEXT // page_size)] * 5, array(max_seqs))
    batch = Batch(*[array(tokens)] * 5, array(max_seqs + 1), max_q_len)
    rope = Rope.create([1e4 ** (-2 * i / head_dim) for i in range(head_dim // 2)])
    q = array(tokens, heads["num_q_heads"], head_dim, dtype=jnp.bfloat16)
    return q, k_pages, v_pages, table, batch, rope


def compile_attention(
    dump: Path,
    models: str,
    heads: dict[str, Any],
    options: dict[str, Any],
    tokens: int,
    max_q_len: int | None,
    page_size: int,
    pages: str,
) -> dict[str, Any]:
    """One row of the table: attention alone."""
    import jax

    from jaxpaged.attention.base import make_config
    from jaxpaged.attention.gpu import backend as mosaic_gpu

    mesh, sharding = describe_device()
    config = make_config(heads["head_dim"], None, options.get("window"), options.get("soft_cap"))

    def attention(q: Any, k_pages: Any, v_pages: Any, table: Any, batch: Any, rope: Any) -> Any:
        return mosaic_gpu.paged_attention(q, k_pages, v_pages, table, batch, config, None, rope)

    given = arguments(heads, tokens, max_q_len, page_size, pages, sharding)
    q, k_pages, _, table, *_ = given
    kind = f"decode {tokens}" if max_q_len == 1 else f"prompt {tokens}"
    row: dict[str, Any] = {"models": models, "pages": pages, "kind": kind, "page_size": page_size}
    sizes = mosaic_gpu.describe(
        q.shape,
        k_pages.shape,
        k_pages.dtype if pages == "bf16" else formats_of(pages),
        max_q_len,
        table.max_seqs,
        table.max_pages_per_seq,
        q_dtype=q.dtype,
    )
    row |= {name: sizes[name] for name in ("blocks", "splits", "blocks_per_sm", "shared_memory_bytes")}
    compiled = compile_and_report(jax.jit(attention), given, mesh, dump, row)
    if compiled is not None and row["shared_memory_bytes"] != sizes["shared_memory_bytes"]:
        row["ok"] = f"shared memory planned: {sizes['shared_memory_bytes']}"
    return row


def compile_step(dump: Path, head_dim: int, pages: str) -> dict[str, Any]:
    """One row: a layer's donated step, which has to write and read the pool where it lies."""
    import jax

    from jaxpaged.attention.base import make_config
    from jaxpaged.attention.gpu import backend as mosaic_gpu

    mesh, sharding = describe_device()
    write = formats_of(pages)[0].write

    def step(k_pages: Any, v_pages: Any, q: Any, k: Any, table: Any, batch: Any, rope: Any) -> Any:
        k_pages = write(k_pages, batch.page, batch.slot, k)
        v_pages = write(v_pages, batch.page, batch.slot, k)
        config = make_config(head_dim, None, None, None)
        out, _ = mosaic_gpu.paged_attention(q, k_pages, v_pages, table, batch, config, None, rope)
        return k_pages, v_pages, out

    heads = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": head_dim}
    q, k_pages, v_pages, table, batch, rope = arguments(heads, 8, 1, 32, pages, sharding)
    k = jax.ShapeDtypeStruct((8, 8, head_dim), q.dtype, sharding=sharding)
    row: dict[str, Any] = {
        "models": f"donated step, head_dim {head_dim}",
        "pages": pages,
        "kind": "decode 8",
        "page_size": 32,
    }
    given = k_pages, v_pages, q, k, table, batch, rope
    compiled = compile_and_report(jax.jit(step, donate_argnums=(0, 1)), given, mesh, dump, row)
    if compiled is not None:
        parts = jax.tree.leaves((k_pages, v_pages))
        pool = sum(part.size * part.dtype.itemsize for part in parts)
        row |= {"pool_bytes": pool, "alias_bytes": compiled.memory_analysis().alias_size_in_bytes}
        # Whatever the compiler calls the numbers of a pool, it has as many rows as the pool.
        copies = re.findall(rf"= \w+\[{NUM_PAGES},\S* (?:copy|transpose)", compiled.as_text())
        if row["alias_bytes"] < pool or row["temp_bytes"] * 8 > pool or copies:
            row["ok"] = f"not in place: {row['alias_bytes']} of {pool} bytes aliased, {len(copies)} copies"
    return row


def product_cases(quick: bool) -> list[tuple[str, int, int]]:
    """``(format, rows, columns)``: Llama-3-8B's queries, keys and values as one matrix, and the last of its MLP."""
    from jaxpaged_model.quantized.formats import WEIGHT_FORMATS

    sizes = ((6144, 4096),) if quick else ((6144, 4096), (4096, 14336))
    return [(name, *size) for name in WEIGHT_FORMATS for size in sizes]


def compile_product(dump: Path, name: str, rows: int, columns: int) -> dict[str, Any]:
    """One row: eight rows of activations times a matrix."""
    import jax
    import jax.numpy as jnp
    from jaxpaged_model.quantized import gpu_kernel, lanes
    from jaxpaged_model.quantized.formats import WEIGHT_FORMATS

    mesh, sharding = describe_device()
    fmt = WEIGHT_FORMATS[name]
    parts = {
        part: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
        for part, shape in lanes.part_shapes(fmt, rows, columns).items()
    }
    x = jax.ShapeDtypeStruct((8, columns), jnp.bfloat16, sharding=sharding)
    row: dict[str, Any] = {"models": f"{name} weights, {rows} x {columns}", "kind": "product 8"}
    compile_and_report(jax.jit(functools.partial(gpu_kernel.matmul, fmt)), (x, parts), mesh, dump, row)
    return row


def compile_and_report(
    function: Any, given: tuple[Any, ...], mesh: Any, dump: Path, row: dict[str, Any]
) -> Any:
    """Compiles and adds to the row what came out; returns the program, or None where there is none."""
    import jax

    start = time.perf_counter()
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            compiled = function.trace(*given).lower(lowering_platforms=("cuda",)).compile()
    except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
        row["ok"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return None
    row["seconds"] = round(time.perf_counter() - start, 1)
    row["temp_bytes"] = compiled.memory_analysis().temp_size_in_bytes
    report = "".join(file.read_text() for file in dump.glob("*.ptxas"))
    resources = "".join(file.read_text() for file in dump.glob("*.resources.txt"))
    for file in dump.iterdir():
        file.unlink()
    # Not every jax reports all of it: none where a kernel is the same as an earlier one, and 0.10 no shared memory.
    row["registers"] = ", ".join(re.findall(r"Used (\d+) registers", report)) or "as above"
    row["spill_bytes"] = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
    if found := re.search(r"smem_scratch_bytes=(\d+)", resources):
        row["shared_memory_bytes"] = int(found[1])
    row["ok"] = "ok" if row["spill_bytes"] == 0 else "spills"
    return compiled


if __name__ == "__main__":
    main()
