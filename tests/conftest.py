"""Shared by all tests: hypothesis without a time limit per example, as the first one pays for imports."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from genac_megatron.platform import uncollected

settings.register_profile("genac", deadline=None)
settings.load_profile("genac")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Test modules import torch and more."""
    with uncollected():
        return (yield)  # type: ignore[misc]
