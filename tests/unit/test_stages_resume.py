"""What a resumed run may change in its recipe, and what a finished one still has to do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from genac_megatron.errors import InputError
from genac_megatron.observe.runinfo import EVALUATIONS, METRICS, ROLLOUTS
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.resume import (
    before_judging,
    check_resumable,
    check_steps,
    fingerprint,
    finished,
    lengths,
    to_train_on,
)
from genac_megatron.recipe.schema import Recipe
from genac_megatron.stages.fallback import trained_folder, trained_on
from genac_megatron.stages.progression import Progression
from genac_megatron.stages.sft_heldout import Seen
from tests.e2e.test_run import RECIPE

STAGES: list[dict[str, Any]] = [
    {"kind": "sft", "name": "sft", "role": "actor", "data": "demonstrations", "size": 64, "epochs": 3,
     "heldout": {"size": 8}},
    {"kind": "policy", "name": "pg", "steps": 4, "algorithm": {"kind": "grpo"},
     "rollout": {"prompts": 2, "samples": 2}},
]  # fmt: skip


def recipe(folder: Path, *overrides: str, stages: list[dict[str, Any]] = STAGES) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "stages": stages}))
    return load_recipe(path, list(overrides))


def state(made_with: Recipe, stage: int, step: int, seen: Seen | None = None, **more: Any) -> dict[str, Any]:
    """As run_state makes it."""
    at = Progression(stage=stage, step=step, heldout=None if seen is None else dataclasses.asdict(seen))
    name = made_with.stages[min(stage, len(made_with.stages) - 1)].name
    return {
        "at": dataclasses.asdict(at),
        "position": [name, step or 4],
        "log": {"rows": {METRICS: 7, EVALUATIONS: 3, ROLLOUTS: 2}, "wandb_id": None},
        "recipe": fingerprint(made_with),
        "lengths": lengths(made_with),
        **more,
    }


def test_the_same_recipe_and_more_steps(tmp_path: Path) -> None:
    for where in ((0, 0), (0, 5), (1, 0), (1, 4), (2, 0)):
        seen = Seen(size=8, metric="loss") if where == (0, 5) else None
        saved = state(recipe(tmp_path), *where, seen)
        for more in ((), ("stages.pg.steps=9",)):
            check_resumable(recipe(tmp_path, *more), saved, "there")
    check_resumable(recipe(tmp_path, "stages.sft.epochs=9"), state(recipe(tmp_path), 0, 0), "there")


def test_attention_is_not_frozen_or_freed_within_a_run(tmp_path: Path) -> None:
    """The optimizer's states would be of other parameters. A checkpoint of before does not say."""
    saved = state(recipe(tmp_path), 1, 2)
    frozen = recipe(tmp_path, "roles.critic.training.frozen_attention=true")
    with pytest.raises(InputError, match=r"made with roles with frozen_attention \[\].*says \['critic'\]"):
        check_resumable(frozen, saved, "there")
    check_resumable(frozen, state(frozen, 1, 2), "there")
    del saved["recipe"]["roles with frozen_attention"]
    check_resumable(frozen, saved, "there")


@pytest.mark.parametrize("epochs", [2, 4])
def test_a_stage_that_others_stand_on_keeps_its_length(tmp_path: Path, epochs: int) -> None:
    saved = state(recipe(tmp_path), 1, 2)
    with pytest.raises(InputError, match=f"stage sft is over, after epochs 3; the recipe says {epochs}") as e:
        check_resumable(recipe(tmp_path, f"stages.sft.epochs={epochs}"), saved, "there")
    assert "set stages.sft.epochs=3 again" in str(e.value)


def test_fewer_steps_than_are_done(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stage pg has done 3 steps, and the recipe has 2"):
        check_resumable(recipe(tmp_path, "stages.pg.steps=2"), state(recipe(tmp_path), 1, 3), "there")
    with pytest.raises(InputError, match="stage pg is over, after steps 4; the recipe says 2"):
        check_resumable(recipe(tmp_path, "stages.pg.steps=2"), state(recipe(tmp_path), 2, 0), "there")
    sft = recipe(tmp_path).stages[0]
    check_steps(sft, 8, 8, "there")
    with pytest.raises(InputError, match="stage sft has done 9 steps, and the recipe has 8"):
        check_steps(sft, 9, 8, "there")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("heldout.size=9", "was begun with heldout.size 8, the recipe says heldout.size 9: trained samples"),
        ("heldout.metric=exact_match", "heldout.metric loss, the recipe says heldout.metric exact_match"),
        ("heldout=null", "was begun with heldout.size 8, the recipe says nothing held out"),
    ],
)
def test_what_is_held_out_stays_so(tmp_path: Path, change: str, told: str) -> None:
    saved = state(recipe(tmp_path), 0, 5, Seen(size=8, metric="loss"))
    with pytest.raises(InputError, match=told):
        check_resumable(recipe(tmp_path, f"stages.sft.{change}"), saved, "there")


def test_what_was_trained_on_is_not_held_out_later(tmp_path: Path) -> None:
    bare = [{k: v for k, v in STAGES[0].items() if k != "heldout"}, STAGES[1]]
    saved = state(recipe(tmp_path, stages=bare), 0, 5)
    with pytest.raises(InputError, match="was begun with nothing held out, the recipe says heldout"):
        check_resumable(recipe(tmp_path), saved, "there")
    at_its_begin = state(recipe(tmp_path, stages=bare), 0, 0)
    check_resumable(recipe(tmp_path), at_its_begin, "there")
    older = state(recipe(tmp_path), 0, 5, Seen())
    del older["at"]["heldout"]["size"], older["at"]["heldout"]["metric"]
    check_resumable(recipe(tmp_path, "stages.sft.heldout.size=9"), older, "there")


def test_a_finished_run_trains_on_from_its_last_step(tmp_path: Path) -> None:
    saved = state(recipe(tmp_path), 2, 0)
    saved["inside"] = before_judging(saved, {"explained_variance": 0.5, "rows": {EVALUATIONS: 2}}, 1, 4)
    assert finished(recipe(tmp_path), saved, "there")
    assert to_train_on(recipe(tmp_path), saved, "there") is None
    more = recipe(tmp_path, "stages.pg.steps=6")
    assert not finished(more, saved, "there")
    check_resumable(more, saved, "there")
    found = to_train_on(more, saved, "there")
    assert found is not None
    assert (found["at"]["stage"], found["at"]["step"], found["at"]["explained_variance"]) == (1, 4, 0.5)
    assert found["log"]["rows"] == {METRICS: 7, EVALUATIONS: 2}, "judged again; the time it took stays"
    assert not finished(recipe(tmp_path), state(recipe(tmp_path), 1, 4), "there")


def test_a_finished_run_of_an_earlier_version_says_why_not(tmp_path: Path) -> None:
    saved = state(recipe(tmp_path), 2, 0)
    del saved["lengths"]
    assert finished(recipe(tmp_path), saved, "there")
    with pytest.raises(InputError, match="finished after steps 4, the recipe says 6") as raised:
        to_train_on(recipe(tmp_path, "stages.pg.steps=6"), saved, "there")
    assert "move that checkpoint away" in str(raised.value)


def test_a_run_whose_critic_went_back_goes_on_from_what_was_trained(tmp_path: Path) -> None:
    """That checkpoint is kept elsewhere, whole; the run's last one has earlier weights and no optimizer."""
    made_with = recipe(tmp_path)
    saved = state(made_with, 2, 0, went_back=True)
    assert finished(made_with, saved, "there")
    more = recipe(tmp_path, "stages.pg.steps=9")
    assert not finished(more, saved, "there")
    assert to_train_on(more, saved, "there") == saved, "nothing is taken from the weights it went back to"
    kept = trained_folder(tmp_path, "pg") / "pg-00004"
    with pytest.raises(InputError, match="is gone or damaged") as raised:
        trained_on(saved, "pg", tmp_path, "pg-end")
    assert "move the checkpoint pg-end away" in str(raised.value)
    for position, found in ((["pg", 4], True), (["pg", 2], False)):  # the other is of an earlier time
        kept.mkdir(parents=True, exist_ok=True)
        manifest = {"format": 1, "serial": 1, "roles": {}, "trained": [], "state": {"position": position}}
        (kept / "manifest.json").write_text(json.dumps(manifest))
        if found:
            assert trained_on(saved, "pg", tmp_path, "pg-end") == (kept, manifest)
        else:
            with pytest.raises(InputError, match="is gone or damaged"):
                trained_on(saved, "pg", tmp_path, "pg-end")
