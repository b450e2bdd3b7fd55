"""KV caches and their operations.

``interface`` has the operations as functions and the protocol that caches implement; ``paged`` and
``contiguous`` implement it, on ``sequences`` (block tables), ``page_pool`` (pages) and ``reservation``
(the plan of a step). ``groups`` joins the caches of layers that keep different keys and values.
``sharing`` attaches, pins, reads and writes pages by number.
"""

from jaxpaged.cache.contiguous import ContiguousKVCache
from jaxpaged.cache.defragment import seq_defragment
from jaxpaged.cache.groups import GroupedKVCache, LayerGroup
from jaxpaged.cache.interface import (
    ALL,
    Cache,
    KVCache,
    OutOfPages,
    can_reserve,
    clear,
    pages_needed,
    reserve,
    reserve_or_raise,
    seq_copy,
    seq_keep,
    seq_length,
    seq_position_max,
    seq_position_min,
    seq_remove,
    seq_reorder,
    seq_shift,
)
from jaxpaged.cache.invariants import InvariantError, check_invariants
from jaxpaged.cache.paged import PagedKVCache

__all__ = [
    "ALL",
    "Cache",
    "ContiguousKVCache",
    "GroupedKVCache",
    "InvariantError",
    "KVCache",
    "LayerGroup",
    "OutOfPages",
    "PagedKVCache",
    "can_reserve",
    "check_invariants",
    "clear",
    "pages_needed",
    "reserve",
    "reserve_or_raise",
    "seq_copy",
    "seq_defragment",
    "seq_keep",
    "seq_length",
    "seq_position_max",
    "seq_position_min",
    "seq_remove",
    "seq_reorder",
    "seq_shift",
]
