"""Quantized matrices on CPUs: their values are those of the file, and products use them without copies."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxpaged_model.quantized import cpu_vectors, panels, product
from jaxpaged_model.quantized.formats import WEIGHT_FORMATS
from jaxpaged_model.quantized.layouts import ALIGNMENT, LAYOUTS, Layout, empty_parts
from quantized_matrices import bits_per_weight, numbers, packed, random_raw, random_weights_raw, stacked

NAMES = tuple(WEIGHT_FORMATS)
ONE_OF_EACH_KIND = ("Q8_0", "Q5_1", "Q6_K", "IQ4_XS")
"""One plane and two, minima, groups of 16 and 32 with steps, a table."""
COLUMNS = 512
ROUNDED = 1e-4
"""Tolerance of 16-bit activations: the error of each is at most 1/65024 of its block's largest."""


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def rounded(x: np.ndarray) -> np.ndarray:
    """Activations rounded as by the kernel: integers up to 127 * 256, with a scale for each 32."""
    blocks, most = x.reshape(len(x), -1, 32), np.float32(127 * 256)
    largest = np.abs(blocks).max(-1, keepdims=True)
    return (np.rint(blocks * (most / largest)) * (largest / most)).reshape(x.shape)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


# --- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_the_file_to_the_bit(name: str, layout: Layout) -> None:
    room = LAYOUTS[layout]
    for columns in (COLUMNS,) if WEIGHT_FORMATS[name].has_steps else (COLUMNS, 160):
        raw = random_raw(name, 40, columns)
        wanted, parts = numbers(name, raw), packed(name, raw, columns, room)
        np.testing.assert_array_equal(room.dequantized(name, parts, 40, columns), wanted)
        index = jnp.array([3, 39, 17, 0, 3])
        np.testing.assert_array_equal(room.rows_of(name, parts, index, columns), wanted[np.asarray(index)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_memory_is_that_of_the_file(name: str, layout: Layout) -> None:
    fmt = WEIGHT_FORMATS[name]
    in_file = 8 * fmt.file_bytes / fmt.file_block
    # Scales of six and of four bits take a byte each.
    assert in_file <= bits_per_weight(name, LAYOUTS[layout]) <= in_file + (1.1 if fmt.has_steps else 0)


def test_matrices_packed_one_after_another_are_one_matrix() -> None:
    fmt, raw = WEIGHT_FORMATS["Q6_K"], random_raw("Q6_K", 80, COLUMNS)
    parts = empty_parts("panels", fmt, 80, COLUMNS)
    for begin, end in ((48, 80), (0, 32), (32, 48)):
        panels.pack(fmt, raw[begin:end], parts, begin)
    for key, part in packed("Q6_K", raw, COLUMNS).items():
        np.testing.assert_array_equal(parts[key], part)
    with pytest.raises(ValueError, match="first_row must be a multiple of 16, got 8"):
        panels.pack(fmt, raw[:16], parts, 8)


def test_parts_are_aligned_for_xla() -> None:
    for part in empty_parts("panels", WEIGHT_FORMATS["Q5_K"], 33, COLUMNS).values():
        assert part.ctypes.data % ALIGNMENT == 0
        assert jax.device_put(part).unsafe_buffer_pointer() == part.ctypes.data


# --- products ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "exact"), [*((name, False) for name in NAMES), *((name, True) for name in ONE_OF_EACH_KIND)]
)
def test_products_equal_those_of_dequantized_matrices(name: str, exact: bool) -> None:
    """72 rows are four and a half panels; 70 tokens are products of 8, 4 and 2 rows, in two work items."""
    raw, rng = random_raw(name, 72, COLUMNS), np.random.default_rng(1)
    parts, wanted = packed(name, raw, COLUMNS), numbers(name, raw).astype(np.float64)
    for tokens in (1, 70):
        x = rng.standard_normal((tokens, COLUMNS)).astype(np.float32)
        found = np.asarray(product.product(x, name, parts, 72, exact=exact))
        taken = x if exact else rounded(x)
        assert relative(found, taken @ wanted.T) < 1e-6
        assert relative(found, x @ wanted.T) < ROUNDED


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "whole"])
@pytest.mark.parametrize("tokens", [1, 3, 23])
def test_fused_operations(tokens: int, exact: bool) -> None:
    raw, rng = random_raw("Q8_0", 96, COLUMNS), np.random.default_rng(tokens)
    parts, matrix = packed("Q8_0", raw, COLUMNS), numbers("Q8_0", raw).astype(np.float64)
    x, add = (rng.standard_normal((tokens, n)).astype(np.float32) for n in (COLUMNS, 48))
    scale, eps = rng.random(COLUMNS).astype(np.float32), 1e-2
    normed = (x / np.sqrt(np.mean(np.square(x, dtype=np.float64), -1, keepdims=True) + eps) * scale).astype(
        "f4"
    )
    taken = normed if exact else rounded(normed)
    both = taken @ matrix.T
    top = {key: part[:3] for key, part in parts.items()}
    for implementation in ("cpu", "xla"):
        around: dict[str, Any] = {"norm": (scale, eps), "exact": exact, "implementation": implementation}
        of_silu, of_gelu = (
            product.product(x, "Q8_0", parts, 48, gated=True, activation=activation, **around)
            for activation in ("silu", "gelu_tanh")
        )
        added = product.product(x, "Q8_0", top, 48, add=add, **around)
        bound = 2e-6 if exact or implementation == "cpu" else ROUNDED
        for gated, activation in ((of_silu, silu), (of_gelu, gelu_tanh)):
            wanted = activation(both[:, :48]) * both[:, 48:]
            assert relative(np.asarray(gated), wanted) < max(bound, 1e-5 if not exact else 0)
        assert relative(np.asarray(added), both[:, :48] + add) < max(bound, 1e-5 if not exact else 0)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_a_layer_of_a_stack_is_the_matrix_alone(name: str, implementation: product.Implementation) -> None:
    parts = packed(name, random_raw(name, 72, COLUMNS), COLUMNS)
    x = jnp.asarray(np.random.default_rng(5).standard_normal((3, COLUMNS)), jnp.float32)

    @jax.jit
    def run(parts: dict[str, Any], layer: Any) -> Any:
        return product.product(x, name, parts, 72, layer=layer, implementation=implementation)

    alone = np.asarray(run(parts, None))
    for layer in (1, 2):
        assert relative(np.asarray(run(stacked(parts, layer), layer)), alone) < 1e-6


def test_a_token_is_the_same_alone_and_in_a_batch() -> None:
    """Bit by bit: a token's result does not depend on the others of its batch."""
    raw, rng = random_raw("Q4_K", 64, COLUMNS), np.random.default_rng(2)
    parts = packed("Q4_K", raw, COLUMNS)
    x = rng.standard_normal((21, COLUMNS)).astype(np.float32)
    for exact in (True, False):
        together = np.asarray(product.product(x, "Q4_K", parts, 64, exact=exact))
        alone = [np.asarray(product.product(row[None], "Q4_K", parts, 64, exact=exact))[0] for row in x]
        np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "whole"])
def test_a_nan_or_infinity_stays_in_its_row(exact: bool, bad: float) -> None:
    parts = packed("Q4_1", random_raw("Q4_1", 32, COLUMNS), COLUMNS)
    x = np.random.default_rng(3).standard_normal((3, COLUMNS)).astype(np.float32)
    clean = np.asarray(product.product(x, "Q4_1", parts, 32, exact=exact))
    x[1, 40] = bad
    found = np.asarray(product.product(x, "Q4_1", parts, 32, exact=exact))
    np.testing.assert_array_equal(found[[0, 2]], clean[[0, 2]])
    assert not np.isfinite(found[1]).any()


def test_zeros_give_zeros() -> None:
    parts = packed("Q5_1", random_raw("Q5_1", 32, COLUMNS), COLUMNS)
    for exact in (True, False):
        assert not np.asarray(product.product(jnp.zeros((2, COLUMNS)), "Q5_1", parts, 32, exact=exact)).any()


def test_results_have_the_dtype_of_activations() -> None:
    raw = random_raw("Q8_0", 32, COLUMNS)
    parts, wanted = packed("Q8_0", raw, COLUMNS), numbers("Q8_0", raw)
    x = jnp.asarray(np.random.default_rng(4).standard_normal((2, COLUMNS)), jnp.bfloat16)
    for implementation in ("cpu", "xla"):
        found = product.product(x, "Q8_0", parts, 32, exact=True, implementation=implementation)  # type: ignore[arg-type]
        assert found.dtype == jnp.bfloat16
        assert relative(np.asarray(found, np.float32), np.asarray(x, np.float32) @ wanted.T) < 1e-2


# --- other CPUs -------------------------------------------------------------------------------------------------

OTHER_CPUS = {"avx2": ("haswell", "+avx2,+fma,+f16c"), "any": ("ivybridge", "+avx,+f16c")}
CHECK = """
import numpy as np
from quantized_matrices import numbers, packed, random_raw
from jaxpaged_model.quantized import cpu_vectors, product
from test_quantized import relative, rounded
assert cpu_vectors.INSTRUCTIONS == {instructions!r}, cpu_vectors.INSTRUCTIONS
for name, exact in {cases}:
    raw = random_raw(name, 32, 256)
    x = np.random.default_rng(0).standard_normal((7, 256)).astype(np.float32)
    found = np.asarray(product.product(x, name, packed(name, raw, 256), 32, exact=exact))
    assert relative(found, (x if exact else rounded(x)) @ numbers(name, raw).T) < 1e-6, name
"""


@pytest.mark.skipif(cpu_vectors.INSTRUCTIONS not in ("avx512vnni", "avx2"), reason="no x86-64 CPU with AVX2")
@pytest.mark.slow
@pytest.mark.parametrize("instructions", OTHER_CPUS)
def test_cpus_with_fewer_features_compute_the_same(instructions: str, tmp_path: Path) -> None:
    name, features = OTHER_CPUS[instructions]
    here = Path(__file__).parent
    environment = os.environ | {
        "NUMBA_CPU_NAME": name,
        "NUMBA_CPU_FEATURES": features,
        "JAXPAGED_CACHE": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])]),
    }
    done = subprocess.run(
        [sys.executable, "-c", CHECK.format(instructions=instructions, cases=(("IQ4_XS", False), ("Q5_1", True)))],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


AS_ON_ARM = """
from llvmlite import ir
from jaxpaged_model.quantized import cpu_vectors

def dot(self, c, total, codes, factors):
    '''What sdot computes: products of signed bytes, four summed up in each lane.'''
    words = cpu_vectors._WORDS
    down = ir.Constant(words, [24] * 16)
    for j in range(4):
        up = ir.Constant(words, [24 - 8 * j] * 16)
        a, b = (c.b.ashr(c.b.shl(x, up), down) for x in (codes, factors))
        total = c.b.add(total, c.b.mul(a, b))
    return total

cpu_vectors._OfBytes._dot = dot
cpu_vectors._PRODUCTS = cpu_vectors._OfBytes()
"""


@pytest.mark.slow
def test_high_and_low_bytes_make_the_same_sums_as_pairs(tmp_path: Path) -> None:
    """The code for Arm, with another instruction in place of its own."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1])])
    environment = os.environ | {"JAXPAGED_CACHE": str(tmp_path), "PYTHONPATH": path}
    script = AS_ON_ARM + CHECK.format(instructions=cpu_vectors.INSTRUCTIONS, cases=(("Q6_K", False),))
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


ASSEMBLY = """
import re
import llvmlite.binding as llvm
from llvmlite import ir
from jaxpaged.native.tiles import Code
from jaxpaged_model.quantized import cpu_vectors
from jaxpaged_model.quantized.formats import WEIGHT_FORMATS

cpu_vectors.INSTRUCTIONS, cpu_vectors._PRODUCTS = "neon", cpu_vectors._OfBytes()
cpu_vectors.instructions = lambda write, *_: write
module = ir.Module()
for name in ("Q8_0", "Q4_K", "IQ4_NL"):
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * cpu_vectors.PANEL_ARGUMENTS)
    function = ir.Function(module, kind, name)
    builder = ir.IRBuilder(function.append_basic_block())
    cpu_vectors.panel_product(WEIGHT_FORMATS[name], 4, False)(Code(builder), *function.args)
    builder.ret_void()
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
target = llvm.Target.from_triple("aarch64-unknown-linux-gnu")
machine = target.create_target_machine(cpu="neoverse-n1", features="+dotprod", opt=3)
parsed = llvm.parse_assembly(str(module))
options = llvm.create_pipeline_tuning_options(speed_level=3)
passes = llvm.create_pass_builder(machine, options)
passes.getModulePassManager().run(parsed, passes)
text = machine.emit_assembly(parsed)
print(len(re.findall(r"\\bsdot\\b", text)), len(re.findall(r"\\btbl\\b", text)))
"""


def test_llvm_compiles_arms_instructions() -> None:
    """Cross-compiles for Arm: four rows, 64 bytes of codes per quad, high and low bytes of activations."""
    done = subprocess.run([sys.executable, "-c", ASSEMBLY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    dots, lookups = map(int, done.stdout.split())
    assert dots == 3 * 8 * 4 * 4 * 2 and lookups >= 8 * 4


@pytest.mark.parametrize("num_rows", [0, 1, 5, 40, 64, 99])
def test_rows_that_do_not_count_are_zero_and_change_no_other(num_rows: int) -> None:
    matrix = packed("Q8_0", random_weights_raw("Q8_0", 48, 64), 64)
    x = jax.random.normal(jax.random.key(0), (64, 64))
    run = functools.partial(product.product, x, "Q8_0", matrix, 48, add=jnp.ones((64, 48)))
    everything, found = run(), run(num_rows=jnp.int32(num_rows))
    np.testing.assert_array_equal(found[:num_rows], everything[:num_rows])
    assert not np.asarray(found[num_rows:]).any()


def test_examples_of_a_vmap_have_rows_of_their_own() -> None:
    matrix = packed("Q8_0", random_weights_raw("Q8_0", 48, 64), 64)
    x, counts = jax.random.normal(jax.random.key(0), (3, 8, 64)), jnp.array([8, 0, 3])
    run = lambda x, count: product.product(x, "Q8_0", matrix, 48, num_rows=count)  # noqa: E731
    for example, found, count in zip(x, jax.vmap(run)(x, counts), counts, strict=True):
        np.testing.assert_array_equal(found[:count], run(example, count)[:count])
