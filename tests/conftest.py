"""Hypothesis profiles, and the backends that tests run on."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

from turboquant_np._backend import load

settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile(
    "ci", max_examples=100, deadline=None, derandomize=True, database=None, print_blob=True
)
settings.register_profile("nightly", max_examples=2000, deadline=None, stateful_step_count=100)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `cuda` are skipped where the backend cannot work, with its own reason."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    reason = load("cuda").why_unavailable() if marked else None
    for item in marked if reason else []:
        item.add_marker(pytest.mark.skip(reason=f"no GPU: {reason}"))


@pytest.fixture(scope="session", params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that works on host memory; both must, on every machine."""
    name: str = request.param
    return name
