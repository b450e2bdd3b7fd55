"""An engine that tests share, because it compiles for seconds."""

import pytest
from engine_kit import NUM_PAGES, make_engine

from jaxpaged.engine import Engine


@pytest.fixture(scope="session")
def compiled() -> Engine:
    return make_engine()


@pytest.fixture
def engine(compiled: Engine) -> Engine:
    """The engine that tests share, empty."""
    assert not compiled.has_work
    compiled.drop_prefix_cache()
    assert compiled.stats().pages_free == NUM_PAGES
    return compiled
