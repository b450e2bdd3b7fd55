"""Scripts of tpu_scripts/, run in the tests' process, and the tables that they print."""

from __future__ import annotations

import importlib
import sys


def run(monkeypatch, script, *arguments):
    """The exit status of a script, run in this process."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
    try:
        return importlib.import_module(f"tpu_scripts.{script}").main() or 0
    except SystemExit as end:
        return end.code


def table(text):
    """The cells of a markdown table, a dictionary a row."""
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    head, _, *rows = lines
    return [dict(zip(head, row, strict=True)) for row in rows]
