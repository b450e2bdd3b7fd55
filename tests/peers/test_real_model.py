"""A published checkpoint on llama.cpp and here: greedy tokens in float32.

The file is named by ``JAXPAGED_REAL_MODEL``: a GGUF file of F32, so that neither side rounds weights or activations.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import LlamaCpp, Measured
from jaxpaged_model.checkpoint.loading import load_model

from jaxpaged import PagedKVCache, generate

STEPS = 48
PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees because",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a haiku about the sea.<|im_end|>\n<|im_start|>assistant\n",
    "Q: What is 17 + 25?\nA:",
]


@pytest.mark.slow
def test_greedy_tokens_are_llama_cpps(llama_cpp: LlamaCpp, measured: Measured) -> None:
    path = os.environ.get("JAXPAGED_REAL_MODEL")
    if path is None:
        pytest.skip("JAXPAGED_REAL_MODEL names no GGUF file of F32")
    loaded = load_model(Path(path), exact=True)
    prompts = [loaded.tokenizer.encode(text, parse_special=True) for text in PROMPTS]
    theirs = llama_cpp(do="evaluate", path=path, kv="f32", texts=[], decode=1, prompts=prompts, steps=STEPS)
    cache = PagedKVCache.create(**loaded.config.cache_spec, num_pages=64, max_seqs=len(prompts))
    result, _ = generate(loaded.function, loaded.params, cache, prompts, max_new_tokens=STEPS)
    ours = result.token_lists()
    same = [tokens == theirs[f"greedy{i}"].tolist() for i, tokens in enumerate(ours)]
    measured(identical=sum(same), prompts=len(prompts))
    assert all(same), [text for text, is_same in zip(PROMPTS, same, strict=True) if not is_same]
