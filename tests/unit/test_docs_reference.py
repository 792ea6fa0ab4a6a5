"""The reference of a recipe's keys is what the schema gives, and what it says of stages' blocks is so."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.schema import Recipe, SftStage
from genac_megatron.recipe.training import OptimizerConfig
from tools.recipe_reference import PAGE, comments, default_of, meaning, page, sections, type_of

RECIPE = """
name: one
roles:
  actor:
    model:
      family: qwen3
      tokenizer: builtin:tiny
      shape: {layers: 1, hidden: 32, ffn: 64, heads: 2, kv_heads: 2}
    optimizer: {lr: 1.0e-3, weight_decay: 0.5}
task: {kind: state_tracking}
stages: [{kind: sft, role: actor, data: demonstrations, optimizer: {lr: 1.0e-4}}]
"""


class Made(BaseModel):
    # said above,
    # in two lines
    one: int = 1  # and beside
    two: dict[str, int] = {}

    # What follows is for others.
    three: str = (
        "abc"  # inside, as where a line is full, which this one is made to be by so many words that it breaks
    )


def test_the_page_is_what_the_schema_gives() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "docs/reference.md is out of date: make reference"


def test_every_block_and_key_is_there() -> None:
    """Counted apart from the page's maker, by pydantic's own JSON schema."""
    blocks = Recipe.model_json_schema()["$defs"]
    found = {section.block.__name__: section.block for section in sections()}
    assert set(found) == {*blocks, "Recipe"}
    for name, schema in blocks.items():
        assert set(found[name].model_fields) == set(schema["properties"]), name


def test_meanings_are_the_comments_beside_and_above_keys() -> None:
    assert meaning(Made, "one") == "said above, in two lines and beside"
    assert meaning(Made, "two") == ""
    assert meaning(Made, "three").startswith("inside, as where")
    assert comments(Made).before == {"three": "What follows is for others."}


def test_types_and_defaults() -> None:
    fields = SftStage.model_fields
    assert (type_of(fields["size"]), default_of(fields["size"])) == ("integer (≥ 1) or null", "`null`")
    assert default_of(fields["role"]) == "required"
    assert type_of(OptimizerConfig.model_fields["beta1"]) == "number (≥ 0, ≤ 1)"


def test_a_stages_optimizer_stands_over_the_roles_as_the_page_says(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(RECIPE, encoding="utf-8")
    stage = load_recipe(tmp_path / "one.yaml").stages[0]
    assert isinstance(stage, SftStage)
    assert stage.optimizer == OptimizerConfig(lr=1e-4, weight_decay=0.5)
    assert "key by key with the role's `optimizer`" in page()


def test_every_key_says_what_it_means() -> None:
    assert [
        f"{section.block.__name__}.{key}"
        for section in sections()
        for key in section.block.model_fields
        if not meaning(section.block, key)
    ] == []
