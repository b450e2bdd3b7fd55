"""Training data of the embedded model: Python's standard library, with a fixed share of its files held out."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"

# The pattern of GGUF's pre-tokenizer "llama-bpe".
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Tables, or files with deliberate errors.
SKIPPED_FOLDERS = {"site-packages", "encodings", "pydoc_data", "__pycache__", "data", "encoded_modules"}
LARGEST_FILE = 300_000
HELD_OUT_ONE_IN = 50


@dataclass(frozen=True)
class Corpus:
    """Texts by path relative to the library's folder; ``held_out`` is never trained on, tokenizer included."""

    train: dict[str, str]
    held_out: dict[str, str]


def is_held_out(name: str) -> bool:
    """True if a file is held out, which the hash of its name decides, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT_ONE_IN == 0


def read_corpus(folder: Path | None = None) -> Corpus:
    """Reads every Python file under ``folder`` (default: the running Python's standard library)."""
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    corpus = Corpus({}, {})
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED_FOLDERS & set(Path(name).parts[:-1]) or path.stat().st_size > LARGEST_FILE:
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        (corpus.held_out if is_held_out(name) else corpus.train)[name] = text
    return corpus


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE, with a token for every byte, on the training files."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.train.values(), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: dict[str, str]) -> list[np.ndarray]:
    """Tokens of each file, i32, followed by END_OF_TEXT."""
    end = token_id(tokenizer, END_OF_TEXT)
    encoded = tokenizer.encode_batch(list(texts.values()), add_special_tokens=False)
    return [np.asarray([*e.ids, end], np.int32) for e in encoded]


def token_id(tokenizer: Tokenizer, text: str) -> int:
    """The id of a token.

    Raises:
      KeyError: there is no such token.
    """
    number = tokenizer.token_to_id(text)
    if number is None:
        raise KeyError(f"the vocabulary has no token {text!r}")
    return int(number)


def tokenizer_metadata(tokenizer: Tokenizer) -> dict[str, object]:
    """The tokenizer as GGUF metadata."""
    description = json.loads(tokenizer.to_str())["model"]
    texts = [text for text, _ in sorted(description["vocab"].items(), key=lambda item: item[1])]
    end = token_id(tokenizer, END_OF_TEXT)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [3 if text == END_OF_TEXT else 1 for text in texts],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in description["merges"]],
        "tokenizer.ggml.bos_token_id": end,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.add_bos_token": False,
    }
