"""The flags of ``jaxpaged serve``."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from jaxpaged_model import tiny
from jaxpaged_model.checkpoint.loading import load_model

from jaxpaged.app.commands import application
from jaxpaged.app.errors import InputError
from jaxpaged.app.server import serve
from jaxpaged.app.server.building import build_engine
from jaxpaged.app.server.options import ServeOptions, all_keys, parse_bytes, parse_memory
from jaxpaged.engine import EngineRequest, RefusedError


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch):
    """Parses a command line: the options, or the error line."""
    found: list[ServeOptions] = []
    of_flags = ServeOptions.of_flags

    def stop(**flags):
        found.append(of_flags(**flags | {"environment": {}}))
        raise InputError("stopped")

    monkeypatch.setattr(ServeOptions, "of_flags", stop)

    def parse(*args: str):
        found.clear()
        result = CliRunner().invoke(application, ["serve", *args])
        return found[0] if found else result.output

    return parse


def test_the_command_and_the_class_have_one_set_of_defaults(parsed):
    assert parsed() == ServeOptions()


def test_flags_as_they_are_typed(parsed):
    o = parsed(
        "-np",
        "4",
        "-c",
        "2048",
        "-b",
        "256",
        "-ub",
        "64",
        "--port",
        "0",
        "--api_key",
        "key-number-1,key-number-2",
        "--api-key",
        "key-number-3",
        "-a",
        "one,two",
        "--no-webui",
        "--no-cache-prompt",
        "--swap-space",
        "0",
        "--kv-memory",
        "50%",
        "-ctk",
        "q8_0",
        "--no-slots",
        "--temp",
        "0",
        "--jinja",
        "-fa",
        "on",
        "-ngl",
        "99",
        "--threads-http",
        "4",
        "-sps",
        "0.5",
        "-kvu",
        "-cb",
        "--cache-reuse",
        "256",
        "--sleep-idle-seconds",
        "60",
    )
    assert (o.parallel, o.ctx_size, o.step_tokens, o.port) == (4, 2048, 64, 0)
    assert o.api_keys == ("key-number-1", "key-number-2", "key-number-3") and o.alias == ("one", "two")
    assert not o.webui and not o.prefix_cache and not o.slots and o.swap_space == 0
    assert o.sleep_idle_seconds == 60
    assert o.kv_memory == 0.5 and o.cache_type_k == "q8_0" and o.temp == 0
    o = parsed("--models_dir", "models", "--models-max", "2", "-m", "a.gguf")
    assert (o.models_dir, o.models_max, o.model) == (Path("models"), 2, Path("a.gguf"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5", 0.5),
        ("50%", 0.5),
        ("1", 1.0),
        ("2G", 2**31),
        ("512M", 2**29),
        ("1.5GiB", 3 * 2**29),
        ("4194304", 2**22),
    ],
)
def test_memory(text, expected):
    assert parse_memory(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("0", 0), ("1k", 1024), ("8MB", 2**23), ("1 G", 2**30)])
def test_bytes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "args",
    [
        ["--kv-memory", "0"],
        ["--kv-memory", "150%"],
        ["--kv-memory", "-1"],
        ["--kv-memory", "nan"],
        ["--kv-memory", "5"],
        ["--kv-memory", "much"],
        ["--kv-memory", "1G", "--kv-pages", "8"],
        ["--swap-space", "-1"],
        ["-np", "0"],
        ["--port", "70000"],
        ["--api-key", "short"],
        ["--api-key", ""],
        ["--api-key-file", "/nowhere/keys"],
        ["--slot-save-path", "/nowhere"],
        ["--no-kv-cache-paged", "--kv-pages", "4"],
        ["--decode-steps", "0"],
        ["--no-kv-cache-paged", "--context-shift"],
        ["--temp", "nan"],
        ["--max-queue", "0"],
        ["--sleep-idle-seconds", "0"],
        ["--sleep-idle-seconds", "-2"],
        ["--models-max", "2"],
        ["--models-dir", "/nowhere"],
        ["--models-dir", "/nowhere", "-a", "name"],
        ["--models-dir", "/nowhere", "-hf", "user/repo"],
        ["--models-dir", str(tiny.PATH.parent), "-m", "another.gguf"],
        ["--nonsense"],
    ],
)
def test_flags_that_mean_nothing_are_one_line_and_status_2(args):
    result = CliRunner().invoke(application, ["serve", *args])
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1 and result.output.startswith("jaxpaged: error: ")


def test_keys_of_a_file_and_of_the_environment(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text("# ours\nkey-of-file\n\nkey-number-2\n")
    keys = all_keys(
        ("key-number-1",), file, {"JAXPAGED_API_KEY": "key-number-2", "LLAMA_API_KEY": "key-number-3"}
    )
    assert keys == ("key-number-1", "key-of-file", "key-number-2", "key-number-3")
    file.write_text("# nothing\n")
    with pytest.raises(InputError, match="no key"):
        all_keys((), file, {})


def test_a_port_that_is_taken_is_one_line():
    from jaxpaged.app.server.serve import run

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        with pytest.raises(InputError, match="cannot listen on"):
            run(ServeOptions(port=sock.getsockname()[1]))


def test_help_needs_neither_jax_nor_a_web_framework():
    code = (
        "import sys; from click.testing import CliRunner; from jaxpaged.app.commands import application; "
        "r = CliRunner().invoke(application, ['serve', '--help']); assert r.exit_code == 0, r.output; "
        "assert 'Examples' in r.output; "
        "print([m for m in ('jax', 'fastapi', 'pydantic', 'uvicorn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("path", "name"), [(".", "Model.v1"), ("tiny-q8_0.gguf", "tiny-q8_0"), ("..", "models")]
)
def test_a_model_is_named_after_its_file_or_folder(tmp_path, monkeypatch, path, name):
    folder = tmp_path / "models" / "Model.v1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    loaded = SimpleNamespace(
        path=Path(path), tokenizer=SimpleNamespace(chat_template="x"), pooling=None, reranker=None,
        config=SimpleNamespace(context_length=1, hidden_size=1),
        description="", size_bytes=0, fingerprint="",
    )  # fmt: skip
    assert serve._served(ServeOptions(), SimpleNamespace(loaded=loaded)).names == (name,)


def test_ids_between_the_tokenizers_and_a_padded_models_are_refused():
    loaded = load_model(tiny.PATH)
    size = loaded.tokenizer.vocab_size
    padded = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, vocab_size=size + 60))
    options = ServeOptions(ctx_size=64, parallel=1, kv_pages=4, log=False)
    engine = build_engine(options, SimpleNamespace(loaded=padded, dtype="f32", call=None))
    with pytest.raises(RefusedError, match=f"token {size} is not one of the model's, 0 to {size - 1}"):
        engine.check(EngineRequest("a", (size,)))
