"""Which recipe a checkpoint may be resumed with."""

from __future__ import annotations

import json
from typing import Any

import pytest

from genac_megatron.errors import InputError
from genac_megatron.recipe.resume import check_resumable, fingerprint
from genac_megatron.recipe.schema import Recipe


def recipe(**changes: Any) -> Recipe:
    role = {"model": {"family": "qwen3", "tokenizer": "builtin:tiny"}}
    whole = {
        "name": "x",
        "task": {"kind": "state_tracking"},
        "roles": {"actor": role},
        "stages": [{"kind": "ppo"}],
    }
    return Recipe.model_validate({**whole, **changes})


def saved(made_with: Recipe) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(json.dumps({"recipe": fingerprint(made_with)}))
    return state


def test_a_key_that_is_new_since_the_checkpoint_has_its_default() -> None:
    state = saved(recipe())
    del state["recipe"]["judging"]["privileged"]
    del state["recipe"]["task"]["slip_rate"]
    check_resumable(recipe(), state, "here")
    with pytest.raises(InputError, match="here: the checkpoint was made with judging"):
        check_resumable(recipe(judging={"privileged": True}), state, "here")
    with pytest.raises(InputError, match="here: the checkpoint was made with task"):
        check_resumable(recipe(task={"kind": "state_tracking", "slip_rate": 0.5}), state, "here")


def test_a_key_that_is_no_more_is_told() -> None:
    state = saved(recipe())
    state["recipe"]["judging"]["gone"] = 1
    with pytest.raises(InputError, match="here: the checkpoint was made with judging"):
        check_resumable(recipe(), state, "here")
