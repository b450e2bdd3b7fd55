"""Compiled programs on disk, found again without being traced.

JAX's compilation cache keeps what XLA made of a program; to look it up there, the program is traced and lowered first,
which for a model of 30 layers takes longer than all else that starting takes. Here the key is what tracing depends on:
the sources, the versions, the machine, the settings, and the shapes of the arguments.

Programs are pickles, as JAX serializes them, so the folder must be one that only its user can write. Nothing is kept
until ``set_directory`` names one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import pickle
import platform
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.serialize_executable import deserialize_and_load, serialize

MOST_PROGRAMS = 256
"""The folder's; of more, those go that were not used for longest."""
_SUFFIX = ".program"
_DIRECTORY = "jax_compilation_cache_dir"
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "numba", "llvmlite")
_VARIABLES = ("JAX", "XLA", "PJRT", "NUMBA")
_SETTINGS = (
    "jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion", "jax_numpy_rank_promotion", "jax_debug_nans", "jax_debug_infs", "jax_disable_jit",
)  # fmt: skip

_folder: Path | None = None
_targets: dict[str, tuple[str, str, tuple[Any, ...]]] = {}


def set_directory(folder: Path | None) -> None:
    """Programs compiled from now on are kept in ``folder``, which is made for its user alone; None = nowhere.

    Raises:
      OSError: it cannot be made, or not be written.
    """
    global _folder
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "not writable", str(folder))
    _folder = folder


def register_target_loader(name: str, function: Callable[..., Any], *arguments: Any) -> None:
    """Tells how the custom call ``name`` comes to be: ``function(*arguments)``, a function of a module.

    A program that is found again may ask for calls that this process has not made yet.
    """
    _targets[name] = function.__module__, function.__qualname__, arguments


@functools.cache
def source_digest(folder: Path) -> str:
    """Of all Python files under ``folder``, as they were when this was first asked."""
    content = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content.update(f"{path.relative_to(folder)}\n".encode())
        content.update(path.read_bytes())
    return content.hexdigest()


class CachedExecutable(NamedTuple):
    """A program from ``compiled``."""

    program: Any
    """``jax.stages.Compiled``."""
    found: bool
    """Whether it was on disk; else it was compiled now."""


def cached_compile(
    lower: Callable[[], Any], name: str, static: tuple[Any, ...], arguments: tuple[Any, ...]
) -> CachedExecutable:
    """``lower().compile()``, or what it was when it was last asked for.

    Args:
      lower: traces and lowers; returns ``jax.stages.Lowered``.
      name: says with ``static`` and ``arguments`` which program it is.
      static: what it closes over. A function has an attribute ``program_key``, a text that says all it depends on,
        or the program is not kept; anything else has a ``repr`` that does.
      arguments: pytrees of arrays or ``jax.ShapeDtypeStruct``, what the program will be called with.
    """
    key = None if _folder is None else _key(name, static, arguments)
    if _folder is None or key is None:
        return CachedExecutable(lower().compile(), found=False)
    path = _folder / f"{key}{_SUFFIX}"
    if (program := _read(path)) is not None:
        return CachedExecutable(program, found=True)
    with _without_jaxs_cache():
        program = lower().compile()
    _write(path, program)
    return CachedExecutable(program, found=False)


# --- what a program depends on ----------------------------------------------------------------------------------


def _key(name: str, static: tuple[Any, ...], arguments: tuple[Any, ...]) -> str | None:
    parts = [name, _surroundings(), *map(_described, static)]
    leaves, structure = jax.tree.flatten(arguments)
    parts.append(str(structure))
    for leaf in leaves:
        if isinstance(getattr(leaf, "sharding", None), jax.sharding.NamedSharding):
            return None  # a program of a mesh names its devices, which are no pickles
        parts.append(f"{leaf.dtype}{leaf.shape}{getattr(leaf, 'weak_type', False)}")
    # An address says nothing to another process.
    if any(part is None or " at 0x" in part for part in parts):
        return None
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _described(value: Any) -> str | None:
    return getattr(value, "program_key", None) if callable(value) else repr(value)


def _surroundings() -> str:
    """Everything outside a program that changes what is compiled."""
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
    """The CPU's name and what it can do: a home folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "Features", "CPU part")
    found = {line.partition(":")[0].strip(): line for line in reversed(lines) if line.startswith(wanted)}
    return platform.machine() + platform.processor() + "".join(found[name] for name in sorted(found))


@contextlib.contextmanager
def _without_jaxs_cache() -> Iterator[None]:
    """A program that XLA has read from JAX's cache cannot be serialized again: on CPUs, functions are missing then."""
    before = getattr(jax.config, _DIRECTORY)
    jax.config.update(_DIRECTORY, None)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update(_DIRECTORY, before)
        compilation_cache.reset_cache()


# --- files ------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    """The program, or None: there is none, or it was damaged or made by something else than this."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        return None
    try:
        serialized, inputs, outputs, targets = pickle.loads(content[32:])
        for module, function, arguments in targets:
            getattr(importlib.import_module(module), function)(*arguments)
        program = deserialize_and_load(serialized, inputs, outputs)
    except (
        jax.errors.JaxRuntimeError,
        pickle.UnpicklingError,
        AttributeError,
        ImportError,
        TypeError,
        ValueError,
    ):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return program


def _write(path: Path, program: Any) -> None:
    """Whole or not at all; a program that cannot be serialized, or a full disk, is no error."""
    try:
        serialized, inputs, outputs = serialize(program)
    except (ValueError, NotImplementedError):
        return
    targets = [how for name, how in _targets.items() if name.encode() in serialized]
    content = pickle.dumps((serialized, inputs, outputs, targets))
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=path.parent) as aside:
        whole = Path(aside) / path.name
        whole.write_bytes(hashlib.sha256(content).digest() + content)
        os.replace(whole, path)
        _forget_oldest(path.parent)


def _forget_oldest(folder: Path) -> None:
    found = sorted(folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime)
    for path in found[:-MOST_PROGRAMS]:
        path.unlink(missing_ok=True)
