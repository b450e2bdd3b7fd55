"""GGUF files: reads and checks the header, dequantizes tensors one at a time.

The header is not read with ``gguf.GGUFReader``, which makes array views of every string: 5 seconds for a
vocabulary of 49,152 tokens, 22 for one of 128,256 (here 0.1 and 0.3). It also answers damaged files with
various exceptions or endless loops. Type numbers, block sizes and dequantization are those of the ``gguf``
package.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from gguf import GGUFValueType as ValueType

from jaxpaged_model.metadata import Metadata, ModelError
from jaxpaged_model.quantized.formats import WEIGHT_FORMATS

SUPPORTED_VERSIONS = (2, 3)
SUPPORTED_TYPES = (GGMLType.F32, GGMLType.F16, GGMLType.BF16, *(GGMLType[name] for name in WEIGHT_FORMATS))
MAX_DIMENSIONS = 4
SMALLEST_FIELD = 8 + 4 + 1
SMALLEST_TENSOR_INFO = 8 + 4 + 4 + 8

_SCALARS = {
    ValueType.UINT8: "<u1",
    ValueType.INT8: "<i1",
    ValueType.UINT16: "<u2",
    ValueType.INT16: "<i2",
    ValueType.UINT32: "<u4",
    ValueType.INT32: "<i4",
    ValueType.FLOAT32: "<f4",
    ValueType.BOOL: "?",
    ValueType.UINT64: "<u8",
    ValueType.INT64: "<i8",
    ValueType.FLOAT64: "<f8",
}
_RAW = {GGMLType.F32: np.dtype("<f4"), GGMLType.F16: np.dtype("<f2"), GGMLType.BF16: np.dtype(jnp.bfloat16)}
_TYPE_NAMES = {int(kind): kind.name for kind in GGMLType}
_PART = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\.gguf)$", re.IGNORECASE)


@dataclass(frozen=True)
class GGUFTensor:
    """Location of one tensor.

    Attributes:
      shape: rows first, as in numpy; a file has the reverse order.
      dtype: name of the type, such as ``"Q8_0"``.
      offset: position of the first byte in the file ``part``.
      num_bytes: size in the file.
      part: index of the part of a split model that holds it, 0 for a single file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    num_bytes: int
    part: int = 0


class GGUFFile:
    """An open, memory-mapped GGUF file, with all parts if the model is split.

    Attributes:
      path: the file, or the first part.
      metadata: plain Python values by key; arrays are lists.
      tensors: by name, in the order of the file.
      size_bytes: size of all parts.

    Raises:
      ModelError: no GGUF file, truncated, damaged, or of a version or with tensor types that are not
        supported.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        first = _Part(self.path, 0)
        self.metadata: Mapping[str, Any] = first.metadata
        self.tensors: dict[str, GGUFTensor] = dict(first.tensors)
        self._parts = [first.data]
        metadata = Metadata(first.metadata, file=str(self.path))
        count, number = metadata.integer("split.count", 1), metadata.integer("split.no", 0, least=0)
        if count > 1:
            for i, name in enumerate(_part_names(self.path, count, number)):
                if i == 0:
                    continue
                part = _Part(name, i)
                if part.metadata.get("split.no") != i or part.metadata.get("split.count") != count:
                    raise ModelError(f"{name}: is not part {i + 1} of {count} of {self.path.name}")
                if twice := self.tensors.keys() & part.tensors.keys():
                    raise ModelError(f"{name}: tensor {min(twice)!r} is in another part as well")
                self.tensors.update(part.tensors)
                self._parts.append(part.data)
        self.size_bytes = sum(len(data) for data in self._parts)

    def sample(self, name: str) -> bytes:
        """First, middle and last KiB of the tensor's bytes in the file."""
        tensor = self.tensors[name]
        end = tensor.offset + tensor.num_bytes
        starts = (tensor.offset, tensor.offset + tensor.num_bytes // 2, max(tensor.offset, end - 1024))
        data = self._parts[tensor.part]
        return b"".join(data[start : min(start + 1024, end)].tobytes() for start in starts)

    def raw(self, name: str, part: tuple[slice, ...] | None = None) -> np.ndarray:
        """One tensor's bytes in the file, u8 ``[rows, bytes of a row]``, mapped and not copied.

        ``part`` are slices of its axes; that of the last axis begins and ends at multiples of a block.
        """
        tensor = self.tensors[name]
        raw = np.asarray(self._parts[tensor.part][tensor.offset : tensor.offset + tensor.num_bytes])
        raw = raw.reshape(*tensor.shape[:-1], -1)
        if part is None:
            return raw
        block, block_bytes = gguf.GGML_QUANT_SIZES[GGMLType[tensor.dtype]]
        begin, end, _ = part[-1].indices(tensor.shape[-1])
        if begin % block or end % block:
            raise ValueError(f"{name}: {begin} to {end} are not multiples of a block of {block}")
        return raw[(*part[:-1], slice(begin // block * block_bytes, end // block * block_bytes))]

    def release(self, name: str) -> None:
        """Releases the memory of a tensor's mapped bytes; reading them again maps them again."""
        tensor = self.tensors[name]
        mapped = getattr(self._parts[tensor.part], "_mmap", None)
        if mapped is None or not hasattr(mapped, "madvise"):  # Windows has no such call
            return
        # Whole pages inside the tensor: those that it shares with neighbours may not have been read yet.
        begin = -(-tensor.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.offset + tensor.num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> np.ndarray:
        """One tensor's values, or those of a part, copied, in float32, or float16 or bfloat16 if stored so."""
        tensor, kind = self.tensors[name], GGMLType[self.tensors[name].dtype]
        cut = slice(None)
        if part is not None:  # reads whole blocks and drops the values outside the part
            block = gguf.GGML_QUANT_SIZES[kind][0]
            begin, end, _ = part[-1].indices(tensor.shape[-1])
            before, behind = begin // block * block, -(-end // block) * block
            cut, part = slice(begin - before, end - before), (*part[:-1], slice(before, behind))
        raw = self.raw(name, part)
        if kind in _RAW:
            return np.array(raw).view(_RAW[kind])
        # A damaged scale may be infinite: no warning.
        with np.errstate(all="ignore"):
            return gguf.dequantize(np.ascontiguousarray(raw), kind)[..., cut]


def split_parts(name: str) -> tuple[int, list[str]]:
    """Returns (number of the part, from 1, names of all parts) by a file's name; a single file is its only part."""
    match = _PART.match(name)
    if match is None:
        return 1, [name]
    stem, count, end = match["stem"], int(match["count"]), match["end"]
    return int(match["number"]), [f"{stem}-{i + 1:05d}-of-{count:05d}{end}" for i in range(count)]


def _part_names(path: Path, count: int, index: int) -> list[Path]:
    """The files of a split model, the one at ``path`` first of them."""
    number, names = split_parts(path.name)
    if len(names) != count:
        raise ModelError(
            f"{path}: is one of {count} parts of a split model; they must be named "
            f"NAME-00001-of-{count:05d}.gguf and so on"
        )
    if number != 1 or index != 0:
        raise ModelError(
            f"{path}: is not the first part of a split model; name {names[0]}, the others are found beside it"
        )
    if missing := [name for name in names if not path.with_name(name).is_file()]:
        raise ModelError(f"{path}: {len(missing)} of {count} parts are missing: {_some(missing)}")
    return [path.with_name(name) for name in names]


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class _Part:
    """One file: its bytes, metadata and tensors."""

    def __init__(self, path: Path, number: int) -> None:
        self.path, self.number = path, number
        self.data = _map(path)
        self.size = len(self.data)
        self.view = memoryview(self.data.data)
        self.offset = 0
        magic = bytes(self.view[:4])
        if magic != b"GGUF":
            raise ModelError(f"{path}: not a GGUF file: it starts with {magic!r}, not b'GGUF'")
        self.offset = 4
        version = self._number("<I", "the version")
        if version & 0xFFFF == 0:
            raise ModelError(f"{path}: a big-endian GGUF file; only little-endian files are supported")
        if version not in SUPPORTED_VERSIONS:
            raise ModelError(f"{path}: GGUF version {version} is not supported; supported are 2 and 3")
        num_tensors = self._number("<Q", "the number of tensors")
        num_fields = self._number("<Q", "the number of metadata fields")
        self._check_count(num_fields, SMALLEST_FIELD, "metadata fields")
        self._check_count(num_tensors, SMALLEST_TENSOR_INFO, "tensors")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self._string("a metadata key", strict=True)
            if key in self.metadata:
                raise self._damaged(f"metadata key {key!r} occurs twice")
            self.metadata[key] = self._value(self._number("<I", f"the type of {key!r}"), key)
        infos = [self._tensor_info() for _ in range(num_tensors)]
        self.tensors = self._locate(infos)

    def _damaged(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: damaged: {what}")

    def _check_end(self, end: int, what: str) -> None:
        if end > self.size:
            raise ModelError(
                f"{self.path}: truncated in {what}: {end} bytes are needed, the file has {self.size}"
            )

    def _take(self, size: int, what: str) -> memoryview:
        end = self.offset + size
        self._check_end(end, what)
        taken = self.view[self.offset : end]
        self.offset = end
        return taken

    def _number(self, form: str, what: str) -> int:
        return struct.unpack(form, self._take(struct.calcsize(form), what))[0]

    def _check_count(self, count: int, smallest: int, what: str) -> None:
        needed = self.offset + count * smallest
        if needed > self.size:
            raise ModelError(
                f"{self.path}: truncated or damaged: {count} {what} need at least {needed} bytes, "
                f"the file has {self.size}"
            )

    def _string(self, what: str, *, strict: bool = False) -> str:
        raw = bytes(self._take(self._number("<Q", what), what))
        try:
            return raw.decode("utf-8", "strict" if strict else "replace")
        except UnicodeDecodeError:
            raise self._damaged(f"{what} is not UTF-8: {raw[:20]!r}") from None

    def _value(self, kind: int, key: str) -> Any:
        if kind == ValueType.STRING:
            return self._string(f"the value of {key!r}")
        if kind != ValueType.ARRAY:
            return self._scalars(kind, 1, key)[0]
        kind = self._number("<I", f"the type of {key!r}")
        count = self._number("<Q", f"the length of {key!r}")
        if kind == ValueType.STRING:
            self._check_count(count, 8, f"strings of {key!r}")
            return self._strings(count, key)
        return self._scalars(kind, count, key)

    def _scalars(self, kind: int, count: int, key: str) -> list[Any]:
        if kind not in _SCALARS:
            raise self._damaged(f"metadata key {key!r} has a value of unknown type {kind}")
        dtype = np.dtype(_SCALARS[ValueType(kind)])
        raw = np.frombuffer(self._take(count * dtype.itemsize, f"the value of {key!r}"), dtype)
        return (raw.view(np.uint8) != 0).tolist() if kind == ValueType.BOOL else raw.tolist()

    def _strings(self, count: int, key: str) -> list[str]:
        """Reads strings; a loop with little overhead, because vocabularies have hundreds of thousands."""
        strings: list[str] = []
        offset, view, size = self.offset, self.view, self.size
        length_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            start = offset + 8
            if start > size or (end := start + length_at(view, offset)[0]) > size:
                self.offset = offset
                return [self._string(f"string {len(strings)} of {key!r}")]  # raises, naming what is missing
            strings.append(str(view[start:end], "utf-8", "replace"))
            offset = end
        self.offset = offset
        return strings

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string("a tensor's name", strict=True)
        what = f"the entry of tensor {name!r}"
        num_dims = self._number("<I", what)
        if not 1 <= num_dims <= MAX_DIMENSIONS:
            raise self._damaged(
                f"tensor {name!r} has {num_dims} dimensions; 1 to {MAX_DIMENSIONS} are allowed"
            )
        dims = struct.unpack(f"<{num_dims}Q", self._take(8 * num_dims, what))
        return name, dims[::-1], self._number("<I", what), self._number("<Q", what)

    def _locate(self, infos: list[tuple[str, tuple[int, ...], int, int]]) -> dict[str, GGUFTensor]:
        metadata = Metadata(self.metadata, file=str(self.path))
        alignment = metadata.integer("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if alignment & (alignment - 1):
            raise metadata.wrong("general.alignment", "a power of two")
        start = -(-self.offset // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        unsupported: dict[str, int] = {}
        for name, shape, kind, offset in infos:
            if name in tensors:
                raise self._damaged(f"tensor {name!r} occurs twice")
            if kind not in SUPPORTED_TYPES:
                known = _TYPE_NAMES.get(kind, f"number {kind}")
                unsupported[known] = unsupported.get(known, 0) + 1
                continue
            dtype = GGMLType(kind)
            block, block_bytes = gguf.GGML_QUANT_SIZES[dtype]
            if 0 in shape or shape[-1] % block:
                raise self._damaged(
                    f"tensor {name!r} of type {dtype.name} has shape {list(shape)}; the last number must be "
                    f"a multiple of {block}, none may be 0"
                )
            if offset % alignment:
                raise self._damaged(f"tensor {name!r} starts at {offset}, not at a multiple of {alignment}")
            num_bytes = math.prod(shape) // block * block_bytes
            self._check_end(start + offset + num_bytes, f"tensor {name!r}")
            tensors[name] = GGUFTensor(name, shape, dtype.name, start + offset, num_bytes, self.number)
        if unsupported:
            found = ", ".join(f"{name} ({count} tensors)" for name, count in unsupported.items())
            raise ModelError(
                f"{self.path}: tensor type {found} is not supported; supported are "
                f"{', '.join(t.name for t in SUPPORTED_TYPES)}"
            )
        return dict(sorted(tensors.items(), key=lambda item: item[1].offset))


def _map(path: Path) -> np.ndarray:
    if path.is_dir():
        raise ModelError(f"{path}: is a folder, not a GGUF file")
    try:
        if path.stat().st_size == 0:
            raise ModelError(f"{path}: the file is empty; a GGUF file is needed")
        return np.memmap(path, mode="r", dtype=np.uint8)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
