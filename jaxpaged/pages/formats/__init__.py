"""Page formats: how rows of keys and values are stored in pages.

A format creates page arrays, writes rows to them and reads pages back; besides formats, only
attention kernels look inside a page array. Formats of plain numbers are in ``plain.py``, quantized
ones in ``blocks.py`` (by row) and ``residual.py`` (by page).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxpaged.pages.formats import ggml, hadamard
from jaxpaged.pages.formats.blocks import BlockFormat as BlockFormat
from jaxpaged.pages.formats.blocks import BlockPages as BlockPages
from jaxpaged.pages.formats.float8 import Float8Format as Float8Format
from jaxpaged.pages.formats.k_quants import Q4_K
from jaxpaged.pages.formats.kivi import Kivi
from jaxpaged.pages.formats.lane_blocks import PackedBlockFormat
from jaxpaged.pages.formats.plain import LANES as LANES
from jaxpaged.pages.formats.plain import LanePageFormat as LanePageFormat
from jaxpaged.pages.formats.plain import PageFormat as PageFormat
from jaxpaged.pages.formats.plain import heads_title as heads_title
from jaxpaged.pages.formats.plain import lane_width as lane_width
from jaxpaged.pages.formats.plain import token_rows as token_rows
from jaxpaged.pages.formats.plain import tokens_per_row as tokens_per_row
from jaxpaged.pages.formats.residual import ResidualFormat as ResidualFormat
from jaxpaged.pages.formats.residual import ResidualPages as ResidualPages

hadamard_transform = hadamard.transform

MIN_PAGE_SIZE, MAX_PAGE_SIZE = 8, 256


def _kivi(bits: int) -> ResidualFormat:
    codes = {"code": Kivi(bits, by_channel=True), "value_code": Kivi(bits, by_channel=False)}
    return ResidualFormat(f"kivi{bits}", jnp.float32, **codes, hadamard=True)


_FORMATS: tuple[PageFormat, ...] = (
    PageFormat("f32", jnp.float32),
    PageFormat("bf16", jnp.bfloat16),
    PageFormat("f16", jnp.float16),
    Float8Format("fp8_e4m3", jnp.float8_e4m3fn),
    PackedBlockFormat("q8_0", jnp.float32, ggml.Q8_0()),
    BlockFormat("q5_1", jnp.float32, ggml.Q5_1()),
    BlockFormat("q5_0", jnp.float32, ggml.Q5_0()),
    # A Hadamard transform gains most where codes have 4 bits or fewer (docs/guides/quantization.md).
    BlockFormat("q4_1", jnp.float32, ggml.Q4_1(), hadamard=True),
    PackedBlockFormat("q4_0", jnp.float32, ggml.Q4_0(), hadamard=True),
    BlockFormat("iq4_nl", jnp.float32, ggml.IQ4_NL(), hadamard=True),
    ResidualFormat("q4_k", jnp.float32, Q4_K(), hadamard=True),
    _kivi(4),
    _kivi(2),
)
PAGE_FORMATS: dict[str, PageFormat] = {one.name: one for one in _FORMATS}
"""All formats by name. They store keys; ``for_values`` of each stores values."""


def page_format(name: DTypeLike) -> PageFormat:
    """Format by its name, or by the dtype of plain pages (jnp.bfloat16, "bfloat16").

    Raises:
      ValueError: unknown; the message lists all names.
    """
    if isinstance(name, str) and name in PAGE_FORMATS:
        return PAGE_FORMATS[name]
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        dtype = None
    for storage in PAGE_FORMATS.values():
        if type(storage) in (PageFormat, Float8Format) and storage.dtype == dtype:
            return storage
    raise ValueError(f"page format {name!r} is not known; known are {', '.join(PAGE_FORMATS)}")


def formats_of(
    dtype: DTypeLike,
    k_dtype: DTypeLike | None = None,
    v_dtype: DTypeLike | None = None,
    hadamard: bool | None = None,
) -> tuple[PageFormat, PageFormat]:
    """Formats of a cache's keys and values; arguments as for ``PagedKVCache.create``.

    Raises:
      ValueError: unknown format.
    """
    k, v = (page_format(dtype if given is None else given) for given in (k_dtype, v_dtype))
    v = v.for_values()
    return (k, v) if hadamard is None else (k.with_hadamard(hadamard), v.with_hadamard(hadamard))


def titled(title: str) -> PageFormat:
    """Format by its ``title``.

    Raises:
      ValueError: unknown title.
    """
    name, plus, option = title.partition("+")
    if plus and option != "hadamard":
        raise ValueError(f"page format {title!r} is not known")
    return page_format(name).with_hadamard(bool(plus))


def check_page_size(page_size: int) -> int:
    """Returns ``page_size``.

    Raises:
      ValueError: it is no power of two from 8 to 256.
    """
    if not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
        raise ValueError(
            f"page_size must be a power of two from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE}, got {page_size}"
        )
    return page_size
