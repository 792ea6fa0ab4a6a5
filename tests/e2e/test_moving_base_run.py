"""A joint run whose actor is merged into the base that its critic stands on, served merged, and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_adapters_run import JOINT, STAGE
from tests.e2e.test_run import RECIPE, rows, write_recipe
from tests.warm import genac


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of SFT and four joint ones; merged after every second. The critic publishes every third."""
    folder = tmp_path_factory.mktemp("moving")
    actor: dict[str, Any] = json.loads(json.dumps(RECIPE["roles"]["actor"]))
    adapter = {"rank": 4, "alpha": 8, "merge_every": 2}
    actor |= {"layout": {}, "training": {**actor["training"], "adapter": adapter}}
    actor["optimizer"]["lr"] = 0.03
    critic = {**actor, "model": {"share": "actor"}, "publication": {"every": 3}}
    critic["training"] = {**actor["training"], "adapter": {"rank": 2}}
    del critic["layout"]
    path = write_recipe(
        folder,
        roles={"actor": actor, "critic": critic},
        stages=[STAGE, {**JOINT, "steps": 4, "actor_loss": {}}],
        world={"ranks": 1, "timeout_s": 120},
        checkpoint={"every": 3, "keep": 9},
        evaluation={"prompts": 2, "samples": 2},
    )
    done = genac("run", str(path), cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return folder


def steps(folder: Path) -> list[dict[str, Any]]:
    return [row for row in rows(folder) if "rollout/staleness" in row]


def test_engines_have_the_moved_base_of_both_roles(whole: Path) -> None:
    """The critic's too, whose turn it is not: what it says is another thing once its base has moved."""
    merged = [row for row in rows(whole) if "actor/merges" in row]
    places = [(row["kind"], row["step"], row["actor/merges"]) for row in merged]
    assert places == [("sft", 2, 1), ("ppo", 2, 2), ("ppo", 4, 3)]
    assert 0 < merged[0]["actor/merge_lost"] < 1e-4
    found = steps(whole)
    assert [row.get("publish/critic_version") for row in found] == [1, 2, 3, 4]
    assert all(row["parity/actor_p99"] < 1e-4 for row in rows(whole) if "parity/actor_p99" in row)
    critics = [row["parity/critic_p99"] for row in rows(whole) if "parity/critic_p99" in row]
    assert critics
    assert max(critics) < 1e-4


def test_a_run_goes_on_from_a_moved_base_byte_for_byte(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    kept = tmp_path / "runs" / "run" / "checkpoints"
    shutil.rmtree(kept / "ppo-end")
    said = json.loads((kept / "ppo-00003" / "manifest.json").read_text())["adapters"]
    assert (said["critic"]["base_in"], said["critic"]["merges"]) == ("actor", 2)
    done = genac("run", str(tmp_path / "recipe.yaml"), "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert rows(tmp_path) == rows(whole)


def test_the_best_is_tested_where_the_actor_stands_on_the_critics_moving_base(tmp_path: Path) -> None:
    """The best weights are those of before the base has moved, and the test is asked of both."""
    critic: dict[str, Any] = json.loads(json.dumps(RECIPE["roles"]["critic"]))
    training = {**critic["training"], "adapter": {"rank": 2, "merge_every": 1}}
    critic |= {"layout": {}, "training": training}
    actor = {**critic, "model": {"share": "critic"}, "training": {**training, "adapter": {"rank": 2}}}
    del actor["layout"]
    (tmp_path / "test.jsonl").write_text('{"question": "1?", "answer": "1"}\n')
    asked = {"kind": "jsonl", "path": str(tmp_path / "test.jsonl"), "verifier": "exact"}
    path = write_recipe(
        tmp_path,
        roles={"actor": actor, "critic": critic},
        stages=[{**JOINT, "steps": 1, "actor_loss": {}}],
        world={"ranks": 1, "timeout_s": 120},
        checkpoint={"best": {"figure": "eval/accuracy"}},  # 0 all along: the first stays
        evaluation={"prompts": 1, "samples": 1, "mc_states": 0, "test": [{"name": "mine", "task": asked}]},
    )
    done = genac("run", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    tested = json.loads((tmp_path / "runs/run/test.json").read_text())
    assert (tested["position"], tested["of"]["checkpoint"]) == (["ppo", 1], "ppo-00000")
    assert tested["best"]["mine"].keys() == tested["final"]["mine"].keys()
    said = json.loads((tmp_path / "runs/run/best/ppo-00000/manifest.json").read_text())["adapters"]
    assert (said["actor"]["base_in"], said["actor"]["merges"]) == ("critic", 0)
