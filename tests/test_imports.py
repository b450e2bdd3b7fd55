"""`import jaxpaged` needs jax and numpy alone, and imports neither before they are used."""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
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
assert jaxpaged.PagedKVCache is jaxpaged.cache.paged.PagedKVCache
assert "jax" in sys.modules and "jaxpaged.generation.loop" not in sys.modules
from jaxpaged import *
import jaxpaged.generation.api

assert generate is jaxpaged.generate is jaxpaged.generation.api.generate
"""

KERNELS = """
import sys
from pathlib import Path

from jaxpaged.native.compile_kernel import load

kernels = (
    ("jaxpaged/attention/cpu/kernel.py", "jaxpaged.attention.cpu.kernel"),
    ("model/jaxpaged_model/quantized/cpu_kernel.py", "jaxpaged_model.quantized.cpu_kernel_Q4_1__rounded"),
)
for file, module in kernels:
    assert callable(load(Path(file), module).handler)
assert "jax" not in sys.modules, "a process that compiles a kernel imports JAX"
"""


@pytest.mark.parametrize(
    "script", [WITHOUT_THE_REST, LAZY, KERNELS], ids=["without the rest", "lazy", "kernels"]
)
def test_the_core_imports(script: str) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=Path(jaxpaged.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_all_names_what_there_is() -> None:
    assert len(set(jaxpaged.__all__)) == len(jaxpaged.__all__)
    for name in jaxpaged.__all__:
        assert hasattr(jaxpaged, name)
    packages = {module.name for module in pkgutil.iter_modules(jaxpaged.__path__)}
    assert not packages & set(jaxpaged.__all__), "importing the package would hide the name"


def test_type_checkers_see_the_names_that_there_are() -> None:
    tree = ast.parse(Path(jaxpaged.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert seen == {name: f"jaxpaged.{module}" for name, module in jaxpaged._MODULE_OF.items()}
    assert {*seen, "__version__"} == set(jaxpaged.__all__)


BANNED = re.compile(r"(What|Whether|Of|How|Who)\b")


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring of a module, those of attributes included."""
    for node in ast.walk(tree):
        for statement in getattr(node, "body", ()) if not isinstance(node, ast.IfExp | ast.Lambda) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                yield statement.lineno, str(statement.value.value).strip()


def test_docstrings_begin_with_a_noun_or_a_verb() -> None:
    """After the shape, if there is one: "i32[S]: tokens of each sequence"."""
    root = Path(jaxpaged.__file__).parents[1]
    wrong = [
        f"{path.relative_to(root)}:{line}: {text[:60]!r}"
        for folder in ("jaxpaged", "model", "tpu_scripts")
        for path in sorted((root / folder).rglob("*.py"))
        for line, text in docstrings(ast.parse(path.read_text(encoding="utf-8")))
        if BANNED.match(re.sub(r"^\w+\[[^\]]*\]:?\s*", "", text))
    ]
    assert not wrong, "\n".join(wrong)
