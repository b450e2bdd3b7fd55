"""A model small enough to compile in seconds, and two ways to call the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result

CONTEXT = 128
_FFN = 64
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}<|im_start|>assistant\n"
)

Command = Callable[..., subprocess.CompletedProcess[str]]


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in kept else chr(next(others)) for b in range(256)]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of random weights, a vocabulary of bytes (and ``qz``), a chat template; 2 KV heads of 8."""
    return _write_model(tmp_path_factory.mktemp("model") / "random.gguf", hidden=32, heads=4, kv_heads=2)


@pytest.fixture(scope="session")
def wide_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one KV head of 32, which quantized pages can keep."""
    return _write_model(tmp_path_factory.mktemp("model") / "wide.gguf", hidden=64, heads=2, kv_heads=1)


@pytest.fixture(scope="session")
def ending_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose likeliest token is always the end of the text; texts begin with ``<|im_start|>``."""
    path = tmp_path_factory.mktemp("model") / "ending.gguf"
    return _write_model(path, hidden=32, heads=4, kv_heads=2, ends=True)


@pytest.fixture(scope="session")
def nan_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights hold NaN."""
    return _write_model(
        tmp_path_factory.mktemp("model") / "nan.gguf", hidden=32, heads=4, kv_heads=2, norm=np.nan
    )


def _write_model(
    path: Path, *, hidden: int, heads: int, kv_heads: int, ends: bool = False, norm: float = 1.0
) -> Path:
    rng = np.random.default_rng(0)
    tokens = [*_byte_characters(), "<|endoftext|>", "<|im_start|>", "qz"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(_FFN)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_token_merges(["q z"])
    writer.add_eos_token_id(256)
    if ends:
        writer.add_bos_token_id(257)
        writer.add_add_bos_token(True)
    writer.add_chat_template(_CHATML)
    kv = hidden // heads * kv_heads
    shapes = {
        "token_embd": (len(tokens), hidden),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (kv, hidden),
        "blk.0.attn_v": (kv, hidden),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (_FFN, hidden),
        "blk.0.ffn_up": (_FFN, hidden),
        "blk.0.ffn_down": (hidden, _FFN),
    }
    for name, shape in shapes.items():
        weights = (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        if ends and name == "token_embd":
            weights[:, 0] = 3
            weights[256, 0] = 6
        writer.add_tensor(f"{name}.weight", weights)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.full(hidden, norm, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Variables of a process that compiles as the tests do, into the cache that all share."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": ""}


@pytest.fixture(scope="session")
def jaxpaged(environment: dict[str, str]) -> Command:
    """Runs ``jaxpaged`` as its own process; keywords are variables of its environment."""

    def run(*arguments: str | Path, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "jaxpaged.app.cli", *map(str, arguments)]
        env = environment | variables
        return subprocess.run(command, input=stdin, capture_output=True, text=True, env=env, timeout=120)

    return run


@pytest.fixture(scope="session")
def here() -> Callable[..., Result]:
    """Runs ``jaxpaged`` in this process, where what one run compiles serves the next."""
    from jaxpaged.app import environment as app_environment
    from jaxpaged.app.commands import application

    def run(*arguments: str | Path, stdin: str = "") -> Result:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(app_environment, "prepare", lambda _threads: None)
            return CliRunner().invoke(application, [str(argument) for argument in arguments], input=stdin)

    return run


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs ``jaxpaged`` in this process with flags it must refuse; gives the line it says."""
    from jaxpaged.app import environment as app_environment
    from jaxpaged.app.commands import application

    monkeypatch.setattr(app_environment, "prepare", lambda _threads: None)

    def run(*arguments: str | Path) -> str:
        result: Result = CliRunner().invoke(application, [str(a) for a in arguments])
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        lines = [line for line in result.stderr.splitlines() if line.startswith("jaxpaged: error: ")]
        assert len(lines) == 1 and result.stderr.splitlines()[-1] == lines[0], result.stderr
        assert "Traceback" not in result.stderr
        return lines[0]

    return run
