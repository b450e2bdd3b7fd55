"""Animation of a cache's pools over a run: one self-contained HTML file, with buttons and keys to step
through."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jaxpaged.cache.groups import GroupedKVCache
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.pictures.page_map import MAX_COLUMNS, STYLE, PageMap, PoolMap, colours

_TEMPLATE = Path(__file__).with_suffix(".html")


def draw_page_map_animation(
    frames: Sequence[tuple[str, PagedKVCache | GroupedKVCache | PageMap]],
) -> str:
    """Draws the states of one cache as an HTML page, each as ``draw_page_map`` does.

    The page holds only the changes between states: some kilobytes a sequence for a thousand decode
    steps.

    Args:
      frames: label and state of each frame, in order. Use ``PageMap.of(cache)`` for a cache that is
        donated later.

    Returns:
      The text of an HTML file.

    Raises:
      ValueError: no frame, or caches of different sizes.
    """
    states = [(label, one if isinstance(one, PageMap) else PageMap.of(one)) for label, one in frames]
    if not states:
        raise ValueError("frames must be at least 1, got 0")
    sizes = {tuple((pool.num_pages, pool.page_size) for pool in state.pools) for _, state in states}
    if len(sizes) > 1:
        raise ValueError(f"frames must be of one cache, got pages and page sizes {sorted(sizes)}")
    first = states[0][1]
    # Pages of all pools, one pool after the other.
    before: list[list[int]] = [[0] for pool in first.pools for _ in pool.ref_counts]
    changes = []
    for label, state in states:
        after = [_page(pool, page) for pool in state.pools for page in range(pool.num_pages)]
        changed = {page: new for page, (old, new) in enumerate(zip(before, after, strict=True)) if old != new}
        changes.append({"label": label, "pages": changed})
        before = after
    sequences = sorted({seq for _, state in states for seq in state.sequences})
    data = {
        "pools": [{"title": pool.title, "numPages": pool.num_pages} for pool in first.pools],
        "pageSize": first.pools[0].page_size,
        "columns": first.columns,
        "maxOwners": MAX_COLUMNS,
        "frames": changes,
    }
    # "</" would end the script element that holds the data.
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    page = _TEMPLATE.read_text(encoding="utf-8")
    return page.replace("/*STYLE*/", STYLE + colours(sequences)).replace("/*DATA*/", text)


def _page(state: PoolMap, page: int) -> list[int]:
    """Reference count, then sequence, first slot, tokens and position of each entry."""
    uses = state.uses.get(page, ())
    return [state.ref_counts[page], *(number for use in uses for number in use)]
