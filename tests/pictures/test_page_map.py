"""Laws of the pictures: a cell a page, and everything in it what allocator and table say."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from cache_oracle import jit_copy, jit_remove, jit_step, make_cache
from groups_kit import filled, grouped, jit

from jaxpaged import GroupedKVCache, PagedKVCache, draw_page_map
from jaxpaged.pictures.animation import draw_page_map_animation
from jaxpaged.pictures.page_map import MAX_COLUMNS, PageMap, PoolMap, colour, headline

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
    empty = PageMap((PoolMap(8, (0,) * num_pages, {}),))
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
        counted = "1 page" if len(pages) == 1 else f"{len(pages)} pages"
        assert f"sequence {seq}: {length} tokens, {counted}{also}" in words


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
    pinned = PageMap((PoolMap(8, (0, 2), {}),))
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
            (pool,) = state.pools
            assert count == pool.ref_counts[number]
            assert rest == [n for use in pool.uses.get(number, ()) for n in use]


def test_frames_must_be_of_one_cache() -> None:
    with pytest.raises(ValueError, match="frames must be at least 1, got 0"):
        draw_page_map_animation([])
    one, two = (PageMap((PoolMap(8, (0,) * n, {}),)) for n in (1, 2))
    with pytest.raises(
        ValueError, match=r"frames must be of one cache, got .*\[\(\(1, 8\),\), \(\(2, 8\),\)\]"
    ):
        draw_page_map_animation([("a", one), ("b", two)])


def in_groups() -> GroupedKVCache:
    """A sequence longer than the window, and one that shares a page with it."""
    cache = filled(grouped(num_pages=(20, 30)), [21, 0, 0, 0])
    cache, ok = jit["seq_copy"](cache, 0, 2, 0, 20)
    assert ok
    return filled(cache, [30, 5, 0, 0], 100)


def test_each_group_is_drawn_as_its_own_pool_under_its_name() -> None:
    cache = in_groups()
    root = ET.fromstring(draw_page_map(cache))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    drawn, alone = cells(draw_page_map(cache)), [cells(draw_page_map(part)) for part in cache.parts]
    assert [part.num_pages for part in cache.parts] == [30, 20]

    def told(cell: ET.Element) -> tuple[Any, ...]:
        return (
            cell.get("class"),
            cell.findtext(f"{SVG}title"),
            [r.get("class") for r in cell.iter(f"{SVG}rect")],
        )

    assert [told(cell) for cell in drawn] == [told(cell) for pool in alone for cell in pool]
    texts = [(text.text, float(text.get("y", 0))) for text in root.iter(f"{SVG}text")]
    places = {words: y for words, y in texts if words}
    headings = places["Layer 1"], places["Layers 0, 2; window 12"]
    tops = [float(cell[1].get("y", 0)) for cell in drawn]
    assert headings[0] < min(tops[:30]) and max(tops[:30]) < headings[1] < min(tops[30:]) < height
    boxes = [[float(cell[1].get(name, 0)) for name in ("x", "y", "width")] for cell in drawn]
    assert len({(x, y) for x, y, _ in boxes}) == 50 and len({side for *_, side in boxes}) == 1
    assert all(x + side <= width and y + side <= height for x, y, side in boxes)
    for part in cache.parts:
        words = next(t.text for t in ET.fromstring(draw_page_map(part)).iter(f"{SVG}text"))
        assert words in places
    assert PageMap.of(cache).pages_used == sum(int(part.pages_used) for part in cache.parts)
    assert PageMap.of(cache).num_tokens == int(cache.lengths.sum())
    one = GroupedKVCache(cache.parts[:1], cache.groups[:1])
    assert draw_page_map(one) == draw_page_map(cache.parts[0])


def test_frames_of_groups_number_the_pages_of_one_pool_after_the_other() -> None:
    cache = in_groups()
    data = frames_of(draw_page_map_animation([("first", cache), ("second", filled(cache, [1, 0, 0, 0]))]))
    assert data["pools"] == [
        {"title": "layer 1", "numPages": 30}, {"title": "layers 0, 2; window 12", "numPages": 20}
    ]  # fmt: skip
    counts = [n for part in cache.parts for n in np.asarray(part.allocator.ref_counts).tolist()]
    pages = data["frames"][0]["pages"]
    assert {int(page): uses[0] for page, uses in pages.items()} == {p: n for p, n in enumerate(counts) if n}
    changed = {int(page) >= 30 for page in data["frames"][1]["pages"]}
    assert changed == {False, True}


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("make", [tangled, in_groups])
def test_a_browser_shows_the_last_frame_as_the_picture_has_it(make: Any, tmp_path: Path) -> None:
    cache = make()
    path = tmp_path / "frames.html"
    path.write_text(draw_page_map_animation([("before", cache.clear()), ("last", cache)]), encoding="utf-8")
    flags = "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"
    command = [str(CHROMIUM), *flags, "--virtual-time-budget=2000", "--dump-dom", f"{path.as_uri()}#2"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    titles = re.findall(r'<g class="page"[^>]*><title>(.*?)</title>', shown, re.DOTALL)
    assert titles == [cell.findtext(f"{SVG}title") for cell in cells(draw_page_map(cache))]
    for pool in PageMap.of(cache).pools:
        assert f"{pool.title}: {headline(pool)}</div>" in shown if pool.title else headline(pool) in shown
    assert '<span id="count">2 / 2</span>' in shown


PICTURES = Path(__file__).parents[2] / "docs" / "pictures"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["page_map.svg", "animation.html"])
def test_the_picture_in_the_docs_is_what_its_script_draws(name: str) -> None:
    drawn = runpy.run_path(str((PICTURES / name).with_suffix(".py")))["picture"]()
    assert drawn == (PICTURES / name).read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_pictures_of_concepts_are_what_their_script_draws() -> None:
    script = runpy.run_path(str(PICTURES / "concepts.py"))
    drawn = {f"{name}.svg": script["draw"](made()) for name, made in script["PICTURES"].items()}
    assert drawn == {
        path.name: path.read_text(encoding="utf-8") for path in (PICTURES / "concepts").iterdir()
    }
