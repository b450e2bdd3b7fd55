"""llama-server for llama.cpp's own tests: translates its command line to ``jaxpaged serve`` with a random model.

The tests use models from the hub, mostly one of 260,000 parameters that was trained on stories. The random model has
the same kind of vocabulary (SentencePiece, 512 pieces), but generates other words.
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
RANDOM_MODEL = "JAXPAGED_RANDOM_MODEL"
"""Environment variable with the path of the random model."""
ROUTED = ("tinygemma3", "stories260K", "stories260K-infill")
"""Names of the random model in the folder of several models, which is that of the random model."""
_CONTROL = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_VOCAB = 512
_CONTEXT = 4096

# Flags of the suite that are dropped, with the reason. All others are passed on.
_WITH_VALUE = {
    "--hf-repo": "replaced by the random model",
    "--hf-file": "replaced by the random model",
    "--ctx-size": "llama-server divides it by its slots",
    "--media-path": "there is no such flag; the test sends a request that names a file",
}
_TEMPLATES = {
    "Llama-3.1": "meta-llama-Llama-3.1-8B-Instruct",
    "gemma-2": "google-gemma-2-2b-it",
    "Phi-3.5": "microsoft-Phi-3.5-mini-instruct",
    "Qwen2.5": "Qwen-Qwen2.5-7B-Instruct",
    "R1-Distill-Qwen": "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
}
"""Chat templates of models of the hub, by a part of their names; the random model has none."""
_WITHOUT_VALUE = {"--offline", "--no-jinja"}


def ours(arguments: list[str], model: str) -> list[str]:
    """Translates llama-server's arguments to those of ``jaxpaged serve``."""
    taken: dict[str, str] = {}
    kept: list[str] = []
    rest = iter(arguments)
    for word in rest:
        if word in _WITH_VALUE:
            taken[word] = next(rest)
        elif word not in _WITHOUT_VALUE:
            kept.append(word)
    for part, template in _TEMPLATES.items():
        if part in taken.get("--hf-repo", "") and not any(
            word.startswith("--chat-template") for word in kept
        ):
            kept += ["--chat-template-file", f"../../../models/templates/{template}.jinja"]
    context = int(taken.get("--ctx-size", "0"))
    if "--kv-unified" not in kept and "--parallel" in kept:
        context //= int(kept[kept.index("--parallel") + 1])
    source = (
        ["--model", model] if "--hf-repo" in taken else ["--models-dir", str(Path(model).parent / "router")]
    )
    return ["serve", *source, "--ctx-size", str(context), *kept]


def write_random_model(path: Path, text: str) -> Path:
    """Writes the random model; its pieces are those of a text."""
    sys.path.insert(0, str(HERE.parent / "model"))
    from small_models import HIDDEN, LAYERS, config_json, random_weights, write_converted_gguf

    first = len(_CONTROL) + len(_BYTES)
    pieces = _pieces(text, _VOCAB - first)
    config = config_json("llama", vocab_size=_VOCAB, max_position_embeddings=_CONTEXT)
    weights = random_weights(config)
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((_VOCAB, HIDDEN)).astype(np.float32)
    output = (0.25 * rng.standard_normal((_VOCAB, HIDDEN))).astype(np.float32)
    # The first number of the residual stream is constant; it keeps tokens that are no text from being sampled.
    embedding[:, 0] = 8.0
    for i in range(LAYERS):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.{i}.{name}.weight"][0] = 0.0
    output[:, 0] = 0.0
    output[:first, 0] = -16.0
    output[first + pieces.index('"'), 0] = 2.0  # strings of JSON end soon
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
        # Any tokens: the tests of /infill ask what is sent, and what comes back.
        "tokenizer.ggml.fim_pre_token_id": _VOCAB - 3,
        "tokenizer.ggml.fim_suf_token_id": _VOCAB - 2,
        "tokenizer.ggml.fim_mid_token_id": _VOCAB - 1,
    }
    head = {"cls.output.weight": rng.standard_normal((1, HIDDEN)).astype(np.float32)}  # of a reranker
    return write_converted_gguf(
        path, config, weights, extra=vocabulary, change=lambda tensors: tensors.update(head)
    )


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
    command = [sys.executable, "-m", "jaxpaged.app.cli", *ours(sys.argv[1:], os.environ[RANDOM_MODEL])]
    os.execv(command[0], command)
