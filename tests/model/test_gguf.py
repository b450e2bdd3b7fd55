"""GGUF files: values are read as written, damaged files are refused in one line."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType
from jaxpaged_model.checkpoint import loading
from jaxpaged_model.checkpoint.gguf_file import SUPPORTED_TYPES, GGUFFile
from jaxpaged_model.checkpoint.loading import load_model
from jaxpaged_model.metadata import Metadata, ModelError
from small_models import config_json, logits, random_weights, write_converted_gguf


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = config_json("llama")
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return write_converted_gguf(path, config, random_weights(config), kind=GGMLType.Q8_0)


def test_metadata_becomes_plain_values(tmp_path: Path) -> None:
    values: dict[str, tuple[str, Any]] = {
        "a.u8": ("add_uint8", 200),
        "a.i8": ("add_int8", -3),
        "a.u16": ("add_uint16", 60000),
        "a.i16": ("add_int16", -300),
        "a.u32": ("add_uint32", 4_000_000_000),
        "a.i32": ("add_int32", -5),
        "a.u64": ("add_uint64", 2**63 + 1),
        "a.i64": ("add_int64", -(2**62)),
        "a.f32": ("add_float32", 0.5),
        "a.f64": ("add_float64", 0.1),
        "a.bool": ("add_bool", True),
        "a.text": ("add_string", "naïve 🙂"),
        "a.empty": ("add_string", ""),
        "a.texts": ("add_array", ["x", "", "é"]),
        "a.numbers": ("add_array", [1, -2, 3]),
        "a.reals": ("add_array", [0.25, -1.5]),
        "a.bools": ("add_array", [True, False]),
    }
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, (method, value) in values.items():
        if value:  # gguf's writer leaves empty texts out
            getattr(writer, method)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = GGUFFile(tmp_path / "m.gguf").metadata
    for key, (_, value) in values.items():
        if value:
            assert metadata[key] == value and type(metadata[key]) is type(value), key
    assert metadata["general.architecture"] == "llama"


def test_reads_what_the_gguf_package_reads(model_file: Path) -> None:
    theirs, ours = gguf.GGUFReader(model_file), GGUFFile(model_file)
    assert set(ours.tensors) == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert (ours.read(tensor.name) == expected).all()
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert ours.metadata[key] == field.contents()


@pytest.mark.parametrize("kind", SUPPORTED_TYPES, ids=lambda kind: kind.name)
def test_every_supported_type(kind: GGMLType, tmp_path: Path) -> None:
    """Each type has rows of the right shape and the values of the gguf package, near those quantized."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((6, 512)).astype(np.float32)
    try:
        data, near = gguf.quantize(values, kind), True
    except (
        NotImplementedError
    ):  # gguf reads this type and does not write it: any bytes will do, but with mild scales
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data, near = rng.integers(0, 60, (6, 512 // block * size), dtype=np.uint8), False
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "m.gguf")
    assert file.tensors["x"].dtype == kind.name and file.tensors["x"].shape == (6, 512)
    read = file.read("x").astype(np.float32)
    assert read.shape == (6, 512) and np.isfinite(read).all() and read.flags.owndata | (read.base is not None)
    assert (read == gguf.dequantize(data, kind).reshape(6, 512)).all()
    if near:
        assert np.abs(read - values).max() < (0.5 if kind.name.startswith(("Q4", "Q5")) else 0.05)


def test_other_files_are_refused(tmp_path: Path) -> None:
    def refused(content: bytes, message: str) -> None:
        path = tmp_path / "x.gguf"
        path.write_bytes(content)
        with pytest.raises(ModelError, match=message) as error:
            GGUFFile(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)

    refused(b"", "the file is empty")
    refused(b"\x89PNG\r\n\x1a\n" + bytes(100), r"not a GGUF file: it starts with b'\\x89PNG'")
    refused(b"GG", "not a GGUF file")
    refused(b"GGUF", "truncated in the version: 8 bytes are needed, the file has 4")
    refused(b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1 is not supported; supported are 2 and 3")
    refused(b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian")
    refused(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "tensors need at least")
    refused(b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "metadata fields need at least")
    key = struct.pack("<Q", 1) + b"k"
    refused(
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IB", 99, 0), "value of unknown type 99"
    )
    huge = struct.pack("<IIQ", 9, 4, 2**62)
    refused(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + huge, "truncated in the value of 'k'")
    nested = struct.pack("<IIQ", 9, 9, 1) + bytes(20)
    refused(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + nested, "value of unknown type 9")
    with pytest.raises(ModelError, match="is a folder"):
        GGUFFile(tmp_path)
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        GGUFFile(tmp_path / "none.gguf")


def test_tensor_types_that_are_not_supported_are_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", np.zeros((2, 66), np.uint8), raw_dtype=GGMLType.IQ2_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ModelError, match=r"tensor type IQ2_XXS \(1 tensors\) is not supported; supported are F32, F16"
    ):
        GGUFFile(tmp_path / "m.gguf")


def test_a_truncated_file_is_refused(model_file: Path, tmp_path: Path) -> None:
    whole = model_file.read_bytes()
    path = tmp_path / "cut.gguf"
    rng = np.random.default_rng(1)
    places = {
        *range(0, 60, 3),
        *(int(n) for n in rng.integers(0, 12000, 120)),
        *(int(n) for n in rng.integers(0, len(whole) - 32, 60)),
    }
    for place in sorted(places):
        path.write_bytes(whole[:place])
        with pytest.raises(ModelError, match=r"truncated|empty|not a GGUF") as error:
            GGUFFile(path)
        assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore::UserWarning")  # the tokenizer says what it mended
def test_flipped_bytes_load_or_are_refused(model_file: Path, tmp_path: Path) -> None:
    """Damage in the header, which ends before byte 12,000."""
    whole = bytearray(model_file.read_bytes())
    path = tmp_path / "flipped.gguf"
    rng = np.random.default_rng(2)
    refused: list[str] = []
    for _ in range(200):
        damaged = bytearray(whole)
        for place in rng.integers(0, 12000, rng.integers(1, 4)):
            damaged[place] = int(rng.integers(256))
        path.write_bytes(damaged)
        try:
            load_model(path)
        except ModelError as error:
            refused.append(str(error))
    assert len(refused) > 20 and not any("\n" in message for message in refused)


def _split(path: Path, folder: Path, count: int) -> list[Path]:
    """Splits a model into several files as llama.cpp's gguf-split does."""
    reader = gguf.GGUFReader(path)
    paths = []
    for i in range(count):
        paths.append(folder / f"m-{i + 1:05d}-of-{count:05d}.gguf")
        writer = gguf.GGUFWriter(paths[-1], "llama")
        if i == 0:
            for key, field in reader.fields.items():
                if key.startswith(("llama.", "tokenizer.")):
                    kind, *inner = field.types
                    writer.add_key_value(key, field.contents(), kind, inner[0] if inner else None)
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[i::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_a_split_model_loads_as_one(model_file: Path, tmp_path: Path) -> None:
    parts = _split(model_file, tmp_path, 3)
    whole, split = load_model(model_file), load_model(parts[0])
    same = (logits(one.config, one.params, function=one.function) for one in (whole, split))
    assert np.array_equal(*same)
    assert split.size_bytes == sum(part.stat().st_size for part in parts)
    with pytest.raises(
        ModelError, match=r"is not the first part of a split model; name m-00001-of-00003\.gguf"
    ):
        load_model(parts[1])
    parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelError, match=r"must be named NAME-00001-of-00003\.gguf"):
        load_model(tmp_path / "renamed.gguf")
    (tmp_path / "renamed.gguf").rename(parts[0])
    parts[2].unlink()
    with pytest.raises(ModelError, match=r"1 of 3 parts are missing: m-00003-of-00003\.gguf"):
        load_model(parts[0])


def test_half_precision_is_read_as_stored(tmp_path: Path) -> None:
    """Loading a bfloat16 model never needs the memory of float32 weights."""
    config = config_json("llama")
    for kind, dtype in ((GGMLType.F16, np.float16), (GGMLType.BF16, jnp.bfloat16)):
        path = write_converted_gguf(tmp_path / "m.gguf", config, random_weights(config), kind=kind)
        assert GGUFFile(path).read("token_embd.weight").dtype == dtype


def test_every_key_that_is_read_has_its_type_checked(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a value of any type under any key the file loads, or one line names the file and the key."""
    read: set[str] = set()
    get = Metadata.get

    def recorded(self: Metadata, key: str, default: Any = None) -> Any:
        read.add(self.prefix + key)
        return get(self, key, default)

    file = GGUFFile(model_file)
    keys = dict(file.metadata) | {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}
    keys |= {"llama.attention.sliding_window": 8, "tokenizer.ggml.scores": [0.0] * len(file.metadata)}
    monkeypatch.setattr(Metadata, "get", recorded)
    monkeypatch.setattr(loading, "GGUFFile", lambda _: file)
    monkeypatch.setattr(loading, "load_params", lambda *_, **__: {})
    file.metadata = keys
    loading.load_model(model_file)
    assert {"general.file_type", "general.name", "llama.block_count", "tokenizer.chat_template"} <= read
    assert len(read) > 40
    for key in sorted(read):
        errors = []
        for value in ("a text", 3, 0.5, True, [True, "a text"], [0.5, 3]):
            file.metadata = keys | {key: value}
            try:
                loading.load_model(model_file)
            except ModelError as error:
                errors.append(str(error))
        assert all(error.startswith(f"{model_file}: ") and "\n" not in error for error in errors)
        assert any(key in error for error in errors), (key, errors)


def test_keys_of_the_files_layout_have_their_type_checked(tmp_path: Path) -> None:
    for key, value in (
        ("general.alignment", "32"),
        ("general.alignment", 12),
        ("split.count", "2"),
        ("split.no", 0.5),
    ):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(
            ModelError, match=f"m.gguf: {key} must be an? (integer|power of two), got {value!r}"
        ):
            GGUFFile(tmp_path / "m.gguf")
