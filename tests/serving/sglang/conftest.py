"""Real SGLang servers on this machine's CPU, forked from one process that imported SGLang."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tiny_models.py

from sglang_servers import Asked, Farm

from genac_megatron.serving.sglang.server import PYTHON_VARIABLE, serving_python


@pytest.fixture(scope="session")
def python() -> Path:
    """The serving environment's interpreter."""
    if PYTHON_VARIABLE not in os.environ:
        pytest.skip(
            f"{PYTHON_VARIABLE} is not set: `make test-serving` builds SGLang's environment and sets it"
        )
    return serving_python()


@pytest.fixture(scope="session")
def farm(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    """Starts servers that end with the session."""
    made = Farm(python, tmp_path_factory.mktemp("servers"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def asked(python: Path) -> Iterator[Asked]:
    """A process that has imported SGLang, to run lines of Python in."""
    made = Asked(python)
    yield made
    made.close()
