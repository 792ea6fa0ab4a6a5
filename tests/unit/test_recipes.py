"""The recipes that ship: each loads, can be described, and the quickstart's parts are the quickstart."""

from __future__ import annotations

from pathlib import Path

import pytest

from genac_megatron.recipe.estimate import describe
from genac_megatron.recipe.loader import load_recipe

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
PARTS = ("sft", "reinforce", "ppo")


# Recipes of other folders name model folders, which are not here.
RECIPES = sorted([*FOLDER.glob("*.yaml"), *(FOLDER / "quickstart").glob("*.yaml")])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_recipe_loads_and_is_described(path: Path) -> None:
    recipe = load_recipe(path)
    assert "rank" in describe(recipe)


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
