"""The recipes that ship: each loads, can be described, and the quickstart's parts are the quickstart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.published_models import MODELS
from genac_megatron.cli import main
from genac_megatron.cluster.placement import misfits
from genac_megatron.recipe.estimate import describe
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.tasks import BenchmarkTask, RubricTask
from genac_megatron.tasks.rubric import make_rubric_task
from genac_megatron.tasks.tokenizer import chat_text, load_tokenizer

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
PARTS = ("sft", "reinforce", "ppo")


# Recipes of other folders name model folders, which are not here.
RECIPES = sorted(
    [
        *FOLDER.glob("*.yaml"),
        *(FOLDER / "quickstart").glob("*.yaml"),
        *(FOLDER / "evaluate").glob("*.yaml"),
        *(FOLDER / "environments").glob("*.yaml"),
        FOLDER / "planning" / "cpu.yaml",
    ]
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_recipe_loads_and_is_described(path: Path) -> None:
    recipe = load_recipe(path)
    assert "rank" in describe(recipe)


@pytest.mark.parametrize("name", ["planning", "dialogue"])
def test_a_recipe_beyond_maths_passes_its_dry_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the config of the model that they name; weights are not looked at."""
    model = tmp_path / "models" / "Qwen3-4B"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(MODELS["Qwen3-4B"]))
    monkeypatch.chdir(tmp_path)
    [path] = (FOLDER / name).glob("qwen3-4b-*.yaml")
    assert main(["run", str(path), "--dry-run"]) == 0
    assert "4.02 B parameters" in capsys.readouterr().out
    assert main(["run", str(path), "--resolved"]) == 0
    shown = capsys.readouterr().out
    assert {"planning": "name: rush_hour", "dialogue": "kind: rubric"}[name] in shown


def test_the_base_models_recipe_has_a_template_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "models" / "Qwen3-8B-Base"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(MODELS["Qwen3-8B"]))
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(FOLDER / "base-models" / "qwen3-8b-base-2n8g-tp4.yaml")
    assert misfits(recipe) == []
    assert "expects advantage/gap" in describe(recipe)
    for role in recipe.roles.values():
        given = load_tokenizer("builtin:tiny", None, None, role.model.chat_template)
        asked = chat_text(given, [{"role": "user", "content": "2+2?"}])
        assert asked == "2+2?\n\nSolution:\n"
        whole = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
        assert chat_text(given, whole, generation=False) == f"2+2?\n\n4{given.eos_token}\n\n"


def test_a_recipe_can_be_evaluated_on_a_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/evaluation.md has it: the override replaces the task whole."""
    model = tmp_path / "models" / "Qwen3-4B"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(MODELS["Qwen3-4B"]))
    monkeypatch.chdir(tmp_path)
    path = FOLDER / "cluster" / "pipeline-qwen3-4b-1n8g-tp4.yaml"
    recipe = load_recipe(path, ["task={kind: benchmark, name: aime24}"])
    assert recipe.task == BenchmarkTask(kind="benchmark", name="aime24")


def test_the_prompts_beside_the_dialogue_recipe_make_a_task() -> None:
    config = RubricTask.model_validate(
        {"kind": "rubric", "path": str(FOLDER / "dialogue" / "prompts.jsonl"), "heldout_size": 4,
         "judge": {"url": "http://127.0.0.1:9/v1", "model": "none"}}
    )  # fmt: skip
    task = make_rubric_task(config, load_tokenizer("builtin:tiny"), 0)
    assert (task.train_size, task.heldout_size) == (8, 4)
    assert all(len(task.prompt("train", index).ids) > 10 for index in range(8))
    task.close()


def test_the_quickstart_in_parts_is_the_quickstart() -> None:
    """Same stages, same everything else, but names and where the models come from."""
    whole = load_recipe(FOLDER / "quickstart.yaml").model_dump()
    parts = [load_recipe(FOLDER / "quickstart" / f"{part}.yaml").model_dump() for part in PARTS]
    assert [stage for part in parts for stage in part["stages"]] == whole["stages"]
    for name, part, before in zip(PARTS, parts, (None, *PARTS), strict=False):
        assert part["name"] == f"quickstart-{name}"
        for role in part["roles"].values():
            begun = role["model"].pop("checkpoint")
            assert begun == (f"runs/quickstart-{before}" if before else None)
        for role in whole["roles"].values():
            role["model"].pop("checkpoint", None)
        assert {k: v for k, v in part.items() if k not in ("name", "stages")} == {
            k: v for k, v in whole.items() if k not in ("name", "stages")
        }
