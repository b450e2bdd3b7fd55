"""The server that most tests ask."""

from __future__ import annotations

from pathlib import Path

import pytest
from http_server import Server


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def slots_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "slots"
    folder.mkdir()
    return folder
