"""llama-server for llama.cpp's own tests: its command line becomes one of ``jaxpaged serve`` with a stand-in model.

The tests ask for models from the hub, mostly one of 260,000 parameters that tells stories. The stand-in has the kind of
vocabulary that it has (SentencePiece, 512 pieces) and random weights: it says words of its own.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np

HERE = Path(__file__).resolve().parent
STAND_IN = "JAXPAGED_STAND_IN"
"""The environment variable that names the stand-in model."""
_CONTROL = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_VOCAB = 512
_CONTEXT = 4096

# What the suite's command lines say, and what is done about it. Whatever stands in neither goes on as it is.
_WITH_VALUE = {
    "--hf-repo": "the stand-in instead",
    "--hf-file": "the stand-in instead",
    "--ctx-size": "llama-server divides it by its slots",
    "--reasoning": "there is no such flag",
    "--media-path": "there is no such flag; what is tested is a request that names a file",
}
_WITHOUT_VALUE = {"--offline", "--no-jinja"}


def ours(arguments: list[str], model: str) -> list[str]:
    """The same server's command line for ``jaxpaged serve``."""
    taken: dict[str, str] = {}
    kept: list[str] = []
    rest = iter(arguments)
    for word in rest:
        if word in _WITH_VALUE:
            taken[word] = next(rest)
        elif word not in _WITHOUT_VALUE:
            kept.append(word)
    context = int(taken.get("--ctx-size", "0"))
    if "--kv-unified" not in kept and "--parallel" in kept:
        context //= int(kept[kept.index("--parallel") + 1])
    return ["serve", "--model", model, "--ctx-size", str(context), *kept]


def write_stand_in(path: Path, text: str) -> Path:
    """The stand-in model, its pieces learned from a text."""
    sys.path.insert(0, str(HERE.parent / "model"))
    from small_models import HIDDEN, LAYERS, config_json, random_weights, write_converted_gguf

    first = len(_CONTROL) + len(_BYTES)
    pieces = _pieces(text, _VOCAB - first)
    config = config_json("llama", vocab_size=_VOCAB, max_position_embeddings=_CONTEXT)
    weights = random_weights(config)
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((_VOCAB, HIDDEN)).astype(np.float32)
    output = (0.25 * rng.standard_normal((_VOCAB, HIDDEN))).astype(np.float32)
    # The first number of the residual stream is the same everywhere, and keeps what is no text from being drawn.
    embedding[:, 0] = 8.0
    for i in range(LAYERS):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.{i}.{name}.weight"][0] = 0.0
    output[:, 0] = 0.0
    output[:first, 0] = -16.0
    weights |= {"model.embed_tokens.weight": embedding, "lm_head.weight": output}
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * len(_BYTES) + [gguf.TokenType.NORMAL] * len(pieces)
    vocabulary = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": _CONTROL + _BYTES + pieces,
        "tokenizer.ggml.scores": [0.0] * first + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    return write_converted_gguf(path, config, weights, extra=vocabulary)


def _pieces(text: str, count: int) -> list[str]:
    """The likeliest pairs, merged one after the other, and then all printable characters."""
    characters = ["▁", *(chr(code) for code in range(33, 127))]
    words = Counter(tuple("▁" + word) for word in text.split() if word.isascii())
    pieces: list[str] = []
    while len(pieces) < count - len(characters):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                pairs[pair] += times
        pair = max(pairs, key=lambda pair: (pairs[pair], pair))
        pieces.append("".join(pair))
        merged: Counter[tuple[str, ...]] = Counter()
        for word, times in words.items():
            merged[_merge(word, pair)] += times
        words = merged
    return pieces + characters


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for part in word:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return tuple(out)


if __name__ == "__main__":
    command = [sys.executable, "-m", "jaxpaged.app.cli", *ours(sys.argv[1:], os.environ[STAND_IN])]
    os.execv(command[0], command)
