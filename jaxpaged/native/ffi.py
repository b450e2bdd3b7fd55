"""XLA custom calls made of numba functions, on XLA's threads.

A kernel is two C functions. XLA calls its *handler*, which reads the buffers, writes a *job* with a
number of work items, and runs *tasks* that process them: one on the calling thread, others on XLA's
thread pool. So a kernel has no thread pool of its own that would compete with XLA's, and threads
are awake when it starts.

The C structures of XLA's foreign function interface are read by offset. ``check_layout`` compares
jaxlib's header, field by field, with the offsets here.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import llvmlite.binding as llvm
import numba
from numba import types

from jaxpaged.compilation.cache_folder import cache_folder, private_folder, read_entry, write_entry
from jaxpaged.native.memory import (
    call_address,
    fetch_add,
    free,
    load_i32,
    load_i64,
    malloc,
    store_i64,
    yield_thread,
)
from jaxpaged.native.tiles import i64, inlined, njit

_FIELDS: dict[str, tuple[str, ...]] = {
    "XLA_FFI_CallFrame": ("struct_size", "extension_start", "api", "ctx", "stage", "args", "rets", "attrs"),
    "XLA_FFI_Args": ("struct_size", "extension_start", "size", "types", "args"),
    "XLA_FFI_Rets": ("struct_size", "extension_start", "size", "types", "rets"),
    "XLA_FFI_Buffer": ("struct_size", "extension_start", "dtype", "data", "rank", "dims"),
    "XLA_FFI_Api_Version": ("struct_size", "extension_start", "major_version", "minor_version"),
    "XLA_FFI_Metadata": ("struct_size", "api_version", "traits"),
    "XLA_FFI_Metadata_Extension": ("extension_base", "metadata"),
    "XLA_FFI_(?:Extension_Base|InternalExtension)": ("struct_size", "type", "next"),
    "XLA_FFI_ThreadPool_Schedule_Args": ("struct_size", "extension_start", "ctx", "task", "data"),
    "XLA_FFI_ThreadPool_NumThreads_Args": ("struct_size", "extension_start", "ctx", "num_threads"),
    "XLA_FFI_Error_Destroy_Args": ("struct_size", "extension_start", "error"),
}
"""First fields of each structure, in order; the offsets below follow from them on a 64-bit machine.
Some names are patterns, because jax 0.12 renamed them."""
_API = ("struct_size", "extension_start", "api_version", "internal_api")
_FIRST_FUNCTION = 48
_FUNCTIONS = {"Error_Destroy": 2, "ThreadPool_Schedule": 11, "ThreadPool_NumThreads": 12}
"""XLA's functions that are called here, and their indices in its table."""
_ERROR_DESTROY, _SCHEDULE, _NUM_THREADS = (_FIRST_FUNCTION + 8 * place for place in _FUNCTIONS.values())


class LayoutError(ImportError):
    """Raised if jaxlib's foreign function interface has other offsets than assumed here."""


def check_layout() -> tuple[int, int]:
    """Checks the structures of XLA's foreign function interface, and returns its version; runs on
    import.

    Raises:
      LayoutError: a structure has other fields than assumed here, or jaxlib has no header.
    """
    path = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    try:
        header = path.read_text()
    except OSError as error:
        raise LayoutError(f"jaxlib has no readable {path.name}: {error.strerror}") from None
    header = re.sub(r"//[^\n]*", "", header)
    for name, fields in _FIELDS.items():
        found = _fields_of(header, name)
        if found[: len(fields)] != fields:
            raise LayoutError(f"{name} begins with {', '.join(found) or 'nothing'}, not {', '.join(fields)}")
    found = _fields_of(header, "XLA_FFI_Api")
    functions = tuple(re.findall(r"_XLA_FFI_API_STRUCT_FIELD\(XLA_FFI_(\w+)\)", header))
    places = {name: place for place, name in enumerate(functions) if name in _FUNCTIONS}
    if found[: len(_API)] != _API or places != _FUNCTIONS:
        raise LayoutError("the table of functions XLA_FFI_Api has other entries")
    version = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", header) for part in ("MAJOR", "MINOR")]
    if not all(version):
        raise LayoutError("the header names no version")
    major, minor = (int(found[1]) for found in version if found)
    return major, minor


def _fields_of(header: str, name: str) -> tuple[str, ...]:
    """Names of a structure's plain fields, in order."""
    body = re.search(rf"struct {name} \{{(.*?)\}}", header, re.DOTALL)
    return tuple(re.findall(r"(\w+)\s*;", body[1])) if body else ()


_MAJOR, _MINOR = check_layout()
_BYTES, _HALVES = (2, 6, 20), (10, 16)
"""XLA's numbers of the data types s8, u8, f8e4m3fn, and f16, bf16; kernels read no other type that
has not 4 bytes."""


# --- arguments and results of a call ------------------------------------------------------------------------


@njit
def argument(call: int, index: int) -> int:
    """Buffer of argument ``index``."""
    return load_i64(load_i64(call, 9), index)


@njit
def result(call: int, index: int) -> int:
    """Buffer of result ``index``."""
    return load_i64(load_i64(call, 14), index)


@njit
def data(buffer: int) -> int:
    """Address of a buffer's elements."""
    return load_i64(buffer, 3)


@njit
def size(buffer: int, axis: int) -> int:
    """Size of a buffer along an axis; -1 is the last one."""
    return load_i64(load_i64(buffer, 5), axis if axis >= 0 else axis + load_i64(buffer, 4))


@njit
def rank(buffer: int) -> int:
    """Number of a buffer's axes."""
    return load_i64(buffer, 4)


@njit
def _stride(buffer: int, axes: int) -> int:
    """Bytes of a buffer's elements along all axes but the first ``axes``."""
    dtype = load_i32(buffer, 4)
    stride = i64(1 if dtype in _BYTES else 2 if dtype in _HALVES else 4)
    for axis in range(axes, rank(buffer)):
        stride *= size(buffer, axis)
    return stride


@njit
def element(buffer: int, index: int) -> int:
    """Address of element ``index`` along a buffer's first axis."""
    return data(buffer) + index * _stride(buffer, 1)


@njit
def num_batch_axes(buffer: int, rank: int) -> int:
    """Axes that ``vmap`` (``vmap_method="expand_dims"``) has put before the ``rank`` axes of a
    buffer's own."""
    return load_i64(buffer, 4) - rank


@njit
def batch_size(out: int, axes: int) -> int:
    """Number of examples in a result with ``axes`` batch axes."""
    count = i64(1)
    for axis in range(axes):
        count *= size(out, axis)
    return count


@njit
def example_data(buffer: int, out: int, axes: int, index: int) -> int:
    """Address of a buffer's elements in example ``index`` of ``batch_size(out, axes)``.

    Each of the ``axes`` batch axes has the size that it has in the result ``out``, or 1 where the
    examples share one array.
    """
    stride = _stride(buffer, axes)
    address = data(buffer)
    for axis in range(axes - 1, -1, -1):
        if size(buffer, axis) > 1:
            address += index % size(out, axis) * stride
        index //= size(out, axis)
        stride *= size(buffer, axis)
    return address


@njit
def _destroy(call: int, error: int) -> None:
    arguments = malloc(24)
    store_i64(arguments, 0, 24)
    store_i64(arguments, 1, 0)
    store_i64(arguments, 2, error)
    call_address(load_i64(load_i64(call, 2) + _ERROR_DESTROY, 0), arguments)
    free(arguments)


@inlined
def _schedule(call: int, task: int, job: int) -> bool:
    """Schedules ``task(job)`` on one of XLA's threads; returns False if XLA refuses."""
    arguments = malloc(40)
    store_i64(arguments, 0, 40)
    store_i64(arguments, 1, 0)
    store_i64(arguments, 2, load_i64(call, 3))
    store_i64(arguments, 3, task)
    store_i64(arguments, 4, job)
    error = call_address(load_i64(load_i64(call, 2) + _SCHEDULE, 0), arguments)
    if error != 0:
        _destroy(call, error)
    free(arguments)
    return error == 0


@inlined
def num_threads(call: int) -> int:
    """Number of XLA's threads; 1 if unknown."""
    answer = malloc(48)
    store_i64(answer, 0, 32)
    store_i64(answer, 1, 0)
    store_i64(answer, 2, load_i64(call, 3))
    store_i64(answer, 3, answer + 40)
    store_i64(answer, 5, 1)
    error = call_address(load_i64(load_i64(call, 2) + _NUM_THREADS, 0), answer)
    if error != 0:
        _destroy(call, error)
    threads = load_i64(answer, 5)
    free(answer)
    return max(threads, 1) if error == 0 else 1


@inlined
def is_version_query(call: int) -> bool:
    """True if XLA only asks the handler for its version, before the first call; answers it."""
    extension = load_i64(call, 1)
    if extension == 0:
        return False
    metadata = load_i64(extension, 3)
    store_i64(metadata, 3, _MAJOR | (_MINOR << 32))
    store_i64(metadata, 4, load_i64(metadata, 4) & ~0xFFFFFFFF)
    return True


# --- jobs: counters, then numbers of the kernel ------------------------------------------------------

_HOLDERS, _NEXT, _DONE, _ITEMS = range(4)
_POLLS = 1024
"""Number of polls, some microseconds, before a waiting thread yields."""
JOB = 4
"""Index of the kernel's first 64-bit number in a job."""


@njit
def new_job(numbers: int) -> int:
    """Allocates a job with that many 64-bit numbers of the kernel, from index ``JOB`` on, all 0."""
    job = malloc(8 * (JOB + numbers))
    for i in range(JOB + numbers):
        store_i64(job, i, 0)
    store_i64(job, _HOLDERS, 1)
    return job


@njit
def next_item(job: int) -> int:
    """Takes the next item; -1 if none is left."""
    index = fetch_add(job + 8 * _NEXT, 1)
    return index if index < load_i64(job, _ITEMS) else -1


@njit
def item_done(job: int) -> None:
    """Counts an item as done."""
    fetch_add(job + 8 * _DONE, 1)


@njit
def release(job: int) -> None:
    """Releases a reference to the job; the last one frees it.

    A thread may start long after the call returned. It finds no item left, and no other thread
    waits for it.
    """
    if fetch_add(job + 8 * _HOLDERS, -1) == 1:
        free(job)


@inlined
def run_items(call: int, job: int, items: int, threads: int, task: int) -> None:
    """Processes ``items`` work items with ``task(job)``, on this thread and others; returns when
    all are done."""
    store_i64(job, _ITEMS, items)
    for _ in range(min(threads, items) - 1):
        fetch_add(job + 8 * _HOLDERS, 1)
        if not _schedule(call, task, job):
            fetch_add(job + 8 * _HOLDERS, -1)
            break
    fetch_add(job + 8 * _HOLDERS, 1)
    call_address(task, job)
    polls = 0
    while fetch_add(job + 8 * _DONE, 0) < items:
        polls += 1
        # The thread with the last item may be waiting for this core.
        if polls % _POLLS == 0:
            yield_thread()


# --- compiling ----------------------------------------------------------------------------------------------

Compiled = tuple[Any, Any]
_REGISTERED: dict[str, Compiled] = {}
"""References to compiled functions, whose addresses XLA has."""


def register(
    name: str, handler: Callable[[int], int], task: Callable[[int], int], sources: Iterable[Path]
) -> None:
    """Registers a kernel as the custom call ``name`` of the CPU platform, compiled or loaded from
    the kernel cache.

    Args:
      name: target name for ``jax.ffi.ffi_call``.
      handler: ``(call) -> 0``, a function of a module (numba caches no closures); finds the task as
        ``symbol("NAME_task")``.
      task: ``(job) -> 0``: processes work items until none is left, then releases the job.
      sources: files with the kernel's code, beside those of ``jaxpaged.native``.

    Warns:
      RuntimeWarning: the cache folder cannot be used, so the kernel was compiled.
    """
    try:
        compiled = _compile_cached(name, handler, task, sources)
    except OSError as error:
        warnings.warn(f"no kernel cache, every process compiles: {error}", RuntimeWarning, stacklevel=2)
        compiled = _compile(name, handler, task, cache=False)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(compiled[1].ctypes), platform="cpu")
    _REGISTERED[name] = compiled


def _compile(
    name: str, handler: Callable[[int], int], task: Callable[[int], int], *, cache: bool
) -> Compiled:
    c_function = numba.cfunc(types.int64(types.int64), error_model="numpy", cache=cache)
    compiled_task = c_function(task)
    # Cached code cannot hold this process' address of the task; it is linked by name.
    llvm.add_symbol(f"{name}_task", compiled_task.address)
    return compiled_task, c_function(handler)


def _compile_cached(
    name: str, handler: Callable[[int], int], task: Callable[[int], int], sources: Iterable[Path]
) -> Compiled:
    """Compiles with a copy of numba's cache: numba runs any file of it, damaged or not.

    Raises:
      OSError: the cache folder or a temporary one cannot be used.
    """
    # numba's own key is the date of one file.
    key = hashlib.sha256(f"{name} {version('jaxlib')} {version('numba')} {llvm.get_host_cpu_name()}".encode())
    for source in sorted({*Path(__file__).parent.glob("*.py"), *sources}):
        key.update(source.read_bytes())
    entry = private_folder(cache_folder() / "kernels") / f"{key.hexdigest()[:32]}.kernel"
    before = numba.config.CACHE_DIR
    with tempfile.TemporaryDirectory() as folder:
        content = read_entry(entry)
        for relative, bytes_of_file in ({} if content is None else pickle.loads(content)).items():
            file = Path(folder, relative)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bytes_of_file)
        numba.config.CACHE_DIR = folder
        try:
            compiled = _compile(name, handler, task, cache=True)
        finally:
            numba.config.CACHE_DIR = before
        if not all(function.cache_hits for function in compiled):
            files = (file for file in Path(folder).rglob("*") if file.is_file())
            write_entry(
                entry, pickle.dumps({str(file.relative_to(folder)): file.read_bytes() for file in files})
            )
    return compiled
