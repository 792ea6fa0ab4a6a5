"""Suites beside training, the best checkpoint, the test at the end: by whole runs of the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from genac_megatron.observe.manifest import find_checkpoint, read_manifest
from tests.e2e.test_kept_runs import SMALL
from tests.warm import genac

# A figure that is another after each step of a model that can do nothing.
OWN = "def score(response):\n    return (sum(map(ord, response)) % 101) / 100\n"
ROLLOUT = {"prompts": 2, "samples": 2, "max_new_tokens": 8}
RECIPE: dict[str, Any] = {
    **SMALL,
    "stages": [{"kind": "policy", "name": "pg", "steps": 4, "algorithm": {"kind": "grpo"}, "eval_every": 1,
                "rollout": ROLLOUT}],
    "checkpoint": {"every": 1, "keep": 1},
}  # fmt: skip
TIMES = ("time", "memory/", "tokens/suites", "unique/suites")


def recipe(folder: Path, *, asked: bool) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "own.py").write_text(OWN)
    for name in ("own", "test", "train"):
        rows = [
            {"question": f"{name} {n}, what is it?", "answer": "1"}
            for n in range(8 if name == "train" else 3)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    block = {"kind": "jsonl", "verifier": {"python": "./own.py:score"}, "instruction": ""}
    evaluation = {
        "suites": [
            {"name": "own", "task": {**block, "path": "./own.jsonl"}, "samples": 2, "max_new_tokens": 6},
            {"name": "rg:chain_sum", "problems": 2, "samples": 1},
        ],
        "suites_every": 2,
        "test": [{"name": "mine", "task": {**block, "path": "./test.jsonl"}}],
    }  # fmt: skip
    made = {**RECIPE, "task": {**block, "path": "./train.jsonl", "heldout_size": 2}}
    if asked:
        made["evaluation"] = {**RECIPE["evaluation"], **evaluation}
        made["checkpoint"] = {**RECIPE["checkpoint"], "best": {"figure": "suite/own"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(made))
    return str(folder / "recipe.yaml")


def rows(folder: Path, log: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs/run" / log).read_text().splitlines()]


def ran(folder: Path, *words: str) -> str:
    done = genac("run", str(folder / "recipe.yaml"), *words, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def asked_of(folder: Path) -> dict[tuple[str, int], float]:
    """The suite's average by evaluation."""
    found = rows(folder, "evaluations.jsonl")
    return {(r["name"], r["step"]): r["suites"]["own"]["average"] for r in found if "suites" in r}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    recipe(folder, asked=True)
    ran(folder)
    return folder


def test_what_training_does_is_the_same_beside_suites(whole: Path, tmp_path: Path) -> None:
    recipe(tmp_path, asked=False)
    ran(tmp_path)

    def kept(folder: Path) -> list[dict[str, Any]]:
        steps = [row for row in rows(folder) if "actor/loss" in row]
        new, measured = ("suite/", "test/", *TIMES), ("_s", "_peak_bytes")
        return [
            {k: v for k, v in row.items() if not k.startswith(new) and not k.endswith(measured)}
            for row in steps
        ]

    assert kept(whole) == kept(tmp_path)
    assert len(kept(whole)) == 4
    assert all(row["verify/late"] == 0 for row in kept(whole))


def test_suites_are_logged_by_name_where_they_are_due(whole: Path) -> None:
    found = asked_of(whole)
    assert list(found) == [("start", 0), ("step 2", 2), ("end", 4)]
    assert len(set(found.values())) == 3, "weights that moved give other responses"
    by_step = {row["step"]: row for row in rows(whole) if "actor/loss" in row}
    assert by_step[2]["suite/own"] == found["step 2", 2]
    assert {"suite/own_pass", "suite/own_truncated", "suite/rg:chain_sum"} <= by_step[2].keys()
    assert "suite/own" not in by_step[1]
    last = next(r for r in rows(whole, "evaluations.jsonl") if r["name"] == "end")["suites"]["own"]
    assert (len(last["outcomes"]), last["samples"], last["max_new_tokens"]) == (3, 2, 6)
    summary = json.loads((whole / "runs/run/report/summary.json").read_text())
    assert summary["suite/own"] == found["end", 4]
    page = (whole / "runs/run/report/index.html").read_text()
    assert "Benchmarks" in page
    assert "rg:chain_sum" in page


def test_the_best_is_kept_whatever_ordinary_checkpoints_go(whole: Path, tmp_path: Path) -> None:
    found = asked_of(whole)
    name, step = max(found, key=lambda at: found[at])
    kept = find_checkpoint(whole / "runs/run/best")
    manifest = read_manifest(kept)
    assert manifest["state"]["best"] == {"figure": "suite/own", "mode": "max", "value": found[name, step]}
    assert (kept.name, manifest["state"]["position"]) == (f"pg-{step:05d}", ["pg", step])
    assert len(list((whole / "runs/run/checkpoints").iterdir())) == 1
    folder = tmp_path / "hf"
    done = genac("convert", "to-hf", str(whole / "runs/run/best"), str(folder), "--role", "actor", cwd=whole)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(folder.glob("*.safetensors"))
    # A run that begins with it has what it was judged by.
    recipe(tmp_path, asked=True)
    best = f"roles.actor.model.checkpoint={whole}/runs/run/best"
    ran(tmp_path, best, "stages.pg.steps=1")
    assert asked_of(tmp_path)["start", 0] == found[name, step]


def test_the_test_is_asked_once_of_the_final_and_the_best(whole: Path) -> None:
    path = whole / "runs/run/test.json"
    tested = json.loads(path.read_text())
    assert tested["position"] == ["pg", 4]
    assert tested["of"]["checkpoint"] == find_checkpoint(whole / "runs/run/best").name
    final, best = (tested[which]["mine"]["average"] for which in ("final", "best"))
    assert (final == best) == (tested["of"]["checkpoint"] == "pg-00004"), "of other weights"
    (row,) = [row for row in rows(whole) if "test/mine_final" in row]
    assert (row["test/mine_final"], row["test/mine_best"]) == (final, best)
    assert not any("mine" in r.get("suites", {}) for r in rows(whole, "evaluations.jsonl")), (
        "it chose nothing"
    )
    summary = json.loads((whole / "runs/run/report/summary.json").read_text())
    assert (summary["test/mine_final"], summary["test/mine_best"]) == (final, best)
    assert "nothing to do" in ran(whole, "--resume")
    path.unlink()  # as if it was killed just before
    ran(whole, "--resume")
    again = json.loads(path.read_text())
    assert again == tested


def test_a_resumed_run_goes_on_from_its_best(whole: Path, tmp_path: Path) -> None:
    recipe(tmp_path, asked=True)
    ran(tmp_path, "stages.pg.steps=2")
    ran(tmp_path, "stages.pg.steps=4", "--resume")
    kept = read_manifest(find_checkpoint(tmp_path / "runs/run/best"))["state"]["best"]
    assert kept == read_manifest(find_checkpoint(whole / "runs/run/best"))["state"]["best"]
    assert json.loads((tmp_path / "runs/run/test.json").read_text())["position"] == ["pg", 4]


def test_a_test_that_is_trained_on_or_has_chosen_is_refused(tmp_path: Path) -> None:
    path = recipe(tmp_path, asked=True)
    same = {"kind": "jsonl", "path": f"{tmp_path}/test.jsonl", "verifier": "exact", "heldout_size": 1}
    for change in (f"task={json.dumps(same)}", f"evaluation.suites.0.task.path={tmp_path}/test.jsonl"):
        done = genac("run", path, change, cwd=tmp_path)
        assert done.returncode == 2, done.stderr[-2000:]
        assert "the test is no test: " in done.stderr
        assert "test 0, what is it?" in done.stderr
        assert not (tmp_path / "runs/run/checkpoints").exists() or not list(
            (tmp_path / "runs/run/checkpoints").iterdir()
        )
