"""Every block of README and docs runs, is parsed by the program that it calls, or is named here with a reason."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import tomllib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from blocks import PAGES, ROOT, Block, blocks, commands, text_of

from jaxpaged.app.commands import application
from jaxpaged.app.server.application import create_application
from jaxpaged.app.server.options import ServeOptions
from jaxpaged.app.server.state import ServerState
from tpu_scripts import common

RUN_ELSEWHERE = {
    (
        "docs/guides/scaling.md",
        "from jaxpaged import PagedKVCache, generate",
    ): "tests/sharding/test_scaling_page.py",
    ("docs/internals/conformance.md", "import jax\n"): "tests/testing/test_conformance_docs.py",
    ("docs/guides/snapshots.md", "import jax.numpy as jnp"): "tests/storage/test_snapshots.py",
    ("docs/guides/serving.md", "from openai import OpenAI"): "tests/app/server/test_agents.py",
    ("docs/guides/serving.md", "from langchain_openai"): "tests/app/server/test_agents.py",
    ("docs/getting_started.md", "from openai import OpenAI"): "tests/app/server/test_agents.py",
}
"""The test that runs a block: by page and the block's first words."""
NOT_RUN = {
    (
        "docs/guides/weights.md",
        "from jaxpaged_model import load_model",
    ): "a fragment: any file, tokens of any step",
    ("docs/internals/kernels_tpu.md", "indices, lengths"): "a fragment: JAX's kernel needs a TPU",
}
SHOWN = {"text": "output, or a drawing", "diff": "applied by tests/testing/test_conformance_docs.py"}
PARSED: dict[str, Callable[[str], object]] = {"sh": str, "python": ast.parse, "toml": tomllib.loads}
FOREIGN = {
    "git": "the reader's repository",
    "cd": "the shell's",
    ".": "the shell's",
    "uv": "another installer",
    "claude": "an agent; tests/app/server/test_agents.py starts it",
}
"""Programs whose arguments nothing here can check."""


def named(block: Block) -> str | None:
    """The test or the reason that a block is named with, if it is."""
    (found, *more) = [
        *(
            reason
            for (page, start), reason in (RUN_ELSEWHERE | NOT_RUN).items()
            if block.page == page and block.code.startswith(start)
        ),
        None,
    ]
    assert len(more) <= 1
    return found


RUN_HERE = {
    page: found
    for page in PAGES
    if (found := [block for block in blocks(page, "python") if named(block) is None])
}


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_category(page: str) -> None:
    for block in blocks(page):
        assert block.language in SHOWN or block.language in PARSED, (page, block.language, block.code[:60])
        PARSED.get(block.language, str)(block.code)
    outside = text_of(page).replace("```", "")
    assert not re.search(r"^\n {4}(python|jaxpaged|make|pip) ", outside, re.M), "an indented block"


def test_every_name_has_its_block() -> None:
    python = [block for page in PAGES for block in blocks(page, "python")]
    for page, start in RUN_ELSEWHERE | NOT_RUN:
        assert any(block.page == page and block.code.startswith(start) for block in python), (page, start)
    for test in RUN_ELSEWHERE.values():
        assert (ROOT / test).exists()


@pytest.mark.parametrize("page", RUN_HERE)
def test_python_blocks_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks of a page are one program, and print what they say."""
    namespace: dict[str, object] = {}
    for block in RUN_HERE[page]:
        exec(compile(block.code, page, "exec"), namespace)
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"print\(.*\)\s+# (.*)", "\n".join(block.code for block in RUN_HERE[page]))
    assert [line for line in printed if line in promised] == promised


def test_the_readmes_step_updates_the_pool_in_place() -> None:
    """Every page array of the compiled step is an output that aliases its input."""
    namespace: dict[str, object] = {}
    exec(compile(RUN_HERE["README.md"][0].code, "README.md", "exec"), namespace)
    step, cache, q, k, v = (namespace[name] for name in ("step", "cache", "q", "k", "v"))
    compiled = step.lower(cache, jnp.array([3, 0, 1, 0]), q, k, v).compile()  # type: ignore[attr-defined]
    pools = sum(x.nbytes for x in jax.tree.leaves((cache.k_pages, cache.v_pages)))  # type: ignore[attr-defined]
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pools > memory.temp_size_in_bytes


# Commands


class Accepted(Exception):
    """The arguments of a script are right; it goes no further."""


def accepts_jaxpaged(words: list[str]) -> None:
    name, *flags = words
    if "--help" in words:
        assert name in ("COMMAND", "--help", *application.commands)
    elif words != ["--version"]:
        application.commands[name].make_context(name, flags)


def accepts_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    what, *rest = words
    if what == "-c":
        ast.parse(rest[0])
    elif rest == ["tpu_scripts.NAME"]:
        assert what == "-m"
    elif what == "-m" and rest[0].startswith("tpu_scripts."):
        module = importlib.import_module(rest[0])
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"{rest[0]}.__main__")
        with monkeypatch.context() as patch:
            patch.setattr(common.Parser, "parse", lambda self: refuse_nothing(self.parse_args(rest[1:])))
            with pytest.raises(Accepted):
                module.main()
    elif what == "-m":
        assert rest[0] in ("venv", "pytest", "tpu_scripts")
        assert all((ROOT / path).exists() for path in rest[1:] if path.endswith(".py"))
    else:
        source = (ROOT / what).read_text(encoding="utf-8")
        for flag in (word.partition("=")[0] for word in rest if word.startswith("--")):
            assert f'"{flag}"' in source or what.endswith("ray_serve.py"), flag


def refuse_nothing(_: argparse.Namespace) -> None:
    raise Accepted


def accepts_make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {word for word in words if "=" not in word} <= {*targets}, words


def accepts_pip(words: list[str]) -> None:
    assert words[0] == "install"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words[1:]:
        if match := re.fullmatch(r"(?:\.|jaxpaged)\[(.*)\]", word):
            assert {*match[1].split(",")} <= {*project["optional-dependencies"]}, word


def accepts_curl(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    for flag in ("-H", "-d"):
        parser.add_argument(flag)
    parser.add_argument("-i", action="store_true")
    parser.add_argument("url")
    args = parser.parse_args(words)
    paths = create_application(ServerState(ServeOptions())).openapi()["paths"]
    assert re.sub(r"^(http://)?[\w.]+:\d+", "", args.url) in paths
    assert isinstance(json.loads(args.d or "{}"), dict)


def accept(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks a command with the parser of the program that it calls."""
    program, *rest = words
    program = re.sub(r"^.*/bin/|(?<=python)3[.\d]*$", "", program)
    if program == "jaxpaged":
        accepts_jaxpaged(rest)
    elif program == "python":
        accepts_python(rest, monkeypatch)
    elif program in ("srun", "gcloud"):  # start another one
        at = rest.index("jaxpaged") if program == "srun" else rest.index("--command") + 1
        accept(rest[at:] if program == "srun" else rest[at].split(), monkeypatch)
    elif program in ("make", "pip", "curl"):
        {"make": accepts_make, "pip": accepts_pip, "curl": accepts_curl}[program](rest)
    else:
        assert program in FOREIGN, f"no parser for {program!r}, and no reason in FOREIGN"


COMMANDS = {(page, " ".join(words)): words for page in PAGES for words in commands(page)}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_is_accepted(command: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    accept(COMMANDS[command], monkeypatch)
