"""The laws of ``--beams`` and ``--lookup``: what they print, and what they refuse."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.slow

PROMPT = ("-p", "def f(x):", "--page-size", "8", "--ignore-eos")


@pytest.fixture(scope="module")
def searched(jaxpaged, model_path) -> dict:
    done = jaxpaged("generate", "-m", model_path, *PROMPT, "-n", "12", "--beams", "3", "--json")
    assert done.returncode == 0, done.stderr
    assert "beams = 3" in done.stderr and "seed" not in done.stderr
    return json.loads(done.stdout)


def test_beams_are_all_in_the_json_the_best_first(searched):
    scores = [choice["score"] for choice in searched["choices"]]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    assert searched["tokens"] == searched["choices"][0]["tokens"] and len(searched["tokens"]) == 12
    assert searched["complete"] and searched["finish_reason"] == "length"
    assert searched["timings"]["prompt_n"] == 9 and searched["timings"]["predicted_n"] == 12
    kv = searched["kv"]
    assert 0 < kv["pages_peak"] <= kv["pages_total"] <= kv["pages_peak_unshared"] == 9


def test_the_text_is_the_best_one(jaxpaged, model_path, searched):
    done = jaxpaged("generate", "-m", model_path, *PROMPT, "-n", "12", "--beams", "3", "--temp", "0")
    assert done.stdout == f"def f(x):{searched['text']}\n"


def test_a_search_out_of_pages_says_so(jaxpaged, model_path):
    done = jaxpaged(
        "generate", "-m", model_path, *PROMPT, "-n", "40", "--beams", "3", "--kv-pages", "6", "--json"
    )
    assert done.returncode == 0
    assert "out of pages: the search ends after" in done.stderr
    result = json.loads(done.stdout)
    assert not result["complete"] and 0 < len(result["tokens"]) < 40


@pytest.mark.parametrize("flags", ["--temp 0", "--temp 0.4 --seed 3 --repeat-penalty 1.05 -np 2"])
def test_lookup_gives_the_text_without_it(jaxpaged, model_path, flags):
    arguments = ("generate", "-m", model_path, *PROMPT, "-n", "40", *flags.split(), "--json")
    plain = json.loads(jaxpaged(*arguments).stdout)
    done = jaxpaged(*arguments, "--lookup", "4")
    looked_up = json.loads(done.stdout)
    assert [one["tokens"] for one in looked_up.get("choices", [looked_up])] == [
        one["tokens"] for one in plain.get("choices", [plain])
    ]
    drafts = looked_up["lookup"]
    assert 0 <= drafts["accepted"] <= drafts["drafted"]
    assert ("lookup = " in done.stderr) == (drafts["drafted"] > 0)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            "--beams 4 --temp 0.5 --top-k 3",
            "--beams 4 samples no tokens: --temp, --top-k would have no effect",
        ),
        ("--beams 4 -np 2", "--beams 4 and -np exclude each other"),
        ("--beams 4 --lookup 2", "--beams 4 and --lookup exclude each other"),
        ("--beams 4 --context-shift", "--beams 4 and --context-shift exclude each other"),
        ("--beams 4 -n 0", "--beams 4 and -n 0: there is nothing to search for"),
        ("--beams 4 -cnv", "--beams 4 continues a prompt (-p or -f) and does not chat"),
    ],
)
def test_what_does_not_go_together_is_refused(refused, model_path, flags, line):
    assert refused("generate", "-m", model_path, "-p", "x", *flags.split()) == f"jaxpaged: error: {line}"
