"""What plans of evaluations say, so that no outcome of another rule is taken for a new one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.errors import InputError
from genac_megatron.evaluation.parts import Parts
from genac_megatron.evaluation.pass_rates import plan_of
from genac_megatron.evaluation.session import graded_by, rollout_config
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.schema import Recipe
from tests.e2e.test_gates import SMALL

BASE = {**SMALL, "stages": SMALL["stages"][1:]}  # without demonstrations, which such tasks have none of


def recipe(folder: Path, **task: Any) -> Recipe:
    """Of questions with a reward of one's own, `./own.py:score`."""
    (folder / "q.jsonl").write_text("".join(f'{{"question": "q{n}", "answer": "{n}"}}\n' for n in range(4)))
    block = {
        "kind": "jsonl",
        "path": "./q.jsonl",
        "heldout_size": 1,
        "verifier": {"python": "./own.py:score"},
    }
    (folder / "r.yaml").write_text(json.dumps({**BASE, "task": {**block, **task}}))
    return load_recipe(str(folder / "r.yaml"))


def test_work_that_was_graded_otherwise_is_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def score(response):\n    return 1\n")

    def begin(given: Recipe) -> None:
        plan = plan_of(given, [], 2, rollout_config(given, None), {"weights": "w"})
        parts = Parts(tmp_path / "out", "rows.jsonl", ("index",))
        try:
            parts.begin(plan)
        finally:
            parts.release()

    begin(recipe(tmp_path))
    begin(recipe(tmp_path, verifier={"python": "./own.py:score", "workers": 3}))  # a pace
    with pytest.raises(InputError, match=r"another task \(.*boxed"):
        begin(recipe(tmp_path, answer_forms=["boxed"]))
    (tmp_path / "own.py").write_text("def score(response):\n    return 0.5\n")
    with pytest.raises(InputError, match=r"another code \(.*own\.py"):
        begin(recipe(tmp_path))


def test_a_judge_may_move_and_may_not_be_another(tmp_path: Path) -> None:
    judge = {"kind": "rubric", "judge": {"url": "http://a:1/v1", "model": "m"}}

    def said(**changes: Any) -> dict[str, Any]:
        block = {**judge, "path": "./q.jsonl", "judge": {**judge["judge"], **changes}}
        (tmp_path / "q.jsonl").write_text("{}")
        (tmp_path / "r.yaml").write_text(json.dumps({**BASE, "task": block}))
        return graded_by(load_recipe(str(tmp_path / "r.yaml")), own=True)

    assert said() == said(url="http://b:2/v1", concurrency=2, api_key_env="KEY")
    assert said() != said(model="n")


def test_a_named_benchmark_is_graded_alike_for_all_but_for_the_actors_own_tags(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def score(response):\n    return 1\n")
    given = recipe(tmp_path)
    assert graded_by(given) == {}, "as in folders of earlier versions"
    roles = json.loads(json.dumps(BASE["roles"]))
    roles["actor"]["model"]["reasoning_tags"] = ["[a]", "[b]"]
    (tmp_path / "r.yaml").write_text(json.dumps({**BASE, "roles": roles}))
    assert graded_by(load_recipe(str(tmp_path / "r.yaml"))) == {"reasoning_tags": ["[a]", "[b]"]}
