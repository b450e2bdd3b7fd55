"""The Python of docs/guides/scaling.md runs as it stands there, on a smaller mesh."""

from __future__ import annotations

import re
from pathlib import Path

from jaxpaged_model import tiny
from mesh_kit import loaded

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "scaling.md"
TEXTS = ("def f(", "class Stack:", "import os")


def test_the_example_runs():
    (code,) = (
        code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "make_mesh" in code
    )
    assert '"model.gguf"' in code and "tensor=4" in code
    code = code.replace('"model.gguf"', repr(str(tiny.PATH))).replace("tensor=4", "tensor=2")
    tokenizer = loaded("tiny").tokenizer
    names = {"prompts": [tokenizer.encode(text) for text in TEXTS]}
    exec(code, names)
    assert list(names["result"].num_tokens[:3]) == [64, 64, 64]
