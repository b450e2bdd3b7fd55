"""The notebooks run without an error or a warning and draw; pages made of them have their pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # the libraries are in the extra `docs`

DOCS = Path(__file__).parents[2] / "docs"
SCRIPTS = sorted((DOCS / "notebooks").glob("*.py"))
TOY = """# %% [markdown]
# # A title

# %%
print("out" + "put")

# %% tags=["remove-input"]
from matplotlib import pyplot

pyplot.plot([0, 1])
pyplot.show()
"""


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def pictures(notebook: Any) -> list[Any]:
    kinds = {"image/png", "image/svg+xml"}
    return [output for output in outputs(notebook) if kinds & output.get("data", {}).keys()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_notebook_runs(script: Path) -> None:
    from execute_notebooks import execute

    notebook = execute(script)
    assert [output.text for output in outputs(notebook) if output.get("name") == "stderr"] == []
    assert pictures(notebook)


def test_a_page_has_text_output_and_picture_and_no_code_of_the_picture(tmp_path: Path) -> None:
    from execute_notebooks import execute, write

    script = tmp_path / "toy.py"
    script.write_text(TOY)
    write(execute(script), script)
    page = (tmp_path / "toy.md").read_text()
    assert "# A title" in page and "output" in page and "pyplot" not in page
    (picture,) = (tmp_path / "toy_files").iterdir()
    assert f"(toy_files/{picture.name})" in page
    assert "pyplot.plot" in (tmp_path / "toy.ipynb").read_text()


def test_a_cell_that_raises_is_an_error(tmp_path: Path) -> None:
    from execute_notebooks import execute
    from nbclient.exceptions import CellExecutionError

    script = tmp_path / "toy.py"
    script.write_text(TOY + "\n# %%\nassert not pyplot\n")
    with pytest.raises(CellExecutionError, match="assert not pyplot"):
        execute(script)
