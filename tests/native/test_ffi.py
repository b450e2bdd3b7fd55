"""Custom calls made of numba functions: structures, threads, compilation beside, and the kernel cache."""

import concurrent.futures
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("numba")

from jaxpaged.compilation import background
from jaxpaged.native import ffi, kernels, layout
from jaxpaged.native.memory import load_f32, load_i64, store_f32, store_i64, symbol

VARIANT = "waiting" if __name__ == "waiting" else "doubling"
NAME = f"jaxpaged_test_{VARIANT}"
TASK = f"{NAME}_task"
KERNEL = kernels.Kernel(NAME, Path(__file__), "doubling", ())
IN, OUT, ROWS, COLUMNS, THREADS = range(ffi.JOB, ffi.JOB + 5)


def task(job):
    index = ffi.next_item(job)
    while index >= 0:
        columns = load_i64(job, COLUMNS)
        for i in range(index * columns, (index + 1) * columns):
            store_f32(load_i64(job, OUT), i, 2 * load_f32(load_i64(job, IN), i) + load_i64(job, THREADS) * 0)
        ffi.item_done(job)
        index = ffi.next_item(job)
    ffi.release(job)
    return 0


def handler(call):
    if ffi.is_version_query(call):
        return 0
    job = ffi.new_job(5)
    x = ffi.argument(call, 0)
    store_i64(job, IN, ffi.data(x))
    store_i64(job, OUT, ffi.data(ffi.result(call, 0)))
    store_i64(job, COLUMNS, ffi.size(x, 1))
    threads = ffi.num_threads(call)
    store_f32(ffi.data(ffi.result(call, 1)), 0, np.float32(threads))
    ffi.run_items(call, job, ffi.size(x, 0), threads, symbol(TASK))
    ffi.release(job)
    return 0


@jax.jit
def double(x):
    shapes = jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((1,), jnp.float32)
    return jax.ffi.ffi_call(NAME, shapes)(x)


@pytest.fixture(scope="module", autouse=True)
def registered():
    kernels.register(KERNEL)


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
    assert layout.check_layout()[0] >= 0
    text, copy = layout.header().read_text(), tmp_path / "c_api.h"
    monkeypatch.setattr(layout, "header", lambda: copy)
    with pytest.raises(layout.LayoutError, match="no readable"):
        layout.check_layout()
    copy.write_text(text)
    assert layout.check_layout()[0] >= 0
    for change, message in (
        (text.replace("  void* data;\n  int64_t rank;", "  int64_t rank;\n  void* data;"), "XLA_FFI_Buffer"),
        (re.sub(r"_XLA_FFI_API_STRUCT_FIELD\(XLA_FFI_State_Get\);", "", text), "table of functions"),
        (text.replace("#define XLA_FFI_API_MINOR", "#define MINOR"), "names no version"),
    ):
        assert change != text
        copy.write_text(change)
        with pytest.raises(layout.LayoutError, match=message):
            layout.check_layout()


def test_a_program_compiles_and_waits_while_its_kernel_is_compiled(monkeypatch, tmp_path):
    """The custom call is there at once; it goes on when its code is."""
    monkeypatch.setenv("JAXPAGED_CACHE", str(tmp_path))
    compiled = threading.Event()
    elsewhere = kernels._compiled_elsewhere

    def late(kernel):
        content = elsewhere(kernel)
        assert compiled.wait(60)
        return content

    monkeypatch.setattr(kernels, "_compiled_elsewhere", late)
    name = "jaxpaged_test_waiting"
    kernels.register(kernels.Kernel(name, Path(__file__), "waiting"))
    shapes = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    x = jnp.ones((3, 5))
    program = jax.jit(jax.ffi.ffi_call(name, shapes)).lower(x).compile()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        out = pool.submit(lambda: np.asarray(program(x)[0]))
        with pytest.raises(concurrent.futures.TimeoutError):
            out.result(timeout=0.2)
        compiled.set()
        np.testing.assert_array_equal(out.result(), 2 * np.ones((3, 5)))
    background.wait()


def test_a_kernel_that_does_not_compile_is_an_error_of_the_call(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXPAGED_CACHE", str(tmp_path))
    file = tmp_path / "broken.py"
    file.write_text("def task(job):\n    return missing\n\n\nhandler = task\n")
    kernels.register(kernels.Kernel("jaxpaged_test_broken", file, "broken"))
    with pytest.raises(RuntimeError, match=r"jaxpaged_test_broken does not compile[\s\S]*missing"):
        background.wait()
    call = jax.ffi.ffi_call("jaxpaged_test_broken", jax.ShapeDtypeStruct((1,), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="the kernel jaxpaged_test_broken did not compile"):
        jax.block_until_ready(jax.jit(lambda: call())())


def test_a_second_process_compiles_nothing(tmp_path):
    """A process that finds object code does not need numba."""
    script = (
        "import sys, jax, jax.numpy as jnp\n"
        "from pathlib import Path\n"
        "from jaxpaged.native import kernels\n"
        "kernels.register(kernels.Kernel(sys.argv[1], Path(sys.argv[2]), 'doubling', ()))\n"
        "shapes = jax.ShapeDtypeStruct((9, 7), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)\n"
        "out, _ = jax.jit(jax.ffi.ffi_call(sys.argv[1], shapes))(jnp.ones((9, 7)))\n"
        "assert (out == 2).all()\n"
        "print('numba' in sys.modules)\n"
    )
    environment = os.environ | {"JAXPAGED_CACHE": str(tmp_path)}
    written: list[list[int]] = []
    for _ in range(2):
        command = [sys.executable, "-c", script, NAME, str(Path(__file__))]
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert out == "False\n"
        written.append([file.stat().st_ctime_ns for file in tmp_path.rglob("*.kernel")])
    assert len(written[0]) == 1


@pytest.fixture
def compile_again(monkeypatch, tmp_path):
    """Registers the kernel with an empty cache folder; returns True if that compiled it."""
    monkeypatch.setenv("JAXPAGED_CACHE", str(tmp_path))
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *_, **__: None)
    code = kernels._compiled_elsewhere([KERNEL])
    compiled = []

    def compile_elsewhere(kernel):
        compiled.append(kernel)
        return code

    monkeypatch.setattr(kernels, "_compiled_elsewhere", compile_elsewhere)

    def register():
        compiled.clear()
        kernels._registered.discard(KERNEL.name)
        kernels.register(KERNEL)
        background.wait()
        return bool(compiled)

    return register


def test_damaged_cache_entries_are_rebuilt(compile_again, tmp_path):
    """LLVM itself links a damaged file, and crashes."""
    assert compile_again()
    for damage in (
        lambda content: b"",
        lambda content: content[:-9],
        lambda content: content[: len(content) // 2] + bytes(500) + content[len(content) // 2 + 500 :],
    ):
        assert not compile_again()
        for file in (file for file in tmp_path.rglob("*") if file.is_file()):
            file.write_bytes(damage(file.read_bytes()))
        assert compile_again()


def test_without_a_usable_cache_folder_kernels_compile(compile_again, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "open" / "kernels").mkdir(parents=True)
    (tmp_path / "open" / "kernels").chmod(0o777)
    for folder, reason in (("file", "Not a directory"), ("open", "another user owns it or may write to it")):
        monkeypatch.setenv("JAXPAGED_CACHE", str(tmp_path / folder))
        with pytest.warns(RuntimeWarning, match=f"no kernel cache, every process compiles: .*{reason}"):
            assert compile_again()
    assert not list((tmp_path / "open" / "kernels").iterdir())


def test_untouched_memory_is_an_array_that_can_be_donated():
    pool = kernels.untouched(jax.ShapeDtypeStruct((1 << 20, 4), jnp.int8))
    address = pool.unsafe_buffer_pointer()
    written = jax.jit(lambda x: x.at[5].set(7), donate_argnums=0)(pool)
    assert written.unsafe_buffer_pointer() == address
    assert written.shape == (1 << 20, 4) and (written[5] == 7).all()
