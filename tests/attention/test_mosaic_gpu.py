"""The GPU kernel: the conformance kit in Pallas' GPU interpreter, and lowering for CUDA on a machine without a GPU."""

import dataclasses
import functools
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh
from layer_pools import in_a_pool

from jaxpaged.attention import reference
from jaxpaged.attention.base import make_config
from jaxpaged.attention.cases import CASES, LLAMA_3_8B, MODELS, SMOLLM2_135M, Case
from jaxpaged.attention.gpu import backend as mosaic_gpu
from jaxpaged.attention.gpu.tile_config import make_plan
from jaxpaged.pages.formats import page_format
from jaxpaged.testing.conformance import build_case, check_conformance

needs_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="jax before 0.11.2 offers no interpreter of GPU kernels"
)
MORE_CASES = (
    Case(
        "everything",
        num_q_heads=10,
        num_kv_heads=2,
        head_dim=32,
        lengths=(61, 300, 12, 0),
        q_lens=(1, 70, 12, 0),
        page_size=8,
        padding=6,
        window=33,
        soft_cap=5.0,
        sinks=True,
        slices=True,
        gaps=True,
    ),
    # As many items as fill a GPU, so that none is split.
    Case(
        "unsplit", num_q_heads=34, num_kv_heads=34, head_dim=16, lengths=(150, 9, 1, 64), q_lens=(1, 1, 1, 1)
    ),
)


def in_pages_of_two_bytes(case):
    return case if case.dtype != "f32" else dataclasses.replace(case, dtype="bf16")


def build(case):
    """The case in bfloat16 or float16 pages, with what the pages hold after rounding as the truth."""
    built = build_case(in_pages_of_two_bytes(case))
    if max(case.q_lens) == 1:
        built = dataclasses.replace(built, batch=dataclasses.replace(built.batch, max_q_len=1))
    # The kit's own truth knows shifted keys as they were before they were rounded.
    return with_reference(built) if case.rotary_dim else built


def with_reference(built):
    case = built.case
    config = make_config(case.head_dim, case.scale, case.window, case.soft_cap, case.v_head_dim)
    arguments = built.q, built.k_pages, built.v_pages, built.table, built.batch
    out, lse = reference.paged_attention(*arguments, config, built.sinks, built.rope)
    return dataclasses.replace(built, out=np.asarray(out, np.float64), lse=np.asarray(lse, np.float64))


def interpreted(q, *arguments, scale, window, soft_cap, return_lse, races=False, **options):
    assert return_lse
    config = make_config(q.shape[-1], scale, window, soft_cap, arguments[1].shape[3])
    interpret = plgpu.InterpretGPUParams(detect_races=races)
    attention = functools.partial(mosaic_gpu.paged_attention, config=config, interpret=interpret)
    out, lse = jax.jit(attention)(q, *arguments, **{"rope": None, **options})
    return out.astype(q.dtype), lse


def served(case):
    return case.head_dim % 16 == 0


REPRESENTATIVE = {
    "smollm2_decode_idle",
    "smollm2_mixed",
    "qwen3_mixed_f16",
    "gpt_oss_sinks",
    "stablelm_head_dim_80",
    "slices_gaps_window",
    "shared",
    "shifted_window",
    "ahead_window_shifted",
    "pages_of_256",
    "values_128_of_192",
    "everything",
    "unsplit",
}
"""Cases that reach every branch of the kernel between them; the others are slow."""
FLOAT_QUERIES = [
    pytest.param(case, id=case.name, marks=() if case.name in REPRESENTATIVE else pytest.mark.slow)
    for case in (*CASES, *MORE_CASES)
    if served(case) and case.head_dim < 256
]


@needs_interpreter
@pytest.mark.parametrize("case", FLOAT_QUERIES)
def test_the_kernel_conforms(case):
    """Float32 queries: two terms of the pages' dtype keep 16 bits of them."""
    check_conformance(interpreted, build(case), rtol=1e-4, atol=1e-4)


@needs_interpreter
@pytest.mark.parametrize(
    "case",
    [
        Case("llama3_decode", **LLAMA_3_8B, lengths=(70, 19), q_lens=(1, 1)),
        Case("smollm2_mixed", **SMOLLM2_135M, lengths=(90, 131, 0), q_lens=(1, 37, 0), window=60),
        # Two warpgroups a block.
        *(case for case in CASES if case.head_dim == 256),
        Case(
            "two_warpgroups_shifted",
            num_q_heads=4,
            num_kv_heads=1,
            head_dim=256,
            lengths=(70, 20),
            q_lens=(9, 1),
            rotary_dim=256,
            slices=True,
        ),
    ],
    ids=lambda case: case.name,
)
def test_queries_of_the_pages_dtype(case, capfd):
    """Weights are rounded to 8 bits, as in every flash attention; nothing races."""
    built = build(case)
    built = with_reference(dataclasses.replace(built, q=built.q.astype(jnp.bfloat16)))
    # Output is compared in bfloat16: half a unit of 4 is 0.008.
    check_conformance(functools.partial(interpreted, races=True), built, rtol=1e-2, atol=1e-2)
    assert "RACE" not in capfd.readouterr().out


@needs_interpreter
@pytest.mark.parametrize(
    "case",
    [
        Case("decode", **LLAMA_3_8B, lengths=(70, 19), q_lens=(1, 1)),
        Case("mixed", **SMOLLM2_135M, lengths=(90, 71, 0), q_lens=(1, 37, 0), window=60),
    ],
    ids=lambda case: case.name,
)
def test_a_layer_of_a_pool_is_the_layer_alone(case):
    check_a_layer_of_a_pool(interpreted, build(case))


def check_a_layer_of_a_pool(attention, built):
    """Attention to layer 2 of a pool and to its pages alone are equal bit by bit."""
    pool, first_page = in_a_pool(built, 2)
    options = built.options | {"return_lse": True}
    queries = built.table, built.batch
    alone = attention(built.q, built.k_pages, built.v_pages, *queries, **options)
    found = attention(built.q, pool.k_pages, pool.v_pages, *queries, first_page=first_page, **options)
    for one, wanted in zip(found, alone, strict=True):
        np.testing.assert_array_equal(one, wanted)


@needs_interpreter
def test_queries_of_one_item_may_be_of_different_frames():
    case = Case(
        "frames", **SMOLLM2_135M, lengths=(150, 33), q_lens=(9, 2), slices=True, gaps=True, rotary_dim=64
    )
    built = build(case)
    batch = built.batch
    shift = jnp.arange(batch.num_tokens, dtype=jnp.int32) % 3 * 7
    batch = dataclasses.replace(batch, rope_positions=batch.rope_positions + shift)
    check_conformance(
        interpreted, with_reference(dataclasses.replace(built, batch=batch)), rtol=1e-4, atol=1e-4
    )


def lowered_for_cuda(jitted, *arguments):
    """The program's text; no GPU, no driver."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("device",), abstract_device=device)):
        return jitted.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def on_gpu(built):
    case = built.case
    config = make_config(case.head_dim, case.scale, case.window, case.soft_cap, case.v_head_dim)

    def attention(q, k_pages, v_pages, table, batch, sinks, rope):
        return mosaic_gpu.paged_attention(q, k_pages, v_pages, table, batch, config, sinks, rope)

    return lowered_for_cuda(
        jax.jit(attention),
        built.q,
        built.k_pages,
        built.v_pages,
        built.table,
        built.batch,
        built.sinks,
        built.rope,
    )


@pytest.mark.parametrize("case", [c for c in (*CASES, *MORE_CASES) if served(c)], ids=lambda case: case.name)
def test_the_kernel_lowers_for_cuda(case):
    built = build_case(in_pages_of_two_bytes(case))
    if case.head_dim == 256:
        built = dataclasses.replace(built, q=built.q.astype(jnp.bfloat16))
    assert "mosaic_gpu" in on_gpu(built)


def test_the_kernel_lowers_with_64_bit_numbers():
    case = next(case for case in CASES if case.name == "shifted_window")
    with jax.enable_x64(True):
        assert "mosaic_gpu" in on_gpu(build_case(in_pages_of_two_bytes(case)))


def test_a_donated_step_aliases_its_pages():
    built = build_case(Case("step", **LLAMA_3_8B, lengths=(70, 19), q_lens=(1, 1), dtype="bf16"))
    write, config = page_format("bf16").write, make_config(128, None, None, None)

    def step(k_pages, v_pages, q, k, table, batch):
        k_pages, v_pages = (write(pages, batch.page, batch.slot, k) for pages in (k_pages, v_pages))
        out, _ = mosaic_gpu.paged_attention(q, k_pages, v_pages, table, batch, config, None, None)
        return k_pages, v_pages, out

    step = jax.jit(step, donate_argnums=(0, 1))
    given = built.k_pages, built.v_pages, built.q, built.q[:, :8], built.table, built.batch
    text = lowered_for_cuda(step, *given)
    assert "mosaic_gpu" in text and text.count("tf.aliasing_output") == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float32"}, "pages of bfloat16 or float16 as they lie, not of float32"),
        ({"head_dim": 24}, "multiple of 16 up to 128, or of 32 up to 256, for wgmma; it is 24"),
        ({"head_dim": 144}, "it is 144"),
        ({"head_dim": 288}, "it is 288"),
        ({"num_q_heads": 130}, "65 query heads of a KV head are more than the 64 rows"),
        ({"page_size": 24}, "page_size must be a power of two from 8 on, to fill steps; it is 24"),
        (
            {"head_dim": 256, "q_dtype": "float32"},
            "float32 queries of bfloat16 pages and head_dim 256 take 232448 bytes",
        ),
    ],
)
def test_what_the_kernel_cannot_serve_is_refused_with_the_reason(change, message):
    sizes = {
        "head_dim": 64,
        "page_size": 32,
        "num_q_heads": 8,
        "dtype": "bfloat16",
        "q_dtype": "bfloat16",
    } | change
    with pytest.raises(NotImplementedError, match=message):
        mosaic_gpu.describe(
            (4, sizes["num_q_heads"], sizes["head_dim"]),
            (9, 2, sizes["page_size"], sizes["head_dim"]),
            sizes["dtype"],
            None,
            2,
            8,
            q_dtype=sizes["q_dtype"],
        )


def test_keys_and_values_of_two_dtypes_are_left_to_another():
    built = build_case(CASES[0])
    k_pages, v_pages = built.k_pages.astype(jnp.bfloat16), built.v_pages.astype(jnp.float16)
    config = make_config(built.q.shape[-1], None, None, None)
    with pytest.raises(NotImplementedError, match="keys of bfloat16 and values of float16; reads one dtype"):
        mosaic_gpu.paged_attention(built.q, k_pages, v_pages, built.table, built.batch, config, None, None)


@pytest.mark.parametrize(("capability", "served"), [("8.0", False), ("9.0", True), ("10.0", False)])
def test_other_gpus_than_hopper_are_refused(capability, served, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    built = build_case(in_pages_of_two_bytes(CASES[0]))
    if served:
        assert "mosaic_gpu" in on_gpu(built)
    else:
        with pytest.raises(NotImplementedError, match=f"this GPU has compute capability {capability}"):
            on_gpu(built)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tokens", [1, 8, 64, 512])
def test_a_decode_step_fills_the_multiprocessors_once(model, tokens):
    heads = MODELS[model]
    shape = 4096, heads["num_kv_heads"], 32, heads["head_dim"]
    plan = make_plan(
        tokens,
        heads["num_q_heads"],
        shape,
        "bfloat16",
        "bfloat16",
        max_q_len=1,
        max_seqs=tokens,
        max_pages_per_seq=1024,
    )
    blocks, room = tokens * heads["num_kv_heads"] * plan.num_splits, 132 * plan.blocks_per_sm
    # More than half of the room is taken, and no block waits for another unless there are too many queries.
    assert blocks > room // 2 or plan.num_splits == 128
    assert blocks <= room or plan.num_splits == 1


def test_describe_counts_what_a_step_moves():
    sizes = mosaic_gpu.describe((8, 32, 128), (4096, 8, 32, 128), "bfloat16", 1, 8, 256, live_tokens=8 * 1000)
    assert sizes["kv_bytes"] == 2 * 8 * 128 * 2 * 8000
    # Four heads a KV head take a tile of eight rows.
    assert sizes["q_bytes"] == 2 * 8 * 8 * 8 * 128 * 2
    assert sizes["out_bytes"] == 4 * (2 * 8 * 8 * 8 * 128 * sizes["splits"] + 8 * 32 * 128)


ROOT = Path(__file__).parents[2]
COMPILE_CHECK = [sys.executable, "-m", "tpu_scripts.compile_check.gpu"]


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is not None, reason="the plugin is here")
def test_the_compile_check_says_what_it_needs():
    done = subprocess.run(COMPILE_CHECK, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("needs jax-cuda13-plugin")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax-cuda13-plugin")
def test_the_kernel_compiles_for_hopper_without_spills():
    done = subprocess.run([*COMPILE_CHECK, "--quick"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
