from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Tests state laws, not speed: a busy machine must not fail one.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest tests first, so that no process is left alone with one of them at the end."""
    longest = ("exhaustive", "slow", "processes")
    items.sort(key=lambda item: not any(item.get_closest_marker(name) for name in longest))
