"""A model of transformers, written as GGUF with the ``gguf`` package alone, loads to the same logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import peer_models as peer
from conftest import Measured
from jaxpaged_model.checkpoint.loading import load_model

TOLERANCE = 1e-4
QUANTIZATIONS = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
CASES = [
    *((name, "F32") for name, variant in peer.VARIANTS.items() if variant.in_gguf),
    *((name, "Q8_0") for name in ("llama", "qwen2", "qwen3", "gemma3", "phi3", "cohere2")),
    *(("mistral-window", quantization) for quantization in QUANTIZATIONS),
]


@pytest.mark.parametrize(("name", "quantization"), CASES)
def test_a_gguf_file_gives_the_logits_of_the_weights_in_it(
    name: str, quantization: str, tmp_path: Path, measured: Measured
) -> None:
    """Also of quantized files: their weights are dequantized and loaded into transformers' model."""
    original = peer.hf_model(name)
    path = tmp_path / "model.gguf"
    model = peer.with_weights(original, peer.write_gguf(original, path, quantization))
    # Prefill only: decoding does not depend on the file.
    texts = peer.prompts()
    ours = np.concatenate(peer.our_logits(load_model(path, exact=True), "paged", texts, decode=0))
    theirs = np.concatenate(peer.hf_logits(model, texts))
    measured(difference=np.abs(ours - theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
