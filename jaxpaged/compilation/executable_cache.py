"""Executable cache: compiled programs on disk, loaded without tracing.

JAX's compilation cache holds what XLA made of a program; to look it up there, the program is traced
and lowered first, which for a model of 30 layers takes longer than all else of a start. The key
here is what tracing depends on: the sources, the versions, the machine, the settings, and the
shapes of the arguments.

Nothing is written until ``set_directory`` names a folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import pickle
import platform
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from jaxpaged.compilation.cache_folder import private_folder, read_entry, write_entry
from jaxpaged.compilation.options import compiler_options

_SUFFIX = ".program"
_DIRECTORY = "jax_compilation_cache_dir"
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "numba", "llvmlite")
_VARIABLES = ("JAX", "XLA", "PJRT", "NUMBA")
_SETTINGS = (
    "jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion", "jax_numpy_rank_promotion", "jax_debug_nans", "jax_debug_infs", "jax_disable_jit",
)  # fmt: skip

_folder: Path | None = None
_lock = threading.Lock()
_num_without = 0
"""Number of threads that compile without JAX's cache."""
_directory: str | None = None
"""JAX's cache otherwise."""
_targets: dict[str, tuple[str, str, tuple[Any, ...]]] = {}


def set_directory(folder: Path | None) -> None:
    """Sets the folder for programs compiled from now on, created private to its user; None = no
    cache.

    Raises:
      OSError: it cannot be created or written to, or other users own it or may write to it.
    """
    global _folder
    _folder = None if folder is None else private_folder(folder)


def register_target_loader(name: str, function: Callable[..., Any], *arguments: Any) -> None:
    """Registers ``function(*arguments)``, a function of a module, which registers the custom call
    ``name``.

    A program from the cache may contain calls that this process has not registered yet.
    """
    _targets[name] = function.__module__, function.__qualname__, arguments


@functools.cache
def source_digest(folder: Path) -> str:
    """SHA-256 of all Python files under ``folder`` at the first call."""
    content = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content.update(f"{path.relative_to(folder)}\n".encode())
        content.update(path.read_bytes())
    return content.hexdigest()


class CachedExecutable(NamedTuple):
    """Program from ``cached_compile``."""

    program: Any
    """``jax.stages.Compiled``."""
    cache_hit: bool
    """True if it was loaded from disk, False if it was compiled now."""


def cached_compile(
    lower: Callable[[], Any], name: str, static: tuple[Any, ...], arguments: tuple[Any, ...]
) -> CachedExecutable:
    """``lower().compile()``, or the same program from the cache.

    Args:
      lower: traces and lowers; returns ``jax.stages.Lowered``.
      name: identifies the program, with ``static`` and ``arguments``.
      static: values that it closes over. A function has an attribute ``program_key``, a text that
        names all it depends on, or the program is not cached; the ``repr`` of any other value does.
      arguments: pytrees of arrays or ``jax.ShapeDtypeStruct`` that the program will be called with.
    """
    key = None if _folder is None else _key(name, static, arguments)
    if _folder is None or key is None:
        return CachedExecutable(_compiled(lower()), cache_hit=False)
    path = _folder / f"{key}{_SUFFIX}"
    if (program := _read(path)) is not None:
        return CachedExecutable(program, cache_hit=True)
    with _without_jax_cache():
        program = _compiled(lower())
    _write(path, program)
    return CachedExecutable(program, cache_hit=False)


def _compiled(lowered: Any) -> Any:
    return lowered.compile(compiler_options=compiler_options(jax.default_backend()))


# --- keys ----------------------------------------------------------------------------------


def _key(name: str, static: tuple[Any, ...], arguments: tuple[Any, ...]) -> str | None:
    parts = [name, _environment(), *map(_description, static)]
    leaves, structure = jax.tree.flatten(arguments)
    parts.append(str(structure))
    for leaf in leaves:
        if isinstance(getattr(leaf, "sharding", None), jax.sharding.NamedSharding):
            return None  # a program of a mesh names its devices, which cannot be pickled
        parts.append(f"{leaf.dtype}{leaf.shape}{getattr(leaf, 'weak_type', False)}")
    # Addresses differ between processes.
    if any(part is None or " at 0x" in part for part in parts):
        return None
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _description(value: Any) -> str | None:
    return getattr(value, "program_key", None) if callable(value) else repr(value)


def _environment() -> str:
    """Everything outside a program that changes the compiled code."""
    device = jax.devices()[0]
    settings = [f"{name}={getattr(jax.config, name, None)}" for name in _SETTINGS]
    variables = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)]
    variables = [text for text in variables if "CACHE" not in text.partition("=")[0]]
    machine = (device.platform, device.device_kind, device.client.platform_version, str(len(jax.devices())))
    return "\n".join([_installed(), *machine, *settings, *variables])


@functools.cache
def _installed() -> str:
    versions = []
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return " ".join(
        [platform.python_version(), *versions, source_digest(Path(__file__).parents[1]), _processor()]
    )


def _processor() -> str:
    """Name and features of the CPU: machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "Features", "CPU part")
    found = {line.partition(":")[0].strip(): line for line in reversed(lines) if line.startswith(wanted)}
    return platform.machine() + platform.processor() + "".join(found[name] for name in sorted(found))


@contextlib.contextmanager
def _without_jax_cache() -> Iterator[None]:
    """Disables JAX's cache, for all threads: on CPUs, a program read from it lacks functions when it
    is serialized again."""
    global _num_without, _directory
    with _lock:
        if _num_without == 0:
            _directory = getattr(jax.config, _DIRECTORY)
            jax.config.update(_DIRECTORY, None)
            compilation_cache.reset_cache()
        _num_without += 1
    try:
        yield
    finally:
        with _lock:
            _num_without -= 1
            if _num_without == 0:
                jax.config.update(_DIRECTORY, _directory)
                compilation_cache.reset_cache()


# --- files ------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    """The program, or None if there is none that can be loaded here."""
    content = read_entry(path)
    if content is None:
        return None
    try:
        serialized, inputs, outputs, targets = pickle.loads(content)
        for module, function, arguments in targets:
            getattr(importlib.import_module(module), function)(*arguments)
        # By default, a program of one device is loaded for all.
        return deserialize_and_load(serialized, inputs, outputs, execution_devices=jax.devices()[:1])
    except (
        jax.errors.JaxRuntimeError,
        pickle.UnpicklingError,
        AttributeError,
        ImportError,
        TypeError,
        ValueError,
    ):
        return None


def _write(path: Path, program: Any) -> None:
    """Writes a program, unless it cannot be serialized."""
    try:
        serialized, inputs, outputs = serialize(program)
    except (ValueError, NotImplementedError):
        return
    targets = [loader for name, loader in _targets.items() if name.encode() in serialized]
    write_entry(path, pickle.dumps((serialized, inputs, outputs, targets)))
