"""Laws of text that comes in and goes out: files of other systems, terminals of few characters, full disks, no home."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from types import SimpleNamespace

import platformdirs
import pytest

from jaxpaged.app import environment as app_environment
from jaxpaged.app.chat import template_of
from jaxpaged.app.perplexity import scored_text
from jaxpaged.app.prompt import read_prompt

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (b"a\n", "a"),
        (b"a\r\n", "a"),
        (b"a\r", "a"),
        (b"a\n\n", "a\n"),
        (b"a\r\n\r\n", "a\r\n"),
        (BOM + b"a", "a"),
        (BOM + b"a\r\n", "a"),
        (b"a\r\nb", "a\r\nb"),
    ],
)
@pytest.mark.parametrize("pipe", [False, True])
def test_a_prompt_has_no_byte_order_mark_and_one_line_end_less(tmp_path, monkeypatch, written, read, pipe):
    (tmp_path / "prompt").write_bytes(written)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(written)))
    file = "-" if pipe else str(tmp_path / "prompt")
    assert read_prompt(SimpleNamespace(prompt=None, file=file)) == read


def test_no_other_text_has_a_byte_order_mark(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(BOM + b"{{ messages }}")
    options = SimpleNamespace(chat_template=None, chat_template_file=path)
    assert template_of(options, None) == scored_text(str(path)) == "{{ messages }}"


def test_a_text_that_begins_twice_is_warned_of(here, ending_model_path):
    flags = ("generate", "-m", ending_model_path, "-n", "1", "--temp", "0", "--no-perf", "-p")
    warning = "jaxpaged: warning: the prompt begins with <|im_start|>, which the tokenizer adds as well"
    assert warning in here(*flags, "<|im_start|>a").stderr
    assert "warning" not in here(*flags, "a<|im_start|>").stderr


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_what_a_terminal_cannot_show_is_replaced(jaxpaged, model_path, encoding):
    flags = ("generate", "-m", model_path, "-p", "x = '😀'", "-n", "0", "--temp", "0", "--no-perf")
    done = jaxpaged(*flags, PYTHONIOENCODING=encoding)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert done.stdout.startswith("x = '")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is always full")
@pytest.mark.parametrize("command", [["--version"], ["generate", "--help"], ["devices"]])
def test_a_full_disk_is_one_line(environment, command):
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "jaxpaged.app.cli", *command],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
    assert process.returncode == 1
    assert process.stderr == "jaxpaged: error: output: No space left on device\n"


def test_without_a_home_nothing_is_cached(monkeypatch, capsys):
    def homeless(*_args, **_kwargs):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr(platformdirs, "user_cache_dir", homeless)
    for name in ("JAXPAGED_CACHE", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    app_environment.prepare(None)
    assert capsys.readouterr().err == (
        "jaxpaged: warning: no compilation cache, every start compiles: no home folder; JAXPAGED_CACHE names a "
        "cache folder\n"
    )
