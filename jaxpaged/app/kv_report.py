"""KV memory: how large a cache a run needs, and what it used of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxpaged.app.errors import InputError
from jaxpaged.cache import PagedKVCache
from jaxpaged.contiguous import ContiguousKVCache
from model.config import ModelConfig

CACHE_DTYPE_BYTES = {"f32": 4, "bf16": 2, "f16": 2}


@dataclass(frozen=True)
class CachePlan:
    """The cache of one run; nothing is allocated before ``create``."""

    config: ModelConfig
    kind: str
    """"paged" or "contiguous"."""
    dtype: str
    num_seqs: int
    context: int
    """Tokens that a sequence may hold."""
    page_size: int
    pages_per_seq: int
    num_pages: int

    @classmethod
    def make(
        cls,
        config: ModelConfig,
        *,
        paged: bool,
        dtype: str,
        num_seqs: int,
        context: int,
        tokens: int,
        page_size: int,
        kv_pages: int | None = None,
        shared: int = 0,
        spare: int = 0,
    ) -> CachePlan:
        """A cache for ``num_seqs`` sequences of at most ``tokens`` tokens each.

        A paged pool has the pages that these tokens fill, or ``kv_pages`` where that is fewer; a contiguous
        cache has ``context`` tokens a sequence, whatever the run needs. The first ``shared`` tokens are the same in
        all sequences; ``spare`` pages a sequence are for tokens that do not fill their pages, as shifts leave them.
        """
        pages = -(-tokens // page_size) + spare
        common = 0 if num_seqs == 1 else shared // page_size
        wanted = common + num_seqs * (pages - common)
        num_pages = wanted if kv_pages is None else min(kv_pages, wanted)
        kind = "paged" if paged else "contiguous"
        return cls(config, kind, dtype, num_seqs, context, page_size, pages, num_pages)

    def check_prompt(self, num_tokens: int) -> None:
        """Refuses prompts that the pool cannot hold."""
        if self.kind != "paged":
            return
        common = 0 if self.num_seqs == 1 else num_tokens // self.page_size
        each = min(-(-num_tokens // self.page_size), self.pages_per_seq) - common
        if common + self.num_seqs * each > self.num_pages:
            samples = "" if self.num_seqs == 1 else f" of {self.num_seqs} samples"
            raise InputError(
                f"pool too small: {num_tokens} prompt tokens{samples} need "
                f"{common + self.num_seqs * each} pages of {self.page_size} tokens, --kv-pages allows {self.num_pages}"
            )

    def create(self) -> PagedKVCache | ContiguousKVCache:
        """The empty cache."""
        c = self.config
        both: dict[str, Any] = {
            "num_layers": c.num_layers,
            "num_kv_heads": c.num_kv_heads,
            "head_dim": c.head_dim,
            "max_seqs": self.num_seqs,
            "dtype": self.dtype,
        }
        if self.kind == "contiguous":
            return ContiguousKVCache.create(**both, max_length=self.context)
        return PagedKVCache.create(
            **both, num_pages=self.num_pages, page_size=self.page_size, max_entries=self.pages_per_seq + 1
        )

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token, all layers."""
        c = self.config
        return 2 * c.num_layers * c.num_kv_heads * c.head_dim * CACHE_DTYPE_BYTES[self.dtype]

    @property
    def bytes_contiguous(self) -> int:
        """What a contiguous cache of the whole context takes."""
        return self.num_seqs * self.context * self.bytes_per_token


@dataclass(frozen=True)
class KVReport:
    """KV memory of a run. In a contiguous cache each sequence's row counts as one page."""

    kind: str
    page_size: int
    pages_total: int
    pages_peak: int
    bytes_peak: int
    bytes_contiguous: int
    num_seqs: int
    context: int

    @classmethod
    def of(cls, plan: CachePlan, pages_peak: int) -> KVReport:
        """The report of a run whose most pages in use were ``pages_peak``."""
        paged = plan.kind == "paged"
        return cls(
            kind=plan.kind,
            page_size=plan.page_size if paged else plan.context,
            pages_total=plan.num_pages if paged else plan.num_seqs,
            pages_peak=pages_peak,
            # A contiguous cache holds all of its memory from the start.
            bytes_peak=pages_peak * plan.page_size * plan.bytes_per_token if paged else plan.bytes_contiguous,
            bytes_contiguous=plan.bytes_contiguous,
            num_seqs=plan.num_seqs,
            context=plan.context,
        )

    def as_dict(self) -> dict[str, str | int]:
        """The ``kv`` object of ``--json``."""
        return {
            "kind": self.kind,
            "page_size": self.page_size,
            "pages_total": self.pages_total,
            "pages_peak": self.pages_peak,
            "bytes_peak": self.bytes_peak,
            "bytes_contiguous": self.bytes_contiguous,
        }

    def line(self) -> str:
        """One line for people."""
        tokens = (
            f"{self.context} tokens" if self.num_seqs == 1 else f"{self.num_seqs} x {self.context} tokens"
        )
        if self.kind == "contiguous":
            return f"{'KV cache':>16} = contiguous, {mebibytes(self.bytes_peak)} for {tokens}"
        pages = f"{self.pages_peak} of {self.pages_total} pages of {self.page_size} tokens"
        return (
            f"{'KV cache':>16} = paged, {pages} at the peak, {mebibytes(self.bytes_peak)} "
            f"(contiguous would take {mebibytes(self.bytes_contiguous)} for {tokens})"
        )


def mebibytes(count: int) -> str:
    """A number of bytes as llama.cpp prints it."""
    return f"{count / 2**20:.2f} MiB" if count < 10 * 2**20 else f"{count / 2**20:.1f} MiB"
