"""A model's fingerprint: tells whether keys and values that were kept come from the same weights."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from typing import Protocol

from jaxpaged_model.checkpoint.weights import TensorSource
from jaxpaged_model.config import ModelConfig


class SampledSource(TensorSource, Protocol):
    """A file or folder that hands out a few bytes of a tensor without reading all of it."""

    def sample(self, name: str) -> bytes: ...


def fingerprint(config: ModelConfig, source: SampledSource) -> str:
    """SHA-256 over the configuration and, of every tensor, its name, type, shape and some of its bytes.

    Training changes all of a tensor, so that its beginning, middle and end tell it from any other; reading a large
    file to its end would take longer than what a kept prompt saves. The path, the model's name and settings that keep
    their default do not count, so that a copy, or a program that knows more settings, finds the same.

    Returns:
      64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name != "name" and value != field.default:
            digest.update(f"{field.name}={value!r}\n".encode())
    for name, tensor in sorted(source.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(source.sample(name))
    return digest.hexdigest()
