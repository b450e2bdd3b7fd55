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


@pytest.mark.parametrize(("platform", "implementation"), [("tpu", "mosaic_tpu"), ("gpu", "mosaic_gpu")])
def test_quantized_pages_have_the_bytes_that_the_kernel_tells_of(platform, implementation):
    result = explain(
        "--platform", platform, "-b", "1", "-c", "2048", "--json", "-ctk", "q8_0", "-ctv", "q4_0"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    step, kv = found["steps"][0], found["kv"]
    assert step["implementation"] == implementation
    assert step["kv_bytes_a_step"] == 2048 // 32 * kv["page_bytes"]
    of_a_layer = step["kv_bytes"] if platform == "gpu" else 2048 * step["bytes_per_token"]
    assert step["kv_bytes_a_step"] == 4 * of_a_layer


def test_residual_pages_are_read_in_16_bits():
    one_page, and_some = (
        json.loads(
            explain(
                "--platform", "cpu", "-b", "1", "-c", tokens, "--json", "-ctk", "q4_k", "-ctv", "q4_k"
            ).stdout
        )
        for tokens in ("32", "42")
    )
    numbers_of_a_token = 4 * 2 * 2 * 64
    assert one_page["kv"]["page_bytes"] == 32 * numbers_of_a_token * 144 // 256
    assert one_page["steps"][0]["kv_bytes_a_step"] == one_page["kv"]["page_bytes"]
    assert one_page["kv"]["staging_bytes"] == 32 * numbers_of_a_token * 2
    more = and_some["steps"][0]["kv_bytes_a_step"] - one_page["steps"][0]["kv_bytes_a_step"]
    assert more == 10 * numbers_of_a_token * 2


def test_what_a_kernel_does_not_read_is_named():
    result = explain("--platform", "gpu", "-b", "1", "-ctk", "kivi2", "-ctv", "iq4_nl", "--hadamard", "off")
    assert result.exit_code == 0, result.output
    assert "pages of 32 tokens in kivi2 and iq4_nl: " in result.stdout
    assert "32768 bytes in 16 bits" in result.stdout  # keys alone wait
    assert "implementation          xla" in result.stdout and "these are kivi2(" in result.stdout


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
        (["--platform", "abacus"], "'abacus' is not one of 'auto', 'cpu', 'gpu', 'tpu'"),
        (["-m", "nowhere.gguf"], "nowhere.gguf: no such file or folder"),
        (["--page-size", "33"], "33"),
        (["-c", "0"], "0 is not in the range"),
        (["--hadamard", "on"], "--hadamard on transforms quantized pages, and none are"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    result = explain(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
