"""The README's Python runs, and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

BLOCKS = re.findall(
    r"```python\n(.*?)```", Path(__file__, "../../../README.md").resolve().read_text(), re.DOTALL
)


@pytest.mark.parametrize("code", BLOCKS, ids=["the cache in your own jit", "a whole generation"])
def test_a_python_block_runs(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.strip()
    for promised in re.findall(r"print\(.*\)\s+# (.*)", code):
        assert promised in printed
