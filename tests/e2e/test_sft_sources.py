"""A critic of several sources: masked traces of a longer task in its SFT and in REINFORCE, a resume inside
REINFORCE, and a gate that goes back to the weights before it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from tests.e2e.test_gates import SMALL
from tests.e2e.test_run import rows
from tests.warm import genac

TASK = {"kind": "state_tracking", "objects": 3, "heldout_size": 16}
LONG = {"name": "long", "scored": False, "task": {**TASK, "min_swaps": 3, "max_swaps": 4}}
ROLLOUT = {"prompts": 4, "samples": 2, "max_new_tokens": 16}
RECIPE: dict[str, Any] = {
    **SMALL,
    "judging": {**SMALL["judging"], "max_new_tokens": 40},
    "stages": [
        {"kind": "sft", "name": "sft-critic", "role": "critic", "data": "traces", "size": 20, "epochs": 1,
         "batch": 5, "length_buckets": 2, "rollout": ROLLOUT, "heldout": {"size": 4, "every": 2},
         "gate": {"action": "off"},
         "sources": [{"name": "short", "share": 0.4}, {**LONG, "share": 0.3},
                     {"name": "body", "share": 0.15, "data": "demonstrations", "phase": [0.5, 1.0]},
                     {"name": "drawn", "share": 0.15,
                      "teacher": {"kind": "monte_carlo", "continuations": 2}}]},
        {"kind": "reinforce", "steps": 3, "rollout": ROLLOUT, "eval_every": 0,
         "gate": {"action": "fallback", "auc": 1.0},
         "replay": {"size": 8, "share": 0.3, "sources": [{**LONG, "share": 1.0}]}},
    ],
    "checkpoint": {"every": 1, "keep": 50},
}  # fmt: skip


def run(folder: Path, *arguments: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    done = genac("run", str(path), *arguments, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


def critic(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The critic's weights in a checkpoint, by torch's own reader."""
    reader = dcp.FileSystemReader(checkpoint / "weights")
    wanted = {
        key: torch.empty(item.size, dtype=item.properties.dtype)
        for key, item in reader.read_metadata().state_dict_metadata.items()
        if key.startswith("critic.") and hasattr(item, "size")
    }
    dcp.load(wanted, storage_reader=reader)
    return wanted


def test_samples_are_kept_with_what_carries_their_loss(whole: tuple[Path, str]) -> None:
    data = whole[0] / "runs/run/data"
    for name, parts in (("sft-critic", {"short", "long", "body", "drawn"}), ("reinforce-replay", {"long"})):
        kept = [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        assert {row["part"] for row in kept} == parts
        for row in kept:
            weights = row.get("fields", {}).get("weights")
            assert (weights is not None) == (row["part"] == "long")
            assert weights is None or 0 < weights.count(0.0) <= 3


def test_figures_are_apart_by_source(whole: tuple[Path, str]) -> None:
    logged = rows(whole[0])
    taught = [row for row in logged if row["stage"] == "sft-critic" and "critic/nll" in row]
    for name in ("short", "long", "body", "drawn"):
        assert any(row.get(f"critic/nll_{name}", 0.0) > 0 for row in taught), name
    steps = [row for row in logged if row["stage"] == "reinforce" and "critic/replay_nll" in row]
    assert len(steps) == 3
    for row in steps:
        assert row["critic/replay_nll"] == pytest.approx(row["replay/nll_long"], rel=1e-4)
        assert row["replay/tokens_long"] > 0


def test_the_critic_goes_back_where_reinforce_misses_its_gate(whole: tuple[Path, str]) -> None:
    folder, told = whole[0] / "runs/run", whole[1]
    assert "the critic goes back to the weights that the stage began with" in told
    kept, ended = (
        critic(folder / "fallback/reinforce/reinforce-00000"),
        critic(folder / "checkpoints/reinforce-end"),
    )
    trained = critic(folder / "checkpoints/reinforce-00002")
    assert kept.keys() == ended.keys() == trained.keys()
    assert all(torch.equal(kept[key], ended[key]) for key in kept)
    assert not all(torch.equal(kept[key], trained[key]) for key in kept)
    summary = json.loads((folder / "report/summary.json").read_text())
    assert summary["gate/fallback"] == "reinforce"
    assert "AUC" in summary["gate/failed"]
    assert "went back to the weights" in (folder / "report/index.html").read_text()


def test_a_resumed_stage_replays_the_same_and_goes_back_too(whole: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(whole[0] / "runs", tmp_path / "runs")
    for name in ("reinforce-00002", "reinforce-end"):
        shutil.rmtree(tmp_path / "runs/run/checkpoints" / name)
    told = run(tmp_path, "--resume")
    assert "goes back to the weights" in told
    assert rows(tmp_path) == rows(whole[0])
    ends = [critic(folder / "runs/run/checkpoints/reinforce-end") for folder in (whole[0], tmp_path)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_more_steps_go_on_from_what_was_trained_and_not_from_what_it_went_back_to(
    whole: tuple[Path, str], tmp_path: Path
) -> None:
    """As the same steps in one go. The earlier weights went on with the moments of the ones thrown away."""
    again, at_once = tmp_path / "again", tmp_path / "at_once"
    for folder in (again, at_once):
        shutil.copytree(whole[0] / "runs", folder / "runs")
    shutil.rmtree(at_once / "runs/run/checkpoints/reinforce-end")  # so it begins behind step 2
    shutil.rmtree(at_once / "runs/run/trained")
    for folder in (again, at_once):
        assert "goes back to the weights" in run(folder, "--resume", "stages.reinforce.steps=4")
    ends = [critic(folder / "runs/run/trained/reinforce/reinforce-00004") for folder in (again, at_once)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    fourth = [
        next(row for row in rows(folder) if row["stage"] == "reinforce" and "critic/replay_nll" in row
             and row["step"] == 4)
        for folder in (again, at_once)
    ]  # fmt: skip
    assert fourth[0] == fourth[1]
    kept = critic(again / "runs/run/fallback/reinforce/reinforce-00000")
    ended = critic(again / "runs/run/checkpoints/reinforce-end")
    assert all(torch.equal(kept[key], ended[key]) for key in kept), "it goes back again"
    shutil.rmtree(again / "runs/run/trained")
    path = again / "recipe.yaml"
    done = genac("run", str(path), "--resume", "stages.reinforce.steps=5", cwd=again)
    assert done.returncode == 2
    assert "what it had trained until then" in done.stderr
    assert "move the checkpoint reinforce-end away" in done.stderr
