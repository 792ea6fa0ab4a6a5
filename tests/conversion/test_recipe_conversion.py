"""The SmolLM2 recipes: they resolve; their data are what the tool makes, apart from the task's problems."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from genac_megatron.recipe.estimate import describe
from genac_megatron.recipe.loader import load_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes" / "smollm2"


@pytest.mark.parametrize("name", ["cpu", "gpu", "tools", "verifiers"])
def test_a_recipe_resolves(name: str, smollm2: Path) -> None:
    places = [f"roles.{role}.model.hf={smollm2}" for role in ("actor", "critic")]
    recipe = load_recipe(str(RECIPES / f"{name}.yaml"), places)
    assert "llama, 135 M parameters" in describe(recipe)
    between = [] if name in ("tools", "verifiers") else ["reinforce"]
    assert [stage.kind for stage in recipe.stages] == ["sft", "sft", *between, "ppo"]


def test_the_conversations_are_those_of_the_tool(tmp_path: Path) -> None:
    tool = ROOT / "tools" / "make_chain_sum_data.py"
    subprocess.run([sys.executable, str(tool), str(tmp_path)], check=True, cwd=tmp_path)
    for file in ("actor.jsonl", "tools.jsonl", "critic.jsonl"):
        assert (tmp_path / file).read_text() == (RECIPES / file).read_text()


def test_no_problem_of_the_task_is_among_them() -> None:
    for line in (RECIPES / "actor.jsonl").read_text().splitlines():
        question = json.loads(line)["messages"][0]["content"].split("\n")[0]
        numbers = re.findall(r"\d+", question)
        assert len(numbers) == 2
        assert min(map(len, numbers)) == 2  # the task's have one digit
