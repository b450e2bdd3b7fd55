"""KV memory: the size of the cache that a run needs, and its use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxpaged_model.config import ModelConfig

from jaxpaged.app.cache_type import CacheType
from jaxpaged.app.errors import InputError
from jaxpaged.cache.contiguous import ContiguousKVCache
from jaxpaged.cache.creation import create_untouched
from jaxpaged.cache.groups import GroupedKVCache, LayerGroup
from jaxpaged.generation.prompts import bucket
from jaxpaged.sharding.mesh import CONTEXT, TENSOR, num_shards
from jaxpaged.sharding.specs import ShardedCache

_FEWEST_PAGES = 4
"""Smallest pool without --kv-pages."""


@dataclass(frozen=True)
class CachePlan:
    """Sizes of the cache of one run; ``create`` allocates it."""

    config: ModelConfig
    kind: str
    """"paged" or "contiguous"."""
    cache_type: CacheType
    num_seqs: int
    """Sequences of each data shard of the mesh."""
    context: int
    """Tokens that a sequence may hold."""
    page_size: int
    pages_per_seq: int
    """Table entries of a sequence, in the group that sees furthest."""
    num_pages: tuple[int, ...]
    """Pages of each group and data shard."""
    groups: tuple[LayerGroup, ...]
    step_tokens: int
    mesh: Mesh | None = None

    @classmethod
    def make(
        cls,
        config: ModelConfig,
        *,
        mesh: Mesh | None = None,
        paged: bool,
        cache_type: CacheType,
        num_seqs: int,
        context: int,
        tokens: int,
        page_size: int,
        groups: Sequence[LayerGroup] | None = None,
        step_tokens: int = 1,
        kv_pages: int | None = None,
        shared: int = 0,
        spare: int = 0,
        unused: int = 0,
    ) -> CachePlan:
        """Plans a cache for ``num_seqs`` sequences of at most ``tokens`` tokens each.

        A paged pool has the pages that these tokens fill, rounded up so that runs share compiled programs, or
        ``kv_pages`` if that is fewer; a contiguous cache has ``context`` tokens per sequence.

        Args:
          config: the model; on a mesh, one device's part of it. Sequences and pages are then per data shard.
          groups: layer groups whose windows free pages; default none, all layers keep all tokens.
          step_tokens: tokens of one step, at most, which a window keeps beside it.
          shared: tokens at the beginning that all sequences share.
          spare: further pages per sequence, for pages that context shifts leave partly filled.
          unused: slots of every page that may stay empty.

        Raises:
          InputError: the page formats do not support the model's heads, the page size or the kind of cache.
        """
        kind = "paged" if paged else "contiguous"
        spread = 1 if mesh is None else mesh.shape[CONTEXT]
        if spread > 1 and not paged:
            raise InputError("--mesh context=N spreads pages, and --no-kv-cache-paged asks for none")
        if groups is None:
            every = tuple(range(config.num_layers))
            groups = [LayerGroup(every, config.num_kv_heads, config.head_dim)]
        num_pages = []
        for group in groups:
            pages = -(-tokens // max(1, page_size - unused)) + spare
            pages = min(pages, group.pages_per_seq(tokens + spare * page_size, page_size, step_tokens))
            common = 0 if num_seqs == 1 or group.window is not None else shared // page_size
            wanted = common + num_seqs * (pages - common)
            # Fewer pages are asked for than a window of all sequences needs only by the group that sees furthest.
            bounded = kv_pages is not None and group is groups[0]
            count = min(kv_pages or 0, wanted) if bounded else bucket(wanted, _FEWEST_PAGES)
            num_pages.append(-(-count // spread) * spread)
        pages = bucket(-(-tokens // max(1, page_size - unused)) + spare, _FEWEST_PAGES)
        plan = cls(
            config, kind, cache_type, num_seqs, context, page_size, pages, tuple(num_pages), tuple(groups),
            step_tokens, mesh,
        )  # fmt: skip
        _ = plan._arrays  # raises if it cannot be created
        return plan

    def check_prompt(self, num_tokens: int) -> None:
        """Raises InputError if the pool is too small for prompts of ``num_tokens`` tokens."""
        if self.kind != "paged":
            return
        shares = self.num_seqs > 1 and self.groups[0].window is None
        common = num_tokens // self.page_size if shares else 0
        furthest = self.groups[0]
        each = furthest.pages_per_seq(num_tokens, self.page_size, self.step_tokens)
        each = min(each, self.pages_per_seq) - common
        if common + self.num_seqs * each > self.num_pages[0]:
            samples = "" if self.num_seqs == 1 else f" of {self.num_seqs} samples"
            raise InputError(
                f"pool too small: {num_tokens} prompt tokens{samples} need "
                f"{common + self.num_seqs * each} pages of {self.page_size} tokens, "
                f"--kv-pages allows {self.num_pages[0]}"
            )

    def create(self) -> Any:
        """Creates the cache; a ``ShardedCache`` on a mesh. On a CPU, its memory is taken when it is written."""
        if self.mesh is not None:
            return ShardedCache.create(self.mesh, self._local)
        return create_untouched(self._local)

    def _local(self) -> Any:
        """Creates the cache of one device."""
        if self.kind == "contiguous":
            return self.cache_type.contiguous(self.config, max_seqs=self.num_seqs, max_length=self.context)
        return self.cache_type.paged(
            self.config,
            groups=self.groups,
            num_pages=self.num_pages,
            step_tokens=max(self.step_tokens, self.num_seqs + 1),
            max_seqs=self.num_seqs,
            page_size=self.page_size,
            max_seq_len=self.pages_per_seq * self.page_size,
            mesh=self.mesh,
        )

    @cached_property
    def _arrays(self) -> Any:
        """Abstract cache of one device."""
        return jax.eval_shape(self._local)

    @property
    def shards(self) -> int:
        """Data shards of the mesh."""
        return num_shards(self.mesh)

    def bytes_in_use(self, pages: int | np.ndarray) -> int:
        """Bytes of ``pages`` pages of each group and the staging slots, or of a whole contiguous cache, on all
        devices."""
        cache = self._arrays
        copies = 1 if self.mesh is None else self.mesh.shape[TENSOR]
        if isinstance(cache, ContiguousKVCache):
            each = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.k, cache.v)))
            return each * copies * self.shards
        parts = cache.parts if isinstance(cache, GroupedKVCache) else (cache,)
        used = np.broadcast_to(pages, len(parts)).tolist()
        each = sum(n * part.bytes_per_page for n, part in zip(used, parts, strict=True))
        return copies * (each + self.shards * sum(part.bytes_of_staging for part in parts))

    @cached_property
    def bytes_contiguous(self) -> int | None:
        """Bytes of a contiguous cache of the whole context; None if it does not support the formats."""
        if self.cache_type.has_residual:
            return None
        return replace(self, kind="contiguous").bytes_in_use(0)


@dataclass(frozen=True)
class KVReport:
    """KV memory of a run. In a contiguous cache, each sequence's row counts as one page."""

    kind: str
    cache_type: CacheType
    page_size: int
    pages_total: tuple[int, ...]
    """One number for each layer group, as ``pages_peak``."""
    pages_peak: tuple[int, ...]
    groups: tuple[LayerGroup, ...]
    bytes_peak: int
    bytes_contiguous: int | None
    num_seqs: int
    context: int

    @classmethod
    def of(cls, plan: CachePlan, pages_peak: int | np.ndarray) -> KVReport:
        """The report of a run that used at most ``pages_peak`` pages at once."""
        paged = plan.kind == "paged"
        total = plan.num_pages if paged else (plan.num_seqs,)
        return cls(
            kind=plan.kind,
            cache_type=plan.cache_type,
            page_size=plan.page_size if paged else plan.context,
            pages_total=tuple(plan.shards * pages for pages in total),
            pages_peak=tuple(np.broadcast_to(pages_peak, len(total)).tolist()),
            groups=plan.groups,
            bytes_peak=plan.bytes_in_use(pages_peak),
            bytes_contiguous=plan.bytes_contiguous,
            num_seqs=plan.shards * plan.num_seqs,
            context=plan.context,
        )

    def as_dict(self) -> dict[str, Any]:
        """The ``kv`` object of ``--json``."""
        return {
            "kind": self.kind,
            **self.cache_type.as_dict(),
            "page_size": self.page_size,
            "pages_total": sum(self.pages_total),
            "pages_peak": sum(self.pages_peak),
            "bytes_peak": self.bytes_peak,
            "bytes_contiguous": self.bytes_contiguous,
            **self._groups(),
        }

    def _groups(self) -> dict[str, Any]:
        if len(self.pages_total) < 2:
            return {}
        rows = zip(self.groups, self.pages_total, self.pages_peak, strict=True)
        return {
            "groups": [
                {
                    "layers": len(group.layers),
                    "window": group.window,
                    "pages_total": total,
                    "pages_peak": peak,
                }
                for group, total, peak in rows
            ]
        }

    def line(self) -> str:
        """One line of text."""
        tokens = (
            f"{self.context} tokens" if self.num_seqs == 1 else f"{self.num_seqs} x {self.context} tokens"
        )
        size = f"{readable(self.bytes_peak)} of {self.cache_type}"
        if self.kind == "contiguous":
            return f"{'KV cache':>16} = contiguous, {size} for {tokens}"
        counts = zip(self.pages_peak, self.pages_total, strict=True)
        pages = " + ".join(f"{peak} of {total}" for peak, total in counts)
        pages = f"{pages} pages of {self.page_size} tokens"
        beside = ""
        if self.bytes_contiguous is not None:
            beside = f" (contiguous would take {readable(self.bytes_contiguous)} for {tokens})"
        return f"{'KV cache':>16} = paged, {pages} at the peak, {size}{beside}"


def readable(count: int) -> str:
    """Formats a number of bytes in MiB, as llama.cpp does, or in KiB if it is small."""
    if count < 2**20 // 10:
        return f"{count / 2**10:.2f} KiB"
    return f"{count / 2**20:.2f} MiB" if count < 10 * 2**20 else f"{count / 2**20:.1f} MiB"
