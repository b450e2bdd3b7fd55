"""Chat templates of published models, which stand in llama.cpp's sources within llama-cpp-python's on PyPI."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SDIST = "llama-cpp-python==0.3.36"


@functools.cache
def read_templates() -> dict[str, str]:
    """Templates by name; none if they cannot be had. JAXPAGED_TEMPLATES=FOLDER names a folder with them."""
    if folder := os.environ.get("JAXPAGED_TEMPLATES"):
        return {file.stem: file.read_text() for file in sorted(Path(folder).glob("*.jinja"))}
    with tempfile.TemporaryDirectory() as name:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-binary",
            "llama-cpp-python",
        ]
        subprocess.run([*command, "-d", name, SDIST], capture_output=True, timeout=600)
        archives = list(Path(name).glob("*.tar.gz"))
        if not archives:
            return {}
        with tarfile.open(archives[0]) as archive:
            found = {}
            for member in archive.getmembers():
                path = Path(member.name)
                if path.suffix == ".jinja" and path.parent.parts[-2:] == ("models", "templates"):
                    file = archive.extractfile(member)
                    assert file is not None
                    found[path.stem] = file.read().decode()
            return dict(sorted(found.items()))
