"""convert.sh and evaluate.sh as real jobs: from another folder, their codes passed on, nothing left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from genac_megatron.models.hf_folder import HfFolder
from tests.conversion.tiny_folder import make_folder, tiny_shape
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT
from tests.slurm.test_jobs import LIMIT_S, Settings, gone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ONE = ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=2", "--gpus-per-node=0")
CONVERT, EVALUATE = (str(ROOT / "slurm" / name) for name in ("convert.sh", "evaluate.sh"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    read = HfFolder(folder)
    return {name: read.get(name) for name in read.names}


def test_convert_there_and_back(
    cluster: Cluster, settings: Settings, tmp_path: Path, output: Callable[[], str]
) -> None:
    """Two jobs in a row: a Hugging Face folder to a checkpoint and to a folder again, bit for bit."""
    source = make_folder(tmp_path / "source", tiny_shape())
    for given in (("to-megatron", "source", "checkpoint"), ("to-hf", "checkpoint", "back")):
        job = cluster.submit(*ONE, CONVERT, *given, cwd=tmp_path, **settings)
        seen = cluster.wait(job, LIMIT_S)
        assert (seen["JobState"], seen["ExitCode"]) == ("COMPLETED", "0:0"), output()
        gone(job)
    assert output().count("genac: genac convert ended with code 0") == 2
    wanted, got = tensors(source), tensors(tmp_path / "back")
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_a_conversion_of_nothing_ends_with_2(
    cluster: Cluster, settings: Settings, tmp_path: Path, output: Callable[[], str]
) -> None:
    job = cluster.submit(*ONE, CONVERT, "to-hf", "nothing", "back", cwd=tmp_path, **settings)
    seen = cluster.wait(job, LIMIT_S)
    assert (seen["JobState"], seen["ExitCode"]) == ("FAILED", "2:0"), output()
    assert "no complete checkpoint there" in output()


def test_evaluate(
    cluster: Cluster, recipe: Path, settings: Settings, tmp_path: Path, output: Callable[[], str]
) -> None:
    """A benchmark's problems on the recipe's two ranks, started by the command on the first node."""
    given = ("task", "rg:chain_sum", str(recipe), "--out=scores", "--problems=4", "--samples=2")
    job = cluster.submit(*ONE, EVALUATE, *given, "--max-new-tokens=8", cwd=tmp_path, **settings)
    seen = cluster.wait(job, LIMIT_S)
    assert (seen["JobState"], seen["ExitCode"]) == ("COMPLETED", "0:0"), output()
    assert "genac: genac evaluate ended with code 0" in output()
    gone(job)
    samples = next(tmp_path.glob("scores/*/samples.jsonl"))
    asked = {(row["index"], row["sample"]) for row in map(json.loads, samples.read_text().splitlines())}
    assert len(asked) == 8
