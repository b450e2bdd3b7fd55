"""Runs the notebooks of docs/notebooks and writes them with their output, for the documentation site.

    python docs/execute_notebooks.py                  # all of them; make docs runs those that changed
    python docs/execute_notebooks.py pages meshes

A notebook is a Python script in jupytext's percent format, which Jupyter opens where jupytext is installed. Beside
each, its results are written: Markdown with the pictures in ``NAME_files/``, for a site, without the code of cells
tagged ``remove-input``; and ``NAME.ipynb``, for a reader who wants to run it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import MarkdownExporter
from nbconvert.writers import FilesWriter
from traitlets.config import Config

FOLDER = Path(__file__).with_name("notebooks")
SECONDS = 600
"""Maximum time of a cell."""


def execute(script: Path) -> Any:
    """A notebook with its outputs, run in a new kernel of this Python, in the script's folder.

    Raises:
      CellExecutionError: a cell raised; names the cell and has its traceback.
    """
    notebook = jupytext.read(script)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=SECONDS,
        resources={"metadata": {"path": script.parent}},
        extra_arguments=[
            "--IPKernelApp.log_level=40"
        ],  # below errors, it says that loopback is not encrypted
    )
    return client.execute()


def write(notebook: Any, script: Path) -> None:
    """Writes ``.ipynb`` and ``.md`` beside the script."""
    nbformat.write(notebook, script.with_suffix(".ipynb"))
    config = Config(
        {
            "FilesWriter": {"build_directory": str(script.parent)},
            "TagRemovePreprocessor": {"enabled": True, "remove_input_tags": {"remove-input"}},
        }
    )
    resources = {"output_files_dir": f"{script.stem}_files", "unique_key": script.stem}
    body, resources = MarkdownExporter(config=config).from_notebook_node(notebook, resources)
    body += f"\nThis page is a notebook: [{script.stem}.ipynb]({script.stem}.ipynb).\n"
    FilesWriter(config=config).write(body, resources, notebook_name=script.stem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = sorted(script.stem for script in FOLDER.glob("*.py"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(names)}")
    chosen = parser.parse_args().names
    if unknown := sorted({*chosen} - {*names}):
        parser.error(f"no notebook {unknown[0]!r}; there are {', '.join(names)}")
    for name in chosen or names:
        script, begun = FOLDER / f"{name}.py", time.monotonic()
        try:
            write(execute(script), script)
        except CellExecutionError as error:
            sys.exit(f"{script}: {error}")
        print(f"{name}: {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
