"""Creation of large caches on a CPU, where memory is taken when it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import TypeVar

import jax

from jaxpaged.cache.interface import KVCache
from jaxpaged.cache.paged import PagedKVCache

Cache = TypeVar("Cache", bound=KVCache)


def create_untouched(make: Callable[[], Cache]) -> Cache:
    """``make()``, but on a CPU pages of a paged cache hold arbitrary numbers, in memory that the
    system gives when they are first written: a pool may be as large as the context and costs what
    is used.

    Args:
      make: pure function that creates a cache.
    """
    like = jax.eval_shape(make)
    if not isinstance(like, PagedKVCache) or jax.default_backend() != "cpu" or find_spec("llvmlite") is None:
        return make()
    from jaxpaged.native.kernels import untouched

    def without_pages() -> Cache:
        return replace(make(), k_pages=None, v_pages=None)  # type: ignore[type-var]

    k_pages, v_pages = jax.tree.map(untouched, (like.k_pages, like.v_pages))
    cache: Cache = replace(jax.jit(without_pages)(), k_pages=k_pages, v_pages=v_pages)
    return cache
