"""The Python of README and of the library's pages runs, and prints what it says; README's step is fast."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__, "../../..").resolve()
BLOCKS = {
    page: re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    for page in ("README.md", "docs/guides/library.md", "docs/guides/your_model.md")
}


@pytest.mark.parametrize("page", BLOCKS)
def test_python_blocks_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks of a page are one program."""
    namespace: dict[str, object] = {}
    for block in BLOCKS[page]:
        exec(compile(block, page, "exec"), namespace)
    printed = capsys.readouterr().out.splitlines()
    assert printed
    promised = re.findall(r"print\(.*\)\s+# (.*)", "\n".join(BLOCKS[page]))
    assert [line for line in printed if line in promised] == promised


def test_the_readmes_step_updates_the_pool_in_place() -> None:
    """Every page array of the compiled step is an output that aliases its input."""
    namespace: dict[str, object] = {}
    exec(compile(BLOCKS["README.md"][0], "README.md", "exec"), namespace)
    step, cache, q, k, v = (namespace[name] for name in ("step", "cache", "q", "k", "v"))
    compiled = step.lower(cache, jnp.array([3, 0, 1, 0]), q, k, v).compile()  # type: ignore[attr-defined]
    pools = sum(x.nbytes for x in jax.tree.leaves((cache.k_pages, cache.v_pages)))  # type: ignore[attr-defined]
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pools > memory.temp_size_in_bytes
