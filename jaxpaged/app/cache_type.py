"""Page formats of ``-ctk``, ``-ctv`` and ``--hadamard``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from jax.sharding import Mesh
from jaxpaged_model.config import ModelConfig

from jaxpaged.app.errors import InputError
from jaxpaged.cache.contiguous import ContiguousKVCache
from jaxpaged.cache.groups import LayerGroup, create_cache
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.pages.formats import PAGE_FORMATS, page_format
from jaxpaged.sharding.context import ContextKVCache
from jaxpaged.sharding.mesh import CONTEXT

_HADAMARD: dict[str, bool | None] = {"auto": None, "on": True, "off": False}
_QUANTIZED = tuple(name for name, one in PAGE_FORMATS.items() if one.with_hadamard(True).hadamard)
"""Formats that support the Hadamard transform."""


def check_formats(**flags: str | None) -> None:
    """Refuses unknown page formats; ``flags`` are formats by flag, None = not given.

    Raises:
      InputError: a format is unknown; the message lists all formats.
    """
    for flag, name in flags.items():
        if name is not None and name not in PAGE_FORMATS:
            raise InputError(f"-{flag} {name}: no such page format; there are {', '.join(PAGE_FORMATS)}")


def check_hadamard(hadamard: str, *formats: str | None) -> None:
    """Refuses ``--hadamard on`` unless a page format quantizes; None = the model's dtype.

    Raises:
      InputError: none does; the message lists the formats that do.
    """
    if hadamard == "on" and not any(name in _QUANTIZED for name in formats):
        names = ", ".join(_QUANTIZED)
        raise InputError(
            f"--hadamard on transforms quantized pages, and none are: give -ctk or -ctv one of {names}"
        )


@contextmanager
def _refusal_is_input() -> Iterator[None]:
    """Turns the ValueError of a format that does not support a size into an InputError."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error


@dataclass(frozen=True)
class CacheType:
    """Page formats of keys and values."""

    k: str
    v: str
    hadamard: bool | None = None
    """True: heads get a Hadamard transform before they are quantized; None: as the formats do by default."""

    @classmethod
    def of(cls, k: str, v: str, hadamard: str) -> CacheType:
        """The formats that flags name; ``hadamard`` has no effect on formats that do not quantize."""
        return cls(k, v, _HADAMARD[hadamard] if {k, v} & {*_QUANTIZED} else None)

    def __str__(self) -> str:
        turned = {None: "", True: ", Hadamard on", False: ", Hadamard off"}[self.hadamard]
        return (self.k if self.k == self.v else f"k={self.k} v={self.v}") + turned

    def as_dict(self) -> dict[str, Any]:
        """The columns of JSON and CSV."""
        return {"type_k": self.k, "type_v": self.v, "hadamard": self.hadamard}

    @property
    def has_residual(self) -> bool:
        """True if pages are quantized when full, and never written again."""
        return page_format(self.k).has_residual or page_format(self.v).has_residual

    def create(self, config: ModelConfig, *, num_seqs: int, tokens: int, page_size: int) -> PagedKVCache:
        """Creates a cache for ``tokens`` tokens of each of ``num_seqs`` sequences.

        Raises:
          InputError: the formats do not support this head size in pages of this size.
        """
        pages = -(-tokens // page_size)
        return self.paged(
            config,
            num_pages=num_seqs * pages,
            max_seqs=num_seqs,
            page_size=page_size,
            max_seq_len=tokens,
        )

    def paged(
        self,
        config: ModelConfig,
        *,
        groups: Sequence[LayerGroup] | None = None,
        mesh: Mesh | None = None,
        **sizes: Any,
    ) -> Any:
        """Creates a paged cache of one device.

        On a mesh with a context axis it is a ``ContextKVCache``, or several.

        Args:
          config: the model.
          groups: its layer groups, as for ``create_cache``; None = one pool, which keeps all tokens.
          mesh: None = one device.
          sizes: as for ``create_cache``, or without groups as for ``PagedKVCache.create``.

        Raises:
          InputError: the formats do not support this head size in pages of this size.
        """
        spread = 1 if mesh is None else mesh.shape[CONTEXT]
        make: Callable[..., Any] = PagedKVCache.create
        if spread > 1:
            make = partial(ContextKVCache.create, axis=CONTEXT, axis_size=spread)
        with _refusal_is_input():
            if groups is None:
                return make(**config.cache_spec, **self._formats, **sizes)
            return create_cache(groups, make=make, rope=config.rope, **self._formats, **sizes)

    def contiguous(self, config: ModelConfig, **sizes: Any) -> ContiguousKVCache:
        """Creates a contiguous cache; ``sizes`` as for ``ContiguousKVCache.create``.

        Raises:
          InputError: the formats need pages, or do not support this head size.
        """
        with _refusal_is_input():
            return ContiguousKVCache.create(**config.cache_spec, **self._formats, **sizes)

    @property
    def _formats(self) -> dict[str, Any]:
        return {"k_dtype": self.k, "v_dtype": self.v, "hadamard": self.hadamard}


def bits_per_value(cache: PagedKVCache, config: ModelConfig) -> float:
    """Bits of the pool per number of a key or value, scales included."""
    numbers = 2 * config.num_layers * config.num_kv_heads * cache.page_size * config.head_dim
    return 8 * cache.bytes_per_page / numbers
