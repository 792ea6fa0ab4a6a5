"""A whole study by the command line: base run, two algorithms, table, plots; a second call does nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.e2e.test_run import RECIPE
from tests.warm import Popen, command, environment, genac

ROLLOUT = {"prompts": 2, "samples": 2, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study")
    actor = {"roles": {"actor": RECIPE["roles"]["actor"]}}
    policy = {"kind": "policy", "steps": 2, "eval_every": 1, "rollout": ROLLOUT}
    recipes = {
        "sft": [RECIPE["stages"][0]],
        "grpo": [{**policy, "algorithm": {"kind": "grpo"}}],
        "rloo": [{**policy, "algorithm": {"kind": "rloo"}}],
    }
    for name, stages in recipes.items():
        (path / f"{name}.yaml").write_text(yaml.safe_dump({**RECIPE, **actor, "stages": stages}))
    study: dict[str, Any] = {
        "name": "tiny",
        "seeds": [4],
        "base": {"actor": {"recipe": "sft.yaml"}},
        "cells": {n: {"recipe": f"{n}.yaml", "start": {"actor": "actor"}} for n in ("grpo", "rloo")},
        "reference": "grpo",
        "curves": [{"x": "steps"}, {"x": "flops"}],
    }
    (path / "study.yaml").write_text(yaml.safe_dump(study))
    return path


def test_a_study_leaves_its_table_and_goes_on_where_it_was(folder: Path) -> None:
    done = genac("study", "study.yaml", "--jobs", "2", "--override", "observe.shown_rollouts=1", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    recipe = (folder / "runs" / "studies" / "tiny" / "grpo-s4" / "recipe.yaml").read_text()
    assert yaml.safe_load(recipe)["observe"]["shown_rollouts"] == 1
    out = folder / "experiments" / "tiny"
    text = (out / "table.md").read_text()
    assert "| grpo" in text
    assert "| rloo" in text
    records = json.loads((out / "figures.json").read_text())["records"]
    assert [r["cell"] for r in records] == ["grpo", "rloo"]
    assert all(len(r["curve"]) == 3 and r["figures"]["cost/flops"] > 0 for r in records)
    starts = {r["figures"]["actor/start"] for r in records}
    assert len(starts) == 1, "both began with the same actor"
    assert {p.name for p in out.glob("*.png")} == {"accuracy-steps.png", "accuracy-flops.png"}
    again = genac("study", "study.yaml", cwd=folder)
    assert again.returncode == 0
    assert "3 of 3 are done already" in again.stdout


def test_a_study_whose_runs_are_gone_stands_on_its_figures(folder: Path) -> None:
    """What changed since is run again, from a base run that is made again."""
    assert genac("study", "study.yaml", cwd=folder).returncode == 0  # nothing to do after the test above
    shutil.rmtree(folder / "runs" / "studies" / "tiny")
    out = folder / "experiments" / "tiny"
    before = (out / "table.md").read_text()
    done = genac("study", "study.yaml", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 run(s) stand in" in done.stdout
    assert (out / "table.md").read_text() == before
    assert not (folder / "runs" / "studies" / "tiny").exists()
    recipe = yaml.safe_load((folder / "rloo.yaml").read_text())
    recipe["stages"][0]["steps"] = 3
    (folder / "rloo.yaml").write_text(yaml.safe_dump(recipe))
    done = genac("study", "study.yaml", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = {path.name for path in (folder / "runs" / "studies" / "tiny").iterdir() if path.is_dir()}
    assert runs == {"actor-s4", "rloo-s4"}
    records = json.loads((out / "figures.json").read_text())["records"]
    assert [len(record["curve"]) for record in records] == [3, 4]
    assert len({record["figures"]["actor/start"] for record in records}) == 1, "the same actor, made again"


@pytest.mark.extended  # how a sweep is made of runs: unit/test_studies.py
def test_a_sweep_is_made_with_its_seeds_and_the_best_goes_on(folder: Path) -> None:
    study = yaml.safe_load((folder / "study.yaml").read_text()) | {"name": "swept", "seeds": [4, 5]}
    cell = study["cells"]["grpo"] | {"label": "grpo"}
    steps = {"dear": 3, "cheap": 1}
    study["cells"] = {name: cell | {"set": [f"stages.0.steps={n}"]} for name, n in steps.items()}
    study |= {"sweep_seeds": [4], "best": "cost/flops", "curves": []}
    (folder / "swept.yaml").write_text(yaml.safe_dump(study))
    listed = genac("study", "swept.yaml", "--dry-run", cwd=folder)
    assert "with seeds 5, the best cell of each label" in listed.stdout
    done = genac("study", "swept.yaml", "--jobs", "2", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = {path.name for path in (folder / "runs" / "studies" / "swept").iterdir() if path.is_dir()}
    assert runs == {"actor-s4", "dear-s4", "cheap-s4", "actor-s5", "cheap-s5"}
    assert "grpo: cheap" in done.stdout
    listed = genac("study", "swept.yaml", "--dry-run", cwd=folder)
    assert listed.stdout.count("done") == 5


def test_a_run_that_fails_is_told_with_the_end_of_its_log(folder: Path) -> None:
    study = yaml.safe_load((folder / "study.yaml").read_text())
    study["name"], study["cells"] = "broken", {"grpo": {"recipe": "grpo.yaml", "set": ["stages.0.stepz=1"]}}
    study["base"], study["reference"] = {}, None
    (folder / "broken.yaml").write_text(yaml.safe_dump(study))
    done = genac("study", "broken.yaml", cwd=folder)
    assert done.returncode != 0
    assert "stepz" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_study_that_is_told_to_end_leaves_no_run_behind(folder: Path) -> None:
    study = yaml.safe_load((folder / "study.yaml").read_text()) | {"name": "ended"}
    (folder / "ended.yaml").write_text(yaml.safe_dump(study))
    words, log = command("study", "ended.yaml"), folder / "runs" / "studies" / "ended" / "actor-s4.log"
    with Popen(words, cwd=folder, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        until = time.monotonic() + 120
        while not (log.exists() and log.stat().st_size) and time.monotonic() < until:
            time.sleep(0.1)
        begun = psutil.Process(process.pid).children(recursive=True)
        assert begun
        process.terminate()
        _, told = process.communicate(timeout=120)
    assert process.returncode == 75, told
    assert "goes on from here" in told
    psutil.wait_procs(begun, timeout=10)
    assert [one for one in begun if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []
