"""Custom calls made of numba functions: structures, threads, and the kernel cache."""

import concurrent.futures
import os
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

NAME = "jaxpaged_test_doubling"
IN, OUT, ROWS, COLUMNS, THREADS = range(ffi.JOB, ffi.JOB + 5)


def doubling_task(job):
    index = ffi.next_item(job)
    while index >= 0:
        columns = load_i64(job, COLUMNS)
        for i in range(index * columns, (index + 1) * columns):
            store_f32(load_i64(job, OUT), i, 2 * load_f32(load_i64(job, IN), i) + load_i64(job, THREADS) * 0)
        ffi.item_done(job)
        index = ffi.next_item(job)
    ffi.release(job)
    return 0


def doubling_handler(call):
    if ffi.is_version_query(call):
        return 0
    job = ffi.new_job(5)
    x = ffi.argument(call, 0)
    store_i64(job, IN, ffi.data(x))
    store_i64(job, OUT, ffi.data(ffi.result(call, 0)))
    store_i64(job, COLUMNS, ffi.size(x, 1))
    threads = ffi.num_threads(call)
    store_f32(ffi.data(ffi.result(call, 1)), 0, np.float32(threads))
    ffi.run_items(call, job, ffi.size(x, 0), threads, symbol("jaxpaged_test_doubling_task"))
    ffi.release(job)
    return 0


@jax.jit
def double(x):
    shapes = jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((1,), jnp.float32)
    return jax.ffi.ffi_call(NAME, shapes)(x)


@pytest.fixture(scope="module", autouse=True)
def registered():
    ffi.register(NAME, doubling_handler, doubling_task, [Path(__file__)])


@pytest.mark.parametrize("rows", [1, 2, 1000])
def test_every_item_is_done_once(rows):
    x = np.random.default_rng(rows).standard_normal((rows, 7)).astype(np.float32)
    out, threads = double(x)
    np.testing.assert_array_equal(out, 2 * x)
    assert threads[0] >= 1


def test_calls_from_many_threads_are_independent():
    xs = [np.full((50, 11), i, np.float32) for i in range(8)]

    def many(x):
        return all((np.asarray(double(x)[0]) == 2 * x).all() for _ in range(50))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(many, xs))


def test_a_call_inside_a_loop_inside_a_program():
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
    """Cached code is linked to the address of the task in the new process."""
    script = (
        "import jax, test_ffi\n"
        "from jaxpaged.native import ffi\n"
        "ffi.register(test_ffi.NAME, test_ffi.doubling_handler, test_ffi.doubling_task, [])\n"
        "assert (test_ffi.double(jax.numpy.ones((9, 7)))[0] == 2).all()\n"
        "print([function.cache_hits for function in ffi._REGISTERED[test_ffi.NAME]])\n"
    )
    environment = os.environ | {"JAXPAGED_CACHE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent)}
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert outputs == ["[0, 0]\n", "[1, 1]\n"]


@pytest.fixture
def compile_again(monkeypatch, tmp_path):
    """Registers the kernel with an empty cache folder; returns the cache hits of its two functions."""
    monkeypatch.setenv("JAXPAGED_CACHE", str(tmp_path))
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *_, **__: None)

    def register():
        ffi.register(NAME, doubling_handler, doubling_task, [])
        return [function.cache_hits for function in ffi._REGISTERED[NAME]]

    return register


def test_damaged_cache_entries_are_rebuilt(compile_again, tmp_path):
    """numba itself runs a damaged file, and crashes."""
    assert compile_again() == [0, 0]
    for damage in (
        lambda content: b"",
        lambda content: content[:-9],
        lambda content: content[: len(content) // 2] + bytes(500) + content[len(content) // 2 + 500 :],
    ):
        assert compile_again() == [1, 1]
        for file in (file for file in tmp_path.rglob("*") if file.is_file()):
            file.write_bytes(damage(file.read_bytes()))
        assert compile_again() == [0, 0]


def test_without_a_usable_cache_folder_kernels_compile(compile_again, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "open" / "kernels").mkdir(parents=True)
    (tmp_path / "open" / "kernels").chmod(0o777)
    for folder, reason in (("file", "Not a directory"), ("open", "another user owns it or may write to it")):
        monkeypatch.setenv("JAXPAGED_CACHE", str(tmp_path / folder))
        with pytest.warns(RuntimeWarning, match=f"no kernel cache, every process compiles: .*{reason}"):
            assert compile_again() == [0, 0]
    assert not list((tmp_path / "open" / "kernels").iterdir())
