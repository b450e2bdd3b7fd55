"""XLA's foreign function interface for custom calls: the offsets of its C structures.

Kernels read these structures by offset. ``check_layout`` compares jaxlib's header, field by field,
with the offsets here.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

_FIELDS: dict[str, tuple[str, ...]] = {
    "XLA_FFI_CallFrame": ("struct_size", "extension_start", "api", "ctx", "stage", "args", "rets", "attrs"),
    "XLA_FFI_Args": ("struct_size", "extension_start", "size", "types", "args"),
    "XLA_FFI_Rets": ("struct_size", "extension_start", "size", "types", "rets"),
    "XLA_FFI_Buffer": ("struct_size", "extension_start", "dtype", "data", "rank", "dims"),
    "XLA_FFI_Api_Version": ("struct_size", "extension_start", "major_version", "minor_version"),
    "XLA_FFI_Metadata": ("struct_size", "api_version", "traits"),
    "XLA_FFI_Metadata_Extension": ("extension_base", "metadata"),
    "XLA_FFI_(?:Extension_Base|InternalExtension)": ("struct_size", "type", "next"),
    "XLA_FFI_ThreadPool_Schedule_Args": ("struct_size", "extension_start", "ctx", "task", "data"),
    "XLA_FFI_ThreadPool_NumThreads_Args": ("struct_size", "extension_start", "ctx", "num_threads"),
    "XLA_FFI_Error_Create_Args": ("struct_size", "extension_start", "message", "errc"),
    "XLA_FFI_Error_Destroy_Args": ("struct_size", "extension_start", "error"),
}
"""First fields of each structure, in order; the offsets below follow from them on a 64-bit machine.
Some names are patterns, because jax 0.12 renamed them."""
_API = ("struct_size", "extension_start", "api_version", "internal_api")
_FIRST_FUNCTION = 48
_FUNCTIONS = {"Error_Create": 0, "Error_Destroy": 2, "ThreadPool_Schedule": 11, "ThreadPool_NumThreads": 12}
"""XLA's functions that are called here, and their indices in its table."""
ERROR_CREATE, ERROR_DESTROY, SCHEDULE, NUM_THREADS = (
    _FIRST_FUNCTION + 8 * place for place in _FUNCTIONS.values()
)


class LayoutError(ImportError):
    """Raised if jaxlib's foreign function interface has other offsets than assumed here."""


def header() -> Path:
    """The header of the interface in jaxlib."""
    spec = importlib.util.find_spec("jaxlib")
    folder = Path(str(spec.origin)).parent if spec is not None else Path()
    return folder / "include" / "xla" / "ffi" / "api" / "c_api.h"


def check_layout() -> tuple[int, int]:
    """Checks the structures of XLA's foreign function interface, and returns its version; runs on
    import.

    Raises:
      LayoutError: a structure has other fields than assumed here, or jaxlib has no header.
    """
    path = header()
    try:
        text = path.read_text()
    except OSError as error:
        raise LayoutError(f"jaxlib has no readable {path.name}: {error.strerror}") from None
    text = re.sub(r"//[^\n]*", "", text)
    for name, fields in _FIELDS.items():
        found = _fields_of(text, name)
        if found[: len(fields)] != fields:
            raise LayoutError(f"{name} begins with {', '.join(found) or 'nothing'}, not {', '.join(fields)}")
    found = _fields_of(text, "XLA_FFI_Api")
    functions = tuple(re.findall(r"_XLA_FFI_API_STRUCT_FIELD\(XLA_FFI_(\w+)\)", text))
    places = {name: place for place, name in enumerate(functions) if name in _FUNCTIONS}
    if found[: len(_API)] != _API or places != _FUNCTIONS:
        raise LayoutError("the table of functions XLA_FFI_Api has other entries")
    version = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    if not all(version):
        raise LayoutError("the header names no version")
    major, minor = (int(found[1]) for found in version if found)
    return major, minor


def _fields_of(text: str, name: str) -> tuple[str, ...]:
    """Names of a structure's plain fields, in order."""
    body = re.search(rf"struct {name} \{{(.*?)\}}", text, re.DOTALL)
    return tuple(re.findall(r"(\w+)\s*;", body[1])) if body else ()


MAJOR, MINOR = check_layout()
