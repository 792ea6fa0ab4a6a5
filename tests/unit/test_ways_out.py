"""Every refusal of an input has a way out: where it is raised, and of values that are none for their keys."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from genac_megatron.errors import InputError
from genac_megatron.recipe.loader import dump_recipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "genac_megatron"
# Here one of our own functions was called wrongly, or `models/registry.py` gives place and way out.
OURS = {
    *(f"models/{name}.py" for name in ("logprobs", "mapping", "packed_attention", "routing", "specs")),
    *("models/families/base.py", "models/families/reading.py", "publication/publisher.py"),
    *(f"serving/{name}.py" for name in ("embedded", "engine", "sglang/engine", "sglang/loading")),
    *(f"training/{name}.py" for name in ("distributed_batch", "packing", "plans", "tree_packs")),
}
RECIPES = ("quickstart.yaml", "games/lock.yaml")
BAD = ("-1.5e+300", "{a: {b: 1}}")


def raised_without(path: Path) -> Iterator[int]:
    """Lines that raise or make an InputError without a way out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "InputError":
            given = {keyword.arg for keyword in node.keywords}
            if "way_out" not in given and len(node.args) + len(given) > 0:
                yield node.lineno


def test_whoever_refuses_an_input_says_what_to_do() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).as_posix() not in OURS
        for line in raised_without(path)
    ]
    assert found == []
    unused = [name for name in OURS if not list(raised_without(PACKAGE / name))]
    assert unused == [], "they need no exception any more"


def leaves(value: Any, path: str = "") -> Iterator[str]:
    """Paths of all keys and of entries of lists, as overrides write them."""
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in children:
        at = f"{path}.{key}".removeprefix(".")
        yield at
        if isinstance(child, dict | list):
            yield from leaves(child, at)


@pytest.mark.parametrize("name", RECIPES)
def test_a_value_that_is_none_for_its_key_is_told_with_a_way_out(name: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole.yaml"
    recipe = load_recipe(ROOT / "recipes" / name)
    whole.write_text(dump_recipe(recipe))
    assert load_recipe(whole) == recipe, "else all is refused of one reason"
    lacking, refused = [], 0
    for path in leaves(yaml.safe_load(whole.read_text())):
        for bad in BAD:
            try:
                load_recipe(whole, [f"{path}={bad}"])
            except InputError as error:
                refused += 1
                if not error.way_out or not error.where:
                    lacking.append(f"{path}={bad}: {error}")
    assert lacking == []
    assert refused > 300, "nearly all keys refuse both"


def test_the_way_out_is_the_keys_own(tmp_path: Path) -> None:
    def way_out(override: str) -> str:
        with pytest.raises(InputError) as caught:
            load_recipe(ROOT / "recipes" / "quickstart.yaml", [override])
        return caught.value.way_out

    assert way_out("stages.ppo.rollout.temperature=0").endswith("(docs/reference.md; default 1.0)")
    assert way_out("world=3") == "its keys: ranks, threads, timeout_s"
    assert way_out("stages.ppo=5").startswith("begin it with kind: one of sft, ")
    assert way_out("name=[]") == "docs/reference.md has what it may be"
    assert way_out("cluster.gpu=[]") == "write such a value, or leave the key out (docs/reference.md)"
