"""`genac evaluate pass-rates` by the command line, and a run that chooses and orders questions by them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from genac_megatron.tasks.filters import problem_digest
from tests.e2e.test_kept_runs import SMALL
from tests.e2e.test_suites_and_best import OWN, ROLLOUT
from tests.warm import genac

QUESTIONS = 8
RECIPE: dict[str, Any] = {
    **SMALL,
    "task": {"kind": "jsonl", "path": "./train.jsonl", "heldout_size": 2, "instruction": "",
             "verifier": {"python": "./own.py:score"}},
    "stages": [{"kind": "policy", "name": "pg", "steps": 2, "algorithm": {"kind": "grpo"}, "eval_every": 0,
                "rollout": {**ROLLOUT, "temperature": 0.9}}],
    "evaluation": {**SMALL["evaluation"], "temperature": 0.5},
}  # fmt: skip


def recipe(folder: Path) -> str:
    rows = [{"question": f"{n}, what is it?", "answer": "1"} for n in range(QUESTIONS + 2)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.py").write_text(OWN)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return str(folder / "recipe.yaml")


def measure(folder: Path, out: str, *more: str, code: int = 0) -> str:
    done = genac("evaluate", "pass-rates", recipe(folder), "--out", out, "--samples", "3", *more, cwd=folder)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    told = measure(folder, "rates")
    assert f"{QUESTIONS} questions, 3 samples each" in told
    return folder


def test_each_question_has_its_rate_and_whose_it_is(measured: Path) -> None:
    rows = lines(measured / "rates/pass_rates.jsonl")
    assert [row["index"] for row in rows] == list(range(QUESTIONS))
    for row in rows:
        assert row["question"] == problem_digest(row["problem"])
        assert len(row["outcomes"]) == 3
        assert row["pass_rate"] == pytest.approx(sum(row["outcomes"]) / 3)
    assert len({row["pass_rate"] for row in rows}) > 3
    manifest = json.loads((measured / "rates/manifest.json").read_text())
    assert {(row["actor"], row["weights"]) for row in rows} == {
        ("actor", manifest["plan"]["model"]["weights"])
    }
    assert manifest["plan"]["sampling"]["temperature"] == 0.9, "as what is trained on is sampled"
    mean = sum(row["pass_rate"] for row in rows) / QUESTIONS
    assert manifest["figures"]["mean"] == pytest.approx(mean)


def test_a_command_that_was_killed_goes_on_to_the_same_file(measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "rates"
    (out / "parts").mkdir(parents=True)
    shutil.copy(measured / "rates/plan.json", out / "plan.json")
    whole = (measured / "rates/pass_rates.jsonl").read_text()
    kept = whole.splitlines(keepends=True)[:5]
    (out / "parts/00000-000.jsonl").write_text("".join(kept) + '{"index": 5, "pass')  # it was writing
    measure(tmp_path, str(out))
    assert (out / "pass_rates.jsonl").read_text() == whole
    other = ("--samples", "2", "task.answer_forms=[boxed]")
    assert "with another samples, task (samples: 3 there, 2 here)" in measure(
        tmp_path, str(out), *other, code=2
    )


def test_a_run_is_of_the_questions_that_are_chosen(measured: Path, tmp_path: Path) -> None:
    rates = {row["problem"]: row["pass_rate"] for row in lines(measured / "rates/pass_rates.jsonl")}
    middle = sorted(rates.values())[2:6]
    path, mine = recipe(tmp_path), tmp_path / "rates"
    shutil.copytree(measured / "rates", mine)
    words = (
        f"task.filter={{pass_rate: [{middle[0]}, {middle[-1]}], pass_rates: {mine}}}",
        "task.order=easy_first",
    )
    done = genac("run", path, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs/run"
    told = "\n".join(json.loads((run / "data.json").read_text())["told"])
    assert f"left out by filter.pass_rate: 2 below {middle[0]:g}, 2 above {middle[-1]:g}" in told
    assert "4 training and 2 held-out prompts" in told
    assert "left out by filter.pass_rate" in done.stdout, "in the log"
    assert "left out by filter.pass_rate" in (run / "report/index.html").read_text()
    played = [r["problem"] for r in lines(run / "rollouts.jsonl") if r.get("of") == "training"]
    easiest = sorted((name for name in rates if rates[name] in middle), key=lambda name: -rates[name])
    assert set(played) <= set(easiest[:2]), "the first batch has the easiest"
    assert played
    # Another file of rates would be other questions than those that the run began with.
    changed = lines(mine / "pass_rates.jsonl")
    changed[0]["pass_rate"] = 1.0 - changed[0]["pass_rate"]
    (mine / "pass_rates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    done = genac("run", path, *words, "stages.pg.steps=3", "--resume", cwd=tmp_path)
    assert done.returncode == 2
    assert "other prompts than when the checkpoint was made" in done.stderr
