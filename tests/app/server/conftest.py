"""The server that most tests ask, the browser with its stub, and where nothing may be skipped."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from http_server import Server
from stub_server import Stub, stub_server

_NPM = "npm cannot install"
"""Reason of a skip that is one everywhere: agents come from a registry that a machine may not reach."""
_NO_SKIPS = bool(os.environ.get("JAXPAGED_NO_SKIPS"))


def _checked(report: Any) -> Any:
    if report.skipped and _NO_SKIPS and _NPM not in str(report.longrepr):
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


@pytest.fixture(scope="session")
def stub() -> Iterator[Stub]:
    with stub_server() as server:
        yield server


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from browser import chromium  # selenium may be missing where nobody asks for a browser

    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def page(driver: Any, stub: Stub) -> Iterator[Any]:
    from browser import new_page

    with new_page(driver, stub) as page:
        yield page
