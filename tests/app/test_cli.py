"""The laws of the command line: what is printed where, what is refused and how."""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxpaged import __version__
from jaxpaged.app.prompt import unescape

CONTEXT = 128  # of the model in conftest.py
GREEDY = ("--temp", "0", "--ignore-eos")
SMALL_PAGES = ("--page-size", "8")


@pytest.fixture(scope="module")
def paged(jaxpaged: Callable, model_path: Path) -> dict:
    done = jaxpaged(
        "generate", "-m", model_path, "-p", "def f(x):", "-n", "40", *GREEDY, "--json", "--page-size", "8"
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["--help"],
        ["generate", "--help"],
        ["bench", "-h"],
        ["devices", "-h"],
        ["perplexity", "-h"],
    ],
)
def test_help_and_version_do_not_import_jax(arguments):
    code = (
        "import sys\n"
        "from jaxpaged.app.commands import application\n"
        "try:\n    application(sys.argv[1:])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'jax', 'numpy', 'flax', 'model'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_environment_is_set_before_jax_starts(environment):
    code = (
        "import os\n"
        "import jaxpaged.app.commands\n"
        "from jaxpaged.app.environment import prepare\n"
        "prepare(threads=1)\n"
        "import jax\n"
        "assert jax.config.jax_compilation_cache_dir.startswith(os.environ['JAXPAGED_CACHE'])\n"
        "assert (os.environ['TF_CPP_MIN_LOG_LEVEL'], os.environ['PJRT_NPROC']) == ('3', '1')\n"  # JAX says 1
    )
    environment = {k: v for k, v in environment.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_demo_writes_code_without_repeating_itself(here):
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    (demo,) = re.findall(r"^\t\.venv/bin/jaxpaged (generate .*) \$\(ARGS\)$", makefile, re.M)
    text = here(*shlex.split(demo)).stdout
    ast.parse(text)
    lines = [line.strip() for line in text.splitlines() if line]
    assert len(lines) > 8 and len(set(lines)) == len(lines)


def test_version(jaxpaged):
    import jax

    versions = f"jaxpaged {__version__}, jax {jax.__version__}, Python {platform.python_version()}\n"
    assert jaxpaged("--version").stdout == versions


def test_no_command_shows_the_help(jaxpaged):
    done = jaxpaged()
    assert (done.returncode, done.stdout) == (0, jaxpaged("--help").stdout)


@pytest.mark.skipif(os.name != "posix", reason="POSIX shell")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(environment, closed):
    command = f"exec {shlex.quote(sys.executable)} -m jaxpaged.app.cli devices {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("cpu:0" in done.stdout) == (">&-" not in closed.split(" "))


def test_devices(jaxpaged):
    assert "cpu:0" in jaxpaged("devices").stdout


def test_json_is_one_object_with_all_fields(paged):
    assert set(paged) == {"prompt_tokens", "tokens", "text", "finish_reason", "timings", "kv"}
    assert paged["prompt_tokens"] == list(b"def f(x):")
    assert len(paged["tokens"]) == 40 and paged["finish_reason"] == "length"
    timings = paged["timings"]
    assert (timings["prompt_n"], timings["predicted_n"]) == (9, 40)
    for name in ("prompt", "predicted"):
        assert timings[f"{name}_ms"] > 0
        rate = 1e3 * timings[f"{name}_n"] / timings[f"{name}_ms"]
        assert timings[f"{name}_per_second"] == pytest.approx(rate, rel=1e-2)


def test_pool_is_the_context(paged):
    token = 2 * 2 * 8 * 4  # K and V, KV heads, head_dim, bytes
    assert paged["kv"] == {
        "kind": "paged",
        "type_k": "f32",
        "type_v": "f32",
        "hadamard": None,
        "page_size": 8,
        "pages_total": CONTEXT // 8,  # of the whole context, so that runs share a program
        "pages_peak": 6,  # the newest token is never fed back
        "bytes_peak": 6 * 8 * token,
        "bytes_contiguous": CONTEXT * token,
    }


def test_contiguous_cache_gives_the_same_tokens(jaxpaged, model_path, paged):
    done = jaxpaged(
        "generate", "-m", model_path, "-p", "def f(x):", "-n", "40", *GREEDY, "--json", "--no-kv-cache-paged"
    )
    contiguous = json.loads(done.stdout)
    assert contiguous["tokens"] == paged["tokens"]
    assert contiguous["kv"]["kind"] == "contiguous"
    assert (
        contiguous["kv"]["bytes_peak"]
        == contiguous["kv"]["bytes_contiguous"]
        == paged["kv"]["bytes_contiguous"]
    )


@pytest.mark.slow
def test_x64_changes_no_token(jaxpaged, model_path, paged):
    flags = ("-p", "def f(x):", "-n", "40", *GREEDY, "--json", *SMALL_PAGES)
    done = jaxpaged("generate", "-m", model_path, *flags, JAX_ENABLE_X64="1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == paged["tokens"]


def test_text_goes_to_stdout_and_the_rest_to_stderr(jaxpaged, model_path, paged):
    flags = ("-n", "40", *GREEDY, "--page_size", "8", "-ngl", "99", "-fa", "on", "-kvu", "--no-mmap")
    done = jaxpaged("generate", "-m", model_path, "-f", "-", *flags, stdin="def f(x):\n")
    assert done.returncode == 0
    assert done.stdout == f"def f(x):{paged['text']}\n"
    for line in (
        "prompt eval time =",
        "  eval time =",
        "total time =",
        "KV cache = paged, 6 of 16 pages of 8 tokens",
    ):
        assert line in done.stderr
    assert f"for {CONTEXT} tokens)" in done.stderr
    for flag in ("-ngl", "-fa", "-kvu", "--no-mmap"):
        assert f"jaxpaged: {flag} is accepted and has no effect" in done.stderr
    assert "Traceback" not in done.stderr
    quiet = jaxpaged("generate", "-m", model_path, "-f", "-", *flags, "--log-disable", stdin="def f(x):\n")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, done.stdout, "")


@pytest.mark.slow
def test_parallel_samples_are_those_of_their_seeds(jaxpaged, model_path):
    # One by one they run the program of `paged`, which is compiled already.
    flags = (
        "generate",
        "-m",
        model_path,
        "-p",
        "def f(x):",
        "-n",
        "40",
        "--json",
        "--ignore-eos",
        *SMALL_PAGES,
    )
    both = json.loads(jaxpaged(*flags, "--temp", "2", "-np", "2", "-s", "5").stdout)
    second = json.loads(jaxpaged(*flags, "--temp", "2", "-s", "6").stdout)
    assert [choice["seed"] for choice in both["choices"]] == [5, 6]
    assert both["tokens"] == both["choices"][0]["tokens"] != second["tokens"]
    assert both["choices"][1]["tokens"] == second["tokens"]


@pytest.mark.slow
def test_running_out_of_pages_ends_the_text(jaxpaged, model_path):
    done = jaxpaged(
        "generate", "-m", model_path, "-p", "def f(x):", "-n", "40", *GREEDY, "--json", "--page-size", "8",
        "--kv-pages", "3",
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert done.returncode == 0
    assert result["finish_reason"] == "length" and len(result["tokens"]) == 3 * 8 - 9 + 1
    assert "out of pages: " in done.stderr


@pytest.mark.slow
def test_chat_on_a_pipe(jaxpaged, model_path):
    done = jaxpaged("generate", "-m", model_path, "-cnv", "-n", "4", *GREEDY, stdin="a\nb\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    assert "KV cache = paged" in done.stderr
    assert "/     8 tokens" in done.stderr  # two answers of four
    turn = len("Suser\na\nSassistant\n")  # S is one token
    prompt_eval = next(line for line in done.stderr.splitlines() if line.startswith("prompt eval time"))
    # The second turn computes itself, and what the answer's text did not give back token by token.
    assert 2 * turn < int(prompt_eval.split("/")[1].split()[0]) < 3 * turn


@pytest.mark.skipif(os.name != "posix", reason="POSIX pipes")
def test_a_closed_pipe_is_no_error(environment):
    command = [sys.executable, "-m", "jaxpaged.app.cli", "generate", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--page-size", "33"], "33 is not a power of two from 8 to 256"),
        (["--page-size", "512"], "512 is not a power of two from 8 to 256"),
        (["-n", "-2"], "-2"),
        (["-np", "0"], "0"),
        (["-c", "-1"], "-1"),
        (["-c", "2000000000"], "2000000000"),
        (["--temp", "nan"], "nan is not a finite number"),
        (["--top-p", "inf"], "inf is not a finite number"),
        (["--top-p", "1.5"], "1.5 is above 1"),
        (["--repeat-penalty", "0"], "0 is not above 0"),
        (["--seed", "4294967296"], "4294967296"),
        (["-npp", "2"], "Did you mean"),
        (["--tmep", "1"], "Did you mean '--temp'? See 'jaxpaged generate --help'."),
        (["--logit-bias", "x"], "No such option '--logit-bias'. See"),
        (["-n64"], "-n64"),
        (["-ngl"], "requires an argument"),
        (["-f", "x"], "-p and -f both give a prompt"),
        (["-m", "nowhere.gguf"], "nowhere.gguf: no such file"),
        (["-m", "x", "-hf", "y"], "-m and -hf both name a model"),
        (["--kv-pages", "2", "--no-kv-cache-paged"], "--kv-pages"),
    ],
)
def test_bad_flags_are_one_line(refused: Callable[..., str], flags, said):
    assert said in refused("generate", "-p", "x", *flags)


def test_the_embedded_model_says_that_it_cannot_chat(refused):
    assert "the embedded model continues Python code and cannot chat: try -p" in refused("generate", "-cnv")


def test_a_chat_without_a_message_has_no_timings(here, model_path):
    done = here("generate", "-m", model_path, "-cnv")
    assert (done.exit_code, done.stdout) == (0, "") and "time =" not in done.stderr


def test_bad_prompts_and_pools_are_one_line(refused, model_path, tmp_path):
    base = ("generate", "-m", model_path, "-s", "1")
    assert "no prompt: give -p TEXT" in refused(*base)
    assert "the prompt has 128 tokens" in refused(*base, "-p", "x" * CONTEXT)
    assert "the prompt has 20 tokens; the context of 16" in refused(*base, "-p", "x" * 20, "-c", "16")
    assert "need 3 pages of 8 tokens, --kv-pages allows 2" in refused(
        *base, "-p", "x" * 17, "--page-size", "8", "--kv-pages", "2"
    )
    assert "missing.txt: No such file" in refused(*base, "-f", tmp_path / "missing.txt")
    (tmp_path / "binary").write_bytes(b"ab\xff")
    assert "not UTF-8 text, byte 2 is 0xff" in refused(*base, "-f", tmp_path / "binary")
    assert "'nonsense' is neither Jinja source nor one of" in refused(
        *base, "-p", "x", "-cnv", "--chat-template", "nonsense"
    )
    assert "the prompt is empty" in refused(*base, "-p", "")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all\n" * 100])
def test_foreign_files_are_one_line(refused, tmp_path, content):
    path = tmp_path / "foreign.gguf"
    path.write_bytes(content)
    assert "foreign.gguf" in refused("generate", "-m", path, "-p", "x")


def test_escapes():
    assert unescape(r"a\nb\t\\n\x41\'\"\q\x4") == "a\nb\t\\nA'\"" + r"\q\x4"


@pytest.mark.slow
def test_the_second_start_compiles_nothing(jaxpaged: Callable, tmp_path: Path) -> None:
    """Another process finds the programs and the kernels that they call; -v says so."""
    flags = ("-p", "def f(x):", "-n", "5", "--temp", "0", "--page-size", "64", "-v")
    first, second = (jaxpaged("generate", *flags, JAXPAGED_CACHE=str(tmp_path)) for _ in range(2))
    assert first.returncode == second.returncode == 0 and first.stdout == second.stdout
    for done, how in ((first, "compiled"), (second, "found on disk")):
        said = dict(re.findall(r"^ *(\w[\w ]*) = +([\d.]+ s.*)$", done.stderr, re.M))
        assert re.fullmatch(rf"[\d.]+ s: {how}", said["programs"])
        parts = sum(
            float(said[name].split()[0]) for name in ("imports", "load", "programs", "first step", "the rest")
        )
        assert float(said["start"].split()[0]) == pytest.approx(parts, abs=0.1)
        assert re.fullmatch(r"[\d.]+ s: metadata [\d.]+, tokenizer [\d.]+, weights [\d.]+", said["load"])
