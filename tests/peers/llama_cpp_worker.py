"""Runs llama.cpp for ``test_llama_cpp.py``: needs llama-cpp-python and numpy, and nothing of this project.

A request comes as JSON on stdin, the result goes to the npz file named by the first argument.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import llama_cpp
import numpy as np

F32, F16 = 0, 1


def evaluate(request: dict[str, Any]) -> dict[str, np.ndarray]:
    """Logits of every position, the prompt in one batch and the rest token by token; then greedy tokens."""
    kv_type = F32 if request["kv"] == "f32" else F16
    llm = llama_cpp.Llama(
        request["path"],
        n_ctx=256,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        flash_attn=False,
        type_k=kv_type,
        type_v=kv_type,
        verbose=False,
    )
    result = {"version": np.array(llama_cpp.__version__)}
    for i, text in enumerate(request["texts"]):
        llm.reset()
        prompt, rest = text[: -request["decode"]], text[-request["decode"] :]
        llm.eval(prompt)
        for token in rest:
            llm.eval([token])
        result[f"logits{i}"] = llm.scores[: len(text)].copy()
    for i, prompt in enumerate(request["prompts"]):
        llm.reset()
        llm.eval(prompt)
        tokens = []
        for _ in range(request["steps"]):
            tokens.append(int(llm.scores[llm.n_tokens - 1].argmax()))
            llm.eval(tokens[-1:])
        result[f"greedy{i}"] = np.array(tokens)
    return result


def tokenize(request: dict[str, Any]) -> dict[str, np.ndarray]:
    llm = llama_cpp.Llama(request["path"], vocab_only=True, n_ctx=8, verbose=False)
    return {
        f"{i}": np.array(llm.tokenize(text.encode(), add_bos=True, special=request["special"]), np.int64)
        for i, text in enumerate(request["texts"])
    }


def quantize(request: dict[str, Any]) -> dict[str, np.ndarray]:
    """Writes a model with weights of another type, dequantizing quantized ones first; returns the file."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = 1
    params.ftype = request["file_type"]
    params.allow_requantize = True
    source, out = request["path"].encode(), request["out"].encode()
    if llama_cpp.llama_model_quantize(source, out, ctypes.byref(params)) != 0:
        sys.exit(f"llama.cpp did not write {request['out']}")
    return {}


if __name__ == "__main__":
    request = json.load(sys.stdin)
    do = {"evaluate": evaluate, "tokenize": tokenize, "quantize": quantize}[request["do"]]
    np.savez(sys.argv[1], **do(request))
