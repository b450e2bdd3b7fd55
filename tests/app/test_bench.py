"""The bench: every test on every kind of cache, and lists that are checked."""

from __future__ import annotations

import csv
import io
import json

import pytest

from jaxpaged.app.flags import count_list

pytestmark = pytest.mark.slow

FLAGS = ("-p", "8", "-n", "8", "-b", "2", "-d", "8", "--page-size", "8")


def test_rows(jaxpaged, model_path):
    done = jaxpaged("bench", "-m", model_path, *FLAGS, "-r", "2", "-o", "json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["test"], row["kv"], row["batch"]) for row in rows] == [
        ("pp8 @ d8", "paged", 2),
        ("pp8 @ d8", "contiguous", 2),
        ("tg8 @ d8", "paged", 2),
        ("tg8 @ d8", "contiguous", 2),
    ]
    token = 2 * 2 * 8 * 4
    assert {row["kv_bytes"] for row in rows} == {2 * 16 * token}
    for row in rows:
        assert len(row["samples"]) == 2 and row["tokens_per_second"] > 0 and row["compile_seconds"] > 0


def test_formats(jaxpaged, model_path):
    flags = ("bench", "-m", model_path, *FLAGS, "-n", "0", "-r", "1", "--kv", "paged")
    table = jaxpaged(*flags).stdout.splitlines()
    assert len(table) == 3 and len({len(line) for line in table}) == 1
    assert "pp8 @ d8" in table[2] and "± 0.00" in table[2]
    (row,) = csv.DictReader(io.StringIO(jaxpaged(*flags, "-o", "csv").stdout))
    assert row["test"] == "pp8 @ d8" and row["stddev"] == "0.0"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-b", "1,x"], "'1,x' is not a list of integers"),
        (["-b", "0"], "0 in '0' is below 1"),
        (["-d", "-1"], "-1 in '-1' is below 0"),
        (["--kv", "paged,ring"], "'ring' is not one of 'paged', 'contiguous'"),
        (["-r", "0"], "0"),
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["-ctk", "f32,q9"], "'q9' is not one of 'f32', "),
        (["-ctk", "f32,f16,bf16", "-ctv", "f32,f16"], "-ctk has 3 formats and -ctv 2: they go in pairs"),
        (["--kv", "contiguous", "-ctk", "q4_k"], "--kv contiguous: q4_k quantizes whole pages"),
        (["-p", "100", "-d", "100"], "ask for 228 tokens in a sequence; the model's context has 128"),
    ],
)
def test_bad_flags_are_one_line(refused, model_path, flags, said):
    assert said in refused("bench", "-m", model_path, *flags)


def test_formats_are_compared_in_one_table(here, wide_model_path):
    flags = ("-p", "8", "-n", "0", "-b", "1", "--page-size", "8", "-r", "1", "-ub", "8", "--hadamard", "on")
    done = here("bench", "-m", wide_model_path, *flags, "-ctk", "f32,q4_k", "-ctv", "f32", "-o", "json")
    assert done.exit_code == 0, done.output
    numbers = 8 * 32  # of a page
    assert [
        (row["type_k"], row["type_v"], row["hadamard"], row["kv"], row["kv_bytes"])
        for row in json.loads(done.stdout)
    ] == [
        ("f32", "f32", None, "paged", 2 * 4 * numbers),  # plain numbers are not transformed
        ("f32", "f32", None, "contiguous", 2 * 4 * numbers),
        ("q4_k", "f32", True, "paged", numbers * 144 // 256 + 2 * numbers + 4 * numbers),
    ]
    assert "contiguous k=q4_k v=f32, Hadamard on is left out" in done.stderr


def test_lists_keep_their_order_once():
    assert count_list(0).convert("8,1,8,2", None, None) == (8, 1, 2)
