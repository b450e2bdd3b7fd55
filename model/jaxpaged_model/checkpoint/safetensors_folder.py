"""A Hugging Face model folder: ``config.json`` and safetensors files, one tensor at a time, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxpaged_model.metadata import ModelError, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class SafetensorsTensor:
    """Location of one tensor: ``dtype`` by safetensors' name (``"BF16"``), ``file`` inside the folder."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    file: str


class SafetensorsFolder:
    """The weights of a model folder.

    Attributes:
      path: the folder.
      config: content of ``config.json``.
      tensors: by name, in the order of the files.
      size_bytes: size of all weight files.

    Raises:
      ModelError: a file is missing, damaged or truncated, or of a kind that is not supported.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        names = self._files()
        self._open = {name: self._open_file(name) for name in names}
        self.tensors: dict[str, SafetensorsTensor] = {}
        for file, reader in self._open.items():
            for name in reader.offset_keys():
                part = reader.get_slice(name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                if dtype not in ITEM_BYTES:
                    raise ModelError(
                        f"{self.path / file}: type {dtype} of tensor {name!r} is not supported; "
                        f"supported are {', '.join(ITEM_BYTES)}"
                    )
                self.tensors[name] = SafetensorsTensor(
                    name, shape, dtype, math.prod(shape) * ITEM_BYTES[dtype], file
                )
        self.size_bytes = sum((self.path / name).stat().st_size for name in names)

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> np.ndarray:
        """One tensor's values in their stored type; ``part``, slices of its axes, reads a part alone."""
        file = self._open[self.tensors[name].file]
        return file.get_tensor(name) if part is None else file.get_slice(name)[part]

    def raw(self, name: str, part: tuple[slice, ...] | None = None) -> np.ndarray:
        """One tensor's bytes, or those of a part, u8 ``[rows, bytes of a row]``."""
        return np.ascontiguousarray(self.read(name, part)).view(np.uint8)

    def release(self, name: str) -> None:
        """Does nothing: no bytes stay mapped."""

    def sample(self, name: str) -> bytes:
        """The tensor's first, middle and last row."""
        tensor = self.tensors[name]
        if not tensor.shape or not tensor.num_bytes:
            return self.read(name).tobytes()
        part, rows = self._open[tensor.file].get_slice(name), tensor.shape[0]
        return b"".join(part[row : row + 1].tobytes() for row in (0, rows // 2, rows - 1))

    def _files(self) -> list[str]:
        index = self.path / INDEX
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ModelError(f"{index}: has no weight_map")
            names = sorted({str(name) for name in weight_map.values()})
            if outside := [name for name in names if Path(name).name != name]:
                raise ModelError(f"{index}: names a file outside the folder: {outside[0]}")
            if missing := [name for name in names if not (self.path / name).is_file()]:
                more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
                raise ModelError(
                    f"{self.path}: {INDEX} names files that are missing: {', '.join(missing[:3])}{more}"
                )
            return names
        if (self.path / SINGLE).is_file():
            return [SINGLE]
        if others := [p.name for kind in ("*.bin", "*.pth") for p in sorted(self.path.glob(kind))]:
            raise ModelError(
                f"{self.path}: holds {others[0]} only; weights are needed as safetensors ({SINGLE})"
            )
        raise ModelError(f"{self.path}: no weights: neither {SINGLE} nor {INDEX}")

    def _open_file(self, name: str) -> Any:
        path = self.path / name
        try:
            return safe_open(path, framework="numpy")
        except SafetensorError as error:
            raise ModelError(
                f"{path}: truncated or no safetensors file ({path.stat().st_size} bytes): {error}"
            ) from None
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
