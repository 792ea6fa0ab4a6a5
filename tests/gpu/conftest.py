"""Tests that need a GPU: skipped without one, each with the reason. None has run on a GPU yet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from genac_megatron import platform

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests; say why they do not run, and on what they would."""
    without_gpu = pytest.mark.skip(reason="no CUDA device here: `make test-gpu` on a machine with one")
    without_te = pytest.mark.skip(reason="Transformer Engine cannot be used here: `genac doctor` says why")
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(without_gpu)
        elif item.get_closest_marker("te") and not platform.has_te():
            item.add_marker(without_te)


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    """A world of this process alone, over NCCL."""
    from genac_megatron.training.layout import init_world

    init_world()
    yield
    torch.cuda.empty_cache()
