"""Pools of several layers, of which one holds a case's pages."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxpaged.attention.base import Pages
from jaxpaged.pages.formats import ResidualPages
from jaxpaged.testing.conformance import Built


def in_a_pool(built: Built, layer: int, num_layers: int = 3) -> tuple[Built, Array]:
    """The case with its pages as those of ``layer`` of a pool, and ``first_page`` of that layer.

    The other layers hold NaN, and codes and scales that are not those of the case.
    """

    def pooled(pages: Pages) -> Pages:
        pool = jax.tree.map(joined, pages)
        if isinstance(pages, ResidualPages):  # layers share their pages' staging slots
            return dataclasses.replace(pool, slot_of_page=pages.slot_of_page)
        return pool

    def joined(part: Array) -> Array:
        other = jnp.full_like(part, jnp.nan) if jnp.issubdtype(part.dtype, jnp.floating) else ~part
        return jnp.concatenate([part if i == layer else other for i in range(num_layers)])

    first_page = jnp.int32(layer * built.k_pages.shape[0])
    pools = {"k_pages": pooled(built.k_pages), "v_pages": pooled(built.v_pages)}
    return dataclasses.replace(built, **pools), first_page
