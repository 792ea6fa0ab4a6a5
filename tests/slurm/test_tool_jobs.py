"""convert.sh and evaluate.sh as real jobs: from another folder, their codes passed on, nothing left."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from genac_megatron.cluster import script
from genac_megatron.models.hf_folder import HfFolder
from genac_megatron.recipe.loader import load_recipe
from tests.conversion.tiny_folder import make_folder, tiny_shape
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT
from tests.slurm.test_jobs import LIMIT_S, Settings, ending, genac, gone, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ONE = ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=2", "--gpus-per-node=0")
CONVERT, EVALUATE = (str(ROOT / "slurm" / name) for name in ("convert.sh", "evaluate.sh"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    read = HfFolder(folder)
    return {name: read.get(name) for name in read.names}


@pytest.mark.extended  # the conversion that is asked to stop is there and back too
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


def test_a_clone_an_argument_and_a_name_with_spaces(
    cluster: Cluster, recipe: Path, settings: Settings, tmp_path: Path, output: Callable[[], str]
) -> None:
    clone = tmp_path / "my clone"
    shutil.copytree(ROOT / "slurm", clone / "slurm")
    (clone / "genac_megatron").symlink_to(ROOT / "genac_megatron")
    convert = str(clone / "slurm" / "convert.sh")
    job = cluster.submit(*ONE, convert, "to-hf", "not there.sh", "back", cwd=tmp_path, **settings)
    seen = cluster.wait(job, LIMIT_S)
    assert (seen["JobState"], seen["ExitCode"]) == ("FAILED", "2:0"), output()
    assert "no complete checkpoint there" in output()
    name = 'my "run" #2'
    written = tmp_path / "my job.sh"
    written.write_text(script.render(load_recipe(recipe, [f"name='{name}'"]), recipe, [], {}))
    job = cluster.submit("--hold", str(written), cwd=tmp_path, **settings)
    assert cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%j").stdout.strip() == name
    cluster.run("scancel", str(job))


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


def stopped_and_requeued(
    cluster: Cluster, job: int, begun: Callable[[], bool], what: str, output: Callable[[], str]
) -> None:
    """USR1 once `begun`: the job leaves with what is done kept, and is back in the queue."""
    over = ending(cluster, job, output)
    until(begun, what, over=over)
    assert cluster.run("scancel", "--batch", "--signal=USR1", str(job)).returncode == 0
    until(lambda: cluster.job(job)["Restarts"] == "1", "the requeue", over=over)
    gone(job)


def test_a_conversion_that_is_asked_to_stop_is_requeued_and_goes_on(
    cluster: Cluster, settings: Settings, tmp_path: Path, output: Callable[[], str]
) -> None:
    shape = tiny_shape(layers=120, hidden=256, ffn=1024, heads=8, kv_heads=4, head_dim=32)
    source, part = make_folder(tmp_path / "source", shape), tmp_path / "checkpoint.part"
    given = ("to-megatron", "source", "checkpoint", "--max-shard-size=200KB")
    job = cluster.submit(*ONE, CONVERT, *given, cwd=tmp_path, **settings)
    shards = "done/*.json"
    stopped_and_requeued(cluster, job, lambda: len(list(part.glob(shards))) >= 5, "five shards", output)
    assert "genac: stopped: stopped as asked after" in output(), output()
    done = {path.name: path.stat().st_mtime_ns for path in part.glob("weights/*.distcp")}
    seen = cluster.wait(job, LIMIT_S)
    assert (seen["JobState"], seen["ExitCode"], seen["Restarts"]) == ("COMPLETED", "0:0", "1"), output()
    gone(job)
    kept = [name for name, at in done.items() if written(tmp_path / "checkpoint", name) == at]
    assert kept == list(done), "shards of the first attempt were not written again"
    job = cluster.submit(*ONE, CONVERT, "to-hf", "checkpoint", "back", cwd=tmp_path, **settings)
    assert cluster.wait(job, LIMIT_S)["JobState"] == "COMPLETED", output()
    wanted, got = tensors(source), tensors(tmp_path / "back")
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def written(checkpoint: Path, name: str) -> int:
    return (checkpoint / "weights" / name).stat().st_mtime_ns


@pytest.mark.extended  # a tool's job that is asked to stop: the conversion above; parts of evaluations: e2e
def test_an_evaluation_that_is_asked_to_stop_is_requeued_and_goes_on(
    cluster: Cluster, recipe: Path, settings: Settings, tmp_path: Path, output: Callable[[], str]
) -> None:
    """The samples are those of an evaluation that nobody stopped, and none was made twice."""
    given = ("task", "rg:chain_sum", str(recipe), "--problems=30", "--samples=70", "--max-new-tokens=24")
    parts = "stopped/*/parts/*.jsonl"
    job = cluster.submit(*ONE, EVALUATE, *given, "--out=stopped", cwd=tmp_path, **settings)
    stopped_and_requeued(cluster, job, lambda: bool(list(tmp_path.glob(parts))), "a first chunk", output)
    text = output()
    assert "genac: stopped: stopped as asked after" in text, text
    assert "requeue (restart 1)" in text, text
    first = {line for path in tmp_path.glob(parts) for line in path.read_text().splitlines()}
    seen = cluster.wait(job, LIMIT_S)
    assert (seen["JobState"], seen["ExitCode"], seen["Restarts"]) == ("COMPLETED", "0:0", "1"), output()
    gone(job)
    done = genac("evaluate", *given, "--out=whole", cwd=tmp_path, environ=dict(os.environ))
    assert done.returncode == 0, done.stderr
    stopped, whole = (next(tmp_path.glob(f"{name}/*/samples.jsonl")) for name in ("stopped", "whole"))
    assert 0 < len(first) < 2100
    assert first < set(whole.read_text().splitlines())
    assert stopped.read_bytes() == whole.read_bytes()
