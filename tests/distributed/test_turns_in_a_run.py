"""A run with `training.offload`: roles rest while engines generate, and nothing comes out differently."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.warm import run as python

UNEQUAL = ("time", "memory/", "_s", "_peak_bytes")  # what the clock and the machine decide
# The run's own entry; it notes which roles rest when engines are asked, and afterwards.
RUN = """
import json, sys
from genac_megatron.platform.megatron import install
install()
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.stages.pipeline import run_recipe
from genac_megatron.stages.serving import Serving
from genac_megatron.stages.stopping import StopFlag
from genac_megatron.training.layout import close_world, init_world

asked, after, generating = [], [], Serving.generating

def watched(self, act):
    def noted():
        asked.append([role.resting for role in self.roles.values()])
        return act()
    found = generating(self, noted)
    after.append([role.resting for role in self.roles.values()])
    return found

Serving.generating = watched
recipe = load_recipe(sys.argv[1], [])
world = init_world(recipe.world.timeout_s, recipe.seed)
run_recipe(recipe, world, StopFlag(), resume=False)
print("noted " + json.dumps([asked, after]))
close_world()
"""
ROLLOUT = {"prompts": 4, "samples": 2, "max_new_tokens": 12}


def recipe_in(folder: Path, *, offload: bool) -> Path:
    role = {
        "model": {
            "family": "qwen3", "tokenizer": "builtin:tiny",
            "shape": {"layers": 2, "hidden": 32, "ffn": 64, "heads": 2, "kv_heads": 2, "init_std": 0.1},
        },
        "training": {"dtype": "fp32", "tokens_per_microbatch": 512, "offload": offload},
        "engine": {"dtype": "fp32"},
        "optimizer": {"lr": 1e-3},
    }  # fmt: skip
    content = {
        "name": "run", "runs": str(folder), "world": {"ranks": 1, "timeout_s": 300},
        "task": {"kind": "state_tracking", "objects": 3, "min_swaps": 1, "max_swaps": 2, "heldout_size": 8},
        "roles": {"actor": role, "critic": role},
        "judging": {"template": "brief", "max_new_tokens": 12, "states": {"max_states": 2, "min_segment": 4}},
        "stages": [
            {"kind": "sft", "name": "sft-actor", "role": "actor", "data": "demonstrations", "size": 16,
             "epochs": 1, "batch": 8},
            {"kind": "ppo", "steps": 2, "eval_every": 1, "rollout": ROLLOUT, "gate": {"action": "off"}},
        ],
        "evaluation": {"prompts": 4, "samples": 1},
        "checkpoint": {"every": 1},
        "observe": {"tensorboard": False, "plots": False},
    }  # fmt: skip
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.startswith(UNEQUAL[:2]) and not k.endswith(UNEQUAL[2:])}
        for row in found
    ]


def test_roles_rest_while_engines_generate_and_figures_are_the_same(tmp_path: Path) -> None:
    noted = {}
    for name in ("rests", "stays"):
        path = recipe_in(tmp_path / name, offload=name == "rests")
        done = python([sys.executable, "-W", "ignore", "-c", RUN, str(path)], cwd=path.parent)
        assert done.returncode == 0, done.stdout + done.stderr
        [line] = [line for line in done.stdout.splitlines() if line.startswith("noted ")]
        noted[name] = json.loads(line.removeprefix("noted "))
    asked, after = noted["rests"]
    assert len(asked) >= 6, "two batches and two evaluations at least, of responses and of judgements"
    assert all(all(roles) for roles in asked), "roles rest while engines generate"
    assert not any(any(roles) for roles in (*after, *noted["stays"][0]))
    rests, stays = (rows(tmp_path / name) for name in noted)
    assert rests == stays
    assert {row["actor/loss"] for row in rests if "actor/loss" in row} - {0.0}, "something was learnt"
