"""The real model (made once, kept in the cache), its checkpoint, and six gloo ranks."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.pool import Pool

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The Hugging Face folder of SmolLM2-135M-Instruct, in bf16."""
    spec = importlib.util.spec_from_file_location("fetch_smollm2", ROOT / "tools" / "fetch_smollm2.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder: Path = module.ensure()
    return folder


@pytest.fixture(scope="session")
def checkpoint(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It as a checkpoint, by the tool."""
    from genac_megatron.cli import main

    folder = tmp_path_factory.mktemp("smollm2") / "checkpoint"
    given = ["convert", "to-megatron", str(smollm2), str(folder), "--max-shard-size", "100MB", "--quiet"]
    assert main(given) == 0
    return folder


@pytest.fixture(scope="session")
def six() -> Iterator[Pool]:
    """Six gloo ranks of one world: room for TP3 x PP2."""
    ranks = Pool(6)
    yield ranks
    ranks.close()
