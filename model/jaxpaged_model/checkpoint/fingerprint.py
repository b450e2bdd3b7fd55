"""A model's fingerprint: identifies the weights that saved keys and values were computed with."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from typing import Protocol

from jaxpaged_model.checkpoint.weights import TensorSource
from jaxpaged_model.config import ModelConfig


class SampledSource(TensorSource, Protocol):
    """A file or folder from which a few bytes of a tensor can be read."""

    def sample(self, name: str) -> bytes: ...


def fingerprint(config: ModelConfig, source: SampledSource) -> str:
    """SHA-256 of the configuration and of every tensor's name, type, shape and some of its bytes.

    Training changes all of a tensor, so its beginning, middle and end identify it; reading a large file
    to its end would take longer than what a saved prompt saves. The path, the model's name and fields
    with their default value are left out, so that a copy of the file, or a version of this program with
    more fields, has the same fingerprint.

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
