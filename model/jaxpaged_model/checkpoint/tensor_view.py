"""A file's tensors under the names that ``weights.placements`` has for them.

Some files have the language model beside a vision tower, and some join matrices: queries, keys and
values, or gate and up. Neither is part of the architecture: llama.cpp's converter joins them on
request. Here each matrix is a tensor of its own, read as rows of the file's, in the file's format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jaxpaged_model.checkpoint.weights import Naming, Part, PartialSource, TensorInfo
from jaxpaged_model.config import ModelConfig
from jaxpaged_model.metadata import ModelError

_TOWERS = ("model.language_model.", "language_model.")
"""Prefixes of a language model's tensors, of which the others of a folder are no part."""
_FUSED: Mapping[Naming, Mapping[str, tuple[str, ...]]] = {
    "gguf": {
        "attn_qkv": ("attn_q", "attn_k", "attn_v"),
        "ffn_up": ("ffn_gate", "ffn_up"),
    },
    "huggingface": {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
}
"""Names of joined tensors and of their parts, in the order of their rows."""


@dataclass(frozen=True)
class _Rows:
    """Rows ``first`` to ``first + shape[0]`` of a tensor of the file."""

    source: str
    first: int
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


class TensorView:
    """Tensors of a file, whole or some rows, under other names; a ``PartialSource``."""

    def __init__(self, file: PartialSource, found: Mapping[str, _Rows]) -> None:
        self._file, self._found = file, found
        self.tensors: Mapping[str, TensorInfo] = found

    @property
    def path(self) -> Path:
        return self._file.path

    def _part(self, name: str, part: Part | None) -> Part | None:
        rows, whole = self._found[name], self._file.tensors[self._found[name].source].shape
        if rows.shape == whole:
            return part
        part = (slice(None),) * len(whole) if part is None else part
        begin, end, _ = part[0].indices(rows.shape[0])
        return slice(rows.first + begin, rows.first + end), *part[1:]

    def read(self, name: str, part: Part | None = None) -> np.ndarray:
        """See ``GGUFFile.read``."""
        return self._file.read(self._found[name].source, self._part(name, part))

    def raw(self, name: str, part: Part | None = None) -> np.ndarray:
        """See ``GGUFFile.raw``."""
        return self._file.raw(self._found[name].source, self._part(name, part))

    def release(self, name: str) -> None:
        """See ``GGUFFile.release``; parts of a tensor that are read later are mapped again."""
        self._file.release(self._found[name].source)


def tensor_view(config: ModelConfig, file: PartialSource, naming: Naming) -> PartialSource:
    """The tensors of a model's file, each matrix on its own; the file itself if it has them so.

    Raises:
      ModelError: a joined tensor has another number of rows than its parts together.
    """
    found: dict[str, _Rows] = {}
    for name, info in file.tensors.items():
        rows = _Rows(name, 0, tuple(info.shape), info.dtype, info.num_bytes)
        for part, one in _parts(config, name, rows, naming, file).items():
            found[part] = one
    found = _language_model(found)
    changed = found.keys() != file.tensors.keys()
    return TensorView(file, found) if changed else file


def _language_model(found: dict[str, _Rows]) -> dict[str, _Rows]:
    """The language model of a folder that has a vision tower beside it."""
    if not any(name.startswith(_TOWERS) for name in found):
        return found
    inside = {}
    for name, rows in found.items():
        prefix = next((one for one in _TOWERS if name.startswith(one)), None)
        if prefix is not None:
            own = name.removeprefix(prefix)
            inside[own if own.startswith(("model.", "lm_head.")) else f"model.{own}"] = rows
        elif name.startswith("lm_head."):
            inside[name] = rows
    return inside


def _parts(
    config: ModelConfig, name: str, whole: _Rows, naming: Naming, file: PartialSource
) -> dict[str, _Rows]:
    """The parts of a tensor by their names: itself, unless it is a joined one."""
    stem, _, kind = name.rpartition(".")
    for joined, parts in _FUSED[naming].items():
        if not stem.endswith(f".{joined}") or (len(parts) == 2 and not config.gated):
            continue
        beginning = stem.removesuffix(joined)
        names = [f"{beginning}{part}.{kind}" for part in parts]
        if joined in parts and any(one != name and one in file.tensors for one in names):
            continue  # a matrix with the joined one's name, beside the other
        sizes = _sizes(config, len(parts))
        if joined in parts and whole.shape[0] != sum(sizes):
            continue
        if whole.shape[0] != sum(sizes):
            raise ModelError(
                f"{file.path}: wrong shape: {name} has {whole.shape[0]} rows, needed are {sum(sizes)}: "
                + " + ".join(map(str, sizes))
            )
        return {
            one: replace(
                whole,
                first=sum(sizes[:i]),
                shape=(sizes[i], *whole.shape[1:]),
                num_bytes=whole.num_bytes * sizes[i] // sum(sizes),
            )
            for i, one in enumerate(names)
        }
    return {name: whole}


def _sizes(config: ModelConfig, count: int) -> list[int]:
    """Rows of queries, keys and values, or of gate and up."""
    if count == 2:
        return [config.intermediate_size] * 2
    return [heads * config.head_dim for heads in (config.num_q_heads, *[config.num_kv_heads] * 2)]
