"""The reference has every public name, on one page."""

from __future__ import annotations

import importlib
import re
from collections import Counter

import pytest
from blocks import PAGES, text_of

DOCUMENTED = Counter(
    name
    for page in PAGES
    if page.startswith("docs/reference/")
    for name in re.findall(r"^::: (\S+)$", text_of(page), re.M)
)
PACKAGES = (
    "jaxpaged",
    "jaxpaged.attention",
    "jaxpaged.cache",
    "jaxpaged.engine",
    "jaxpaged.generation",
    "jaxpaged.pages",
    "jaxpaged.pictures",
    "jaxpaged.storage",
    "jaxpaged.testing",
    "jaxpaged_model",
)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_documented_once(package: str) -> None:
    top = {name.rpartition(".")[2] for name in DOCUMENTED if name.count(".") == 1}  # a name of two packages
    for name in set(importlib.import_module(package).__all__) - {"__version__"}:
        found = DOCUMENTED[f"{package}.{name}"]
        assert found == 1 or (found == 0 and name in top), f"{package}.{name}"
