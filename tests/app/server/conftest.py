"""The server that most tests ask; and where nothing may be skipped, because all that tests need is there."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from http_server import Server

_NO_SKIPS = bool(os.environ.get("JAXPAGED_NO_SKIPS"))


def _checked(report: Any) -> Any:
    if report.skipped and _NO_SKIPS:
        report.outcome, report.longrepr = "failed", f"nothing may be skipped here: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    return _checked((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    return _checked((yield))


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def slots_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "slots"
    folder.mkdir()
    return folder
