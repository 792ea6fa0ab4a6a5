"""Real SGLang servers on this machine's CPU, forked from one process that imported SGLang."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tiny_models.py

from sglang_servers import Farm

from tests.serving.zygote import AskingZygote


@pytest.fixture(scope="session")
def farm(python: Path, zygote: AskingZygote, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    """Starts servers that end with the session."""
    made = Farm(python, zygote, tmp_path_factory.mktemp("servers"))
    yield made
    made.close()
