"""Creation of large caches on a CPU, where memory is taken when it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, TypeVar

import jax

from jaxpaged.cache.groups import map_parts, parts_of
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
    like = parts_of(jax.eval_shape(make))
    paged = all(isinstance(part, PagedKVCache) for part in like)
    if not paged or jax.default_backend() != "cpu" or find_spec("llvmlite") is None:
        return make()
    from jaxpaged.native.kernels import untouched

    def with_pools(part: PagedKVCache, pools: Any) -> PagedKVCache:
        return replace(part, k_pages=pools[0], v_pages=pools[1])

    def without_pools() -> Cache:
        return map_parts(with_pools, make(), [(None, None)] * len(like))

    pools = jax.tree.map(untouched, [(part.k_pages, part.v_pages) for part in like])
    return map_parts(with_pools, jax.jit(without_pools)(), pools)
