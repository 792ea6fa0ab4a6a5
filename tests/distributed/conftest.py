"""The pool of gloo ranks that distributed tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four gloo ranks of one world, on the CPU."""
    ranks = Pool()
    yield ranks
    ranks.close()
