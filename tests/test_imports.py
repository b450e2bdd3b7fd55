"""`import jaxpaged` needs jax and numpy alone, and imports neither before they are used."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import jaxpaged

WITHOUT_THE_REST = """
import sys

OUTSIDE = {
    "click", "fastapi", "flax", "gguf", "httpx", "huggingface_hub", "jinja2", "jaxpaged_model", "numba", "optax",
    "platformdirs", "prometheus_client", "pydantic", "rich", "safetensors", "starlette", "tokenizers",
    "torch", "transformers", "typer", "uvicorn",
}


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OUTSIDE:
            raise ModuleNotFoundError(f"{name} is absent", name=name)


sys.meta_path.insert(0, Absent())
import jaxpaged

for name in jaxpaged.__all__:
    getattr(jaxpaged, name)
"""

LAZY = """
import sys

import jaxpaged

assert set(jaxpaged.__all__) <= set(dir(jaxpaged))
assert not hasattr(jaxpaged, "nonsense")
assert not {"jax", "numpy"} & set(sys.modules), "import jaxpaged imports JAX"
assert jaxpaged.pages.allocator.PageAllocator is jaxpaged.PageAllocator
assert "jax" in sys.modules and "jaxpaged.generation.loop" not in sys.modules
from jaxpaged import *
import jaxpaged.generation.loop

assert generate is jaxpaged.generate is jaxpaged.generation.loop.generate
"""


@pytest.mark.parametrize("script", [WITHOUT_THE_REST, LAZY], ids=["without the rest", "lazy"])
def test_the_core_imports(script: str) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_all_names_what_there_is() -> None:
    assert len(set(jaxpaged.__all__)) == len(jaxpaged.__all__)
    for name in jaxpaged.__all__:
        assert hasattr(jaxpaged, name)
    rooms = {module.name for module in pkgutil.iter_modules(jaxpaged.__path__)}
    assert not rooms & set(jaxpaged.__all__), "importing the room would hide the name"


def test_type_checkers_see_the_names_that_there_are() -> None:
    tree = ast.parse(Path(jaxpaged.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {node.module: {alias.name for alias in node.names} for node in imports}
    assert seen == {f"jaxpaged.{room}": set(names) for room, names in jaxpaged._ROOMS.items()}
    assert set().union(*seen.values(), {"__version__"}) == set(jaxpaged.__all__)
