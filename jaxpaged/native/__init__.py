"""Shared parts of CPU kernels, which numba compiles and XLA calls.

``memory`` reads and writes at addresses, ``tiles`` and ``codes`` compute with vectors, ``ffi``
registers XLA custom calls that process work items on XLA's own threads. Needs numba (``pip install
"jaxpaged[cpu]"``); imported when a kernel is used.
"""
