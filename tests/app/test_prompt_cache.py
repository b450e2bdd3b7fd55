"""The laws of --prompt-cache: the same text with and without the file, fewer tokens to compute, no bad file taken."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jaxpaged_model.checkpoint.loading import load_model

from jaxpaged import read_snapshot

pytestmark = pytest.mark.slow

PROMPT = "def f(x):\n    return"
GREEDY = ("--temp", "0", "--ignore-eos", "--page-size", "8", "-n", "12", "-e", "--no-warmup")


@pytest.fixture(scope="module")
def generate(here: Callable, model_path: Path) -> Callable[..., tuple[dict[str, Any], str]]:
    """The object of ``--json``, and the line about the prompt cache."""

    def run(*arguments: str | Path, prompt: str = PROMPT) -> tuple[dict[str, Any], str]:
        done = here("generate", "-m", model_path, "-p", prompt, *GREEDY, "--json", *arguments)
        assert done.exit_code == 0, done.stderr
        said = re.findall(r"jaxpaged: prompt cache: (.*)", done.stderr)
        return json.loads(done.stdout), said[0] if said else ""

    return run


@pytest.fixture(scope="module")
def plain(generate: Callable) -> dict[str, Any]:
    return generate()[0]


@pytest.fixture(scope="module")
def kept(generate: Callable, plain: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kept") / "prompt.kv"
    result, said = generate("--prompt-cache", path)
    assert said == f"{path} does not exist yet; it will be made"
    assert result["tokens"] == plain["tokens"]
    return path


@pytest.fixture
def held(model_path: Path) -> Callable[[Path], list[int]]:
    """The token ids in a file."""
    fingerprint = load_model(model_path).fingerprint
    return lambda path: read_snapshot(path, fingerprint=fingerprint).token_ids[0]


def test_the_file_has_the_prompt_and_gives_the_same_text_for_less(generate, plain, kept, held) -> None:
    assert held(kept) == plain["prompt_tokens"]
    before = kept.read_bytes()
    again, said = generate("--prompt-cache", kept)
    length = len(PROMPT)
    assert said == f"{length - 1} of {length} prompt tokens reused from {kept}"
    assert again["tokens"] == plain["tokens"] and again["prompt_tokens"] == plain["prompt_tokens"]
    assert (plain["timings"]["prompt_n"], again["timings"]["prompt_n"]) == (length, 1)
    assert kept.read_bytes() == before, "nothing new was read, and the file was written"


def test_other_pages_and_other_endings_of_the_prompt(generate, plain, kept, held, tmp_path) -> None:
    path = tmp_path / "copy.kv"
    # Lengths that run the programs of `plain` and `kept`, which are compiled already.
    for prompt, shared in (
        (PROMPT + " x", 20),
        (PROMPT[:12] + "pass # f", 12),
        ("class Stack:\n    pass", 0),
    ):
        path.write_bytes(kept.read_bytes())
        expected, _ = generate("-n", "10", prompt=prompt)
        result, said = generate("-n", "10", "--prompt-cache", path, prompt=prompt)
        assert said == f"{shared} of {len(prompt)} prompt tokens reused from {path}"
        assert result["tokens"] == expected["tokens"]
        assert held(path) == list(prompt.encode())
    assert generate("--prompt-cache", kept, "--page-size", "16")[0]["tokens"] == plain["tokens"]


def test_read_only_never_writes_and_all_writes_what_was_generated(
    generate, plain, kept, held, tmp_path
) -> None:
    path = tmp_path / "copy.kv"
    path.write_bytes(kept.read_bytes())
    before = path.read_bytes()
    for flags in (["--prompt-cache-ro"], ["--prompt-cache-ro", "--prompt-cache-all"]):
        generate("--prompt-cache", path, *flags, "-n", "10", prompt=PROMPT + " 7")
        assert path.read_bytes() == before
    missing = tmp_path / "missing.kv"
    assert generate("--prompt-cache", missing, "--prompt-cache-ro")[1] == f"{missing} does not exist yet"
    assert not missing.exists()
    generate("--prompt-cache", path, "--prompt-cache-all")
    assert held(path) == plain["prompt_tokens"] + plain["tokens"][:-1]
    # A shorter prompt of the same beginning leaves the longer file alone.
    before = path.read_bytes()
    generate("--prompt-cache", path)
    assert path.read_bytes() == before


def test_samples_share_what_was_reused(generate, kept) -> None:
    flags = ("-np", "3", "--temp", "2", "-s", "5", "--repeat-penalty", "1.3", "--repeat-last-n", "16")
    plain, _ = generate(*flags)
    again, said = generate(*flags, "--prompt-cache", kept)
    assert said.startswith(f"{len(PROMPT) - 1} of ")
    assert [c["tokens"] for c in again["choices"]] == [c["tokens"] for c in plain["choices"]]


def test_a_chat_begins_with_what_an_earlier_one_kept(generate, tmp_path, held) -> None:
    path = tmp_path / "chat.kv"
    flags = ("-cnv", "--prompt-cache", path)
    first, _ = generate(*flags, "--prompt-cache-all", "--page-map", tmp_path / "chat.html", prompt="hello")
    assert "12 tokens generated" in (tmp_path / "chat.html").read_text()
    assert held(path) == first["prompt_tokens"] + first["tokens"][:-1]
    again, said = generate(*flags, prompt="hello")
    assert again["tokens"] == first["tokens"]
    length = len(first["prompt_tokens"])
    assert said == f"{length - 1} of {length} prompt tokens reused from {path}"


def test_an_empty_file_is_none_yet(generate, plain, held, tmp_path) -> None:
    path = tmp_path / "empty.kv"
    path.touch()
    assert generate("--prompt-cache", path)[0]["tokens"] == plain["tokens"]
    assert held(path) == plain["prompt_tokens"]


def test_a_text_whose_beginning_was_forgotten_is_not_saved(generate, held, tmp_path) -> None:
    path = tmp_path / "shifted.kv"
    generate("--prompt-cache", path, "--prompt-cache-all", "--context-shift", "-c", "24", "--keep", "4")
    assert not path.exists()
    # The prompt alone is saved before anything is forgotten.
    generate("--prompt-cache", path, "--context-shift", "-c", "24", "--keep", "4")
    assert held(path) == list(PROMPT.encode())


def test_files_that_cannot_be_used_are_one_line(refused, model_path, kept, tmp_path) -> None:
    flags = ("generate", "-m", model_path, "-p", PROMPT, *GREEDY)
    path = tmp_path / "bad.kv"
    data = kept.read_bytes()
    for content in (data[:-1], data[:100], data[:-9] + b"x" + data[-8:], b"GGUF", b"text"):
        path.write_bytes(content)
        assert f"{path.name}: " in refused(*flags, "--prompt-cache", path)
        assert path.read_bytes() == content
    assert "the cache has 1 layers" in refused(*flags, "--prompt-cache", kept, "-ctk", "f16")
    assert "made with another model" in refused("generate", "-p", PROMPT, "--prompt-cache", kept)
    assert "there is no folder" in refused(*flags, "--prompt-cache", tmp_path / "nowhere" / "x.kv")
    assert "--prompt-cache" in refused(*flags, "--prompt-cache", tmp_path)
    assert "asks for none" in refused(*flags, "--prompt-cache", kept, "--no-kv-cache-paged")
    assert "need --prompt-cache FILE" in refused(*flags, "--prompt-cache-all")
    assert "need --prompt-cache FILE" in refused(*flags, "--prompt-cache-ro")
