"""Eight devices on one machine.

XLA's CPU client makes as many as it is told to before it starts, so these tests are a process of their own:
``python -m pytest tests/sharding``. Beside other tests, which start it with one device, they are skipped.
"""

import os
import sys

import pytest

NUM_DEVICES = 8

if "jax" not in sys.modules:
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={NUM_DEVICES}"
    # In a collective every device waits on a thread of its own, and kernels need some beside them.
    os.environ["NPROC"] = str(max(2 * NUM_DEVICES, int(os.environ.get("NPROC", "0"))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Programs over eight devices take their time: `make test-all` runs them."""
    for item in items:
        if "sharding" in item.path.parts:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def eight_devices() -> None:
    """Skips all of it where jax has started with fewer devices."""
    import jax

    if (count := jax.device_count()) < NUM_DEVICES:
        pytest.skip(
            f"needs {NUM_DEVICES} devices, jax has started with {count}; run tests/sharding as its own process"
        )
