"""A value head learns kept judgements by the command line, and goes on alike after a stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from genac_megatron.recipe.tasks import StateTrackingTask
from genac_megatron.tasks import make_task
from genac_megatron.tasks.tokenizer import load_tokenizer
from tests.e2e.test_gates import SMALL
from tests.e2e.test_run import rows
from tests.warm import genac

pytestmark = pytest.mark.timeout(600)
STEPS = 30
ROLE = SMALL["roles"]["actor"]
RECIPE: dict[str, Any] = {
    **SMALL,
    "roles": {"actor": ROLE, "critic": {**ROLE, "model": {**ROLE["model"], "head": "value"}}},
    "stages": [{"kind": "value", "start_from": "actor", "steps": STEPS, "eval_every": 15,
                "distil": {"path": "judged.jsonl", "batch": 32, "heldout": 0.25},
                "optimizer": {"lr": 3e-3}, "gate": {"action": "off"},
                "rollout": {"prompts": 2, "samples": 2, "max_new_tokens": 8}}],
    "checkpoint": {"every": 15, "keep": 9},
}  # fmt: skip


def write_judged(path: Path) -> None:
    """Judgements that are nearly the truth: a long prefix is promising, a short one is not."""
    tokenizer = load_tokenizer("builtin:tiny")
    task = make_task(StateTrackingTask.model_validate(RECIPE["task"]), tokenizer, RECIPE.get("seed", 0))
    ids = tokenizer("abcdefgh" * 4, add_special_tokens=False)["input_ids"]
    states = []
    for index in range(24):
        prompt = task.prompt("train", index)
        for length in (2, 10):
            truth = 0.75 if length > 5 else 0.25
            known = {"prompt_id": prompt.id, "problem": prompt.problem, "partial": "-", "ids": ids[:length]}
            draws = [1.0] * round(8 * truth) + [0.0] * round(8 * (1 - truth))
            value = truth + (0.1 if index % 2 else -0.1)
            states.append({**known, "value": value, "outcomes": draws})
    path.write_text("".join(json.dumps(state) + "\n" for state in states))


def test_a_head_learns_what_is_judged_and_resumes_alike(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    early = genac("run", "recipe.yaml", cwd=tmp_path)
    assert early.returncode == 2
    assert "there is no file judged.jsonl" in early.stderr
    write_judged(tmp_path / "judged.jsonl")
    done = genac("run", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "36 judged states to learn, 12 held out" in done.stdout
    whole = rows(tmp_path)
    last = whole[-1]
    assert last["distil/mse"] < 0.5 * last["distil/mse_constant"]
    assert last["distil/truth_mse"] < 0.5 * last["distil/truth_mse_constant"]
    # The critic is 0.1 away from the truth, whose noise is taken off.
    assert last["distil/truth_mse_teacher"] == pytest.approx(0.01 - 0.75 * 0.25 / 7)
    for path in (tmp_path / "runs/run/checkpoints").iterdir():
        if not path.name.endswith("00015"):
            shutil.rmtree(path)
    done = genac("run", "recipe.yaml", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(tmp_path) == whole
