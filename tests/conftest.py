from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from .support.inside import force_static

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


@pytest.fixture
def _forget_what_was_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def _as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `generate` compile by itself, as on CUDA."""
    force_static(monkeypatch)
