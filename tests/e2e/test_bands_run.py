"""A run that goes wrong says so early, in its log and its report, and ends where its recipe asks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.test_gates import SMALL
from tests.warm import genac

pytestmark = pytest.mark.timeout(600)
EXPECT = [
    {"figure": "rollout/outcome_mean", "low": 0.3, "step": 1, "until": 3},  # untrained: nothing is solved
    {"figure": "rollout/length_mean", "high": 0.5, "step": 2, "over": 1, "action": "stop"},
    {"figure": "actor/lr", "high": 1.0, "step": 1, "until": 3},  # as it should be
]
RECIPE: dict[str, Any] = {
    **SMALL,
    "roles": {"actor": SMALL["roles"]["actor"]},
    "stages": [{"kind": "policy", "algorithm": {"kind": "reinforce_pp"}, "steps": 3, "eval_every": 0,
                "rollout": SMALL["stages"][0]["rollout"], "expect": EXPECT}],
    "checkpoint": {"every": 0},
}  # fmt: skip


def test_a_run_says_early_that_it_goes_wrong(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    done = genac("run", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "[policy] warning: step 1: rollout/outcome_mean 0 is below 0.3; usually: hardly any" in done.stdout
    assert "stages.policy.expect.1: the stage has left its band: step 2: rollout/length_mean" in done.stderr
    assert "above 0.5; usually: responses run away in length" in done.stderr
    assert "actor/lr 1" not in done.stdout
    summary = json.loads((tmp_path / "runs/run/report/summary.json").read_text())
    assert "policy: step 1: rollout/outcome_mean" in summary["run/unexpected"]
    assert "step 2: rollout/length_mean" in summary["run/unexpected"]
    assert "Not as expected" in (tmp_path / "runs/run/report/index.html").read_text()

    done = genac("run", "recipe.yaml", "stages.policy.expect.1.action=warn", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()
    trained = [row["step"] for row in map(json.loads, lines) if "actor/lr" in row]
    assert trained == [1, 2, 3]  # it went on from where it ended
    assert "rollout/outcome_mean 0 is below" not in done.stdout + done.stderr
