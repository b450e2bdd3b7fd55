"""Prints the scripts of this folder and how to run them: ``python -m tpu_scripts``."""

import ast
from pathlib import Path

for path in sorted(Path(__file__).parent.glob("*/*.py")):
    module = ".".join(path.relative_to(Path(__file__).parents[1]).with_suffix("").parts)
    text = path.read_text(encoding="utf-8")
    if "\ndef main() ->" in text:
        name = module.removesuffix(".__main__")
        print(f"python -m {name:43} {(ast.get_docstring(ast.parse(text)) or '').splitlines()[0]}")
print("\n--help explains each")
