"""Pages of rows quantized in blocks of 32 numbers along a head, each with its own scale.

Codes, scales and other parts of a block are separate arrays ``[num_pages, num_kv_heads, page_size,
...]``, so that kernels read codes in whole vectors. ``ggml_bytes`` joins them to ggml's layout.
Encoding and rounding of a block are in ``ggml.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxpaged.pages.formats import hadamard
from jaxpaged.pages.formats.ggml import BLOCK, BlockCode
from jaxpaged.pages.formats.plain import PageFormat

Parts = Mapping[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockPages:
    """Quantized keys or values; attention takes it in place of a page array."""

    parts: dict[str, Array]
    """Arrays ``[num_pages, num_kv_heads, ...]``; names and shapes depend on the format."""
    format: BlockFormat = field(metadata={"static": True})
    page_size: int = field(metadata={"static": True})
    head_dim: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(num_pages, num_kv_heads, page_size, head_dim)``: shape of the dequantized numbers."""
        num_pages, num_kv_heads = next(iter(self.parts.values())).shape[:2]
        return num_pages, num_kv_heads, self.page_size, self.head_dim

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(part.nbytes for part in self.parts.values())


def take_pages(array: Array, index: Array, slices: bool) -> Array:
    """``array[index]``, as one gather or, with ``slices``, one slice per index."""
    if not slices:
        return array[index]
    pages = jnp.stack([lax.dynamic_index_in_dim(array, i, keepdims=False) for i in index.reshape(-1)])
    return pages.reshape(*index.shape, *array.shape[1:])


@dataclass(frozen=True)
class BlockFormat(PageFormat):
    """Format of rows in blocks of 32 numbers."""

    code: BlockCode
    """Encoding of a block."""
    hadamard: bool = False
    """True if rows are transformed before quantization; see ``hadamard.transform``."""

    @property
    def title(self) -> str:
        return self.name + "+hadamard" * self.hadamard

    def with_hadamard(self, hadamard: bool) -> BlockFormat:
        return replace(self, hadamard=hadamard)

    def check(self, page_size: int, head_dim: int) -> None:
        if head_dim % BLOCK:
            raise ValueError(
                f"{self.name} stores blocks of {BLOCK} numbers along a head: head_dim must be a multiple of {BLOCK}, "
                f"got {head_dim}; formats for any head_dim are f32, bf16, f16, fp8_e4m3"
            )

    def bytes_per_page(self, num_kv_heads: int, page_size: int, head_dim: int) -> int:
        return num_kv_heads * page_size * head_dim // BLOCK * self.code.bytes

    def create(self, num_pages: int, num_kv_heads: int, page_size: int, head_dim: int) -> BlockPages:  # type: ignore[override]
        """Creates zeroed pages.

        Raises:
          ValueError: ``head_dim`` is no multiple of 32.
        """
        self.check(page_size, head_dim)
        shape = num_pages, num_kv_heads, page_size
        parts = {
            name: jnp.zeros((*shape, head_dim // BLOCK * width), dtype)
            for name, (width, dtype) in self.code.parts.items()
        }
        return BlockPages(parts, self, page_size, head_dim)

    def encode(self, rows: Array) -> dict[str, Array]:
        """Quantizes ``rows [..., head_dim]`` to parts, ``[..., width]`` each."""
        rows = hadamard.transform(rows) if self.hadamard else rows.astype(jnp.float32)
        parts = self.code.encode(rows.reshape(*rows.shape[:-1], -1, BLOCK))
        return {name: part.reshape(*rows.shape[:-1], -1) for name, part in parts.items()}

    def decode(self, parts: Parts) -> Array:
        """f32[..., head_dim]: dequantized ``parts [..., width]``, still transformed if ``hadamard``."""
        blocks = {
            name: parts[name].reshape(*parts[name].shape[:-1], -1, width)
            for name, (width, _) in self.code.parts.items()
        }
        numbers = self.code.decode(blocks)
        return numbers.reshape(*numbers.shape[:-2], -1)

    def write(self, pages: BlockPages, page: Array, slot: Array, rows: Array) -> BlockPages:  # type: ignore[override]
        return self.put(pages, page, slot, self.encode(rows))

    def read(self, pages: BlockPages, page: Array, slot: Array) -> dict[str, Array]:  # type: ignore[override]
        return {name: part[page, :, slot] for name, part in pages.parts.items()}

    def put(self, pages: BlockPages, page: Array, slot: Array, stored: Parts) -> BlockPages:  # type: ignore[override]
        parts = {
            name: part.at[page, :, slot].set(stored[name], mode="drop") for name, part in pages.parts.items()
        }
        return replace(pages, parts=parts)

    def copy(self, pages: BlockPages, source: Array, target: Array) -> BlockPages:  # type: ignore[override]
        return jax.tree.map(lambda part: part.at[target].set(part[source]), pages)

    def gather(self, pages: BlockPages, page: Array, slot: Array, target: Array) -> BlockPages:  # type: ignore[override]
        return jax.tree.map(lambda part: part.at[target].set(part[page, :, slot].swapaxes(0, 1)), pages)

    def load(self, pages: BlockPages, page: Array, *, slices: bool = False) -> Array:
        """f32[..., num_kv_heads, page_size, head_dim]: pages ``page i32[...]``, see ``decode``.

        ``slices`` reads one slice per page instead of a gather, which is slow in XLA:CPU.
        """
        return self.decode({name: take_pages(part, page, slices) for name, part in pages.parts.items()})

    def ggml_bytes(self, parts: Mapping[str, Any]) -> np.ndarray:
        """u8[..., bytes]: ``parts [..., width]`` in ggml's layout; on the host."""
        blocks = []
        for name, (width, _) in self.code.parts.items():
            part = np.ascontiguousarray(parts[name])
            part = part.reshape(*part.shape[:-1], part.shape[-1] // width, width)
            blocks.append(part.view(np.uint8))
        joined = np.concatenate(blocks, axis=-1)
        return joined.reshape(*joined.shape[:-2], math.prod(joined.shape[-2:]))

    def on_lanes(self, head_dim: int) -> PageFormat:
        return self
