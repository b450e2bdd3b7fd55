"""Compilers for devices that are not there: their environments, topologies, and the sizes of compiled programs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpaged.compilation.options import compiler_options
from jaxpaged.pages.batch import Batch
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.rope import Rope

OK, FAILED, NOT_CHECKED = range(3)
"""Exit statuses of the checks."""
LLAMA_3_8B_PRODUCTS = ((6144, 4096), (4096, 14336))
"""Rows and columns of Llama-3-8B's queries, keys and values as one matrix, and of the last matrix of its MLP."""
MASKS: dict[str, dict[str, Any]] = {
    "Mistral-7B": {"window": 4096},
    "Gemma-2-2B": {"window": 4096, "soft_cap": 50.0},
    "Gemma-2-9B": {"window": 4096, "soft_cap": 50.0},
    "Gemma-3-1B": {"window": 512},
    "Gemma-3-4B": {"window": 1024},
    "Gemma-3-12B": {"window": 1024},
    "Gemma-3-27B": {"window": 1024},
}
"""Masks of models beyond causality, which their heads alone do not say: those of layers with a window."""
CONTEXT = 8192
TPU_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any that exists; the topology is named when compiling
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Variables that libtpu needs on a machine without a TPU."""
# Facts of NVIDIA's data sheet and programming guide for compute capability 9.0, in the fields that XLA asks for.
_H200 = """
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


def environment(platform: str) -> dict[str, str] | None:
    """Variables of a process that compiles for "tpu" or "gpu"; None if the platform's compiler is not installed."""
    if platform == "tpu":
        return TPU_ENVIRONMENT if importlib.util.find_spec("libtpu") else None
    folder = _ptxas_folder()
    if importlib.util.find_spec("jax_cuda13_plugin") is None or folder is None:
        return None
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "PATH": path}


def _ptxas_folder() -> str | None:
    """Folder of ptxas: on the path, or in the wheel ``nvidia-cuda-nvcc``."""
    found = shutil.which("ptxas")
    if found is not None:
        return str(Path(found).parent)
    try:
        files = importlib.metadata.files("nvidia-cuda-nvcc") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(Path(str(f.locate())).parent) for f in files if f.name == "ptxas"), None)


def devices(target: str) -> list[Any]:
    """Devices of a topology: "v5e:2x2", or "H200:1x1x4" (slices, hosts of each, GPUs of each)."""
    name, _, shape = target.partition(":")
    if name == "H200":
        return topologies.get_topology_desc(platform="cuda", target_config=_H200, topology=shape).devices
    return topologies.get_topology_desc(target, platform="tpu").devices


def trace_models_for(platform: str) -> None:
    """Lets models of this process choose products as on a "tpu" or "gpu", which is not here.

    The environment variable JAXPAGED_ATTENTION does so for attention.
    """
    from jaxpaged_model.quantized import product

    vars(product)["choose"] = lambda *_: platform


class Compiler:
    """Compiles for one device of a target; arrays are shapes without data."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.platform = "cuda" if target.startswith("H200") else "tpu"
        # Some operations are lowered for the device of the current mesh, so there has to be one.
        self.mesh = Mesh(np.array(devices(target)[:1]), ("device",))
        self.sharding = NamedSharding(self.mesh, PartitionSpec())

    def array(self, *shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding)

    def arrays(self, shapes: Any) -> Any:
        """Places a pytree of shapes on the device."""
        return jax.tree.map(lambda x: self.array(*x.shape, dtype=x.dtype), shapes)

    def pool(self, storage: Any, num_pages: int, heads: Mapping[str, int], page_size: int) -> Any:
        """Pages of one layer in a format."""
        sizes = num_pages, heads["num_kv_heads"], page_size, heads["head_dim"]
        return self.arrays(jax.eval_shape(partial(storage.create, *sizes)))

    def step(
        self, tokens: int, max_q_len: int | None, max_seqs: int, page_size: int, head_dim: int
    ) -> tuple[BlockTable, Batch, Rope]:
        """Table, batch and rope of a step."""
        table = BlockTable(*[self.array(max_seqs, CONTEXT // page_size)] * 5, self.array(max_seqs))
        batch = Batch(*[self.array(tokens)] * 5, self.array(max_seqs + 1), max_q_len)
        return table, batch, Rope.create(10_000.0 ** (-np.arange(0, head_dim, 2) / head_dim))

    def compile(
        self, function: Any, *arguments: Any, donate: tuple[int, ...] = ()
    ) -> tuple[Any, dict[str, Any]]:
        """Compiles for the device.

        Returns:
          ``(program, sizes)``; or ``(None, reason)``: the message of whatever the compilers raise.
        """
        start = time.perf_counter()
        try:
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                traced = jax.jit(function, donate_argnums=donate).trace(*arguments)
                lowered = traced.lower(lowering_platforms=(self.platform,))
                program = lowered.compile(compiler_options=compiler_options(self.platform))
        except Exception as error:  # Mosaic's has no public name, and whatever it is, it is the result
            return None, {"result": one_line(error), "seconds": 0.0}
        return program, {
            "result": "ok",
            "seconds": round(time.perf_counter() - start, 1),
            **sizes_of(program),
        }


def one_line(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def sizes_of(program: Any) -> dict[str, int]:
    """Bytes of a compiled program, and those that it accesses."""
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "accessed_bytes": int(cost.get("bytes accessed", 0)),
    }


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays of a pytree."""
    return sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(tree))


def same_heads(models: Mapping[str, Mapping[str, int]]) -> list[list[str]]:
    """Groups names of models with the same heads and masks: their attention is one program."""
    groups: dict[str, list[str]] = {}
    for name, heads in models.items():
        groups.setdefault(str({**heads, **MASKS.get(name, {})}), []).append(name)
    return list(groups.values())


def cell(row: Mapping[str, Any], column: str) -> str:
    """Cell of a table; columns that end with "_mib" show the bytes of the same name."""
    if column.endswith("_mib"):
        count = row.get(column.removesuffix("_mib") + "_bytes")
        return "" if count is None else f"{count / 2**20:.2f}"
    return str(row.get(column, ""))
