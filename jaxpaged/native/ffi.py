"""Arguments, results and jobs of XLA custom calls, for numba functions.

A kernel is two C functions. XLA calls its *handler*, which reads the buffers, writes a *job* with a
number of work items, and runs *tasks* that process them: one on the calling thread, others on XLA's
thread pool. So a kernel has no thread pool of its own that would compete with XLA's, and threads
are awake when it starts.

The C structures of XLA's foreign function interface are read by offset, see ``layout``.
"""

from __future__ import annotations

from jaxpaged.native.layout import ERROR_DESTROY, MAJOR, MINOR, NUM_THREADS, SCHEDULE
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
from jaxpaged.native.tiles import i64, njit

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
    call_address(load_i64(load_i64(call, 2) + ERROR_DESTROY, 0), arguments)
    free(arguments)


@njit
def _schedule(call: int, task: int, job: int) -> bool:
    """Schedules ``task(job)`` on one of XLA's threads; returns False if XLA refuses."""
    arguments = malloc(40)
    store_i64(arguments, 0, 40)
    store_i64(arguments, 1, 0)
    store_i64(arguments, 2, load_i64(call, 3))
    store_i64(arguments, 3, task)
    store_i64(arguments, 4, job)
    error = call_address(load_i64(load_i64(call, 2) + SCHEDULE, 0), arguments)
    if error != 0:
        _destroy(call, error)
    free(arguments)
    return error == 0


@njit
def num_threads(call: int) -> int:
    """Number of XLA's threads; 1 if unknown."""
    answer = malloc(48)
    store_i64(answer, 0, 32)
    store_i64(answer, 1, 0)
    store_i64(answer, 2, load_i64(call, 3))
    store_i64(answer, 3, answer + 40)
    store_i64(answer, 5, 1)
    error = call_address(load_i64(load_i64(call, 2) + NUM_THREADS, 0), answer)
    if error != 0:
        _destroy(call, error)
    threads = load_i64(answer, 5)
    free(answer)
    return max(threads, 1) if error == 0 else 1


@njit
def is_version_query(call: int) -> bool:
    """True if XLA only asks the handler for its version, before the first call; answers it."""
    extension = load_i64(call, 1)
    if extension == 0:
        return False
    metadata = load_i64(extension, 3)
    store_i64(metadata, 3, MAJOR | (MINOR << 32))
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


@njit
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
