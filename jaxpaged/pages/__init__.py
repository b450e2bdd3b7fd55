"""Pages, and the integer state that maps sequences to them; knows neither caches nor attention.

``allocator`` (free pages and reference counts), ``block_table`` (entries of sequences), ``batch``
(tokens of a step), ``residual`` (staging slots of pages not yet quantized), ``rope``, ``formats``.
"""

from jaxpaged.pages.allocator import PageAllocator
from jaxpaged.pages.batch import Batch
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.rope import Rope

__all__ = ["Batch", "BlockTable", "PageAllocator", "Rope"]
