"""Sources of SFT samples, a replay and what a gate goes back to: what a recipe may say of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from genac_megatron.errors import InputError
from genac_megatron.recipe.estimate import describe
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.schema import ReinforceStage, SftStage
from genac_megatron.recipe.source_rules import replayed

RECIPE = """\
name: tiny
roles:
  actor: &role
    model:
      family: qwen3
      tokenizer: builtin:tiny
      shape: {layers: 2, hidden: 64, ffn: 128, heads: 4, kv_heads: 2}
  critic: *role
task: {kind: state_tracking}
stages:
  - {kind: sft, name: demos, role: actor, data: demonstrations}
  - {kind: sft, name: traces, role: critic, data: traces, epochs: 1, size: 100, sources: [{share: 1}]}
  - {kind: reinforce, replay: {sources: [{share: 1}]}}
  - {kind: ppo}
"""
LONG = "task: {kind: state_tracking, min_swaps: 6, max_swaps: 8}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def sources(*blocks: str) -> str:
    return f"stages.1.sources=[{', '.join(blocks)}]"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [sources("{share: 0.7}", f"{{name: long, share: 0.3, scored: false, {LONG}}}")],
        [sources("{share: 0.5, phase: [0, 0.5]}", "{share: 0.5, phase: [0.5, 1]}")],
        [sources("{share: 0.9}", "{share: 0.1, data: demonstrations}")],
        [sources("{share: 0.3333333}", "{share: 0.3333333}", "{share: 0.3333334}")],
        [sources("{share: 1, teacher: {kind: monte_carlo}}")],
        [sources("{share: 1, teacher: {kind: monte_carlo, writes: score}}")],
        [sources("{share: 0.5, data: demonstrations}", "{share: 0.5}"), "stages.1.length_buckets=3"],
        ["task={kind: reasoning_gym, name: x}", sources("{share: 1, teacher: {kind: monte_carlo}}"),
         "stages.0=null", "stages.2.replay=null"],
        ["stages.2.gate={action: fallback}"],
        ["stages.2.gate={action: fallback, fallback: traces}"],
    ],
)  # fmt: skip
def test_what_goes_together(path: Path, overrides: list[str]) -> None:
    overrides = [one for one in overrides if one != "stages.0=null"]
    if any("reasoning_gym" in one for one in overrides):
        path.write_text("\n".join(line for line in RECIPE.splitlines() if "demos" not in line) + "\n")
        overrides = [one.replace("stages.1", "stages.0").replace("stages.2", "stages.1") for one in overrides]
    assert "rank" in describe(load_recipe(path, overrides))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (sources("{share: 0.5}", "{share: 0.4}"), "shares sum to 0.9, not to 1"),
        (sources("{share: 0.5, name: a}", "{share: 0.5, name: a}"), "2 sources that are called 'a'"),
        (sources("{share: 0.5, name: '2'}", "{share: 0.5}"), "2 sources that are called '2'"),
        (sources("{share: 0.999}", "{share: 0.001}"), "share 0.001 of source '2' is less than one"),
        (sources("{share: 0}", "{share: 1}"), "more than 0"),
        (sources("{share: 1, task: {kind: benchmark, name: math500}}"), "all of which is held out"),
        (sources("{share: 1, task: {kind: state_tracking, min_swaps: 6}}"), "above max_swaps"),
        (sources("{share: 1, task: {kind: reasoning_gym, name: x}}"), "'reasoning_gym' has none"),
        (sources("{share: 1, task: {kind: jsonl, path: nowhere, verifier: math}, teacher: {kind: self}}"),
         "no file nowhere"),
        (sources("{share: 1, data: demonstrations, task: {kind: reasoning_gym, name: x}}"), "no teacher"),
        (sources("{share: 1, data: demonstrations, scored: false}"), "scored is about traces"),
        (sources("{share: 1, data: demonstrations, teacher: {kind: self}}"), "teacher is about traces"),
        (sources("{share: 1, scored: false, teacher: {writes: reasoning}}"), "which has no score"),
        (sources("{share: 1, teacher: {kind: monte_carlo, writes: reasoning}}"), "which has no score"),
        (sources("{share: 1, teacher: {kind: monte_carlo, p_bar_range: [0, 1]}}"), "(p_bar_range)"),
        (sources("{share: 1, teacher: {kind: self, writes: score}}"), "teacher.kind: monte_carlo or exact"),
        (sources("{share: 1, teacher: {kind: self, writes: reasoning}}"), "teacher.kind: exact"),
        (sources("{share: 1, teacher: {kind: self, p_bar_range: [0, 1]}}"), "shows others (p_bar_range)"),
        (sources("{share: 1, teacher: {kind: endpoint, url: u, model: m, writes: score}}"),
         "an endpoint's answers as they are"),
        (sources("{share: 1, teacher: {kind: endpoint, url: u, model: m, p_bar_range: [0, 1]}}"),
         "(p_bar_range)"),
        ("stages.1={kind: sft, role: critic, data: traces, teacher: {kind: self, writes: score}}",
         "take writes out"),
        ("stages.2.replay={sources: [{share: 1, teacher: {kind: self, p_bar_range: [0.3, 1]}}]}",
         "(p_bar_range)"),
        (sources("{share: 1, data: demonstrations, rollout: {samples: 2}}"), "rollout is about traces"),
        (sources("{share: 1, data: demonstrations, length_buckets: 3}"), "length_buckets is about traces"),
        ("stages.0.length_buckets=4", "makes no traces, and length_buckets"),
        ("stages.1={kind: sft, role: critic, data: jsonl, path: ./recipe.yaml, length_buckets: 2}",
         "makes no traces, and length_buckets"),
        ("stages.1={kind: sft, role: critic, data: traces, length_buckets: 2, "
         "sources: [{share: 1, data: demonstrations}]}", "makes no traces, and length_buckets"),
        (sources("{share: 1, teacher: {kind: endpoint}}"), "without its url and model"),
        (sources("{share: 1, phase: [0.5, 0.5]}"), "phase from 0.5 to 0.5"),
        (sources("{share: 1, phase: [0, 2]}"), "at most 1"),
        (sources("{share: 1, rollout: {max_new_tokens: 5000}}"), "no room for a prompt"),
        (sources("{share: 1, score: false}"), "unknown key"),
        ("stages.0.sources=[{share: 1, data: traces}]", "the stage is demonstrations"),
        ("stages.1={kind: sft, name: traces, role: critic, data: traces, epochs: 2, "
         "sources: [{share: 1, phase: [0, 0.5]}]}", "set epochs: 1"),
        ("stages.1={kind: sft, role: critic, data: jsonl, path: ./recipe.yaml, sources: [{share: 1}]}",
         "reads jsonl, and has sources"),
        ("stages.1={kind: sft, role: critic, data: traces, teacher: {kind: monte_carlo, writes: reasoning}}",
         "which has no score"),
        ("stages.2.replay={sources: [{share: 0.5}]}", "shares sum to 0.5"),
        ("stages.2.replay={sources: []}", "at least 1 entry"),
        ("stages.2.replay={sources: [{share: 1, phase: [0, 0.5]}]}", "a source has a phase"),
        ("stages.2.replay={sources: [{share: 1, rollout: {max_new_tokens: 5000}}]}", "no room for a prompt"),
        ("stages.0.name=reinforce-replay", "as the samples of the replay"),
        ("stages.2.gate={action: fallback, fallback: demos}", "no SFT stage of the critic before it"),
        ("stages.2.gate={action: fallback, fallback: nothing}", "there are: traces"),
        ("stages.2.gate={fallback: traces}", "its action is stop"),
        ("stages.2.gate={action: back}", "one of stop, warn, off, fallback"),
        ("stages.1.gate={action: fallback}", "one of stop, warn, off (it is"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_told_with_its_place(path: Path, override: str, said: str) -> None:
    with pytest.raises(InputError, match=r"stages|recipe\.yaml:\d") as raised:
        load_recipe(path, [override])
    assert said in str(raised.value)


def test_a_replay_is_made_as_traces_of_the_critic(path: Path) -> None:
    stage = load_recipe(path, ["stages.2.replay={size: 30, sources: [{share: 1}]}"]).stages[2]
    assert isinstance(stage, ReinforceStage)
    made = replayed(stage)
    assert (made.name, made.role, made.data, made.made) == ("reinforce-replay", "critic", "traces", 30)
    assert made.rollout == stage.rollout


def test_who_teaches() -> None:
    def asks(**more: object) -> bool:
        return SftStage.model_validate(
            {"kind": "sft", "role": "critic", "data": "traces", **more}
        ).asks_itself

    own = {"kind": "self"}
    assert not asks()
    assert asks(teacher=own)
    assert asks(sources=[{"share": 0.5}, {"share": 0.5, "teacher": own}])
    assert asks(teacher=own, sources=[{"share": 1}])
    assert not asks(teacher=own, sources=[{"share": 1, "teacher": {"kind": "exact"}}])
