"""The planning recipe from beginning to end, shortened: plans are executed, their credit is trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.warm import ROOT, genac

SHORT = (
    "stages.sft-actor.size=32", "stages.sft-critic.size=16", "stages.reinforce.steps=1", "stages.ppo.steps=1",
    "evaluation={prompts: 2, samples: 2}", "observe.tensorboard=false",
)  # fmt: skip


@pytest.mark.extended  # its parts: unit/test_tasks_reasoning_gym.py, test_tasks_hanoi.py; a run: test_run.py
def test_the_planning_recipe_runs_to_its_report(tmp_path: Path) -> None:
    recipe = ROOT / "recipes" / "planning" / "cpu.yaml"
    done = genac("run", str(recipe), *SHORT, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    run = tmp_path / "runs" / "planning-cpu"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["stage"] == "ppo" and "actor/loss" in row] == [1]
    outcomes = [row["rollout/outcome_mean"] for row in rows if "rollout/outcome_mean" in row]
    assert len(outcomes) == 2
    assert all(0.0 <= outcome <= 1.0 for outcome in outcomes)
    shown = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert all(row["problem"].startswith("Solve the Tower of Hanoi problem with 2 disks") for row in shown)
    traces = [json.loads(line) for line in (run / "data" / "sft-critic.jsonl").read_text().splitlines()]
    assert traces, "the exact teacher wrote about the actor's plans"
    assert (run / "report" / "index.html").exists()
