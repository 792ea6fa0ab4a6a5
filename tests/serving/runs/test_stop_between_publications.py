"""A run that publishes every third step is asked to stop in between: resumed, it is the same, or says so."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.serving.runs.test_runs_on_servers import PPO, RECIPE
from tests.warm import run as python

STEPS = 7
# What the clock, the machine and what servers were asked before (their caches) decide.
UNEQUAL = ("time", "memory/", "tokens/evaluate", "unique/", "_s", "_peak_bytes")
# The run's own entry, but asked to stop at the first look after `looks` steps: a signal comes when it likes.
RUN = """
import sys
from genac_megatron.platform.megatron import install
install()
from genac_megatron.errors import GenacError
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.stages.pipeline import run_recipe
from genac_megatron.training.layout import close_world, init_world

class Stop:
    def __init__(self, looks):
        self.looks = looks
    @property
    def asked(self):
        self.looks -= 1
        return self.looks < 0

recipe = load_recipe(sys.argv[1], [])
world = init_world(recipe.world.timeout_s, recipe.seed)
try:
    run_recipe(recipe, world, Stop(int(sys.argv[2])), resume=sys.argv[3] == "resume")
except GenacError as error:
    print(error)
    sys.exit(error.exit_code)
close_world()
"""


def recipe_in(folder: Path) -> Path:
    roles = {
        name: {**role, "layout": {}, "engine": {"dtype": "fp32"}} for name, role in RECIPE["roles"].items()
    }
    roles["critic"]["publication"] = {"every": 3}
    content = {**RECIPE, "roles": roles, "world": {"ranks": 1, "timeout_s": 120}, "runs": str(folder)}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**content, "stages": [{**PPO, "steps": STEPS}]}))
    return path


def run(folder: Path, looks: int, how: str = "begin") -> tuple[int, str]:
    recipe = folder / "recipe.yaml"
    done = python([sys.executable, "-W", "ignore", "-c", RUN, str(recipe), str(looks), how], cwd=folder)
    return done.returncode, done.stdout + done.stderr


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [
        {
            k: v
            for k, v in json.loads(line).items()
            if not k.startswith(UNEQUAL[:4]) and not k.endswith(UNEQUAL[4:])
        }
        for line in lines
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of a run that nobody stops."""
    folder = tmp_path_factory.mktemp("whole")
    recipe_in(folder)
    code, output = run(folder, 10**6)
    assert code == 0, output
    found = rows(folder)
    # Every third step and the last one. The first version is of the stage's beginning.
    versions = {
        row["step"]: row["publish/critic_version"] for row in found if "publish/critic_version" in row
    }
    assert versions == {1: 1, 3: 2, 6: 3, 7: 4}
    return found


@pytest.mark.parametrize("asked", [1, *(pytest.param(n, marks=pytest.mark.extended) for n in (2, 3))])
def test_stopped_between_publications_and_resumed_the_rows_are_the_same(
    tmp_path: Path, whole: list[dict[str, Any]], asked: int
) -> None:
    """Asked after steps 1, 2 and 3 the run stops after 3, where engines have what the checkpoint has."""
    recipe_in(tmp_path)
    code, output = run(tmp_path, asked - 1)
    assert code == 75, output
    assert rows(tmp_path)[-1]["step"] == 3
    assert ("goes on until critic is published" in output) == (asked < 3)
    code, output = run(tmp_path, 10**6, "resume")
    assert code == 0, output
    assert "warning" not in output
    assert rows(tmp_path) == whole


def test_ended_between_publications_the_resumed_run_says_what_its_engines_have(
    tmp_path: Path, whole: list[dict[str, Any]]
) -> None:
    """As where a job's grace ends before step 3: what was saved at once, after step 1, is the newest then."""
    recipe_in(tmp_path)
    code, output = run(tmp_path, 0)
    assert code == 75, output
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["ppo-00001", "ppo-00003"]
    shutil.rmtree(checkpoints / "ppo-00003")
    code, output = run(tmp_path, 10**6, "resume")
    assert code == 0, output
    assert "ended between publications of critic" in output
    assert "1 updates later" in output
    found = rows(tmp_path)
    assert found[0] == whole[0]
    assert found[1]["publish/critic_version"] == 2  # other weights, so another version
    assert found[1]["publish/critic_behind"] == 0
    assert [row["step"] for row in found if "rollout/staleness" in row] == list(range(1, STEPS + 1))
