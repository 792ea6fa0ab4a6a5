"""Suites, the best checkpoint and the test: what recipes may say, and what lies in best/."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genac_megatron.cli import main
from genac_megatron.errors import EXIT_INPUT, EXIT_OK, InputError
from genac_megatron.recipe.data import MATHS
from genac_megatron.recipe.judged_rules import CRITIC_FIGURES
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.stages import suites
from genac_megatron.stages.suites import is_due
from genac_megatron.tasks import make_task
from genac_megatron.tasks.overlap import Looked

SHAPE = "{layers: 1, hidden: 8, ffn: 8, heads: 2, kv_heads: 1}"
MODEL = f"{{model: {{family: qwen3, tokenizer: 'builtin:tiny', shape: {SHAPE}}}}}"
OWN = {"kind": "jsonl", "path": "./mine.jsonl", "verifier": "math"}


def recipe(folder: Path, *, best: dict[str, Any] | None = None, **evaluation: Any) -> str:
    rows = [{"question": f"{n}+1?", "answer": n + 1} for n in (1, 2, 3, 3)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "r.yaml"
    path.write_text(
        f"name: x\nworld: {{ranks: 1}}\nroles: {{actor: {MODEL}}}\ntask: {{kind: state_tracking}}\n"
        "stages: [{kind: policy, algorithm: {kind: grpo}, eval_every: 10}]\n"
        f"evaluation: {json.dumps(evaluation)}\ncheckpoint: {json.dumps({'best': best})}\n"
    )
    return str(path)


def test_suites_are_counted_by_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suites = ["maths", {"name": "mine", "task": OWN, "samples": 2}, {"name": "rg:chain_sum", "problems": 7}]
    path = recipe(tmp_path, suites=suites, best={"figure": "suite/mine"}, test=["gsm8k"])
    assert main(["run", path, "--dry-run"]) == EXIT_OK
    out = capsys.readouterr().out
    assert "suite mine: 3 questions x 2 samples" in out
    assert "suite rg:chain_sum: 7 questions x 4 samples" in out
    assert "suite math500: its data set is looked for when the run begins" in out
    assert "suite gsm8k: its data set is looked for" in out
    assert [suite.name for suite in load_recipe(path).evaluation.suites][: len(MATHS)] == list(MATHS)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"suites": ["aime26"]}, "did you mean aime25"),
        ({"suites": ["aime24", {"name": "aime24"}]}, "aime24 is named 2 times"),
        ({"suites": ["aime24"], "test": ["maths"]}, "aime24 is asked during the run"),
        ({"suites": [{"name": "m", "task": OWN}, {"name": "m", "task": OWN}]}, "two of suites are called"),
        ({"suites": [{"name": "mine", "task": OWN, "path": "x"}]}, "rows of its own (task) and a path"),
        ({"suites": [{"name": "mine", "task": {**OWN, "path": "no.jsonl"}}]}, "there is no file no.jsonl"),
        ({"suites": [{"name": "mine", "task": {**OWN, "verifier": None}}]}, "has no verifier"),
        ({"suites": [{"name": "mine", "task": {**OWN, "heldout_size": 2}}]}, "sets heldout_size, and all"),
        ({"suites": [{"name": "mine", "task": {**OWN, "filter": {"prompt_tokens": [1, 9]}}}]},
         "'mine' sets filter.prompt_tokens, and all"),
        ({"suites": [{"name": "mine", "task": {**OWN, "order": "short_first"}}]}, "sets order, and all"),
        ({"suites": ["aime24"], "suites_every": 15}, "every 15 steps, and stage 'policy' evaluates every 10"),
        ({"best": {"figure": "suite/aime24"}}, "no suite gives the figure suite/aime24"),
        ({"best": {"figure": "accuracy"}}, "no evaluation gives the figure accuracy"),
        ({"best": {"figure": "eval/critic_brier"}}, "no evaluation gives the figure eval/critic_brier"),
        ({"best": {"figure": "eval/accuracy", "stage": "ppo"}}, "there is no stage 'ppo'"),
        ({"best": {"figure": "eval/accuracy", "mode": "most"}}, "must be one of max, min"),
    ],
)  # fmt: skip
def test_what_no_run_would_give_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: dict[str, Any], told: str
) -> None:
    assert main(["run", recipe(tmp_path, **keys), "--dry-run"]) == EXIT_INPUT
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("best", "keys", "told"),
    [
        ({"figure": "suite/mine_pass"}, {"samples": 1}, "no suite gives the figure suite/mine_pass"),
        ({"figure": "suite/mine_pass"}, {"samples": 2}, None),
        ({"figure": "eval/critic_brier"}, {}, "eval/critic_brier is an error: mode max would keep the worst"),
        ({"figure": "eval/critic_brier", "mode": "min"}, {}, None),
        ({"figure": "eval/critic_auc"}, {}, None),
        ({"figure": "eval/critic_bier", "mode": "min"}, {}, "no evaluation gives the figure eval/critic_b"),
        ({"figure": "eval/critic_mse", "mode": "min"}, {}, "no state's value is estimated by Monte"),
    ],
)  # fmt: skip
def test_the_best_is_by_a_figure_that_the_run_gives_and_its_right_end(
    tmp_path: Path, best: dict[str, Any], keys: dict[str, Any], told: str | None
) -> None:
    path = Path(recipe(tmp_path, best=best, suites=[{"name": "mine", "task": OWN, **keys}]))
    text = path.read_text().replace(f"{{actor: {MODEL}}}", f"{{actor: {MODEL}, critic: {MODEL}}}")
    path.write_text(text.replace("kind: policy, algorithm: {kind: grpo}", "kind: ppo"))
    if told is None:
        assert load_recipe(str(path)).checkpoint.best is not None
        return
    with pytest.raises(InputError) as refusal:
        load_recipe(str(path))
    assert told in str(refusal.value)


def test_a_critics_figures_are_those_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs/figures.md").read_text()
    rows = page.partition("## evaluations.jsonl")[2].partition("\n## ")[0].splitlines()
    names = {row.split("`")[1] for row in rows if row.startswith("| `")}
    assert names - {"ranking_response"} == set(CRITIC_FIGURES), "that one a run's evaluations do not have"


def test_suites_are_due_by_step_and_at_a_stages_ends(tmp_path: Path) -> None:
    own = [{"name": "mine", "task": OWN}]
    every = load_recipe(recipe(tmp_path, suites=own, suites_every=20))
    due = [is_due(every, f"step {step}", step) for step in (10, 20, 30, 40)]
    assert due == [False, True, False, True]
    assert is_due(every, "start", 0)
    assert is_due(every, "end", 33)
    assert is_due(load_recipe(recipe(tmp_path, suites=own)), "step 10", 10)


def test_all_that_is_held_out_is_compared_with_a_test_however_slow_the_generator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_recipe(recipe(tmp_path, test=[{"name": "mine", "task": OWN}]))
    task = make_task(loaded.task, None, 0)
    last = task._problem("heldout", task.heldout_size - 1).text
    monkeypatch.setattr(suites, "LOOK_S", -1.0)  # a generator that has used all of it up
    run = SimpleNamespace(recipe=loaded, task=task, world=SimpleNamespace(rank=0, size=1))  # no rank here
    found = list(suites._overlaps(run, Looked([("mine", [last])], 8, 0.5)))  # type: ignore[arg-type]
    assert [(problem.text, at.name, whole) for problem, at, whole in found] == [(last, "mine", True)]
