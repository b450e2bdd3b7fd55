"""Picture of a cache's pools: one cell a page, filled like its slots, in the colours of their sequences."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple
from xml.sax.saxutils import escape

import jax
import numpy as np

from jaxpaged.cache.groups import GroupedKVCache, parts_of
from jaxpaged.cache.paged import PagedKVCache

# Distinct for most colour-blind people (Okabe and Ito), and visible on white and on black.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#b8a800")
MAX_COLUMNS = 6
"""Maximum number of columns of a cell; further owners share the last one."""

STYLE = """
.back{fill:#fff}.cell{fill:#e7ebf0}.words{fill:#1f2328;font:13px system-ui,sans-serif}
.faint{fill:#636c76;font:11px system-ui,sans-serif}.edge{fill:none;stroke:#1f2328;stroke-width:2}.more{fill:#7d8590}
.count{fill:#fff;stroke:#1f2328;stroke-width:3;paint-order:stroke;text-anchor:middle;font:600 13px system-ui,sans-serif}
@media (prefers-color-scheme:dark){.back{fill:#15181d}.cell{fill:#2b3038}.words{fill:#e6edf3}
.faint{fill:#9198a1}.edge{stroke:#e6edf3}}
""".strip()

_WIDTH, _MARGIN, _TOP, _LARGEST = 960, 44, 36, 64
_LINE, _COLUMN = 20, 320
_MOST_LISTED = 24


class Use(NamedTuple):
    """Entry of the table, listed under its page."""

    sequence: int
    first_slot: int
    num_tokens: int
    position: int


@dataclass(frozen=True)
class PoolMap:
    """Owners of the slots of each page of a pool."""

    page_size: int
    ref_counts: tuple[int, ...]
    """Number of entries and pins of each page."""
    uses: dict[int, tuple[Use, ...]]
    """Entries of each page that has any, by sequence."""
    title: str = ""
    """Names the layer group, where there are several."""

    @classmethod
    def of(cls, cache: PagedKVCache, title: str = "") -> PoolMap:
        """Copies the table and the reference counts from the device, but not the pages."""
        table, counts = jax.tree.map(np.asarray, (cache.table, cache.allocator.ref_counts))
        uses: dict[int, list[Use]] = {}
        for seq, used in enumerate(table.num_entries.tolist()):
            fields = (table.pages, table.first_slot, table.num_tokens, table.position)
            for page, *rest in zip(*(field[seq, :used].tolist() for field in fields), strict=True):
                uses.setdefault(page, []).append(Use(seq, *rest))
        held = {page: tuple(of) for page, of in uses.items()}
        return cls(cache.page_size, tuple(counts.tolist()), held, title)

    @property
    def num_pages(self) -> int:
        """Number of pages of the pool."""
        return len(self.ref_counts)

    @property
    def pages_used(self) -> int:
        """Number of pages in use."""
        return sum(count > 0 for count in self.ref_counts)

    @property
    def pages_shared(self) -> int:
        """Number of pages that several sequences share."""
        return sum(len({use.sequence for use in of}) > 1 for of in self.uses.values())

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences; shared ones count once a sequence."""
        return sum(use.num_tokens for of in self.uses.values() for use in of)

    @property
    def slots_used(self) -> int:
        """Number of slots that hold a token."""
        return sum(self.slots_of(page) for page in self.uses)

    def slots_of(self, page: int) -> int:
        """Number of slots of a page that hold a token."""
        uses = self.uses.get(page, ())
        return len({use.first_slot + i for use in uses for i in range(use.num_tokens)})

    def describe(self, page: int) -> str:
        """Tooltip of a page: a line about the page, and one for each entry."""
        count = self.ref_counts[page]
        if not count:
            return f"page {page}: free"
        references = "1 reference" if count == 1 else f"{count} references"
        lines = [f"page {page}: {references}, {self.slots_of(page)} of {self.page_size} slots used"]
        for use in self.uses.get(page, ()):
            slots = f"{use.first_slot}-{use.first_slot + use.num_tokens - 1}"
            positions = f"{use.position}-{use.position + use.num_tokens - 1}"
            lines.append(f"sequence {use.sequence}: slots {slots}, positions {positions}")
        return "\n".join(lines)


@dataclass(frozen=True)
class PageMap:
    """Pools of a cache, copied to the host, so that the cache may be donated."""

    pools: tuple[PoolMap, ...]
    """One for each layer group."""

    @classmethod
    def of(cls, cache: PagedKVCache | GroupedKVCache) -> PageMap:
        """Copies tables and reference counts from the device, but not the pages."""
        if isinstance(cache, GroupedKVCache) and len(cache.parts) > 1:
            each = zip(cache.parts, cache.groups, strict=True)
            return cls(tuple(PoolMap.of(part, group.title) for part, group in each))
        return cls(tuple(map(PoolMap.of, parts_of(cache))))

    @property
    def pages_used(self) -> int:
        """Number of pages in use, in all pools."""
        return sum(pool.pages_used for pool in self.pools)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, in the group that sees furthest; shared ones count once a sequence."""
        return self.pools[0].num_tokens

    @property
    def sequences(self) -> list[int]:
        """Sequences that hold a token."""
        return sorted({use.sequence for pool in self.pools for of in pool.uses.values() for use in of})

    @property
    def columns(self) -> int:
        """Cells in a row, a multiple of 8; the largest pool is about twice as wide as high."""
        return 8 * math.ceil(math.sqrt(2 * max(pool.num_pages for pool in self.pools)) / 8)


def colour(sequence: int) -> str:
    """``#rrggbb`` of a sequence: seven distinct colours, then hues far from each other."""
    if sequence < len(_COLOURS):
        return _COLOURS[sequence]
    rgb = colorsys.hls_to_rgb(sequence * 0.618034 % 1, 0.5, 0.5)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


def colours(sequences: Iterable[int]) -> str:
    """Style rules ``.s0``, ``.s1``, ... of sequences."""
    return "".join(f".s{seq}{{fill:{colour(seq)}}}" for seq in sequences)


def draw_page_map(cache: PagedKVCache | GroupedKVCache | PageMap) -> str:
    """Draws the pool of each layer group as an SVG picture, for light and dark backgrounds.

    A cell is a page, with its slots from the bottom up; slots that hold a token have the colour of
    their sequence. A page that several sequences share is split among them, and has an edge.
    Tooltips show the reference count and the owners of slots. Where there are several groups, a
    heading names the layers and the window of each.

    Args:
      cache: concrete, not traced; or a ``PageMap`` of one.

    Returns:
      The text of an SVG file; each page is a ``<g class="page">``, with the classes ``free``,
      ``partial`` and ``shared`` where they apply.
    """
    drawn = cache if isinstance(cache, PageMap) else PageMap.of(cache)
    across = drawn.columns
    pitch = min(_LARGEST, _WIDTH / across)
    width = max(across * pitch, 2 * _COLUMN)
    parts: list[str] = []
    top = 0.0
    for pool in drawn.pools:
        if pool.title:
            words = pool.title[:1].upper() + pool.title[1:]
            parts.append(_text(_MARGIN, top + 22, words, "words", ' style="font-weight:600"'))
            top += _LINE
        top, lines = _pool(pool, top, across, pitch, int(width // _COLUMN))
        parts += lines
    height, symbols = _symbols(drawn.sequences, top)
    width += _MARGIN + 12
    size = f'width="{_n(width)}" height="{_n(height)}"'
    title = "; ".join(
        f"{pool.title}: {headline(pool)}" if pool.title else headline(pool) for pool in drawn.pools
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(width)} {_n(height)}" {size}>',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}{colours(drawn.sequences)}</style>",
        f'<rect class="back" {size} rx="6"/>',
    )
    return "\n".join([*head, *parts, *symbols, "</svg>\n"])


def headline(drawn: PoolMap) -> str:
    """One line about the use of a pool."""
    shared = f", {drawn.pages_shared} of them shared" if drawn.pages_shared else ""
    return (
        f"{drawn.pages_used} of {drawn.num_pages} pages of {drawn.page_size} tokens in use{shared}; "
        f"{drawn.num_tokens} tokens in {drawn.slots_used} slots"
    )


def _pool(
    drawn: PoolMap, top: float, across: int, pitch: float, lines_across: int
) -> tuple[float, list[str]]:
    """Headline, cells and sequences of a pool: ``(bottom, elements)``."""
    parts = [_text(_MARGIN, top + 22, headline(drawn), "words")]
    for page in range(drawn.num_pages):
        row, column = divmod(page, across)
        x, y = _MARGIN + column * pitch, top + _TOP + row * pitch
        if not column and (pitch >= 12 or row % 2 == 0):
            parts.append(_text(_MARGIN - 8, y + pitch / 2 + 2, str(page), "faint", ' text-anchor="end"'))
        parts.append(_cell(drawn, page, x, y, pitch))
    bottom, lines = _legend(
        drawn, top + _TOP + math.ceil(drawn.num_pages / across) * pitch + 12, lines_across
    )
    return bottom, parts + lines


def _cell(drawn: PoolMap, page: int, x: float, y: float, pitch: float) -> str:
    uses, count = drawn.uses.get(page, ()), drawn.ref_counts[page]
    owners = list(dict.fromkeys(use.sequence for use in uses))
    kinds = ["page"]
    if not count:
        kinds.append("free")
    if 0 < drawn.slots_of(page) < drawn.page_size:
        kinds.append("partial")
    if len(owners) > 1:
        kinds.append("shared")
    side = pitch - (1 if pitch < 14 else 4)
    parts = [f"<title>{escape(drawn.describe(page))}</title>", _rect("cell", x, y, side, side)]
    width = side / max(1, min(len(owners), MAX_COLUMNS))
    for use in uses:
        column = owners.index(use.sequence)
        kind = f"s{use.sequence}" if len(owners) <= MAX_COLUMNS or column < MAX_COLUMNS - 1 else "more"
        high, end = use.num_tokens / drawn.page_size, (use.first_slot + use.num_tokens) / drawn.page_size
        left = x + min(column, MAX_COLUMNS - 1) * width
        parts.append(_rect(kind, left, y + side * (1 - end), width, side * high))
    if count and not uses:
        parts.append(_rect("more", x, y, side, side))
    if len(owners) > 1 and pitch >= 14:
        parts.append(_rect("edge", x, y, side, side))
    if count > 1 and pitch >= 28:
        parts.append(_text(x + side / 2, y + side / 2 + 5, str(count), "count"))
    return f'<g class="{" ".join(kinds)}">{"".join(parts)}</g>'


def _legend(drawn: PoolMap, top: float, across: int) -> tuple[float, list[str]]:
    """Lines of the sequences: ``(bottom, elements)``."""
    held: dict[int, list[tuple[int, bool]]] = {}
    for uses in drawn.uses.values():
        owners = {use.sequence for use in uses}
        for seq in owners:
            tokens = sum(use.num_tokens for use in uses if use.sequence == seq)
            held.setdefault(seq, []).append((tokens, len(owners) > 1))
    lines = []
    for seq in sorted(held):
        tokens, shared = (sum(column) for column in zip(*held[seq], strict=True))
        also = f", {shared} shared" if shared else ""
        pages = f"{len(held[seq])} page{'s' * (len(held[seq]) != 1)}"
        lines.append((f"s{seq}", f"sequence {seq}: {tokens} tokens, {pages}{also}"))
    if len(lines) > _MOST_LISTED:
        lines[_MOST_LISTED - 1 :] = [("more", f"and {len(lines) - _MOST_LISTED + 1} more sequences")]
    parts = []
    for i, (kind, words) in enumerate(lines):
        x, y = float(_MARGIN + i % across * _COLUMN), top + i // across * _LINE
        parts += [_rect(kind, x, y, 13, 13), _text(x + 20, y + 11, words, "words")]
    return top + math.ceil(len(lines) / across) * _LINE + 4, parts


def _symbols(sequences: list[int], top: float) -> tuple[float, list[str]]:
    """Line that explains the symbols, in the colours of two sequences: ``(bottom, elements)``."""
    kinds = [*(f"s{seq}" for seq in sequences), "more", "more"]
    cell, left = _rect("cell", 0, 0, 13, 13), _rect(kinds[0], 0, 0, 6.5, 13)
    x, parts = float(_MARGIN), []
    for sign, words in (
        (cell, "free"),
        (cell + _rect(kinds[0], 0, 7, 13, 6), "slots in use, from the bottom up"),
        (
            left + _rect(kinds[1], 6.5, 0, 6.5, 13) + _rect("edge", 0, 0, 13, 13),
            "shared, with the reference count",
        ),
    ):
        parts.append(f'<g transform="translate({_n(x)},{_n(top)})">{sign}{_text(20, 11, words, "faint")}</g>')
        x += 50 + 5.6 * len(words)
    return top + _LINE, parts


def _rect(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"/>'


def _text(x: float, y: float, words: str, kind: str, more: str = "") -> str:
    return f'<text class="{kind}" x="{_n(x)}" y="{_n(y)}"{more}>{escape(words)}</text>'


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
