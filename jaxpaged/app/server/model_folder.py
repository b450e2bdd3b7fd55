"""The models of ``--models-dir``."""

from __future__ import annotations

from pathlib import Path

from jaxpaged_model.checkpoint.gguf_file import split_parts

from jaxpaged.app.errors import InputError


def name_of(path: Path) -> str:
    """Name of a model: its folder's, or its file's without ``.gguf`` and the number of the part."""
    if path.is_dir():
        return path.name
    _, parts = split_parts(path.name)
    name = path.name.removesuffix(".gguf")
    return name.removesuffix(f"-00001-of-{len(parts):05d}") if len(parts) > 1 else name


def models_in(folder: Path) -> dict[str, Path]:
    """GGUF files and Hugging Face folders in a folder, by name.

    Raises:
      InputError: there is none, or two have one name.
    """
    if not folder.is_dir():
        raise InputError(f"--models-dir {folder}: no such folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        is_folder = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
        if not is_folder and not (path.suffix == ".gguf" and path.is_file()):
            continue
        if not is_folder and split_parts(path.name)[0] != 1:  # the first part stands for all
            continue
        name = name_of(path)
        if name in found:
            raise InputError(f"--models-dir {folder}: two models have the name {name}")
        found[name] = path
    if not found:
        raise InputError(f"--models-dir {folder}: there is no *.gguf file and no Hugging Face folder in it")
    return found
