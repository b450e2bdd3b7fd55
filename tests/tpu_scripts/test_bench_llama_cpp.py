"""tpu_scripts/bench/llama_cpp.py, with fakes of llama.cpp's programs."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
from jaxpaged_model.tiny import PATH as TINY
from script_kit import run, table

from tpu_scripts.bench import llama_cpp as bench
from tpu_scripts.bench import llama_cpp_side
from tpu_scripts.bench.llama_cpp import CONTIGUOUS, PAGED
from tpu_scripts.bench.llama_cpp_side import LLAMA_CPP, LLAMA_CPP_PAGED, Cell, Failure
from tpu_scripts.common import in_turns

PROGRAM = """#!{python} -SE
import json, sys
name, given = sys.argv[0].rsplit("/", 1)[1], dict(zip(sys.argv[1:], sys.argv[2:]))
paged, number = "--kv-cache-paged" in given or sys.argv[-1] == "--kv-cache-paged", lambda flag: int(given[flag])
rate = 50 if paged else 100
if "--help" in sys.argv:
    print("usage: " + {help!r})
elif {complaint!r}:
    print("a warning", {complaint!r}, sep="\\n", file=sys.stderr)
    sys.exit(1)
elif name == "llama-bench":
    assert given["-t"] == "2" and given["-r"] == "1" and given["-o"] == "json"
    print(json.dumps([
        dict(n_prompt=p, n_gen=n, n_depth=number("-d") if "-d" in given else 0,
             samples_ns=[(p + n) * 10**9 // rate], build_number=77, build_commit="abc")
        for p, n in ((number("-p"), 0), (0, number("-n"))) if p + n
    ]))
else:
    assert name == "llama-batched-bench" and given["--output-format"] == "jsonl"
    rows, pp, tg = number("-npl"), number("-npp"), number("-ntg")
    assert number("-c") >= rows * (pp + tg)
    print()
    print(json.dumps(dict(pp=pp, tg=tg, pl=rows, t_pp=rows * pp / rate, t_tg=rows * tg / rate / 2)))
"""


@pytest.fixture
def llama_cpp(tmp_path):
    """Makes fakes of llama.cpp's two programs: a fixed rate, half of it with paged memory."""

    def make(help="-m", complaint=""):
        for name in ("llama-bench", "llama-batched-bench"):
            program = tmp_path / name
            program.write_text(PROGRAM.format(python=sys.executable, help=help, complaint=complaint))
            program.chmod(0o755)
        return tmp_path / "llama-bench"

    return make


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "the following arguments are required: -m/--model"),
        (["-m", "nowhere.gguf"], "-m nowhere.gguf: no such file"),
        (["-m", __file__], "test_bench_llama_cpp.py: not a GGUF file"),
        (["-m", TINY, "-p", "0", "-n", "0"], "-p and -n are both 0"),
        (["-m", TINY, "-d", "0,-1"], "must be a non-negative integer, got '-1'"),
        (["-m", TINY, "-d", "2000"], "need 2,712 tokens per sequence; the mo"),
        (["-m", TINY, "-d", "0", "--llama-bench", "no-such"], "--llama-bench no-such: no such program"),
        (["-m", TINY, "-d", "0", "--llama-bench", "x", "--only-ours"], "give one of them"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, arguments, complaint):
    assert run(monkeypatch, "bench.llama_cpp", *arguments) == 2
    said = capsys.readouterr().err
    assert complaint in said and said.count("\n") == 1


def test_no_measure_is_favoured_by_its_turn():
    asked = []
    found = in_turns({name: partial(asked.append, name) for name in "abcd"}, 8)
    assert all(len(values) == 8 for values in found.values())
    rounds = [asked[i : i + 4] for i in range(0, 32, 4)]
    assert all(sorted(order) == list("abcd") for order in rounds)
    for position in range(4):
        assert sorted(order[position] for order in rounds) == list("aabbccdd")


def test_what_is_counted_is_what_llama_cpp_counts():
    one, many = Cell(1, 4000, 712, 100), Cell(8, 4000, 712, 100)
    assert one.read == (4000, 712) and one.tokens == {"prompt": 712, "generation": 100}
    assert (one.name("prompt"), one.name("generation")) == ("pp712 @ d4000", "tg100 @ d4000")
    assert many.read == (0, 4000) and many.tokens == {"prompt": 32000, "generation": 800}
    assert (many.name("prompt"), many.name("generation")) == ("8 x pp4000", "8 x tg100 @ d4000")
    assert Cell(8, 0, 712, 100).read == (0, 712) and Cell(8, 0, 712, 0).tokens == {"prompt": 5696}
    assert one.longest == 4712 and many.longest == 4100 and Cell(1, 0, 0, 3).longest == 4


@pytest.mark.parametrize("cell", [Cell(1, 0, 30, 6), Cell(1, 9, 30, 0), Cell(3, 0, 30, 6), Cell(3, 20, 0, 6)])
def test_llama_cpp_is_asked_for_each_cell(llama_cpp, cell):
    for name, paged, rate in ((LLAMA_CPP, False, 100), (LLAMA_CPP_PAGED, True, 50)):
        side = llama_cpp_side.Programs(name, llama_cpp(help="--kv-cache-paged"), TINY, 2, None, paged)
        assert side.prepare(cell) is None
        found = side.measure(cell)
        rates = {"prompt": rate, "generation": rate if cell.batch == 1 else 2 * rate}
        assert {test: tokens / found[test] for test, tokens in cell.tokens.items()} == {
            test: pytest.approx(rates[test]) for test in cell.tokens
        }
    assert side.probe()["build_number"] == 77


def test_paged_memory_that_a_build_does_not_know_is_said(llama_cpp):
    side = llama_cpp_side.Programs(LLAMA_CPP_PAGED, llama_cpp(), TINY, 2, None, True)
    assert side.prepare(Cell(1, 0, 1, 1)) == side.prepare(Cell(2, 0, 1, 1)) == "not known to this build"


@pytest.mark.parametrize("text", ["", "no json", "[]", "[1]", "{}", '[{"n_prompt": 1}]', "null"])
def test_what_is_no_measurement_is_refused(text):
    with pytest.raises(Failure, match="llama-bench printed no tests: "):
        llama_cpp_side.read_llama_bench(text)
    with pytest.raises(Failure, match="llama-batched-bench printed no test: "):
        llama_cpp_side.read_batched_bench(text)


def test_a_llama_cpp_that_fails_is_one_line(monkeypatch, capsys, llama_cpp):
    program = llama_cpp(complaint="error: failed to load model")
    assert run(monkeypatch, "bench.llama_cpp", "-m", TINY, "-d", 0, "--llama-bench", program) == 2
    said = capsys.readouterr().err
    assert "llama-bench failed: error: failed to load model" in said and said.count("\n") == 1
    program.with_name("llama-batched-bench").unlink()
    assert run(monkeypatch, "bench.llama_cpp", "-m", TINY, "-d", 0, "--llama-bench", program) == 2
    said = capsys.readouterr().err
    assert "-b 8 needs llama-batched-bench beside " in said and said.count("\n") == 1


def test_no_llama_cpp_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert run(monkeypatch, "bench.llama_cpp", "-m", TINY, "-d", 0) == 2
    said = capsys.readouterr().err
    assert "no llama.cpp to compare with" in said and "--only-ours" in said and said.count("\n") == 1


def test_a_child_that_fails_is_one_line():
    child = bench.Child(PAGED, Path(__file__), 1, None)
    message = r"jaxpaged paged failed: .*test_bench_llama_cpp.py: not a GGUF file"
    with child.worker, pytest.raises(Failure, match=message):
        child.load()


class GivenSide:
    """Side with given seconds, which records when it was asked."""

    def __init__(self, name, seconds, asked, reason=None):
        self.name, self.seconds, self.asked, self.reason = name, iter(seconds), asked, reason

    def prepare(self, cell):
        return self.reason

    def measure(self, cell):
        self.asked.append(self.name)
        second = next(self.seconds)
        return {"prompt": second, "generation": 2 * second}


def test_the_table_has_a_row_a_side():
    asked = []
    sides = [
        GivenSide(LLAMA_CPP, [1, 2, 4], asked),
        GivenSide(LLAMA_CPP_PAGED, [], asked, "not known to this build"),
        GivenSide(PAGED, [1, 1, 4], asked),
    ]
    row = llama_cpp_side.measure(sides, Cell(1, 9, 40, 10), 3, lambda _: None)
    assert asked == [LLAMA_CPP, PAGED, PAGED, LLAMA_CPP, LLAMA_CPP, PAGED]
    assert json.loads(json.dumps(row)) == row
    names = [LLAMA_CPP, LLAMA_CPP_PAGED, PAGED]
    assert table("\n".join(bench.table([row], names))) == [
        {"t/s": LLAMA_CPP, "pp40 @ d9": "20.0 (10.0-40.0)", "tg10 @ d9": "2.5 (1.2-5.0)"},
        {"t/s": f"{LLAMA_CPP_PAGED}: not known to this build", "pp40 @ d9": "-", "tg10 @ d9": "-"},
        # In its turns 1, 1/4 and 4 times llama.cpp; the ratio of the medians would be 2.
        {"t/s": PAGED, "pp40 @ d9": "40.0 (10.0-40.0) 1.00x", "tg10 @ d9": "5.0 (1.2-5.0) 1.00x"},
    ]


class Library:
    """Fake of llama-cpp-python: records tokens per call, and checks that positions have no gap."""

    __version__ = "1.2.3"

    def __init__(self):
        self.held, self.calls = {}, []

    def __getattr__(self, name):
        made = type("Any", (), {})
        return lambda *_: made()

    def llama_vocab_n_tokens(self, vocab):
        return 5

    def llama_memory_clear(self, memory, data):
        self.held = {}

    def llama_memory_seq_rm(self, memory, row, start, end):
        self.held[row] = min(self.held.get(row, 0), start)

    def llama_batch_init(self, count, embedding, rows):
        made = type("Batch", (), {name: [None] * count for name in ("token", "pos", "n_seq_id", "logits")})()
        made.seq_id = [[None] for _ in range(count)]
        return made

    def llama_decode(self, context, batch):
        for (row,), position, token in zip(batch.seq_id, batch.pos, batch.token, strict=True):
            assert position == self.held.get(row, 0) and 0 <= token < 5
            self.held[row] = position + 1
        self.calls.append((batch.n_tokens, sum(batch.logits)))
        return 0


@pytest.mark.parametrize(
    ("cell", "calls"),
    [
        (Cell(1, 0, 7, 2), [(7, 1), (1, 1), (1, 1)]),
        (Cell(1, 3000, 7, 1), [(2048, 0), (952, 1), (7, 1), (1, 1)]),
        (Cell(2, 5, 7, 1), [(10, 2), (2, 2)]),
        (Cell(2, 0, 7, 1), [(14, 2), (2, 2)]),
        (Cell(2, 5, 0, 1), [(10, 2), (2, 2)]),
        (Cell(1, 5, 7, 0), [(5, 1), (7, 1)]),
    ],
)
def test_the_library_reads_what_its_programs_read(monkeypatch, cell, calls):
    library = Library()
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    side = llama_cpp_side.OnLlamaCpp({"model": "m.gguf", "threads": 1, "cache_type": None})
    side.prepare(cell)
    library.calls.clear()
    assert side.measure(cell).keys() == cell.tokens.keys()
    assert library.calls == calls
    assert set(library.held.values()) == {cell.behind + cell.steps if cell.steps else sum(cell.read)}


@pytest.mark.slow
def test_both_are_measured(monkeypatch, capsys, tmp_path, llama_cpp):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiles faster
    monkeypatch.setattr(bench, "free_memory", lambda: 32 << 20)  # arrays of the bandwidth, else gigabytes
    arguments = f"-m {TINY} -t 2 -p 8 -n 3 -b 2 -d 9 -r 2 --llama-bench {llama_cpp()}".split()
    assert run(monkeypatch, "bench.llama_cpp", *arguments, "--json", tmp_path / "rows.json") == 0
    said = capsys.readouterr()
    rows = table(said.out)
    assert list(rows[0])[1:] == ["2 x pp9", "2 x tg3 @ d9"]
    assert [r["t/s"].partition(":")[0] for r in rows] == [LLAMA_CPP, LLAMA_CPP_PAGED, CONTIGUOUS, PAGED]
    assert rows[0]["2 x pp9"] == "100.0 (100.0-100.0)" and rows[0]["2 x tg3 @ d9"] == "200.0 (200.0-200.0)"
    assert all(re.search(r"\) [\d.]+x$", r[name]) for r in rows[2:] for name in list(r)[1:])
    assert "llama.cpp build 77 (abc)" in said.out and "GB/s read by" in said.out
    assert said.err.splitlines()[-1] == "1 of 1: batch 2, depth 9"
    found = json.loads((tmp_path / "rows.json").read_text())
    assert len(found["rows"]) == 1 and len(found["rows"][0]["seconds"]["prompt"][PAGED]) == 2
    assert found["command"].startswith("python -m tpu_scripts.bench.llama_cpp -m ")
