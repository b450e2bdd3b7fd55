"""Without an extra, a command is refused in one line that names the extra to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

MODEL = "click, flax, gguf, huggingface_hub, jinja2, llguidance, numba, platformdirs, rich, tokenizers"
SERVE = "fastapi, h11, httpx, prometheus_client, pydantic, starlette, uvicorn"
WITHOUT = """
import sys

absent = set("{absent}".split(", "))


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Absent())
{code}
"""


def without(absent: str, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = WITHOUT.format(absent=absent, code=code)
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("absent", "command", "needs"),
    [
        (f"{MODEL}, {SERVE}", "", "'click': pip install 'jaxpaged[model]'"),
        (f"{MODEL}, {SERVE}", "generate -p x", "'click': pip install 'jaxpaged[model]'"),
        (f"{MODEL}, {SERVE}", "serve", "'click': pip install 'jaxpaged[serve]'"),
        ("gguf", "generate -p x", "'gguf': pip install 'jaxpaged[model]'"),
        ("tokenizers", "generate -p x", "'tokenizers': pip install 'jaxpaged[model]'"),
        (SERVE, "serve", "pip install 'jaxpaged[serve]'"),
        (SERVE, "bench-serve --kv-memory 8M", "pip install 'jaxpaged[serve]'"),
    ],
)
def test_a_command_names_the_extra(absent, command, needs):
    done = without(absent, "from jaxpaged.app.cli import main\nmain()", *command.split())
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("jaxpaged: error: this command needs the package '") and line.endswith(needs)


def test_an_import_names_the_extra():
    done = without(MODEL, "from jaxpaged_model import load_model")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: jaxpaged_model needs the package 'gguf': pip install 'jaxpaged[model]'"
    )


def test_a_missing_module_of_its_own_is_an_error_of_the_program():
    done = without("jaxpaged_model", "from jaxpaged.app.cli import main\nmain()", "generate", "-p", "x")
    assert done.returncode == 1 and "Traceback" in done.stderr
