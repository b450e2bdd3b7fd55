"""What `make dist` builds: a wheel with the two packages and their data, and a source archive that builds it again."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from datetime import date
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml

import jaxpaged

ROOT = Path(__file__).parents[2]
VERSION = jaxpaged.__version__
WHEEL = ROOT / "dist" / f"jaxpaged-{VERSION}-py3-none-any.whl"
SOURCES = ROOT / "dist" / f"jaxpaged-{VERSION}.tar.gz"
PACKAGES = {"jaxpaged": ROOT / "jaxpaged", "jaxpaged_model": ROOT / "model" / "jaxpaged_model"}
INFO = f"jaxpaged-{VERSION}.dist-info"


def files_of(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def wheel() -> dict[str, bytes]:
    return files_of(WHEEL)


@pytest.fixture(scope="module")
def metadata(wheel):
    return message_from_bytes(wheel[f"{INFO}/METADATA"])


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    sources = {
        f"{package}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name: wheel[name] for name in wheel if not name.startswith(f"{INFO}/")} == sources
    for needed in (
        "py.typed",
        "app/server/pages/index.html",
        "app/server/pages/main.js",
        "pictures/animation.html",
    ):
        assert f"jaxpaged/{needed}" in sources
    model = [name for name in sources if name.endswith(".gguf")]
    assert len(model) == 1 and sources[model[0]].startswith(b"GGUF")
    assert "jaxpaged_model/py.typed" in sources


def test_licences_are_inside(wheel, metadata):
    assert metadata["License-Expression"] == "Apache-2.0"
    for name in ("LICENSE", "NOTICE"):
        assert wheel[f"{INFO}/licenses/{name}"] == (ROOT / name).read_bytes()
    card = wheel["jaxpaged_model/tiny/README.md"].decode()
    assert "| Licence |" in card and "| Data |" in card  # NOTICE sends readers there


def test_the_core_requires_jax_and_numpy_alone(metadata):
    required = [one for one in metadata.get_all("Requires-Dist") if "extra ==" not in one]
    assert sorted(re.split(r"[^\w-]", one)[0] for one in required) == ["jax", "numpy"]


def test_the_page_of_the_index_has_no_relative_links(metadata):
    page = metadata.get_payload()
    assert page.startswith("# jaxpaged") and 'pip install "jaxpaged[' in page
    assert [link for link in re.findall(r"\]\(([^)]*)\)", page) if not link.startswith("https://")] == []


def test_the_sources_build_the_same_wheel(wheel, tmp_path):
    """`make dist` builds the wheel from the source archive; this one comes from the checkout."""
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    assert files_of(tmp_path / WHEEL.name) == wheel


def test_the_sources_hold_tests_and_docs_but_nothing_that_was_built():
    with tarfile.open(SOURCES) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    for needed in (
        "README.md",
        "LICENSE",
        "NOTICE",
        "Makefile",
        "tests/conftest.py",
        "tpu_scripts/__main__.py",
    ):
        assert needed in names
    built = ("models/", "build/", "dist/", ".venv", ".pytest_cache", ".git/")
    assert [name for name in names if name.startswith(built) or "__pycache__" in name] == []


def test_the_version_is_that_of_changelog_and_citation():
    released = re.findall(r"^## \[(.+)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], str(citation["date-released"])) == released[0]
    assert citation["version"] == VERSION and isinstance(citation["date-released"], date)
    assert citation["license"] == "Apache-2.0"
