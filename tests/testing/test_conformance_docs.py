"""The example of docs/internals/conformance.md prints what the page says, and its fix works."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from jaxpaged.attention import paged_attention
from jaxpaged.testing.conformance import ADVERSARIAL_FILLS, Case, Verdict, benign_fill, build_case, judge

PAGE = Path(__file__, "../../../docs/internals/conformance.md").resolve().read_text()
CODE, PRINTED, DIFF = (
    re.search(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)[1] for kind in ("python", "text", "diff")
)
SMALL = Case(
    "small", num_q_heads=4, num_kv_heads=2, head_dim=8, lengths=(13, 0, 9), q_lens=(1, 0, 3), page_size=8
)


def run(code: str, capsys: pytest.CaptureFixture[str]) -> str:
    exec(compile(code, "conformance.md", "exec"), {})
    return capsys.readouterr().out


def test_the_example_prints_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(CODE, capsys) == PRINTED


def test_its_fix_mends_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    taken, given = ("".join(re.findall(rf"^\{sign}(.*\n)", DIFF, re.MULTILINE)) for sign in "-+")
    assert CODE.count(taken) == 1
    assert run(CODE.replace(taken, given), capsys) == PRINTED.replace("NaN leaks", "ok")


def looks_at(place):
    """A correct attention, except that it adds 0 times the number at a place that no token occupies."""

    def attention(q, k_pages, v_pages, table, batch, **options):
        return paged_attention(q, k_pages, v_pages, table, batch, **options) + 0 * place(v_pages, table)

    return attention


def last_page(v_pages, table):
    """Last slot of the first sequence's last page, which it does not fill."""
    return v_pages[table.pages[0, table.num_entries[0] - 1], 0, -1, 0]


def free_page(v_pages, table):
    held = np.asarray(table.pages)[
        np.arange(table.max_pages_per_seq) < np.asarray(table.num_entries)[:, None]
    ]
    return v_pages[np.setdiff1d(np.arange(len(v_pages)), held)[0], 0, 0, 0]


def stale_entry(v_pages, table):
    """NaN if table rows hold different pages beyond their entries."""
    stale = np.asarray(table.pages)[
        np.arange(table.max_pages_per_seq) >= np.asarray(table.num_entries)[:, None]
    ]
    return 0.0 if (stale == stale[0]).all() else np.nan


@pytest.mark.parametrize(
    ("fill", "place"), list(zip(ADVERSARIAL_FILLS, (last_page, free_page, stale_entry), strict=True))
)
def test_benign_fill_replaces_all_fills_but_those_it_keeps(fill, place) -> None:
    built, attention = build_case(SMALL), looks_at(place)
    assert judge(attention, built, lse=False).kind == "nan"
    assert judge(attention, benign_fill(built), lse=False).kind == "ok"
    for kept in ADVERSARIAL_FILLS:
        expected = "nan" if kept == fill else "ok"
        assert judge(attention, benign_fill(built, keep=[kept]), lse=False).kind == expected
    with pytest.raises(ValueError, match="unknown fills \\['noise'\\]; there are unused_slots, "):
        benign_fill(built, keep=["noise"])


def test_a_verdict_says_what_came_of_a_case() -> None:
    def another(change):
        return lambda *args, **options: change(*paged_attention(*args, **options))

    def refuse(*_, **__):
        raise NotImplementedError("no such heads")

    assert judge(paged_attention, SMALL).kind == "ok"
    wrong = judge(another(lambda out, lse: (out + 0.25, lse)), SMALL)
    assert wrong == Verdict("wrong", pytest.approx(0.25, abs=1e-4)) and str(wrong) == "wrong: max error 0.25"
    assert "small: lse" in str(judge(another(lambda out, lse: (out, lse + 1)), SMALL))
    assert "small: out has shape" in str(judge(another(lambda out, lse: (out[1:], lse)), SMALL))
    assert str(judge(refuse, SMALL)) == "refused: no such heads"
