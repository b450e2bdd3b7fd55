"""Shards of a file: together they are the file, and a device reads its share alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from jaxpaged_model.checkpoint.gguf_file import GGUFFile
from jaxpaged_model.checkpoint.loading import read_config
from jaxpaged_model.checkpoint.safetensors_folder import SafetensorsFolder
from jaxpaged_model.checkpoint.shards import ShardSource
from small_models import KV_HEADS, config_json, random_weights, write_converted_gguf, write_folder

from jaxpaged.sharding.mesh import MeshError

FOLDERS: dict[str, dict[str, Any]] = {
    "qwen2": config_json("qwen2"),  # biases on Q, K and V
    "qwen3": config_json("qwen3", tie_word_embeddings=True),  # norms of heads
    "biased": config_json("llama", attention_bias=True, mlp_bias=True),
}
SIZES = (1, 2, 4)  # of 4 query heads and 2 KV heads
# Written independently of ``jaxpaged_model.checkpoint.shards``: the split axis of each matrix, by name.
BATCH = (
    "q_proj",
    "k_proj",
    "v_proj",
    "gate_proj",
    "up_proj",
    "attn_q",
    "attn_k",
    "attn_v",
    "ffn_gate",
    "ffn_up",
)
COLUMNS = ("o_proj", "down_proj", "attn_output", "ffn_down")
KV = ("k_proj", "v_proj", "attn_k", "attn_v")


class Watched:
    """A file that counts the numbers read of each tensor."""

    def __init__(self, file: Any) -> None:
        self.file, self.asked = file, dict.fromkeys(file.tensors, 0)
        self.path, self.tensors, self.release = file.path, file.tensors, file.release

    def _watch(self, name: str, part: Any) -> None:
        shape = self.tensors[name].shape
        cuts = part or (slice(None),) * len(shape)
        self.asked[name] += math.prod(len(range(n)[cut]) for cut, n in zip(cuts, shape, strict=True))

    def read(self, name: str, part: Any = None) -> np.ndarray:
        self._watch(name, part)
        return self.file.read(name, part)

    def raw(self, name: str, part: Any = None) -> np.ndarray:
        self._watch(name, part)
        return self.file.raw(name, part)


def open_model(kind: str, folder: Path) -> tuple[Any, Any, str]:
    """Config, file and naming of a model."""
    if kind not in FOLDERS:
        config, types = config_json("llama"), gguf.GGMLQuantizationType
        path = write_converted_gguf(
            folder / "model.gguf", config, random_weights(config), kind=getattr(types, kind)
        )
        return read_config(path), GGUFFile(path), "gguf"
    path = write_folder(folder, FOLDERS[kind], random_weights(FOLDERS[kind]), shards=2)
    return read_config(path), SafetensorsFolder(path), "huggingface"


def cut_axis(name: str) -> int | None:
    module, _, weight = name.rpartition(".")
    if module.endswith(BATCH):
        return 0
    return 1 if module.endswith(COLUMNS) and weight == "weight" else None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [*FOLDERS, "Q8_0", "F16"])
def test_the_parts_of_all_devices_are_the_whole(kind, size, tmp_path):
    config, file, naming = open_model(kind, tmp_path)
    sources = [ShardSource(config, file, naming, rank=rank, size=size) for rank in range(size)]
    assert [list(source.tensors) for source in sources] == [list(file.tensors)] * size
    for name in file.tensors:
        whole, parts = file.read(name), [source.read(name) for source in sources]
        assert [part.shape for part in parts] == [source.tensors[name].shape for source in sources]
        module, axis = name.rpartition(".")[0], cut_axis(name)
        if module.endswith(COLUMNS) and axis is None:  # a bias behind the sum: added once
            np.testing.assert_array_equal(parts[0], whole)
            assert not any(part.any() for part in parts[1:])
        elif axis is None:
            assert all(np.array_equal(part, whole) for part in parts)
        else:
            each = max(1, size // KV_HEADS) if module.endswith(KV) else 1  # devices that have the same head
            assert all(np.array_equal(parts[i], parts[i - i % each]) for i in range(size))
            np.testing.assert_array_equal(np.concatenate(parts[::each], axis), whole)


@pytest.mark.parametrize("size", SIZES)
def test_quantized_bytes_are_split_at_blocks_or_dequantized(size, tmp_path):
    config, file, naming = open_model("Q8_0", tmp_path)
    sources = [ShardSource(config, file, naming, rank=rank, size=size) for rank in range(size)]
    for name, info in file.tensors.items():
        axis = cut_axis(name)
        if info.dtype != "Q8_0" or axis is None:
            continue
        columns = info.shape[1] // (size if axis == 1 else 1)
        fits = columns % 32 == 0
        assert [source.tensors[name].dtype for source in sources] == ["Q8_0" if fits else "F32"] * size
        if fits:
            raw = [source.raw(name) for source in sources]
            each = max(1, size // KV_HEADS) if name.rpartition(".")[0].endswith(KV) else 1
            np.testing.assert_array_equal(np.concatenate(raw[::each], axis), file.raw(name))
            assert [source.tensors[name].num_bytes for source in sources] == [part.nbytes for part in raw]


@pytest.mark.parametrize("kind", ["biased", "Q8_0"])
def test_a_device_reads_its_share_alone(kind, tmp_path):
    config, file, naming = open_model(kind, tmp_path)
    for rank in range(4):
        watched = Watched(file)
        source = ShardSource(config, watched, naming, rank=rank, size=4)
        for name in source.tensors:
            source.read(name)
        for name, asked in watched.asked.items():
            module, numbers = name.rpartition(".")[0], math.prod(file.tensors[name].shape)
            if module.endswith(COLUMNS) and cut_axis(name) is None:
                assert asked == (numbers if rank == 0 else 0), name
            elif cut_axis(name) is None:
                assert asked == numbers, name
            else:
                assert asked == numbers // (KV_HEADS if module.endswith(KV) else 4), name


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (3, "tensor=3 does not divide 4 query heads and 2 KV heads; allowed are 1, 2, 4"),
        (8, "tensor=8 does not divide 4 query heads and 2 KV heads; allowed are 1, 2, 4"),
    ],
)
def test_heads_that_cannot_be_split_are_named(size, message, tmp_path):
    config, _, _ = open_model("qwen2", tmp_path)
    with pytest.raises(MeshError) as error:
        config.shard(size)
    assert str(error.value) == message
