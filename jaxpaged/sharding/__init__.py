"""Caches, weights and programs over a JAX mesh: ``mesh``, partition ``specs``, ``context`` (pages of one sequence over
several devices), ``multihost``."""
