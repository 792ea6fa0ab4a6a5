"""The process that has imported SGLang, for all serving tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from genac_megatron.serving.sglang.server import PYTHON_VARIABLE, serving_python
from tests.serving.zygote import AskingZygote


@pytest.fixture(scope="session")
def python() -> Path:
    """The serving environment's interpreter."""
    if PYTHON_VARIABLE not in os.environ:
        pytest.skip(
            f"{PYTHON_VARIABLE} is not set: `make test-serving` builds SGLang's environment and sets it"
        )
    return serving_python()


@pytest.fixture(scope="session")
def zygote(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AskingZygote]:
    """Forks servers in seconds, and answers what is asked of SGLang itself."""
    made = AskingZygote(python, tmp_path_factory.mktemp("zygote") / "zygote.log")
    yield made
    made.close()
