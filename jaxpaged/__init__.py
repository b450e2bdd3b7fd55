"""jaxpaged: a paged KV cache and PagedAttention for JAX.

A name is imported from its room when it is first asked for, so that ``import jaxpaged`` does not import JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jaxpaged.attention import merge_states, paged_attention
    from jaxpaged.cache.contiguous import ContiguousKVCache
    from jaxpaged.cache.defragment import seq_defragment
    from jaxpaged.cache.invariants import InvariantError, check_invariants
    from jaxpaged.cache.paged import (
        OutOfPages,
        PagedKVCache,
        can_reserve,
        clear,
        pages_needed,
        reserve,
        reserve_or_raise,
    )
    from jaxpaged.cache.sequences import (
        ALL,
        seq_copy,
        seq_drop_unseen,
        seq_keep,
        seq_length,
        seq_position_max,
        seq_position_min,
        seq_remove,
        seq_reorder,
        seq_shift,
    )
    from jaxpaged.generation.beams import BeamResult, BeamSearch, beam_search, prepare_beam_search
    from jaxpaged.generation.loop import (
        FINISH_LENGTH,
        FINISH_NAN,
        FINISH_OUT_OF_PAGES,
        FINISH_STOP,
        GenerateResult,
        KVCache,
        LimitVocab,
        generate,
    )
    from jaxpaged.generation.request import ContextShift
    from jaxpaged.generation.sampling import SamplingParams, sample
    from jaxpaged.generation.speculative import (
        LookupResult,
        LookupStream,
        generate_lookup,
        lookup_stream,
    )
    from jaxpaged.generation.stream import GenerateStream, StreamChunk, generate_stream
    from jaxpaged.pages.allocator import PageAllocator
    from jaxpaged.pages.batch import Batch
    from jaxpaged.pages.block_table import BlockTable
    from jaxpaged.pages.formats import PAGE_FORMATS, BlockPages, PageFormat
    from jaxpaged.pages.rope import Rope
    from jaxpaged.pictures.animation import draw_page_map_animation
    from jaxpaged.pictures.page_map import PageMap, draw_page_map
    from jaxpaged.storage.snapshot_file import Snapshot, SnapshotError, read_snapshot
    from jaxpaged.storage.snapshots import restore, snapshot

__all__ = [
    "ALL",
    "FINISH_LENGTH",
    "FINISH_NAN",
    "FINISH_OUT_OF_PAGES",
    "FINISH_STOP",
    "PAGE_FORMATS",
    "Batch",
    "BeamResult",
    "BeamSearch",
    "BlockPages",
    "BlockTable",
    "ContextShift",
    "ContiguousKVCache",
    "GenerateResult",
    "GenerateStream",
    "InvariantError",
    "KVCache",
    "LimitVocab",
    "LookupResult",
    "LookupStream",
    "OutOfPages",
    "PageAllocator",
    "PageFormat",
    "PageMap",
    "PagedKVCache",
    "Rope",
    "SamplingParams",
    "Snapshot",
    "SnapshotError",
    "StreamChunk",
    "__version__",
    "beam_search",
    "can_reserve",
    "check_invariants",
    "clear",
    "draw_page_map",
    "draw_page_map_animation",
    "generate",
    "generate_lookup",
    "generate_stream",
    "lookup_stream",
    "merge_states",
    "paged_attention",
    "pages_needed",
    "prepare_beam_search",
    "read_snapshot",
    "reserve",
    "reserve_or_raise",
    "restore",
    "sample",
    "seq_copy",
    "seq_defragment",
    "seq_drop_unseen",
    "seq_keep",
    "seq_length",
    "seq_position_max",
    "seq_position_min",
    "seq_remove",
    "seq_reorder",
    "seq_shift",
    "snapshot",
]

_ROOMS = {
    "pages.allocator": ("PageAllocator",),
    "attention": ("merge_states", "paged_attention"),
    "pages.batch": ("Batch",),
    "generation.beams": ("BeamResult", "BeamSearch", "beam_search", "prepare_beam_search"),
    "pages.block_table": ("BlockTable",),
    "cache.paged": (
        "OutOfPages", "PagedKVCache", "can_reserve", "clear", "pages_needed", "reserve", "reserve_or_raise",
    ),
    "cache.contiguous": ("ContiguousKVCache",),
    "cache.defragment": ("seq_defragment",),
    "generation.loop": (
        "FINISH_LENGTH", "FINISH_NAN", "FINISH_OUT_OF_PAGES", "FINISH_STOP", "GenerateResult", "KVCache",
        "LimitVocab", "generate",
    ),
    "generation.request": ("ContextShift",),
    "cache.invariants": ("InvariantError", "check_invariants"),
    "generation.speculative": ("LookupResult", "LookupStream", "generate_lookup", "lookup_stream"),
    "pages.formats": ("PAGE_FORMATS", "BlockPages", "PageFormat"),
    "pictures.page_map": ("PageMap", "draw_page_map"),
    "pictures.animation": ("draw_page_map_animation",),
    "pages.rope": ("Rope",),
    "generation.sampling": ("SamplingParams", "sample"),
    "cache.sequences": (
        "ALL", "seq_copy", "seq_drop_unseen", "seq_keep", "seq_length", "seq_position_max", "seq_position_min",
        "seq_remove", "seq_reorder", "seq_shift",
    ),
    "storage.snapshot_file": ("Snapshot", "SnapshotError", "read_snapshot"),
    "storage.snapshots": ("restore", "snapshot"),
    "generation.stream": ("GenerateStream", "StreamChunk", "generate_stream"),
}  # fmt: skip
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

if not TYPE_CHECKING:  # a type checker would take this for a module that has every name

    def __getattr__(name: str) -> Any:
        if name in _ROOMS:
            return import_module(f"{__name__}.{name}")
        if name not in _ROOM_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
