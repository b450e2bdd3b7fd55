"""jaxpaged: a paged KV cache and PagedAttention for JAX.

Names are imported on first use, so ``import jaxpaged`` does not import JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jaxpaged.attention import paged_attention
    from jaxpaged.cache.contiguous import ContiguousKVCache
    from jaxpaged.cache.defragment import seq_defragment
    from jaxpaged.cache.interface import (
        ALL,
        OutOfPages,
        can_reserve,
        clear,
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
    from jaxpaged.cache.invariants import check_invariants
    from jaxpaged.cache.paged import PagedKVCache
    from jaxpaged.generation.beams import beam_search
    from jaxpaged.generation.loop import (
        FINISH_LENGTH,
        FINISH_NAN,
        FINISH_OUT_OF_PAGES,
        FINISH_STOP,
        generate,
    )
    from jaxpaged.generation.request import ContextShift
    from jaxpaged.generation.sampling import SamplingParams, sample
    from jaxpaged.generation.speculative import generate_lookup
    from jaxpaged.generation.stream import generate_stream
    from jaxpaged.pages.batch import Batch
    from jaxpaged.pages.formats import PAGE_FORMATS
    from jaxpaged.pages.rope import Rope
    from jaxpaged.pictures.page_map import draw_page_map
    from jaxpaged.storage.snapshot_file import SnapshotError, read_snapshot
    from jaxpaged.storage.snapshots import restore, snapshot

__all__ = [
    "ALL",
    "FINISH_LENGTH",
    "FINISH_NAN",
    "FINISH_OUT_OF_PAGES",
    "FINISH_STOP",
    "PAGE_FORMATS",
    "Batch",
    "ContextShift",
    "ContiguousKVCache",
    "OutOfPages",
    "PagedKVCache",
    "Rope",
    "SamplingParams",
    "SnapshotError",
    "__version__",
    "beam_search",
    "can_reserve",
    "check_invariants",
    "clear",
    "draw_page_map",
    "generate",
    "generate_lookup",
    "generate_stream",
    "paged_attention",
    "read_snapshot",
    "reserve",
    "reserve_or_raise",
    "restore",
    "sample",
    "seq_copy",
    "seq_defragment",
    "seq_keep",
    "seq_length",
    "seq_position_max",
    "seq_position_min",
    "seq_remove",
    "seq_reorder",
    "seq_shift",
    "snapshot",
]

_NAMES = {
    "attention": "paged_attention",
    "cache.contiguous": "ContiguousKVCache",
    "cache.defragment": "seq_defragment",
    "cache.interface": "ALL OutOfPages can_reserve clear reserve reserve_or_raise seq_copy seq_keep seq_length "
    "seq_position_max seq_position_min seq_remove seq_reorder seq_shift",
    "cache.invariants": "check_invariants",
    "cache.paged": "PagedKVCache",
    "generation.beams": "beam_search",
    "generation.loop": "FINISH_LENGTH FINISH_NAN FINISH_OUT_OF_PAGES FINISH_STOP generate",
    "generation.request": "ContextShift",
    "generation.sampling": "SamplingParams sample",
    "generation.speculative": "generate_lookup",
    "generation.stream": "generate_stream",
    "pages.batch": "Batch",
    "pages.formats": "PAGE_FORMATS",
    "pages.rope": "Rope",
    "pictures.page_map": "draw_page_map",
    "storage.snapshot_file": "SnapshotError read_snapshot",
    "storage.snapshots": "restore snapshot",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}
_PACKAGES = {module.partition(".")[0] for module in _NAMES}


if not TYPE_CHECKING:  # a type checker would take this for a module that has every name

    def __getattr__(name: str) -> Any:
        if name in _PACKAGES:
            return import_module(f"{__name__}.{name}")
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
