"""The Python of README and of the library's page runs, and prints what it says; README's step is fast."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__, "../../..").resolve()
BLOCKS = {
    page: re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)[0]
    for page in ("README.md", "docs/library.md")
}


@pytest.mark.parametrize("page", BLOCKS)
def test_a_python_block_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(BLOCKS[page], page, "exec"), {})
    printed = capsys.readouterr().out
    assert printed.strip()
    for promised in re.findall(r"print\(.*\)\s+# (.*)", BLOCKS[page]):
        assert promised in printed


def test_the_readmes_step_updates_the_pool_in_place() -> None:
    """Every page array of the compiled step is an output that aliases its input."""
    namespace: dict[str, object] = {}
    exec(compile(BLOCKS["README.md"], "README.md", "exec"), namespace)
    step, cache, q, k, v = (namespace[name] for name in ("step", "cache", "q", "k", "v"))
    compiled = step.lower(cache, jnp.array([3, 0, 1, 0]), q, k, v).compile()  # type: ignore[attr-defined]
    pools = sum(x.nbytes for x in jax.tree.leaves((cache.k_pages, cache.v_pages)))  # type: ignore[attr-defined]
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pools > memory.temp_size_in_bytes
