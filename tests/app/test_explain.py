"""``jaxpaged explain``."""

import json

import pytest
from click.testing import CliRunner

from jaxpaged.app.commands import application


def explain(*arguments):
    return CliRunner().invoke(application, ["explain", *arguments])


@pytest.mark.parametrize(
    ("platform", "implementation"), [("cpu", "cpu_numba"), ("tpu", "mosaic_tpu"), ("gpu", "mosaic_gpu")]
)
def test_each_platform_has_its_kernel(platform, implementation):
    result = explain("--platform", platform, "-b", "1,8", "-c", "2048", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["platform"] == platform and len(found["steps"]) == 3
    one, eight, prompt = found["steps"]
    assert {step["implementation"] for step in (one, eight, prompt)} == {implementation}
    # Keys and values of 2,048 tokens: 4 layers of 2 heads of 64.
    itemsize = 4 if platform == "cpu" else 2
    assert one["kv_bytes_a_step"] == 2 * 4 * 2 * 64 * itemsize * 2048
    assert eight["kv_bytes_a_step"] == 8 * one["kv_bytes_a_step"]


def test_text_names_what_was_refused_and_why():
    result = explain("--platform", "cpu")
    assert result.exit_code == 0
    assert "cpu: decode, batch 1, 4096 live tokens" in result.stdout
    assert "the kernel of this platform" in result.stdout and "in place" in result.stdout


def test_an_implementation_may_be_forced(monkeypatch):
    monkeypatch.setenv("JAXPAGED_ATTENTION", "xla")
    result = explain("--platform", "cpu", "--json")
    assert result.exit_code == 0, result.output
    step = json.loads(result.stdout)["steps"][0]
    assert step["implementation"] == "xla" and step["why"] == "JAXPAGED_ATTENTION names it"
    monkeypatch.setenv("JAXPAGED_ATTENTION", "abacus")
    result = explain()
    assert result.exit_code == 2
    assert "JAXPAGED_ATTENTION is 'abacus'; allowed are cpu_numba, " in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--platform", "abacus"], "'abacus' is not one of 'cpu', 'gpu', 'tpu'"),
        (["-m", "nowhere.gguf"], "nowhere.gguf: no such file or folder"),
        (["--page-size", "33"], "33"),
        (["-c", "0"], "0 is not in the range"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    result = explain(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
