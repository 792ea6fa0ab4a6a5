"""`genac run --profile`: traces with the phases' names, of the steps and ranks that were asked for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from tests.e2e.test_run import PPO_ONLY, write_recipe
from tests.warm import genac

STAGES = [{**PPO_ONLY[0], "steps": 3, "eval_every": 0}]


def events(path: Path) -> set[str]:
    """Names of what the program itself marked in a trace."""
    with gzip.open(path, "rt") as file:
        trace: Any = json.load(file)
    return {e["name"] for e in trace["traceEvents"] if e.get("cat") == "user_annotation"}


def test_a_profiled_step_leaves_a_trace_with_its_phases(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, stages=STAGES, evaluation={"prompts": 2, "samples": 1})
    overrides = ("observe.profile.first=2", "observe.profile.memory=true", "observe.tensorboard=false")
    done = genac("run", "--profile", str(recipe), *overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "run" / "profile"
    assert sorted(p.name for p in folder.iterdir()) == ["ppo-00002-rank0.json.gz", "ppo-00002-rank0.txt"]
    names = events(folder / "ppo-00002-rank0.json.gz")
    phases = {"ppo step 2", "rollout", "actor_train", "critic_train", "publish"}
    parts = {
        f"{role} {part}" for role in ("actor", "critic") for part in ("forward and backward", "optimizer")
    }
    assert phases | parts <= names
    assert "aten::" in (folder / "ppo-00002-rank0.txt").read_text()
    # The report has the same phases' seconds.
    summary = json.loads((folder.parent / "report" / "summary.json").read_text())
    assert {f"time/{phase}_s" for phase in ("rollout", "actor_train", "critic_train", "publish")} <= set(
        summary
    )
