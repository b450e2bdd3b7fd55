"""Floating-point matrices on CPUs: numbers and products are those of the file, in its type, without a copy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxpaged_model.checkpoint.export import write_gguf
from jaxpaged_model.checkpoint.gguf_file import GGUFFile
from jaxpaged_model.checkpoint.huggingface_config import config_from_huggingface
from jaxpaged_model.checkpoint.loading import LoadedModel, load_model, read_config
from jaxpaged_model.checkpoint.safetensors_folder import SafetensorsFolder
from jaxpaged_model.checkpoint.shards import ShardSource
from jaxpaged_model.checkpoint.weights import load_params, placements, weight_plan
from jaxpaged_model.llama import functional
from jaxpaged_model.quantized import panels, product
from jaxpaged_model.quantized.formats import FLOAT_FORMATS
from jaxpaged_model.quantized.layouts import empty_parts
from small_models import config_json, logits, random_weights, write_converted_gguf, write_folder

NAMES = tuple(FLOAT_FORMATS)
ROUNDING = 1e-6
"""Tolerance of sums of a few hundred float32 products."""


def matrix(name: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random numbers of a format, with zeros of both signs and subnormal ones."""
    rng = np.random.default_rng(seed)
    numbers = rng.standard_normal((rows, columns)) * columns**-0.5
    numbers.flat[rng.integers(0, numbers.size, 4)] = (0.0, -0.0, 6e-8, -3e-39)
    return numbers.astype(FLOAT_FORMATS[name].dtype)


def packed(name: str, *matrices: np.ndarray) -> dict[str, Any]:
    """The parts of a matrix, or of a stack of several."""
    stack = (len(matrices),) if len(matrices) > 1 else ()
    parts = empty_parts("panels", FLOAT_FORMATS[name], *matrices[0].shape, stack)
    for layer, one in enumerate(matrices):
        own = {key: part[layer] if stack else part for key, part in parts.items()}
        panels.pack(FLOAT_FORMATS[name], one.view(np.uint8), own)
    return {key: jnp.asarray(part) for key, part in parts.items()}


def relative(found: Any, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted))


# --- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_the_file_to_the_bit(name: str) -> None:
    numbers = matrix(name, 40, 160)
    parts, wide = packed(name, numbers), numbers.astype(np.float32)
    found = np.asarray(panels.dequantized(name, parts, 40, 160))
    np.testing.assert_array_equal(found.view(np.uint32), wide.view(np.uint32))
    index = np.array([3, 39, 17, 0, 3])
    rows = np.asarray(panels.rows_of(name, parts, jnp.asarray(index), 160))
    np.testing.assert_array_equal(rows.view(np.uint32), wide[index].view(np.uint32))


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_that_of_the_file(name: str) -> None:
    shapes = panels.part_shapes(FLOAT_FORMATS[name], 48, 160)
    assert {key: (one.shape, one.dtype) for key, one in shapes.items()} == {
        "codes": ((3, 160, 16), FLOAT_FORMATS[name].dtype)
    }


# --- products ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_products_equal_those_in_float64(name: str) -> None:
    """72 rows are five panels, so that the last one has no other beside it; 135 tokens are products of 8,
    4, 2 and 1 rows, in two work items."""
    numbers, rng = matrix(name, 72, 160), np.random.default_rng(1)
    parts, wide = packed(name, numbers), numbers.astype(np.float64)
    x = rng.standard_normal((135, 160)).astype(np.float32)
    together = np.asarray(product.product(x, name, parts, 72))
    assert relative(together, x @ wide.T) < ROUNDING
    assert relative(product.product(x, name, parts, 72, implementation="xla"), x @ wide.T) < ROUNDING
    # Bit by bit: a token's result does not depend on the others of its batch.
    for count in (1, 2, 7):
        np.testing.assert_array_equal(product.product(x[-count:], name, parts, 72), together[-count:])
    np.testing.assert_array_equal(product.product(x, name, parts, 72, exact=True), together)


@pytest.mark.parametrize("name", NAMES)
def test_fused_operations_of_a_layer_of_a_stack(name: str) -> None:
    matrices = [matrix(name, 96, 160, seed) for seed in range(3)]
    parts, rng = packed(name, *matrices), np.random.default_rng(2)
    x, add = (rng.standard_normal((11, n)).astype(np.float32) for n in (160, 96))
    scale, eps = rng.random(160).astype(np.float32), 1e-2
    normed = x / np.sqrt(np.mean(np.square(x, dtype=np.float64), -1, keepdims=True) + eps) * scale

    @jax.jit
    def run(layer: Any) -> tuple[Any, Any]:
        around: dict[str, Any] = {"layer": layer, "norm": (scale, eps)}
        gated = product.product(x, name, parts, 48, gated=True, **around)
        return gated, product.product(x, name, parts, 96, add=add, **around)

    for layer, one in enumerate(matrices):
        both = normed @ one.astype(np.float64).T
        gated, added = run(layer)
        assert relative(gated, both[:, :48] / (1 + np.exp(-both[:, :48])) * both[:, 48:]) < 1e-5
        assert relative(added, both + add) < ROUNDING


def test_a_batch_of_a_vmap_equals_a_loop() -> None:
    matrices = [matrix("BF16", 32, 64, seed) for seed in range(2)]
    parts = packed("BF16", *matrices)
    x = np.random.default_rng(3).standard_normal((2, 5, 64)).astype(np.float32)

    def run(x: Any, codes: Any) -> Any:
        return product.product(x, "BF16", {"codes": codes}, 32)

    over_both = jax.vmap(run)(x, parts["codes"])
    over_rows = jax.vmap(run, (0, None))(x, parts["codes"][1])
    for i in range(2):
        np.testing.assert_array_equal(over_both[i], run(x[i], parts["codes"][i]))
        np.testing.assert_array_equal(over_rows[i], run(x[i], parts["codes"][1]))


ASSEMBLY = """
import re
import llvmlite.binding as llvm
from llvmlite import ir
from jaxpaged.native.tiles import Code
from jaxpaged_model.quantized import cpu_vectors
from jaxpaged_model.quantized.formats import FLOAT_FORMATS

cpu_vectors.instructions, cpu_vectors._PANELS_AT_ONCE = lambda write, *_: write, 1
module = ir.Module()
for name, fmt in FLOAT_FORMATS.items():
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 7)
    function = ir.Function(module, kind, name)
    builder = ir.IRBuilder(function.append_basic_block())
    cpu_vectors.pair_product(fmt, 4)(Code(builder), *function.args)
    builder.ret_void()
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
target = llvm.Target.from_triple("{triple}")
machine = target.create_target_machine(cpu="{cpu}", features="{features}", opt=3)
parsed = llvm.parse_assembly(str(module))
passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
passes.getModulePassManager().run(parsed, passes)
text = machine.emit_assembly(parsed)
print(len(re.findall(r"\\b(?:fmla|vfmadd)", text)), len(re.findall(r"\\b(?:bl|callq)\\b", text)))
"""


@pytest.mark.parametrize(
    ("triple", "cpu", "features"),
    [
        ("aarch64-unknown-linux-gnu", "neoverse-n1", "+dotprod"),
        ("x86_64-unknown-linux-gnu", "haswell", "+avx2,+fma,+f16c"),
    ],
)
def test_llvm_compiles_other_cpus_instructions(triple: str, cpu: str, features: str) -> None:
    """Cross-compiles: a vector of 16 numbers is four of Arm or two of AVX2; no conversion is a call."""
    script = ASSEMBLY.format(triple=triple, cpu=cpu, features=features)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    products, calls = map(int, done.stdout.split())
    each = 4 if triple.startswith("aarch64") else 2
    assert products == len(FLOAT_FORMATS) * 2 * 8 * 4 * each and calls == 0


# --- models -----------------------------------------------------------------------------------------------------

CONFIG = config_json("qwen3")
TIED = config_json("llama", tie_word_embeddings=True)


def by_function(model: LoadedModel) -> np.ndarray:
    return logits(model.config, model.params, function=model.function)


def matrices_of(model: LoadedModel) -> dict[str, np.dtype]:
    """Dtypes of params of two or more axes a layer, by path."""
    flat = jax.tree_util.tree_flatten_with_path(model.params)[0]
    return {jax.tree_util.keystr(path): x.dtype for path, x in flat if "scale" not in str(path)}


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["qwen3", "llama, tied"])
@pytest.mark.parametrize("name", NAMES)
def test_files_and_folders_have_the_logits_of_dense_weights(
    name: str, config: dict[str, Any], tmp_path: Path
) -> None:
    weights = random_weights(config)
    kind, dtype = gguf.GGMLQuantizationType[name], FLOAT_FORMATS[name].dtype
    file = write_converted_gguf(tmp_path / "m.gguf", config, weights, kind=kind)
    for path in (file, write_folder(tmp_path / "folder", config, weights, dtype=dtype)):
        stored, dense = load_model(path), load_model(path, weights="dequantized")
        assert set(matrices_of(stored).values()) == {dtype}
        assert relative(by_function(stored), by_function(dense)) < 1e-5
        assert stored.fingerprint == dense.fingerprint and stored.description == dense.description
        assert stored.function is stored.exact_function
        if name == "F32":
            sizes = [sum(x.nbytes for x in jax.tree.leaves(one.params)) for one in (stored, dense)]
            assert sizes[1] <= sizes[0] < sizes[1] + 2 * 12 * 64 * 4 + 1  # panels are full


def test_stored_weights_do_not_depend_on_the_models_dtype(tmp_path: Path) -> None:
    path = write_folder(tmp_path, CONFIG, random_weights(CONFIG), dtype=jnp.bfloat16)
    half, wide = load_model(path, dtype="bf16"), load_model(path)
    assert matrices_of(half) == matrices_of(wide)
    assert relative(by_function(half), by_function(wide)) < 0.05


def test_columns_that_are_no_whole_blocks_stay_dense(tmp_path: Path) -> None:
    """Half of the MLP's 96 columns on each of two devices; queries' 64 columns are whole blocks."""
    path = write_folder(tmp_path, CONFIG, random_weights(CONFIG), dtype=np.float16)
    config, folder = read_config(path), SafetensorsFolder(path)
    source = ShardSource(config, folder, "huggingface", rank=1, size=2)
    kinds = dict(weight_plan(config.shard(2), source, "huggingface").formats)
    assert "blocks.0.mlp.down" not in kinds
    assert kinds["blocks.0.attention.qkv"] == kinds["blocks.0.mlp.gate_up"] == "F16"
    assert not weight_plan(config.shard(2), source, "huggingface", layout="lanes").formats


def test_layers_split_inside_a_block_are_dequantized_numbers(tmp_path: Path) -> None:
    config, kind = config_json("llama"), gguf.GGMLQuantizationType.Q8_0
    path = write_converted_gguf(tmp_path / "m.gguf", config, random_weights(config), kind=kind)
    source = ShardSource(read_config(path), GGUFFile(path), "gguf", rank=1, size=4)
    name = "blk.0.attn_output.weight"
    assert source.tensors[name].dtype == "F32"
    np.testing.assert_array_equal(source.raw(name).view(np.float32), source.read(name))


def test_logits_do_not_depend_on_x64(tmp_path: Path) -> None:
    folder = SafetensorsFolder(write_folder(tmp_path, TIED, random_weights(TIED), dtype=jnp.bfloat16))
    config = read_config(folder.path)
    plan = weight_plan(config, folder, "huggingface")
    params = load_params(config, folder, "huggingface", plan=plan)
    wanted = logits(config, params, function=functional(config, plan=plan))
    with jax.enable_x64(True):
        again = load_params(config, folder, "huggingface", plan=plan)
        assert jax.tree.map(lambda x: x.dtype, again) == jax.tree.map(lambda x: x.dtype, params)
        found = logits(config, again, function=functional(config, plan=plan))
    np.testing.assert_array_equal(found, wanted)


def test_stored_params_are_not_exported(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "folder", CONFIG, random_weights(CONFIG))
    stored = load_model(path)
    with pytest.raises(
        ValueError, match=r'dense weights are needed: load_model\(path, weights="dequantized"\)'
    ):
        write_gguf(tmp_path / "m.gguf", stored.config, stored.params, tokenizer_metadata={})
    assert not (tmp_path / "m.gguf").exists()


PEAK = """
import resource, sys
from jaxpaged_model.checkpoint.loading import load_model
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
load_model(sys.argv[1])
before = peak()
load_model(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system's unit of memory is another one")
def test_loading_needs_the_memory_of_the_file_once(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "head_dim": 128}
    config = config_json("llama", **sizes)
    shapes = placements(config_from_huggingface(config), "huggingface")
    weights = {name: np.ones(place.shape, np.float32) for name, place in shapes.items()}
    large = write_folder(tmp_path / "large", config, weights, dtype=np.float16)
    small = write_folder(tmp_path / "small", CONFIG, random_weights(CONFIG), dtype=np.float16)
    command = [sys.executable, "-c", PEAK, str(small), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 1.25 * (large / "model.safetensors").stat().st_size
