"""A gate that fails: what a person is told, the report all the same, and how the run goes on."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.test_run import RECIPE
from tests.warm import genac

MODEL = {
    "family": "qwen3",
    "tokenizer": "builtin:tiny",
    "shape": {"layers": 1, "hidden": 32, "ffn": 64, "heads": 2, "kv_heads": 2, "init_std": 0.1},
}
STEPS = 3
SMALL: dict[str, Any] = {
    **RECIPE,
    "world": {"ranks": 1},
    "roles": {
        name: {
            "model": MODEL,
            "training": {"dtype": "fp32"},
            "engine": {"dtype": "fp32"},
            "optimizer": {"lr": 1e-3},
        }
        for name in ("actor", "critic")
    },
    "judging": {**RECIPE["judging"], "max_new_tokens": 8},
    "stages": [
        # Such a critic writes no score; checkpoints by the cadence are of step 2 alone.
        {"kind": "sft", "name": "sft-critic", "role": "critic", "data": "demonstrations", "size": 6,
         "epochs": 1, "batch": 2},
        {"kind": "ppo", "steps": 1, "eval_every": 0},
    ],
    "evaluation": {"prompts": 4, "samples": 2},
    "checkpoint": {"every": 2},
    "observe": {"tensorboard": False, "plots": False},
}  # fmt: skip
for _stage in SMALL["stages"]:
    _stage["rollout"] = {"prompts": 2, "samples": 2, "max_new_tokens": 8}

Done = subprocess.CompletedProcess[str]


def run(folder: Path, *arguments: str) -> Done:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return genac("run", str(path), *arguments, cwd=folder)


def trained(folder: Path, stage: str = "sft-critic") -> list[dict[str, Any]]:
    """The stage's rows of steps that were trained."""
    lines = (folder / "runs/run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["stage"] == stage and "critic/lr" in row]


def summary(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "runs/run/report/summary.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    folder = tmp_path_factory.mktemp("failed")
    return folder, run(folder)


@pytest.fixture
def again(failed: tuple[Path, Done], tmp_path: Path) -> Path:
    """A copy of the run that its gate has stopped."""
    return Path(shutil.copytree(failed[0], tmp_path / "again"))


def test_a_person_reads_what_it_means_what_helps_and_how_to_go_on(failed: tuple[Path, Done]) -> None:
    folder, done = failed
    assert done.returncode == 3, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stderr.count("genac: error") == 1
    message = done.stderr[done.stderr.index("genac: error") :]
    assert "gate of stage sft-critic" in message
    assert "parse rate 0.000 is below 0.98" in message
    for words in ("means:", "helps:", "--resume", "stages.sft-critic.epochs=2", "gate.action=warn"):
        assert words in message
    words = done.stderr[done.stderr.index("genac: ended: a gate is not reached after ") :]
    assert "\n  run folder: runs/run\n  report:     runs/run/report/index.html\n" in words
    way = "-m genac_megatron run " + str(folder / "recipe.yaml") + " stages.sft-critic.epochs=2 --resume"
    first = words.splitlines()[3]
    assert first.startswith("  to go on:   ")
    assert first.endswith(way)


def test_the_report_is_there_and_shows_it(failed: tuple[Path, Done]) -> None:
    folder, _ = failed
    figures = summary(folder)
    assert figures["gate/stopped"] == "sft-critic"
    assert figures["gate/failed"] == "sft-critic: parse rate 0.000 is below 0.98"
    assert figures["report/missing"].startswith("stage ppo has not begun")
    html = (folder / "runs/run/report/index.html").read_text()
    for words in ("Stage sft-critic did not reach its gate", "is below 0.98", "What usually helps"):
        assert words in html


def test_what_is_trained_is_saved_with_what_a_resume_needs(failed: tuple[Path, Done]) -> None:
    folder, _ = failed
    manifest = json.loads((folder / f"runs/run/checkpoints/sft-critic-{STEPS:05d}/manifest.json").read_text())
    assert manifest["trained"] == ["critic"]
    assert manifest["state"]["at"]["stage"] == 0
    assert manifest["state"]["at"]["step"] == STEPS


def test_with_warn_it_goes_on_at_once(failed: tuple[Path, Done], again: Path) -> None:
    with (again / "runs/run/metrics.jsonl").open("a") as file:  # a crash after the stage's end was logged
        file.write(json.dumps({"stage": "sft-critic", "kind": "sft", "step": STEPS, "time": 1.0}) + "\n")
    done = run(again, "stages.sft-critic.gate.action=warn", "--resume")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert trained(again) == trained(failed[0]), "no step was trained again"
    assert len(trained(again, "ppo")) == 1
    assert "gate not reached: parse rate 0.000" in done.stderr
    assert "genac: done after " in done.stdout
    assert "report:     runs/run/report/index.html" in done.stdout
    figures = summary(again)
    assert figures["gate/stopped"] is None
    assert "sft-critic: parse rate" in figures["gate/failed"], "a gate that only warns is seen too"
    assert figures["report/complete"] is True


def test_with_more_steps_it_trains_those_alone(again: Path, tmp_path: Path) -> None:
    """As a run does that has them from the start. A report that cannot be written hides no error."""
    shutil.rmtree(again / "runs/run/report")
    (again / "runs/run/report").write_text("in the way")
    done = run(again, "stages.sft-critic.epochs=2", "--resume")
    assert done.returncode == 3, done.stdout[-2000:] + done.stderr[-4000:]
    assert "parse rate 0.000 is below 0.98" in done.stderr
    warnings = [line for line in done.stderr.splitlines() if "report could not be written" in line]
    assert len(warnings) == 1
    assert "Traceback" not in done.stderr
    rows = trained(again)
    assert [row["step"] for row in rows] == list(range(1, 2 * STEPS + 1))
    assert (again / f"runs/run/checkpoints/sft-critic-{2 * STEPS:05d}/manifest.json").exists()
    whole = run(tmp_path, "stages.sft-critic.epochs=2", "stages.sft-critic.gate.action=off")
    assert whole.returncode == 0, whole.stderr[-4000:]
    for key in ("critic/loss", "critic/grad_norm"):
        assert [row[key] for row in rows] == [row[key] for row in trained(tmp_path)]
