"""Reading recipes: inheritance, overrides, and what a mistake is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.errors import EXIT_INPUT, InputError
from genac_megatron.recipe import document
from genac_megatron.recipe.document import Entry, merge, parse, plain
from genac_megatron.recipe.loader import dump_recipe, load_recipe

BASE = """\
name: tiny
roles:
  actor: &role
    model:
      family: llama
      tokenizer: builtin:tiny
      shape: {layers: 4, hidden: 64, ffn: 128, heads: 4, kv_heads: 2}
    optimizer: {lr: 1e-4}
    training: {recompute: off, fp8: off}
  critic: *role
task:
  kind: state_tracking
  objects: 3
stages:
  - kind: sft
    role: critic
    data: traces
  - kind: reinforce
    steps: 7
  - kind: ppo
    steps: 3
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> InputError:
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == EXIT_INPUT
    return caught.value


def test_the_loader_imports_no_torch():
    modules = "recipe.loader", "recipe.estimate", "recipe.schema", "recipe.rules", "recipe.document"
    modules = *modules, "models.registry", "models.sizes", "tasks.tokenizer"
    imports = "; ".join(f"import genac_megatron.{name}" for name in modules)
    code = f"import sys; {imports}; sys.exit(any(m.split('.')[0] == 'torch' for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_plain_words_and_numbers_are_read_as_a_recipe_means_them(base: Path):
    recipe = load_recipe(base)
    assert recipe.roles["actor"].training.recompute == "off"
    assert recipe.roles["critic"].optimizer.lr == 1e-4
    assert recipe.stages[1].steps == 7


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"), ("off", "off"), ("yes", "yes"), ("true", True), ("1e-6", 1e-6), ("-2.5E3", -2500.0),
        ("1_000", 1000), ("0x10", 16), ("-3", -3), (".5", 0.5), ("12:30", "12:30"), ("~", None), ("", None),
        ("null", None), ("2026-01-02", "2026-01-02"), ("1.2.3", "1.2.3"), ("[1, a]", [1, "a"]),
        (".inf", float("inf")), ("'1'", "1"), ("007", "007"),
    ],
)  # fmt: skip
def test_plain_scalars_follow_yaml_1_2(text: str, value: object):
    assert plain(parse(text, "x", Path())) == value


def test_a_dumped_recipe_loads_to_the_same(base: Path, tmp_path: Path):
    recipe = load_recipe(base, ["judging.icc=shuffled", "stages.ppo.rollout.temperature=0.7"])
    again = load_recipe(write(tmp_path / "dumped.yaml", dump_recipe(recipe)))
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)


def test_extends_merges_mappings_and_replaces_lists(base: Path, tmp_path: Path):
    write(tmp_path / "other.yaml", "seed: 4\nworld: {ranks: 2, threads: 1}\n")
    top = write(
        tmp_path / "top.yaml",
        "extends: [base.yaml, other.yaml]\nname: top\nworld: {ranks: 4}\nstages: [{kind: ppo, steps: 9}]\n",
    )
    recipe = load_recipe(top)
    assert (recipe.name, recipe.seed, recipe.world.ranks, recipe.world.threads) == ("top", 4, 4, 1)
    assert [stage.kind for stage in recipe.stages] == ["ppo"]
    assert recipe.roles["actor"].model.family == "llama"


def test_extends_is_relative_to_the_file_it_stands_in(base: Path, tmp_path: Path):
    deep = tmp_path / "deep"
    deep.mkdir()
    write(deep / "middle.yaml", "extends: ../base.yaml\n")
    assert load_recipe(write(tmp_path / "top.yaml", "extends: deep/middle.yaml\n")).name == "tiny"


def test_another_kind_replaces_the_block_of_its_base(base: Path, tmp_path: Path):
    top = write(
        tmp_path / "top.yaml",
        "extends: base.yaml\ntask: {kind: reasoning_gym, name: chain_sum}\n"
        "stages: [{kind: ppo}]\n",
    )  # fmt: skip
    assert load_recipe(top).task.name == "chain_sum"


def test_a_circle_of_extends_is_refused(tmp_path: Path):
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    assert "a.yaml -> b.yaml -> a.yaml" in str(refusal(tmp_path / "a.yaml"))


def test_a_missing_base_names_the_line_that_wants_it(tmp_path: Path):
    error = refusal(write(tmp_path / "a.yaml", "name: x\nextends:\n  - nowhere.yaml\n"))
    assert error.where == f"{tmp_path}/a.yaml:3"


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("stages.2.steps=5", lambda r: r.stages[2].steps == 5),
        ("stages.ppo.steps=6", lambda r: r.stages[2].steps == 6),
        ("roles.actor.optimizer.lr=3e-5", lambda r: r.roles["actor"].optimizer.lr == 3e-5),
        ("world={ranks: 8}", lambda r: r.world.ranks == 8),
        ("judging.states.max_states=4", lambda r: r.judging.states.max_states == 4),
        ("judging.icc=off", lambda r: r.judging.icc == "off"),
        ("name=a=b", lambda r: r.name == "a=b"),
    ],
)
def test_overrides(base: Path, text: str, read):
    assert read(load_recipe(base, [text]))


def test_an_override_touches_no_alias_of_its_block(base: Path):
    recipe = load_recipe(base, ["roles.actor.optimizer.lr=1"])
    assert recipe.roles["critic"].optimizer.lr == 1e-4


@pytest.mark.parametrize(
    "text", ["steps", "=3", "stages.7.steps=1", "stages.ppp.steps=1", "name.x=3", "a..b=1", "task=[1"]
)
def test_an_override_that_means_nothing_is_refused(base: Path, text: str):
    assert refusal(base, text).where == f"override {text}"


def test_an_unknown_key_is_named_with_line_and_nearest(base: Path, tmp_path: Path):
    top = write(tmp_path / "top.yaml", "extends: base.yaml\njudging:\n  states:\n    max_stats: 3\n")
    error = refusal(top)
    assert error.where == f"{top}:4"
    assert "'judging.states.max_stats'" in str(error)
    assert "'max_states'" in error.way_out


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("stages.ppo.stepz=1", "steps"),
        ("roles.actor.optimizer.larning_rate=1", "known here: beta1"),
        ("task.objcts=3", "objects"),
        ("wrld.ranks=3", "world"),
        ("task.kind=jsnl", "jsonl"),
        ("roles.critic.layout.t_p=2", "tp"),
    ],
)
def test_the_nearest_key_is_of_the_same_block(base: Path, text: str, near: str):
    assert near in refusal(base, text).way_out


def test_every_fault_is_told_at_once(base: Path):
    error = refusal(base, "world.ranks=0", "seed=x", "stages.ppo.stepz=3")
    text = str(error)
    assert all(part in text for part in ("world.ranks", "'seed'", "did you mean 'steps'"))


def test_a_bad_value_names_its_line(base: Path, tmp_path: Path):
    path = write(tmp_path / "top.yaml", BASE.replace("steps: 7", "steps: seven"))
    error = refusal(path)
    assert error.where == f"{path}:19"
    assert "'stages.1.steps'" in str(error)


def test_a_missing_key_names_its_block(tmp_path: Path):
    path = write(tmp_path / "top.yaml", BASE.replace("    role: critic\n", ""))
    error = refusal(path)
    assert error.where == f"{path}:15"
    assert "'stages.0.role' is missing" in str(error)


def test_a_key_that_is_twice_in_a_block_is_refused(tmp_path: Path):
    path = write(tmp_path / "twice.yaml", "name: a\nseed: 1\nname: b\n")
    error = refusal(path)
    assert error.where == f"{path}:3"
    assert f"{path}:1" in error.way_out


@pytest.mark.parametrize(
    "text", ["name: [1", "- a\n", "", "a: !thing 3", "name: a\n\tseed: 1", "1: 2\n? [a]\n: 3"]
)
def test_what_is_no_recipe_is_refused_with_its_place(tmp_path: Path, text: str):
    path = write(tmp_path / "odd.yaml", text)
    assert refusal(path).where.startswith(str(path))


def test_a_missing_recipe_is_refused(tmp_path: Path):
    assert "No such file" in str(refusal(tmp_path / "none.yaml"))


def test_paths_beside_the_recipe_become_absolute(tmp_path: Path):
    (tmp_path / "data.jsonl").write_text("")
    task = "  kind: jsonl\n  path: ./data.jsonl\n  verifier: math"
    text = BASE.replace("  kind: state_tracking\n  objects: 3", task)
    text = text.replace("  - kind: sft\n    role: critic\n    data: traces\n", "")
    path = write(tmp_path / "top.yaml", text)
    assert load_recipe(path).task.path == str(tmp_path / "data.jsonl")
    assert load_recipe(path, ["runs=elsewhere"]).runs == "elsewhere"


keys = st.text("abc", min_size=1, max_size=2)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


def entry(value: object) -> Entry:
    if isinstance(value, dict):
        return Entry({key: entry(child) for key, child in value.items()}, "")
    return Entry([entry(child) for child in value] if isinstance(value, list) else value, "")


@given(values)
def test_what_yaml_writes_is_read_back(value: object):
    assert plain(parse(yaml.safe_dump(value), "x", Path())) == value


@given(st.dictionaries(keys, values), st.dictionaries(keys, values))
def test_merging_keeps_all_of_the_upper_and_adds_what_only_the_lower_has(low: dict, high: dict):
    merged = plain(merge(entry(low), entry(high)))
    assert merged.keys() == low.keys() | high.keys()
    for key in merged:
        if key not in high:
            assert merged[key] == low[key]
        elif not (isinstance(high[key], dict) and isinstance(low.get(key), dict)):
            assert merged[key] == high[key]
    assert plain(merge(entry(merged), entry(high))) == merged


def test_the_schema_has_every_key_that_may_be_a_path():
    from genac_megatron.recipe import schema, tasks

    blocks = [
        block
        for block in (*vars(schema).values(), *vars(tasks).values())
        if isinstance(block, type) and issubclass(block, schema.Block)
    ]
    known = {key for block in blocks for key in block.model_fields}
    assert known >= document.PATH_KEYS
