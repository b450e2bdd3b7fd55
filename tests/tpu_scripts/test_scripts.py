"""The scripts for TPUs and GPUs, on a CPU: help texts, small measurements, and bad input as one line."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jaxpaged_model import tiny
from jaxpaged_model.config import ModelConfig
from script_kit import run, table

from jaxpaged.attention import api, candidates, paged_attention, tuning
from jaxpaged.attention.tuning import Key, trial, tuned
from jaxpaged.testing.conformance import build_case
from tpu_scripts.bench import generate as bench_generate
from tpu_scripts.bench import models, tune_paged_attention
from tpu_scripts.bench.paged_attention import Attention, Row, Shape
from tpu_scripts.compile_check import __main__ as compile_check

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPTS = (
    "bench.paged_attention",
    "bench.generate",
    "bench.tune_paged_attention",
    "compile_check",
    "bench.quality",
    "bench.llama_cpp",
    "bench.slots",
)
TOY = ModelConfig("llama", 32, 16, 16, 1, 2, 1, 8, 64, name="toy")


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_teaches(script):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", f"tpu_scripts.{script}", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and not done.stderr
    assert f"python -m tpu_scripts.{script}" in done.stdout
    assert len(re.findall("^Needs: ", done.stdout, re.MULTILINE)) == 1


@pytest.mark.parametrize(
    ("script", "arguments", "complaint"),
    [
        ("bench.paged_attention", ["-m", "GPT-9"], "unknown model 'GPT-9'; known are SmolLM2-135M, "),
        ("bench.paged_attention", ["-b", "-1"], "must be a positive integer, got '-1'"),
        ("bench.paged_attention", ["-c", "64,x"], "must be a positive integer, got 'x'"),
        ("bench.paged_attention", ["--page-size", "24"], "page_size must be a power of two from 8 to 256"),
        (
            "bench.paged_attention",
            ["--implementation", "cuda"],
            "unknown implementation 'cuda'; known are cpu_",
        ),
        ("bench.paged_attention", ["--json", "nowhere/rows.json"], "cannot write nowhere/rows.json"),
        ("bench.generate", ["-m", "GPT-9"], "unknown model 'GPT-9': no such file, and known shapes are "),
        ("bench.generate", ["-b", "-1"], "must be a positive integer, got '-1'"),
        ("bench.generate", ["--implementation", "xla,cuda"], "unknown implementation 'cuda'; known are cpu_"),
        ("bench.generate", ["--live", "0", "-p", "0"], "nothing to measure"),
        ("bench.generate", ["-m", "Llama-3-8B", "--memory", "100"], "the weights of Llama-3-8B shape"),
        ("bench.tune_paged_attention", ["-m", "GPT-9"], "unknown model 'GPT-9'; known are SmolLM2-135M, "),
        ("bench.tune_paged_attention", ["-b", "-1"], "must be a positive integer, got '-1'"),
        (
            "bench.tune_paged_attention",
            ["--page-size", "24"],
            "page_size must be a power of two from 8 to 256",
        ),
        ("bench.quality", ["-f", "nowhere.txt"], "-f nowhere.txt: No such file or directory"),
        (
            "bench.quality",
            ["-f", __file__, "--formats", "q9_9"],
            "no such page format; there are f32, bf16, f16",
        ),
        ("bench.quality", ["-f", __file__, "-c", "4096"], "-c 4096 is more than the 1024 tokens"),
        (
            "bench.quality",
            ["--formats", "f32", "-c", "64", "--chunks", "1", "--llama-perplexity", "sh"],
            "needs -m",
        ),
        ("bench.quality", ["--page-size", "24"], "page_size must be a power of two from 8 to 256"),
        ("compile_check", ["--python-tpu", "no-such-python"], "no-such-python is not a program"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, script, arguments, complaint):
    assert run(monkeypatch, script, *arguments) == 2
    said = capsys.readouterr()
    assert complaint in said.err and said.err.count("\n") == 1 and not said.out


def test_a_bad_environment_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("JAXPAGED_ATTENTION", "cuda")
    assert run(monkeypatch, "bench.paged_attention") == 2
    said = capsys.readouterr().err
    assert "JAXPAGED_ATTENTION is 'cuda'; allowed are cpu_numba, " in said and said.count("\n") == 1


def test_the_environment_names_the_only_implementation(monkeypatch):
    monkeypatch.setenv("JAXPAGED_ATTENTION", "xla")
    assert candidates() == candidates("tpu") == ("xla",)
    monkeypatch.setenv("JAXPAGED_ATTENTION", "cuda")
    with pytest.raises(ValueError, match=r"JAXPAGED_ATTENTION is 'cuda'; allowed are cpu_numba, .*xla"):
        candidates()
    monkeypatch.setenv("JAXPAGED_ATTENTION", "")
    assert candidates("tpu")[0] == "mosaic_tpu"


def test_a_forced_implementation_is_what_is_compiled(monkeypatch):
    """A jitted function is traced anew for each implementation."""
    pytest.importorskip("numba")
    monkeypatch.delenv("JAXPAGED_ATTENTION", raising=False)
    from jaxpaged.attention.cases import CASES

    built = build_case(CASES[0])
    attend = jax.jit(paged_attention)
    arguments = built.q, built.k_pages, built.v_pages, built.table, built.batch
    text = {}
    for name in ("xla", "cpu_numba", "xla"):
        with bench_generate.forced(name):
            text[name] = attend.lower(*arguments).as_text()
    assert "jaxpaged_paged_attention" in text["cpu_numba"] and "jaxpaged_paged_attention" not in text["xla"]
    assert candidates("cpu")[0] == "cpu_numba"


def test_named_shapes_are_the_models():
    """By the number of parameters that their authors give."""
    millions = {"SmolLM2-135M": 135, "Qwen3-0.6B": 596, "Llama-3-8B": 8030, "Qwen3-8B": 8191}
    found = {name: round(c.num_parameters() / 1e6) for name, c in models.MODEL_SHAPES.items()}
    assert found == millions


def test_attention_of_layers_is_attention(monkeypatch):
    """The timed program computes the same as single calls, on the pages in their order."""
    shape = Shape("SmolLM2-135M", batch=2, context=50, queries=3, page_size=16, dtype="f32")
    program = Attention(shape, "xla", layers=2)
    pool = models.noise(shape.pool())
    q = models.noise(program.q)
    found = program._run(1, q, (pool, pool), (pool, pool), program.table, program.batch)
    mixed = q
    for _ in range(2):
        mixed = (
            q
            + paged_attention(mixed, pool, pool, program.table, program.batch, implementation="reference")
            / 64
        )
    np.testing.assert_allclose(found, mixed, rtol=2e-5, atol=2e-5)
    assert shape.kv_bytes == 2 * 3 * 64 * 4 * 100
    assert shape.operations == 4 * 9 * 64 * 2 * (48 + 49 + 50)


def test_share_is_of_the_bandwidth_of_the_same_turn():
    shape = Shape("SmolLM2-135M", 1, 1000, 1, 16, "f32")
    seconds = [shape.kv_bytes / rate for rate in (5e9, 8e9, 2e9)]
    assert Row(shape, 1, "xla", seconds, [1e10, 1e10, 8e9]).share == pytest.approx(0.5)


@pytest.mark.slow
def test_attention_is_measured(monkeypatch, capsys, tmp_path):
    drawn = ["--plot", tmp_path / "rows.svg"] if importlib.util.find_spec("matplotlib") else []
    arguments = (
        "-m SmolLM2-135M -b 1,100 -c 64,128 --prefill 16 --page-size 16 --layers 2 -r 2 --milliseconds 1"
    )
    arguments += " --memory 24 --implementation xla"
    status = run(
        monkeypatch, "bench.paged_attention", *arguments.split(), "--json", tmp_path / "rows.json", *drawn
    )
    said = capsys.readouterr()
    assert status == 0
    assert "the limit is read" in said.out
    rows = table(said.out)
    # Batch 100 with 128 tokens of 1536 bytes does not fit; with 64 tokens one layer of the two does.
    wanted = [
        ("decode", "1", "64"),
        ("decode", "1", "128"),
        ("decode", "100", "64"),
        ("prefill 16", "1", "64"),
    ]
    assert set(wanted) <= {(row["test"], row["batch"], row["context"]) for row in rows}
    assert re.search(
        "left out: SmolLM2-135M, decode, batch 100, context 128: 18.8 MiB of pages, ",
        said.err,
    )
    found = json.loads((tmp_path / "rows.json").read_text())
    assert len(found["rows"]) == len(rows) and found["limit"] == "read" and "copy" in found["bandwidth"]
    assert {row["layers"] for row in found["rows"]} == {1, 2}
    if drawn:
        assert "<svg" in drawn[1].read_text()


@pytest.mark.slow
def test_generation_is_measured(monkeypatch, capsys, tmp_path):
    pytest.importorskip("numba")
    monkeypatch.delenv("JAXPAGED_ATTENTION", raising=False)
    monkeypatch.setitem(models.MODEL_SHAPES, "toy", TOY)
    arguments = "-m toy -b 1 --live 5,20,61 -p 9 -n 3 -r 1 --page-size 8 --implementation xla,cpu_numba"
    assert run(monkeypatch, "bench.generate", *arguments.split(), "--json", tmp_path / "rows.json") == 0
    said = capsys.readouterr()
    rows = table(said.out)
    assert [(r["test"], r["tokens"]) for r in rows] == [
        ("generation", "5"),
        ("generation", "20"),
        ("prompt", "9"),
    ]
    assert all(
        float(r[name].replace(",", "")) > 0 for r in rows for name in ("xla", "cpu_numba", "cpu_numba / xla")
    )
    assert said.err == "left out: generation, batch 1, 61 tokens: the model's context has 64 tokens\n"
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 3


# --- tuning -------------------------------------------------------------------------------------------------

KEY = Key("TPU v5 lite", 8, 4, 128, 32, "bfloat16", "decode")
CALL = {
    "num_kv_heads": 8,
    "group": 4,
    "head_dim": 128,
    "page_size": 32,
    "dtype": "bfloat16",
    "kind": "decode",
}


def test_only_what_was_measured_is_tuned(monkeypatch):
    monkeypatch.setattr(tuning, "TABLE", {KEY: {"pages": 16}})
    assert tuned(**CALL, device_kind="TPU v5 lite") == {"pages": 16}
    assert tuned(**CALL, device_kind="TPU v4") is None
    assert tuned(**CALL | {"num_kv_heads": 1}, device_kind="TPU v5 lite") is None
    assert tuned(**CALL) is None, "this is no TPU"
    with trial({"pages": 4}) as running:
        assert not running.asked
        assert tuned(**CALL, device_kind="TPU v5 lite") == {"pages": 4} and running.asked
    with trial(None):
        assert tuned(**CALL, device_kind="TPU v5 lite") is None


def test_the_table_is_written_beside_other_devices(monkeypatch, tmp_path):
    source = Path(tuning.__file__).read_text()
    monkeypatch.setattr(
        tuning, "TABLE", {KEY: {"pages": 8}, KEY._replace(device_kind="TPU v4"): {"pages": 4}}
    )
    monkeypatch.setattr(tuning, "MEASURED", {"TPU v4": ("2026-01-01, jax 0.10.2", "python -m x")})
    slower = KEY._replace(kind="prefill")
    results = {
        KEY: [{"sizes": {"pages": 16}, "gain": 1.2}, {"sizes": {}, "gain": 1.0}],
        slower: [{"sizes": {"pages": 32}, "gain": 1.01}],
    }
    measured, entries = tune_paged_attention.merged(results, "2026-02-02")
    assert entries == {KEY: {"pages": 16}, KEY._replace(device_kind="TPU v4"): {"pages": 4}}
    written = tune_paged_attention.rewrite(source, measured, entries)
    file = tmp_path / "written.py"
    file.write_text(written)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("written")
    assert {tuple(k): v for k, v in module.TABLE.items()} == {tuple(k): v for k, v in entries.items()}
    assert module.MEASURED["TPU v4"][1] == "python -m x" and "2026-02-02" in written
    assert tune_paged_attention.rewrite(written, {}, {}) == tune_paged_attention.rewrite(source, {}, {})
    if importlib.util.find_spec("ruff"):
        ruff = [sys.executable, "-m", "ruff", "format", "--check", "-", "--config", ROOT / "pyproject.toml"]
        subprocess.run(ruff, input=written, text=True, check=True, capture_output=True)


@pytest.mark.slow
def test_sizes_under_trial_reach_the_kernel(monkeypatch, capsys):
    """With an XLA kernel that asks: every candidate is traced, and one that cannot serve is passed over."""
    asked = []
    xla = api.load("xla")

    def kernel(q, k_pages, *rest):
        sizes = dict(tuned(**CALL) or {})
        asked.append(sizes)
        if sizes.get("pages") == 4:
            raise NotImplementedError("4 pages are too few")
        return xla(q, k_pages, *rest)

    monkeypatch.setattr(api, "load", lambda name: kernel)
    monkeypatch.setattr(tune_paged_attention, "PREFERENCES", {"tpu": ("xla",)})
    monkeypatch.setattr(tune_paged_attention, "candidates", lambda *_: [{"pages": 4}, {"pages": 8}])
    shape = Shape("SmolLM2-135M", 1, 64, 1, 16, "f32")
    monkeypatch.setattr(sys, "argv", ["tune_paged_attention.py"])
    options = type("Options", (), {"milliseconds": 1, "repeat": 2})
    rows = list(tune_paged_attention.measure("tpu", KEY, shape, options, 1 << 26))
    assert {json.dumps(row["sizes"]) for row in rows} == {"{}", '{"pages": 8}'}
    assert {"pages": 4} in asked and {"pages": 8} in asked and {} in asked
    assert "skipped: {'pages': 4}: xla: 4 pages are too few" in capsys.readouterr().err


def test_candidates_are_listed_anywhere(monkeypatch, capsys):
    arguments = ["--dry-run", "-m", "SmolLM2-135M,Llama-3-8B,Qwen3-8B", "--page-size", "32"]
    assert run(monkeypatch, "bench.tune_paged_attention", *arguments) == 0
    rows = table(capsys.readouterr().out)
    # Models with the same heads are one.
    assert [r["platform"] for r in rows] == ["tpu"] * 4 + ["gpu"] * 4
    assert rows[2] == {
        "platform": "tpu", "kind": "decode", "KV heads": "8", "group": "4", "head_dim": "128", "page size": "32",
        "dtype": "bfloat16", "candidates": "5: pages 4, 8, 16, 32, 64; queries 1",
    }  # fmt: skip
    assert run(monkeypatch, "bench.tune_paged_attention") == 0
    assert capsys.readouterr().out.startswith("nothing to tune on cpu")


# --- compiling without a device -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tpu", "gpu", "status"), [(0, 0, 0), (0, 2, 0), (2, 0, 0), (2, 2, 2), (1, 0, 1), (2, 1, 1), (0, 137, 1)]
)
def test_checks_are_summed_up(monkeypatch, capfd, tmp_path, tpu, gpu, status):
    """By the exit statuses of what stands for the two interpreters; each says what to install where it is missing."""
    arguments = ["--quick", "--json", tmp_path / "rows.json"]
    for target, code in (("tpu", tpu), ("gpu", gpu)):
        python = tmp_path / target
        python.write_text(
            f'#!/bin/sh\n[ "$2" = tpu_scripts.compile_check.{target} ] && [ "$5" = --quick ] || exit 1\n'
            f'[ {code} = 2 ] || echo \'{{"rows": [1, 2]}}\' > "$4"\nexit {code}\n'
        )
        python.chmod(0o755)
        arguments += [f"--python-{target}", python]
    assert run(monkeypatch, "compile_check", *arguments) == status
    said = capfd.readouterr().out
    for target, code in (("tpu", tpu), ("gpu", gpu)):
        expected = {0: "ok, 2 programs", 2: "not checked; it needs pip install"}.get(code, "FAILED")
        assert f"{target}: {expected}" in said
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows["tpu"] == ([1, 2] if tpu != 2 else []) and rows["gpu"] == ([1, 2] if gpu != 2 else [])


def test_both_checks_are_there():
    for target in compile_check.INSTALL:
        assert importlib.util.find_spec(f"tpu_scripts.compile_check.{target}")


LLAMA_PERPLEXITY = r"""#!/bin/sh
case "$*" in *--kl-divergence\ *) cat <<END
Mean PPL(Q)/PPL(base)         :   1.002784 ±   0.000793
Mean    KLD:   0.000284 ±   0.000018
99.0%   KLD:   0.002101
Same top p: 98.725 ± 0.351 %
END
esac
"""


def test_quality_is_a_row_a_variant(monkeypatch, capsys, tmp_path):
    flags = ["--formats", "f32,q8_0/q4_0", "-c", 128, "--chunks", 2, "-m", tiny.PATH, "-f", __file__]
    found, program = (tmp_path / "rows.json", tmp_path / "rows.svg"), tmp_path / "llama-perplexity"
    program.write_text(LLAMA_PERPLEXITY)
    program.chmod(0o755)
    if importlib.util.find_spec("matplotlib"):
        flags += ["--plot", found[1]]
    flags += ["-np", 2, "--llama-perplexity", program, "--json", found[0]]
    assert run(monkeypatch, "bench.quality", *flags) == 0
    same, plain, transformed, *theirs = table(capsys.readouterr().out)
    assert (same["K / V"], same["mean KLD"], same["same top %"]) == ("f32", "0", "100")
    assert (plain["K / V"], plain["Hadamard"], transformed["Hadamard"]) == ("q8_0 / q4_0", "no", "yes")
    assert plain["bits"] == transformed["bits"] == "6.5"
    values = json.loads(found[0].read_text())["rows"]
    assert [row["hadamard"] for row in values[:3]] == [None, False, True]
    assert all(0 < row["kld"]["value"] < 0.1 for row in values[1:])
    assert len(theirs) == 14 and {row["mean KLD"] for row in theirs} == {"2.8e-04 ± 2e-05"}
    assert theirs[0]["same top %"] == "98.72 ± 0.35" and theirs[0]["PPL ratio"] == "1.00278 ± 0.00079"
    assert found[1].is_file() == ("--plot" in flags)


def test_slots_are_a_row_a_server(monkeypatch, capsys, tmp_path):
    arguments = ["--slots", 2, "-c", 1024, "-p", 16, "-n", 4, "--json", tmp_path / "rows.json"]
    assert run(monkeypatch, "bench.slots", *arguments) == 0
    assert [row["server"] for row in table(capsys.readouterr().out)] == ["contiguous", "paged"]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert all(0 < row["idle"] <= row["peak"] and row["rate"] > 0 for row in rows)
