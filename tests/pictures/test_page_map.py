"""Laws of the pictures: a cell a page, and everything in it what allocator and table say."""

from __future__ import annotations

import json
import re
import runpy
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from cache_oracle import jit_copy, jit_remove, jit_step, make_cache

from jaxpaged import PagedKVCache, draw_page_map
from jaxpaged.pictures.animation import draw_page_map_animation
from jaxpaged.pictures.page_map import MAX_COLUMNS, PageMap, colour

SVG = "{http://www.w3.org/2000/svg}"


def tangled() -> PagedKVCache:
    """Shared pages, shared in part, a hole inside a page, a page held twice by one sequence."""
    cache, _, ok = jit_step(make_cache(), jnp.asarray([21, 5, 0, 0]), 0, num_tokens=64)
    for operation, arguments in (
        (jit_copy, (0, 2, 0, 18)),
        (jit_copy, (1, 3, 0, -1)),
        (jit_remove, (0, 10, 13)),
        (jit_remove, (3, 1, 3)),
    ):
        cache, ok = operation(cache, *arguments)
        assert ok
    cache, _, ok = jit_step(cache, jnp.asarray([9, 0, 3, 0]), 100, num_tokens=64)
    assert ok
    return cache


def cells(text: str) -> list[ET.Element]:
    return [g for g in ET.fromstring(text).iter(f"{SVG}g") if "page" in g.get("class", "").split()]


def live_slots(cache: PagedKVCache) -> dict[int, dict[int, set[int]]]:
    """Page -> sequence -> slots, from the arrays."""
    live: dict[int, dict[int, set[int]]] = {}
    for seq in range(cache.max_seqs):
        for e in range(int(cache.table.num_entries[seq])):
            fields = (cache.table.pages, cache.table.first_slot, cache.table.num_tokens)
            page, first, count = (int(field[seq, e]) for field in fields)
            live.setdefault(page, {}).setdefault(seq, set()).update(range(first, first + count))
    return live


def test_a_cell_a_page_says_what_allocator_and_table_say() -> None:
    cache = tangled()
    live, counts = live_slots(cache), np.asarray(cache.allocator.ref_counts)
    drawn = cells(draw_page_map(cache))
    assert len(drawn) == cache.num_pages
    seen = set()
    for page, cell in enumerate(drawn):
        title = cell.find(f"{SVG}title")
        assert title is not None and title.text is not None
        kinds = set(cell.get("class", "").split()) - {"page"}
        owners = live.get(page, {})
        used = set().union(*owners.values())
        if counts[page] == 0:
            assert title.text == f"page {page}: free" and kinds == {"free"}
            continue
        first, *rest = title.text.split("\n")
        noun = "reference" if counts[page] == 1 else "references"
        assert first == f"page {page}: {counts[page]} {noun}, {len(used)} of 8 slots used"
        assert len(rest) == counts[page]
        assert ("partial" in kinds) == (len(used) < 8)
        assert ("shared" in kinds) == (len(owners) > 1)
        seen |= kinds
        # What is coloured is as high as the slots in use, and each owner has its share of the width.
        back, *fills = (r for r in cell.iter(f"{SVG}rect") if r.get("class") != "edge")
        side = float(back.get("height", 0))
        for seq, slots in owners.items():
            mine = [r for r in fills if r.get("class") == f"s{seq}"]
            assert sum(float(r.get("height", 0)) for r in mine) == pytest.approx(
                side * len(slots) / 8, abs=0.1
            )
            assert all(float(r.get("width", 0)) == pytest.approx(side / len(owners), abs=0.01) for r in mine)
    assert seen == {"partial", "shared"}


@pytest.mark.parametrize("num_pages", [1, 8, 9, 64, 500, 4096])
def test_cells_do_not_overlap_and_stay_in_the_picture(num_pages: int) -> None:
    empty = PageMap(8, (0,) * num_pages, {})
    text = draw_page_map(empty)
    root = ET.fromstring(text)
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    assert width <= 1040 and height <= 1040
    places = set()
    for cell in cells(text):
        back = cell.find(f"{SVG}rect")
        assert back is not None
        x, y, side = (float(back.get(name, 0)) for name in ("x", "y", "width"))
        assert side >= 8 and x >= 0 and y >= 0 and x + side <= width and y + side <= height
        places.add((x, y))
    assert len(places) == num_pages


def test_the_legend_counts_tokens_and_pages_of_each_sequence() -> None:
    cache = tangled()
    words = [text.text for text in ET.fromstring(draw_page_map(cache)).iter(f"{SVG}text")]
    live = live_slots(cache)
    for seq, length in enumerate(np.asarray(cache.lengths).tolist()):
        pages = [page for page, owners in live.items() if seq in owners]
        shared = sum(len(live[page]) > 1 for page in pages)
        also = f", {shared} shared" if shared else ""
        assert f"sequence {seq}: {length} tokens, {len(pages)} pages{also}" in words


def test_crowds_and_pins_are_seen() -> None:
    cache, *_ = jit_step(make_cache(max_seqs=30), jnp.asarray([5] + [0] * 29), 0, num_tokens=64)
    for seq in range(1, 30):
        cache, _ = jit_copy(cache, 0, seq)
    drawn = PageMap.of(cache)
    text = draw_page_map(drawn)
    (shared,) = (cell for cell in cells(text) if "shared" in cell.get("class", ""))
    kinds = [r.get("class") for r in shared.iter(f"{SVG}rect")]
    assert kinds.count("more") == 30 - MAX_COLUMNS + 1
    assert "and 7 more sequences" in text
    pinned = PageMap(8, (0, 2), {})
    assert "page 1: 2 references, 0 of 8 slots used" in draw_page_map(pinned)
    assert pinned.pages_used == 1


def test_colours_differ() -> None:
    assert len({colour(seq) for seq in range(200)}) == 200
    assert all(re.fullmatch("#[0-9a-f]{6}", colour(seq)) for seq in range(200))


def frames_of(page: str) -> dict[str, Any]:
    found = re.search(r"^const data = (.*);$", page, re.MULTILINE)
    assert found is not None
    return json.loads(found[1])


def test_frames_hold_what_changed_and_add_up_to_every_state() -> None:
    cache = make_cache()
    states = [("empty", PageMap.of(cache))]
    for n, counts in enumerate([[9, 3, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 17, 0, 1]]):
        cache, *_ = jit_step(cache, jnp.asarray(counts), 0, num_tokens=64)
        states.append((f"step {n} </script>", PageMap.of(cache)))
    cache, _ = jit_remove(cache, 1)
    page = draw_page_map_animation([*states, ("last", cache)])
    data = frames_of(page)
    assert page.count("</script>") == 1 and "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page and "src=" not in page
    assert [frame["label"] for frame in data["frames"]] == [label for label, _ in states] + ["last"]
    assert data["frames"][0]["pages"] == {} == data["frames"][3]["pages"]
    assert set(data["frames"][2]["pages"]) == {"1", "2"}, "one token each is one page each"
    shown = {page: [0] for page in range(cache.num_pages)}
    for frame, (_, state) in zip(data["frames"], [*states, ("last", PageMap.of(cache))], strict=True):
        shown |= {int(page): numbers for page, numbers in frame["pages"].items()}
        for number, (count, *rest) in shown.items():
            assert count == state.ref_counts[number]
            assert rest == [n for use in state.uses.get(number, ()) for n in use]


def test_frames_must_be_of_one_pool() -> None:
    with pytest.raises(ValueError, match="frames must be at least 1, got 0"):
        draw_page_map_animation([])
    with pytest.raises(ValueError, match=r"frames must be of one pool, got .*\[\(1, 8\), \(2, 8\)\]"):
        draw_page_map_animation([("a", PageMap(8, (0,), {})), ("b", PageMap(8, (0, 0), {}))])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["page_map.py", "sequences.py"])
def test_the_picture_in_the_docs_is_what_its_script_draws(name: str) -> None:
    script = Path(__file__).parents[2] / "docs" / "pictures" / name
    drawn = runpy.run_path(str(script))["picture"]()
    assert drawn == script.with_suffix(".svg").read_text(encoding="utf-8")
