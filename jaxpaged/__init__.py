"""jaxpaged: a paged KV cache and PagedAttention for JAX."""

from jaxpaged.allocator import PageAllocator
from jaxpaged.attention import merge_states, paged_attention
from jaxpaged.batch import Batch
from jaxpaged.block_table import BlockTable
from jaxpaged.cache import (
    ALL,
    OutOfPages,
    PagedKVCache,
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
)
from jaxpaged.contiguous import ContiguousKVCache
from jaxpaged.generation import (
    FINISH_LENGTH,
    FINISH_OUT_OF_PAGES,
    FINISH_STOP,
    GenerateResult,
    GenerateStream,
    KVCache,
    StreamChunk,
    generate,
    generate_stream,
)
from jaxpaged.invariants import InvariantError, check_invariants
from jaxpaged.page_format import PAGE_FORMATS, PageFormat
from jaxpaged.sampling import SamplingParams, sample
from jaxpaged.version import __version__

__all__ = [
    "ALL",
    "FINISH_LENGTH",
    "FINISH_OUT_OF_PAGES",
    "FINISH_STOP",
    "PAGE_FORMATS",
    "Batch",
    "BlockTable",
    "ContiguousKVCache",
    "GenerateResult",
    "GenerateStream",
    "InvariantError",
    "KVCache",
    "OutOfPages",
    "PageAllocator",
    "PageFormat",
    "PagedKVCache",
    "SamplingParams",
    "StreamChunk",
    "__version__",
    "can_reserve",
    "check_invariants",
    "clear",
    "generate",
    "generate_stream",
    "merge_states",
    "paged_attention",
    "pages_needed",
    "reserve",
    "reserve_or_raise",
    "sample",
    "seq_copy",
    "seq_keep",
    "seq_length",
    "seq_position_max",
    "seq_position_min",
    "seq_remove",
]
