"""The bench: every test on every kind of cache, and lists that are checked."""

from __future__ import annotations

import csv
import io
import json

import pytest

from jaxpaged.app.options import CountList


def test_rows(jaxpaged, model_path):
    flags = ("-p", "16", "-n", "4", "-b", "2", "-d", "8", "-r", "2", "--page-size", "8")
    done = jaxpaged("bench", "-m", model_path, *flags, "-o", "json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["test"], row["kv"], row["batch"]) for row in rows] == [
        ("pp16 @ d8", "paged", 2),
        ("pp16 @ d8", "contiguous", 2),
        ("tg4 @ d8", "paged", 2),
        ("tg4 @ d8", "contiguous", 2),
    ]
    token = 2 * 2 * 8 * 4
    assert [row["kv_bytes"] for row in rows] == [
        2 * 24 * token,
        2 * 24 * token,
        2 * 16 * token,
        2 * 12 * token,
    ]
    for row in rows:
        assert len(row["samples"]) == 2 and row["tokens_per_second"] > 0 and row["compile_seconds"] > 0


def test_formats(jaxpaged, model_path):
    flags = ("bench", "-m", model_path, "-p", "16", "-n", "0", "-b", "1", "-r", "1", "--kv", "paged")
    table = jaxpaged(*flags).stdout.splitlines()
    assert len(table) == 3 and len({len(line) for line in table}) == 1
    assert "pp16" in table[2] and "± 0.00" in table[2]
    (row,) = csv.DictReader(io.StringIO(jaxpaged(*flags, "-o", "csv").stdout))
    assert row["test"] == "pp16" and row["stddev"] == "0.0"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-b", "1,x"], "'1,x' is not a list of whole numbers"),
        (["-b", "0"], "0 in '0' is below 1"),
        (["-d", "-1"], "-1 in '-1' is below 0"),
        (["--kv", "paged,ring"], "'ring' is no kind of cache"),
        (["-r", "0"], "0"),
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["-p", "100", "-d", "100"], "ask for 228 tokens in a sequence; the model's context has 128"),
    ],
)
def test_bad_flags_are_one_line(refused, model_path, flags, said):
    assert said in refused("bench", "-m", model_path, *flags)


def test_lists_keep_their_order_once():
    assert CountList(0).convert("8,1,8,2", None, None) == (8, 1, 2)
