"""``-hf user/repo[:quant]`` from the command line."""

from __future__ import annotations

import pytest
from hub_server import serving

pytestmark = pytest.mark.slow


def test_a_model_of_the_hub_is_downloaded_once(jaxpaged, model_path, tmp_path):
    prompt = ("-p", "def f(x):", "-n", "4", "--temp", "0", "--ignore-eos")
    with serving() as hub:
        hub.repos["u/r"] = {"m-Q8_0.gguf": model_path.read_bytes(), "m-F16.gguf": b"other"}
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}

        first = jaxpaged("generate", "-hf", "u/r:q8_0", *prompt, **variables)
        assert first.returncode == 0, first.stderr
        assert first.stdout.startswith("def f(x):") and len(first.stdout) > len("def f(x):\n")

        unknown_quant = jaxpaged("generate", "-hf", "u/r:Q2_K", *prompt, **variables)
        unknown_repo = jaxpaged("generate", "-hf", "u/none", *prompt, **variables)
    for refused, said in (
        (unknown_quant, "u/r has no GGUF file of quant 'Q2_K'; it has m-F16.gguf, m-Q8_0.gguf"),
        (unknown_repo, f"there is no model u/none at {hub.endpoint}; if it is private, set HF_TOKEN"),
    ):
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr == f"jaxpaged: error: {said}\n"

    for flags in ((), ("--offline",)):  # nobody answers by now
        again = jaxpaged("generate", "-hf", "u/r", *flags, *prompt, **variables)
        assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr
