"""The wheel has two packages, which a user's own files do not shadow; names are imported lazily."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import jaxpaged_model

ROOT = Path(__file__).parents[2]
LAZY = """
import sys

import jaxpaged_model

assert set(jaxpaged_model.__all__) <= set(dir(jaxpaged_model))
assert not hasattr(jaxpaged_model, "nonsense")
assert not {"jax", "numpy", "flax"} & set(sys.modules), "import jaxpaged_model imports JAX"
from jaxpaged_model.checkpoint import loading

assert loading.load_model is jaxpaged_model.load_model
"""


def test_a_wheel_holds_the_two_packages_and_their_data() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["jaxpaged", "model/jaxpaged_model"]}
    for package in wheel["packages"]:
        folder = ROOT / package
        assert (folder / "py.typed").is_file()
        folders = {path.parent for path in folder.rglob("*.py")}
        assert [path for path in folders if not (path / "__init__.py").is_file()] == []
    assert [path.name for path in (ROOT / "model").iterdir() if path.name != "__pycache__"] == [
        "jaxpaged_model"
    ]


def test_a_users_files_do_not_shadow_the_package(tmp_path: Path) -> None:
    for name in ("model.py", "text.py", "config.py", "checkpoint.py"):
        (tmp_path / name).write_text("raise SystemExit('imported the file of the user')")
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", LAZY],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_type_checkers_see_the_names_that_there_are() -> None:
    tree = ast.parse(Path(jaxpaged_model.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {node.module: {alias.name for alias in node.names} for node in imports}
    assert seen == {f"jaxpaged_model.{name}": set(names) for name, names in jaxpaged_model._MODULES.items()}
    assert sorted(set().union(*seen.values())) == jaxpaged_model.__all__
    for name in jaxpaged_model.__all__:
        assert getattr(jaxpaged_model, name).__module__.startswith("jaxpaged_model.")
