"""Kernels for CPUs, compiled by numba and called by XLA: what such kernels share.

``memory`` reads and writes at addresses, ``tiles`` computes with vectors, ``ffi`` makes an XLA custom call of functions
that do pieces of work on XLA's own threads. Needs numba (``pip install "jaxpaged[cpu]"``); nothing here is imported
unless a kernel is asked for.
"""
