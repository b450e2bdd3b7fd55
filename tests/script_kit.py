"""Helpers that run a script of tpu_scripts/ in the tests' process and parse the tables that it prints."""

from __future__ import annotations

import importlib
import sys


def run(monkeypatch, script, *arguments):
    """Exit status of a script, such as "bench.generate", run in this process."""
    module = importlib.import_module(f"tpu_scripts.{script}")
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"tpu_scripts.{script}.__main__")
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    try:
        return module.main() or 0
    except SystemExit as end:
        return end.code


def table(text):
    """Rows of a Markdown table, each a dictionary of cells by column head."""
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    head, _, *rows = lines
    return [dict(zip(head, row, strict=True)) for row in rows]
