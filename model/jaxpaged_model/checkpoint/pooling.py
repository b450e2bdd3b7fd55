"""Pooling: one vector, or one score, of a text's hidden states, as the file asks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxpaged_model.checkpoint.gguf_file import GGUFFile
from jaxpaged_model.checkpoint.safetensors_folder import SafetensorsFolder

Pooling = Literal["mean", "cls", "last"]
"""mean of all tokens, the first token, or the last one."""
_GGUF: dict[int, Pooling] = {1: "mean", 2: "cls", 3: "last", 4: "last"}
"""llama.cpp's numbers; 4 = rank, which reads the last token of a causal model."""
_FOLDER: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
RERANKER_TENSORS = ("cls.output.weight", "cls.output.bias")
"""Tensors of a head that ranks documents, in a GGUF file."""
_LARGEST = 2**16
"""Bytes of a description, at most."""


def pooled(hidden: np.ndarray, pooling: Pooling) -> np.ndarray:
    """The vector of a text, f32[hidden_size], from its hidden states ``f32[T, hidden_size]``."""
    if pooling == "mean":
        return hidden.mean(axis=0, dtype=np.float32)
    return hidden[0] if pooling == "cls" else hidden[-1]


@dataclass(frozen=True)
class Reranker:
    """Head that scores a document for a query, from the last token's hidden state."""

    weight: np.ndarray
    """f32[N, hidden_size]: N scores, of which the first counts."""
    bias: np.ndarray | None
    """f32[N]."""
    template: str | None
    """Text with ``{query}`` and ``{document}``; None: the two texts, each with its end."""
    is_softmax: bool
    """True: the scores are normalized, as those of Qwen3's yes and no."""

    def score(self, hidden: np.ndarray) -> float:
        """Score of a text's last hidden state ``f32[hidden_size]``."""
        scores = self.weight @ hidden + (0.0 if self.bias is None else self.bias)
        if self.is_softmax:
            scores = np.exp(scores - scores.max())
            scores /= scores.sum()
        return float(scores[0])


def pooling_of(source: GGUFFile | SafetensorsFolder) -> Pooling | None:
    """The pooling that a file, or a sentence-transformers folder, asks for; None = it does not say."""
    if isinstance(source, GGUFFile):
        number = source.metadata.get(f"{source.metadata.get('general.architecture')}.pooling_type")
        return _GGUF.get(number) if isinstance(number, int) else None
    file = source.path / "1_Pooling" / "config.json"
    if not file.is_file() or file.stat().st_size > _LARGEST:
        return None
    try:
        config = json.loads(file.read_text())
    except ValueError:
        return None
    found = [name for key, name in _FOLDER.items() if isinstance(config, dict) and config.get(key) is True]
    return found[0] if len(found) == 1 else None


def reranker_of(source: GGUFFile | SafetensorsFolder) -> Reranker | None:
    """The head of a GGUF file's ``cls.output``; None = it has none."""
    if not isinstance(source, GGUFFile) or RERANKER_TENSORS[0] not in source.tensors:
        return None
    weight, bias = RERANKER_TENSORS
    template = source.metadata.get("tokenizer.chat_template.rerank")
    return Reranker(
        source.read(weight).astype(np.float32),
        source.read(bias).astype(np.float32) if bias in source.tensors else None,
        template if isinstance(template, str) else None,
        source.metadata.get("general.architecture") == "qwen3",
    )
