"""jaxpaged: a paged KV cache and PagedAttention for JAX.

Names are imported on first use, so ``import jaxpaged`` does not import JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from jaxpaged.attention import paged_attention
    from jaxpaged.cache import (
        ALL,
        ContiguousKVCache,
        GroupedKVCache,
        LayerGroup,
        OutOfPages,
        PagedKVCache,
        can_reserve,
        check_invariants,
        clear,
        reserve,
        reserve_or_raise,
        seq_copy,
        seq_defragment,
        seq_keep,
        seq_length,
        seq_position_max,
        seq_position_min,
        seq_remove,
        seq_reorder,
        seq_shift,
    )
    from jaxpaged.generation import (
        FINISH_LENGTH,
        FINISH_NAN,
        FINISH_OUT_OF_PAGES,
        FINISH_STOP,
        ContextShift,
        Lookup,
        Request,
        SamplingParams,
        beam_search,
        generate,
        generate_stream,
        run,
        sample,
        score,
    )
    from jaxpaged.pages import Batch, Rope
    from jaxpaged.pages.formats import PAGE_FORMATS
    from jaxpaged.pictures import draw_page_map
    from jaxpaged.storage import SnapshotError, read_snapshot, restore, snapshot

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
    "GroupedKVCache",
    "LayerGroup",
    "Lookup",
    "OutOfPages",
    "PagedKVCache",
    "Request",
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
    "generate_stream",
    "paged_attention",
    "read_snapshot",
    "reserve",
    "reserve_or_raise",
    "restore",
    "run",
    "sample",
    "score",
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
    "cache": "ALL ContiguousKVCache GroupedKVCache LayerGroup OutOfPages PagedKVCache can_reserve check_invariants "
    "clear reserve reserve_or_raise seq_copy seq_defragment seq_keep seq_length seq_position_max seq_position_min "
    "seq_remove seq_reorder seq_shift",
    "generation": "ContextShift FINISH_LENGTH FINISH_NAN FINISH_OUT_OF_PAGES FINISH_STOP Lookup Request SamplingParams "
    "beam_search generate generate_stream run sample score",
    "pages": "Batch Rope",
    "pages.formats": "PAGE_FORMATS",
    "pictures": "draw_page_map",
    "storage": "SnapshotError read_snapshot restore snapshot",
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
