"""The types of matrices that stay in memory as a file has them.

The quantized types of GGUF files are codes of a few bits, with a scale and perhaps a minimum for each group.

A number is ``scale * (code - zero)``, or ``scale * code - minimum``. In K-quants, scales and minima are
integers of a few bits, multiplied by one float16 for a super-block of 256 numbers.

Source: ggml's ``ggml-common.h`` and ``ggml-quants.c`` (github.com/ggml-org/llama.cpp). The ``gguf`` package
only dequantizes to float32; tests compare the two.

Floating-point types are numbers without a scale, in GGUF files and in Hugging Face folders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import ml_dtypes
import numpy as np

BLOCK = 32
"""Columns of a block; every group is a block or half of one."""
SUPER_BLOCK = 256
ROWS = 16
"""Rows of a panel, see ``panels``; concatenated matrices begin at multiples of it."""
QUADS = 8
"""Quads of a block, of four columns each, see ``panels``."""
_HALF_FLOAT = np.dtype("<f2")


@dataclass(frozen=True)
class Unpacked:
    """The parts of ``n`` blocks of a file.

    Attributes:
      codes: u8 ``[n, numbers]``; the numbers themselves if they are floating point.
      scales: f16 ``[n, 1]``, one for each block of the file; None if codes are numbers.
      minima: like ``scales``; None if the format has none.
      steps: i8 ``[n, groups]``, factors of the scale; None if each group has its own float16 scale.
      min_steps: u8 ``[n, groups]``, factors of the minimum, likewise.
    """

    codes: np.ndarray
    scales: np.ndarray | None = None
    minima: np.ndarray | None = None
    steps: np.ndarray | None = None
    min_steps: np.ndarray | None = None


@dataclass(frozen=True)
class WeightFormat:
    """A quantized type of GGUF.

    Attributes:
      name: GGUF's name.
      planes: the bits of a code, split into planes: ``(4, 2)`` are four low bits and two high ones.
      zero: the code of 0, or the value of 0 in ``table``.
      group: numbers with one scale, 32 or 16.
      file_block: numbers of a block of the file, 32 or 256.
      file_bytes: bytes of such a block.
      has_minima: True if groups have minima.
      table: values of the codes, plus 128; None if a code is its own value.
    """

    name: str
    planes: tuple[int, ...]
    zero: int
    group: int
    file_block: int
    file_bytes: int
    has_minima: bool = False
    table: tuple[int, ...] | None = None
    unpack_blocks: Callable[[np.ndarray], Unpacked] = field(repr=False, compare=False, kw_only=True)

    @property
    def has_steps(self) -> bool:
        """True if scales are integers, times one float16 for 256 numbers."""
        return self.file_block == SUPER_BLOCK

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return sum(self.planes)

    @property
    def factors(self) -> dict[str, tuple[int, type]]:
        """Parts beside the codes: ``{name: (columns that share a number, numpy type)}``."""
        wide = SUPER_BLOCK if self.has_steps else self.group
        parts = {
            "scales": (wide, np.float16), "steps": (self.group, np.int8),
            "minima": (wide, np.float16), "min_steps": (self.group, np.uint8),
        }  # fmt: skip
        absent = set() if self.has_steps else {"steps", "min_steps"}
        absent |= set() if self.has_minima else {"minima", "min_steps"}
        return {name: part for name, part in parts.items() if name not in absent}

    def unpack(self, raw: np.ndarray) -> Unpacked:
        """Splits a matrix's rows, u8 ``[rows, bytes]``, into its parts, ``[rows, numbers of a row]`` each."""
        rows = len(raw)
        found = self.unpack_blocks(raw.reshape(-1, self.file_bytes))

        def by_row(part: np.ndarray | None) -> np.ndarray | None:
            return None if part is None else part.reshape(rows, -1)

        return Unpacked(
            found.codes.reshape(rows, -1),
            *map(by_row, (found.scales, found.minima, found.steps, found.min_steps)),
        )


@dataclass(frozen=True)
class FloatFormat:
    """A floating-point type: codes are the numbers, and there is no scale.

    Attributes:
      name: its name in GGUF files and in safetensors.
      dtype: numpy's type of a number.
    """

    name: str
    dtype: np.dtype

    group: ClassVar[int] = BLOCK
    has_minima: ClassVar[bool] = False
    has_steps: ClassVar[bool] = False

    @property
    def bits(self) -> int:
        """Bits of a number."""
        return 8 * self.dtype.itemsize

    @property
    def factors(self) -> dict[str, tuple[int, type]]:
        """No parts beside the codes."""
        return {}

    def unpack(self, raw: np.ndarray) -> Unpacked:
        """The numbers of a matrix's rows, u8 ``[rows, bytes]``, which are not copied."""
        return Unpacked(raw.view(self.dtype))


StoredFormat = WeightFormat | FloatFormat


# --- the bytes of each type -------------------------------------------------------------------------------------


def _f16(raw: np.ndarray, start: int) -> np.ndarray:
    return np.ascontiguousarray(raw[:, start : start + 2]).view(_HALF_FLOAT)


def _split(raw: np.ndarray, bits: int, run: int) -> np.ndarray:
    """Unpacks codes of ``bits`` bits: of each run of bytes the lowest bits of all, then the next bits of all."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    parts = raw.reshape(len(raw), -1, 1, run) >> shifts
    return (parts & np.uint8((1 << bits) - 1)).reshape(len(raw), -1)


def _q8_0(raw: np.ndarray) -> Unpacked:
    return Unpacked(raw[:, 2:] ^ np.uint8(128), _f16(raw, 0))


def _nibbles(minima: bool) -> Callable[[np.ndarray], Unpacked]:
    def unpack(raw: np.ndarray) -> Unpacked:
        codes = _split(raw[:, 4 if minima else 2 :], 4, 16)
        return Unpacked(codes, _f16(raw, 0), -_f16(raw, 2) if minima else None)

    return unpack


def _fives(minima: bool) -> Callable[[np.ndarray], Unpacked]:
    def unpack(raw: np.ndarray) -> Unpacked:
        start = 4 if minima else 2
        bits = np.unpackbits(raw[:, start : start + 4], axis=1, bitorder="little")
        codes = _split(raw[:, start + 4 :], 4, 16) | bits << 4
        return Unpacked(codes, _f16(raw, 0), -_f16(raw, 2) if minima else None)

    return unpack


def _six_bit_pairs(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima of 6 bits in 12 bytes."""
    head, middle, tail = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = np.concatenate([head & 63, tail & 15 | head >> 6 << 4], axis=1)
    minima = np.concatenate([middle & 63, tail >> 4 | middle >> 6 << 4], axis=1)
    return scales.view(np.int8), minima


def _q4_k(raw: np.ndarray) -> Unpacked:
    steps, min_steps = _six_bit_pairs(raw[:, 4:16])
    return Unpacked(_split(raw[:, 16:], 4, 32), _f16(raw, 0), _f16(raw, 2), steps, min_steps)


def _q5_k(raw: np.ndarray) -> Unpacked:
    steps, min_steps = _six_bit_pairs(raw[:, 4:16])
    codes = _split(raw[:, 48:], 4, 32) | _split(raw[:, 16:48], 1, 32) << 4
    return Unpacked(codes, _f16(raw, 0), _f16(raw, 2), steps, min_steps)


def _q6_k(raw: np.ndarray) -> Unpacked:
    codes = _split(raw[:, :128], 4, 64) | _split(raw[:, 128:192], 2, 32) << 4
    return Unpacked(codes, _f16(raw, 208), steps=np.ascontiguousarray(raw[:, 192:208]).view(np.int8))


def _q2_k(raw: np.ndarray) -> Unpacked:
    steps = raw[:, :16]
    return Unpacked(
        _split(raw[:, 16:80], 2, 32), _f16(raw, 80), _f16(raw, 82), (steps & 15).view(np.int8), steps >> 4
    )


def _less_32(steps: np.ndarray) -> np.ndarray:
    """Signed values of codes of 6 bits."""
    return steps.astype(np.int8) - np.int8(32)


def _q3_k(raw: np.ndarray) -> Unpacked:
    codes = _split(raw[:, 32:96], 2, 32) | _split(raw[:, :32], 1, 32) << 2
    steps = _split(raw[:, 96:104], 4, 8) | _split(raw[:, 104:108], 2, 4) << 4
    return Unpacked(codes, _f16(raw, 108), steps=_less_32(steps))


def _iq4_xs(raw: np.ndarray) -> Unpacked:
    low = np.stack([raw[:, 4:8] & 15, raw[:, 4:8] >> 4], axis=-1).reshape(len(raw), 8)
    high = _split(raw[:, 2:4], 2, 1)
    return Unpacked(_split(raw[:, 8:], 4, 16), _f16(raw, 0), steps=_less_32(low | high << 4))


_IQ4_TABLE = tuple(
    128 + x for x in (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
)

_FORMATS = (
    WeightFormat("Q8_0", (8,), 128, 32, 32, 34, unpack_blocks=_q8_0),
    WeightFormat("Q4_0", (4,), 8, 32, 32, 18, unpack_blocks=_nibbles(False)),
    WeightFormat("Q4_1", (4,), 0, 32, 32, 20, True, unpack_blocks=_nibbles(True)),
    WeightFormat("Q5_0", (4, 1), 16, 32, 32, 22, unpack_blocks=_fives(False)),
    WeightFormat("Q5_1", (4, 1), 0, 32, 32, 24, True, unpack_blocks=_fives(True)),
    WeightFormat("Q2_K", (2,), 0, 16, 256, 84, True, unpack_blocks=_q2_k),
    WeightFormat("Q3_K", (2, 1), 4, 16, 256, 110, unpack_blocks=_q3_k),
    WeightFormat("Q4_K", (4,), 0, 32, 256, 144, True, unpack_blocks=_q4_k),
    WeightFormat("Q5_K", (4, 1), 0, 32, 256, 176, True, unpack_blocks=_q5_k),
    WeightFormat("Q6_K", (4, 2), 32, 16, 256, 210, unpack_blocks=_q6_k),
    WeightFormat("IQ4_NL", (4,), 128, 32, 32, 18, table=_IQ4_TABLE, unpack_blocks=_nibbles(False)),
    WeightFormat("IQ4_XS", (4,), 128, 32, 256, 136, table=_IQ4_TABLE, unpack_blocks=_iq4_xs),
)
WEIGHT_FORMATS: dict[str, WeightFormat] = {one.name: one for one in _FORMATS}
"""The quantized formats by name."""
FLOAT_FORMATS: dict[str, FloatFormat] = {
    name: FloatFormat(name, np.dtype(kind))
    for name, kind in (("F32", "<f4"), ("F16", "<f2"), ("BF16", ml_dtypes.bfloat16))
}
STORED_FORMATS: dict[str, StoredFormat] = {**WEIGHT_FORMATS, **FLOAT_FORMATS}
"""All formats by name."""
