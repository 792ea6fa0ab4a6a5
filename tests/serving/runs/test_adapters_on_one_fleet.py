"""A joint run of two adapters on one base and one server: both decode there, live; the base moves; and the
server is lost.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.models.registry import shape_of
from genac_megatron.models.sizes import adapter_parameters, parameters
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.serving.sglang.server import PYTHON_VARIABLE
from genac_megatron.tasks.tokenizer import tokenizer_size
from tests.serving.runs.test_runs_on_servers import (
    RECIPE,
    SERVERS,
    finish,
    gone,
    rows,
    server_pids,
    start,
    wait_for,
)

pytestmark = pytest.mark.skipif(
    PYTHON_VARIABLE not in os.environ,
    reason=f"{PYTHON_VARIABLE} is not set: `make test-serving` builds SGLang's environment and sets it",
)
ACTOR = RECIPE["roles"]["actor"]
ADAPTED = {**ACTOR, "training": {**ACTOR["training"], "adapter": {"rank": 4, "alpha": 8}}}
MOVES = {"rank": 4, "alpha": 8, "merge_every": 2}  # the actor's into the base of both
ROLES: dict[str, Any] = {
    "actor": {
        **ADAPTED,
        "training": {**ACTOR["training"], "adapter": MOVES},
        "engine": {**SERVERS, "enable_lora": True},
    },
    "critic": {**ADAPTED, "model": {"share": "actor"}, "engine": {"share": "actor"}},
}


@pytest.mark.parametrize("overlap", [False, pytest.param(True, marks=pytest.mark.extended)])
def test_two_adapters_on_one_server(tmp_path: Path, overlap: bool) -> None:
    """overlap: publications meet requests that run, and end on the versions that they began with."""
    run = start(tmp_path, {"steps": 3, "overlap": overlap}, roles=ROLES)
    wait_for(lambda: any(row.get("kind") == "ppo" for row in rows(tmp_path)), run, "a first step")
    before = server_pids(tmp_path)
    assert list(before) == ["actor/0"]
    os.killpg(before["actor/0"], signal.SIGKILL)
    code, output = finish(run)
    assert code == 0, output
    steps = [row for row in rows(tmp_path) if "rollout/staleness" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert [row["publish/actor_version"] for row in steps] == [2, 3, 4]
    assert [row["publish/critic_version"] for row in steps] == [2, 3, 4]
    assert [row.get("actor/merges") for row in steps] == [None, 1, None]
    assert {row["rollout/staleness"] for row in steps} == ({0, 1} if overlap else {0})
    # fp32 on both sides: rounding alone, with the version that the trainer thinks it is.
    same = steps[: 1 if overlap else None]  # what older weights sampled differs, and is called drift
    same.append(rows(tmp_path)[-1])
    assert all(row[f"parity/{role}_p99"] < 1e-4 for row in same for role in ("actor", "critic"))
    assert max(row.get("serving/actor_restarts", 0) for row in steps) == 1
    assert not any("serving/critic_restarts" in row for row in steps)  # it is one server, counted once
    recipe = load_recipe(tmp_path / "recipe.yaml")
    model, adapter = recipe.roles["critic"].model, recipe.roles["critic"].training.adapter
    assert adapter is not None
    shape = shape_of(model, tokenizer_size("builtin:tiny", ""))
    small, base = 4 * adapter_parameters(shape, adapter, 1, shape.layers), 4 * parameters(shape)
    bytes_ = {row[f"publish/{role}_bytes"] for row in steps for role in ("actor", "critic")}
    assert bytes_ <= {small, small + base}
    assert small in bytes_
    shown = (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in shown]
    assert gone(list((before | server_pids(tmp_path)).values()))
