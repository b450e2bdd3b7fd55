"""jaxpaged: a paged KV cache and PagedAttention for JAX.

A name is imported from its room when it is first asked for, so that ``import jaxpaged`` does not import JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxpaged.version import __version__

if TYPE_CHECKING:
    from jaxpaged.allocator import PageAllocator
    from jaxpaged.attention import merge_states, paged_attention
    from jaxpaged.batch import Batch
    from jaxpaged.beams import BeamResult, BeamSearch, beam_search, prepare_beam_search
    from jaxpaged.block_table import BlockTable
    from jaxpaged.cache import (
        OutOfPages,
        PagedKVCache,
        can_reserve,
        clear,
        pages_needed,
        reserve,
        reserve_or_raise,
    )
    from jaxpaged.contiguous import ContiguousKVCache
    from jaxpaged.defragment import seq_defragment
    from jaxpaged.generation import (
        FINISH_LENGTH,
        FINISH_OUT_OF_PAGES,
        FINISH_STOP,
        GenerateResult,
        KVCache,
        generate,
    )
    from jaxpaged.generation_request import ContextShift
    from jaxpaged.invariants import InvariantError, check_invariants
    from jaxpaged.lookup import LookupResult, LookupStream, generate_lookup, lookup_stream
    from jaxpaged.page_format import PAGE_FORMATS, BlockPages, PageFormat
    from jaxpaged.page_map import PageMap, draw_page_map
    from jaxpaged.page_map_frames import draw_page_map_frames
    from jaxpaged.rope import Rope
    from jaxpaged.sampling import SamplingParams, sample
    from jaxpaged.sequences import (
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
    from jaxpaged.snapshot_file import Snapshot, SnapshotError, read_snapshot
    from jaxpaged.snapshots import restore, snapshot
    from jaxpaged.streaming import GenerateStream, StreamChunk, generate_stream

__all__ = [
    "ALL",
    "FINISH_LENGTH",
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
    "draw_page_map_frames",
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
    "allocator": ("PageAllocator",),
    "attention": ("merge_states", "paged_attention"),
    "batch": ("Batch",),
    "beams": ("BeamResult", "BeamSearch", "beam_search", "prepare_beam_search"),
    "block_table": ("BlockTable",),
    "cache": (
        "OutOfPages", "PagedKVCache", "can_reserve", "clear", "pages_needed", "reserve", "reserve_or_raise",
    ),
    "contiguous": ("ContiguousKVCache",),
    "defragment": ("seq_defragment",),
    "generation": (
        "FINISH_LENGTH", "FINISH_OUT_OF_PAGES", "FINISH_STOP", "GenerateResult", "KVCache", "generate",
    ),
    "generation_request": ("ContextShift",),
    "invariants": ("InvariantError", "check_invariants"),
    "lookup": ("LookupResult", "LookupStream", "generate_lookup", "lookup_stream"),
    "page_format": ("PAGE_FORMATS", "BlockPages", "PageFormat"),
    "page_map": ("PageMap", "draw_page_map"),
    "page_map_frames": ("draw_page_map_frames",),
    "rope": ("Rope",),
    "sampling": ("SamplingParams", "sample"),
    "sequences": (
        "ALL", "seq_copy", "seq_drop_unseen", "seq_keep", "seq_length", "seq_position_max", "seq_position_min",
        "seq_remove", "seq_reorder", "seq_shift",
    ),
    "snapshot_file": ("Snapshot", "SnapshotError", "read_snapshot"),
    "snapshots": ("restore", "snapshot"),
    "streaming": ("GenerateStream", "StreamChunk", "generate_stream"),
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
