"""Training data of the embedded model: Python files, a fixed share of which is held out.

They are those of the running Python's standard library and, for training, of ``PACKAGES`` from PyPI.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import sysconfig
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxpaged_model.checkpoint.gguf_file import GGUFFile

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

# Wheels whose Python files are trained on, by licence as their metadata states it.
PACKAGES = {
    "BSD": (
        "bokeh==3.9.2 celery==5.7.0 click==8.5.1 dask==2026.8.0 distributed==2026.8.0 django==5.2.19 docutils==0.23 "
        "flask==3.1.3 httpx==0.28.1 ipython==9.18.1 jinja2==3.1.6 nbconvert==7.17.2 networkx==3.6.1 numpy==2.4.6 "
        "pandas==3.1.1 scikit-image==0.26.0 scikit-learn==1.9.1 scipy==1.17.1 scrapy==2.19.0 sphinx==9.0.4 "
        "starlette==1.10.0 sympy==1.14.0 werkzeug==3.1.9"
    ),
    "MIT": (
        "attrs==26.1.0 black==26.10.1 fastapi==0.165.0 pip==26.3 pydantic==2.14.4 pytest==9.2.0 rich==15.0.0 "
        "sqlalchemy==2.1.9 twisted==26.10.0 urllib3==2.8.0"
    ),
    "Apache-2.0": (
        "aiohttp==3.14.5 flax==0.12.8 jax==0.10.2 nltk==3.10.4 optax==0.2.8 requests==2.34.2 tornado==6.6.1 "
        "xarray==2026.9.0"
    ),
    "PSF": "matplotlib==3.11.2",
}
# Files that shrink to less than a tenth repeat themselves: tables, and generated code.
MOST_REPETITIVE = 10


@dataclass(frozen=True)
class Corpus:
    """Texts by path relative to the library's folder; ``held_out`` is never trained on, tokenizer included."""

    train: dict[str, str]
    held_out: dict[str, str]


def is_held_out(name: str) -> bool:
    """True if a file is held out, which the hash of its name decides, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT_ONE_IN == 0


def _corpus(files: Iterable[tuple[str, bytes]]) -> Corpus:
    """The files, by name and content, that are UTF-8, neither large nor tables."""
    corpus = Corpus({}, {})
    for name, content in files:
        if SKIPPED_FOLDERS & set(Path(name).parts[:-1]) or len(content) > LARGEST_FILE:
            continue
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        (corpus.held_out if is_held_out(name) else corpus.train)[name] = text
    return corpus


def read_corpus(folder: Path | None = None) -> Corpus:
    """Reads every Python file under ``folder`` (default: the running Python's standard library)."""
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    return _corpus(
        (path.relative_to(root).as_posix(), path.read_bytes()) for path in sorted(root.rglob("*.py"))
    )


def download_packages(folder: Path) -> None:
    """Downloads the wheels of ``PACKAGES`` into ``folder``, where they are not there yet; nothing is installed.

    Raises:
      subprocess.CalledProcessError: pip cannot; it has said why.
    """
    wanted = " ".join(PACKAGES.values()).split()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary",
        ":all:",
        "-d",
        str(folder),
    ]
    subprocess.run([*command, *wanted], check=True)


def read_packages(folder: Path, library: Corpus) -> Corpus:
    """Reads the Python files of the wheels in ``folder``, without tests and without copies of held-out files.

    Args:
      folder: where ``download_packages`` put the wheels.
      library: the standard library's files; a file that shares a tenth of its long lines with its held-out ones is
        left out, for packages bring copies of modules along.
    """
    held_out = set().union(*(_long_lines(text) for text in library.held_out.values()))

    def members() -> Iterable[tuple[str, bytes]]:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(archive.namelist()):
                    if not name.endswith(".py") or {"tests", "testing", "_vendor"} & set(Path(name).parts):
                        continue
                    content = archive.read(name)
                    if len(content) < MOST_REPETITIVE * len(zlib.compress(content)):
                        yield name, content

    corpus = _corpus(members())
    for name, text in list(corpus.train.items()):
        lines = _long_lines(text)
        if 10 * len(lines & held_out) > len(lines):
            del corpus.train[name]
    return corpus


def _long_lines(text: str) -> set[str]:
    return {stripped for line in text.splitlines() if len(stripped := line.strip()) >= 40}


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE, with a token for every byte, on the training files."""
    tokenizer = _byte_level(models.BPE(ignore_merges=True))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.train.values(), trainer)
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file that ``publish.py`` wrote."""
    metadata = GGUFFile(path).metadata
    vocabulary = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = _byte_level(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.add_special_tokens([END_OF_TEXT])
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
