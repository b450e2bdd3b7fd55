"""Attention on CPUs: numba functions that XLA calls."""
