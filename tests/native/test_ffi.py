"""Custom calls made of numba functions: the structures they read, and the threads they run on."""

import concurrent.futures
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("numba")

from jaxpaged.native import ffi
from jaxpaged.native.memory import load_f32, load_i64, store_f32, store_i64, symbol

IN, OUT, ROWS, COLUMNS, THREADS = range(ffi.JOB, ffi.JOB + 5)


def doubling_task(job):
    index = ffi.next_piece(job)
    while index >= 0:
        columns = load_i64(job, COLUMNS)
        for i in range(index * columns, (index + 1) * columns):
            store_f32(load_i64(job, OUT), i, 2 * load_f32(load_i64(job, IN), i) + load_i64(job, THREADS) * 0)
        ffi.piece_done(job)
        index = ffi.next_piece(job)
    ffi.release(job)
    return 0


def doubling_handler(call):
    if ffi.answers_query(call):
        return 0
    job = ffi.new_job(5)
    x = ffi.argument(call, 0)
    store_i64(job, IN, ffi.data(x))
    store_i64(job, OUT, ffi.data(ffi.result(call, 0)))
    store_i64(job, COLUMNS, ffi.size(x, 1))
    threads = ffi.num_threads(call)
    store_f32(ffi.data(ffi.result(call, 1)), 0, np.float32(threads))
    ffi.run_pieces(call, job, ffi.size(x, 0), threads, symbol("jaxpaged_test_doubling_task"))
    ffi.release(job)
    return 0


@pytest.fixture(scope="module")
def double():
    ffi.register("jaxpaged_test_doubling", doubling_handler, doubling_task, [Path(__file__)])

    @jax.jit
    def call(x):
        shapes = jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((1,), jnp.float32)
        return jax.ffi.ffi_call("jaxpaged_test_doubling", shapes)(x)

    return call


@pytest.mark.parametrize("rows", [1, 2, 1000])
def test_every_piece_is_done_once(double, rows):
    x = np.random.default_rng(rows).standard_normal((rows, 7)).astype(np.float32)
    out, threads = double(x)
    np.testing.assert_array_equal(out, 2 * x)
    assert threads[0] >= 1


def test_calls_from_many_threads_do_not_meet(double):
    xs = [np.full((50, 11), i, np.float32) for i in range(8)]

    def many(x):
        return all((np.asarray(double(x)[0]) == 2 * x).all() for _ in range(50))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(many, xs))


def test_a_call_inside_a_loop_inside_a_program(double):
    x = jnp.ones((4, 4))
    out = jax.jit(lambda x: jax.lax.fori_loop(0, 10, lambda _, x: double(x)[0], x))(x)
    np.testing.assert_array_equal(out, 1024 * np.ones((4, 4)))


def test_the_layout_is_compared_with_jaxlibs_header(monkeypatch, tmp_path):
    assert ffi.check_layout()[0] >= 0
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    copy = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    copy.parent.mkdir(parents=True)
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    with pytest.raises(ffi.LayoutError, match="no readable"):
        ffi.check_layout()
    shutil.copy(header, copy)
    assert ffi.check_layout()[0] >= 0
    text = header.read_text()
    for change, message in (
        (text.replace("  void* data;\n  int64_t rank;", "  int64_t rank;\n  void* data;"), "XLA_FFI_Buffer"),
        (re.sub(r"_XLA_FFI_API_STRUCT_FIELD\(XLA_FFI_State_Get\);", "", text), "table of functions"),
        (text.replace("#define XLA_FFI_API_MINOR", "#define MINOR"), "names no version"),
    ):
        assert change != text
        copy.write_text(change)
        with pytest.raises(ffi.LayoutError, match=message):
            ffi.check_layout()


def test_a_second_process_compiles_nothing(tmp_path):
    """What is kept is found again, and linked to where the task lies in the new process."""
    script = (
        "import jax, numpy as np\n"
        "from jaxpaged.attention.cases import Case\n"
        "from jaxpaged.testing.conformance import build_case, check_conformance\n"
        "from jaxpaged.attention import paged_attention\n"
        "from jaxpaged.native import ffi\n"
        "case = Case('c', num_q_heads=2, num_kv_heads=1, head_dim=16, lengths=(40,), q_lens=(3,))\n"
        "check_conformance(lambda *a, **k: paged_attention(*a, implementation='cpu_numba', **k), case)\n"
        "print([f.cache_hits for f in ffi._REGISTERED['jaxpaged_paged_attention']])\n"
    )
    environment = {"JAXPAGED_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    seen = [
        subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert seen == ["[0, 0]\n", "[1, 1]\n"]
