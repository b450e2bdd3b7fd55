"""`import jaxpaged` needs jax and numpy alone."""

from __future__ import annotations

import subprocess
import sys

import jaxpaged

SCRIPT = """
import sys

OUTSIDE = {
    "click", "fastapi", "flax", "gguf", "httpx", "huggingface_hub", "jinja2", "model", "numba", "optax",
    "platformdirs", "prometheus_client", "pydantic", "rich", "safetensors", "starlette", "tokenizers",
    "torch", "transformers", "typer", "uvicorn",
}


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OUTSIDE:
            raise ModuleNotFoundError(f"{name} is absent", name=name)


sys.meta_path.insert(0, Absent())
import jaxpaged

for name in jaxpaged.__all__:
    getattr(jaxpaged, name)
"""


def test_the_core_imports_without_flax_numba_model_and_web_packages() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_all_names_what_there_is() -> None:
    assert len(set(jaxpaged.__all__)) == len(jaxpaged.__all__)
    for name in jaxpaged.__all__:
        assert hasattr(jaxpaged, name)
