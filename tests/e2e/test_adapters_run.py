"""A run that trains adapters on one base: served merged, resumed byte for byte, beside no other base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_run import RECIPE, rows, write_recipe
from tests.warm import genac

STAGE = {"kind": "sft", "name": "demos", "role": "actor", "data": "demonstrations", "size": 16, "batch": 8,
         "epochs": 1, "rollout": {"prompts": 2, "samples": 2, "max_new_tokens": 8}}  # fmt: skip
JOINT = {"kind": "ppo", "steps": 1, "rollout": {"prompts": 2, "samples": 2, "max_new_tokens": 8},
         "actor_loss": {"kl_coef": 0.1}, "gate": {"action": "off"}}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps that move the weights by some tenths of what they are, and a joint one with a critic on the
    actor's base, which is the KL term's reference too.
    """
    folder = tmp_path_factory.mktemp("adapters")
    actor: dict[str, Any] = json.loads(json.dumps(RECIPE["roles"]["actor"]))
    actor["training"]["adapter"] = {"rank": 4, "alpha": 8}
    actor["optimizer"]["lr"] = 0.03
    actor["layout"] = {}
    critic = {**actor, "model": {"share": "actor"}, "training": {**actor["training"], "adapter": {"rank": 2}}}
    del critic["layout"]
    path = write_recipe(
        folder,
        roles={"actor": actor, "critic": critic},
        stages=[STAGE, JOINT],
        world={"ranks": 1, "timeout_s": 120},
        checkpoint={"every": 1, "keep": 9},
        evaluation={"prompts": 2, "samples": 2},
    )
    done = genac("run", str(path), cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return folder


def copied(whole: Path, folder: Path) -> Path:
    """The run as it was after the first step."""
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    checkpoints = list((folder / "runs" / "run" / "checkpoints").iterdir())
    assert {"demos-00001"} < {path.name for path in checkpoints}
    for path in checkpoints:
        if path.name != "demos-00001":
            shutil.rmtree(path)
    return folder


def test_engines_have_what_the_trainer_has(whole: Path) -> None:
    """fp32: the sum of both products, and the merged weights'. The base alone would be far from both."""
    found = [row["parity/actor_p99"] for row in rows(whole) if "parity/actor_p99" in row]
    assert found
    assert max(found) < 1e-4
    critics = [row["parity/critic_p99"] for row in rows(whole) if "parity/critic_p99" in row]
    assert critics
    assert max(critics) < 1e-4
    losses = [row["actor/loss"] for row in rows(whole) if "actor/loss" in row]
    assert losses[0] - losses[1] > 0.01


def test_the_kl_term_is_to_the_base(whole: Path) -> None:
    """From which two steps of SFT have led the actor away."""
    (kl,) = [row["actor/kl_reference"] for row in rows(whole) if "actor/kl_reference" in row]
    assert kl > 1e-3


def test_a_checkpoint_has_two_adapters_and_no_base(whole: Path) -> None:
    paths = (whole / "runs" / "run" / "checkpoints").glob("*/manifest.json")
    newest = max((json.loads(path.read_text()) for path in paths), key=lambda manifest: manifest["serial"])
    found = newest["adapters"]
    assert (found["actor"]["rank"], found["critic"]["rank"]) == (4, 2)
    assert found["actor"]["base"] == found["critic"]["base"]


def test_the_critic_alone_is_evaluated_on_its_own_base(whole: Path) -> None:
    """A command with one role has no actor whose base it could share."""
    done = genac("parity", "critic", "runs/run/recipe.yaml", "--prompts", "2", cwd=whole)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


def test_a_resumed_run_goes_on_byte_for_byte(whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path)
    done = genac("run", str(folder / "recipe.yaml"), "--resume", cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert rows(folder) == rows(whole)


def test_another_base_is_refused_before_anything_is_trained(whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path)
    done = genac("run", str(folder / "recipe.yaml"), "--resume", "roles.actor.model.init_seed=9", cwd=folder)
    assert done.returncode == 2
    assert "its actor is an adapter beside another base" in done.stderr
    kept = [path.name for path in (folder / "runs" / "run" / "checkpoints").iterdir()]
    assert kept == ["demos-00001"]
