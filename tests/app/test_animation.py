"""The laws of --page-map: a frame a step, from the empty pool to the empty pool, and a picture of the fullest."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET

import pytest

from jaxpaged import PagedKVCache
from jaxpaged.app import animation as page_film
from jaxpaged.app.animation import PageMapRecorder
from jaxpaged.pictures.page_map import PageMap, PoolMap

pytestmark = pytest.mark.slow

GREEDY = ("--temp", "0", "--ignore-eos", "--page-size", "8", "--no-warmup", "-p", "def f(x):", "-n", "12")


def frames_of(text: str) -> list[dict]:
    found = re.search(r"^const data = (.*);$", text, re.MULTILINE)
    assert found is not None
    return json.loads(found[1])["frames"]


def test_a_run_as_frames(here, model_path, tmp_path):
    path = tmp_path / "run.html"
    done = here("generate", "-m", model_path, *GREEDY, "-np", "2", "--json", "--page-map", path)
    assert done.exit_code == 0, done.stderr
    frames = frames_of(path.read_text())
    assert [frame["label"] for frame in frames] == [
        "before the prompt",
        "prompt read, first token generated",
        *(f"{n} tokens generated" for n in range(2, 13)),
    ]
    used, tokens, pages = [], [], {}
    for frame in frames:
        pages |= frame["pages"]
        used.append(sum(count > 0 for count, *_ in pages.values()))
        tokens.append(sum(sum(uses[2::4]) for _, *uses in pages.values()))
    # Two samples of nine prompt tokens, whose full page they share; the newest token is never in the cache.
    assert tokens == [0, *(2 * (9 + n) for n in range(11)), 0]
    assert used == [0, 2, *([3] * 7), *([5] * 3), 0]
    assert json.loads(done.stdout)["kv"]["pages_peak"] == max(used)


def test_the_fullest_moment_as_a_picture(here, model_path, tmp_path):
    path = tmp_path / "run.SVG"
    done = here("generate", "-m", model_path, *GREEDY, "-np", "2", "--json", "--page-map", path)
    assert done.exit_code == 0, done.stderr
    kv = json.loads(done.stdout)["kv"]
    drawn = [g.get("class", "") for g in ET.parse(path).getroot().iter("{http://www.w3.org/2000/svg}g")]
    cells = [kinds.split() for kinds in drawn if "page" in kinds.split()]
    assert len(cells) == kv["pages_total"]
    assert sum("free" not in kinds for kinds in cells) == kv["pages_peak"]


def test_a_long_film_keeps_every_second_frame_and_looks_half_as_often(tmp_path, monkeypatch):
    monkeypatch.setattr(page_film, "_MOST_FRAMES", 4)
    recorder = PageMapRecorder(tmp_path / "recorder.html")
    cache = PagedKVCache.create(
        num_layers=1, num_kv_heads=1, head_dim=1, num_pages=1, max_seqs=1, page_size=8
    )
    looks = []
    monkeypatch.setattr(PageMap, "of", lambda cache: looks.append(0) or PageMap((PoolMap(8, (0,), {}),)))
    for step in range(200):
        recorder.add(str(step), cache, 1)
    recorder.write()
    labels = [int(frame["label"]) for frame in frames_of(recorder.path.read_text())]
    assert 4 <= len(labels) <= 8 and labels[0] == 0 and labels[-1] > 150
    assert recorder.every == 32 and len(looks) < 50


@pytest.mark.parametrize("name", ["map.png", "map", "svg"])
def test_other_names_are_one_line(refused, model_path, name):
    said = refused("generate", "-m", model_path, *GREEDY, "--page-map", name)
    assert f"{name}: the name must end in .svg or .html" in said


def test_where_nothing_can_be_drawn_is_one_line(refused, model_path, tmp_path):
    flags = ("generate", "-m", model_path, *GREEDY, "--page-map")
    assert "asks for none" in refused(*flags, tmp_path / "map.svg", "--no-kv-cache-paged")
    assert "there is no folder" in refused(*flags, tmp_path / "nowhere" / "map.svg")
