"""A stage's block stands over an outer one's: what it leaves out is the role's, or the stage's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from genac_megatron.errors import InputError
from genac_megatron.recipe.loader import dump_recipe, load_recipe
from genac_megatron.recipe.schema import OptimizerConfig, Recipe, ReinforceStage, RolloutConfig, SftStage
from genac_megatron.recipe.stages import TeacherConfig

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
RECIPE = """\
name: tiny
roles:
  actor: &role
    model: &model
      family: qwen3
      tokenizer: builtin:tiny
      shape: {layers: 2, hidden: 64, ffn: 128, heads: 4, kv_heads: 2}
    optimizer: {lr: 1.0e-3, weight_decay: 0.0, warmup_steps: 7}
  critic:
    model: *model
    optimizer: {lr: 2.0e-3, beta2: 0.5}
task: {kind: state_tracking}
stages:
  - {kind: sft, name: demos, role: actor, data: demonstrations, optimizer: {warmup_steps: 0}}
  - kind: sft
    name: traces
    role: critic
    data: traces
    rollout: {prompts: 4, max_new_tokens: 96}
    teacher: {p_bar_range: [0.3, 1.0]}
    optimizer: {lr: 3.0e-3}
    sources:
      - {share: 0.5, teacher: {writes: reasoning}, rollout: {samples: 2}}
      - {share: 0.3, teacher: {kind: monte_carlo, continuations: 3}}
      - {share: 0.2, teacher: {p_bar_range: null}}
  - kind: reinforce
    rollout: {prompts: 4, max_new_tokens: 80}
    optimizer: {schedule: cosine}
    replay: {sources: [{share: 1, rollout: {samples: 2}, teacher: {writes: score}}]}
  - {kind: ppo, actor_optimizer: {lr: 1.0e-5}, critic_optimizer: {beta1: 0.8}}
"""
SCALAR = """\
extends: one.yaml
roles: {critic: {model: {head: value}}}
stages:
  - {kind: value, optimizer: {lr: 5.0e-3}}
  - {kind: policy, algorithm: {kind: ppo}, actor_optimizer: {eps: 1.0e-6}, critic_optimizer: {lr: 6.0e-3}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "one.yaml").write_text(RECIPE)
    (tmp_path / "two.yaml").write_text(SCALAR)
    return tmp_path / "one.yaml"


def optimizers(recipe: Recipe) -> list[Any]:
    return [
        getattr(stage, key)
        for stage in recipe.stages
        for key in ("optimizer", "actor_optimizer", "critic_optimizer")
        if hasattr(stage, key)
    ]


def test_optimizers_of_every_kind_of_stage(path: Path) -> None:
    actor, critic = {"lr": 1e-3, "weight_decay": 0.0, "warmup_steps": 7}, {"lr": 2e-3, "beta2": 0.5}
    assert optimizers(load_recipe(path)) == [
        OptimizerConfig(**{**actor, "warmup_steps": 0}),
        OptimizerConfig(**{**critic, "lr": 3e-3}),
        OptimizerConfig(**critic, schedule="cosine"),
        OptimizerConfig(**{**actor, "lr": 1e-5}),
        OptimizerConfig(**critic, beta1=0.8),
    ]
    assert optimizers(load_recipe(path.with_name("two.yaml"))) == [
        OptimizerConfig(**{**critic, "lr": 5e-3}),
        OptimizerConfig(**actor, eps=1e-6),
        OptimizerConfig(**{**critic, "lr": 6e-3}),
    ]


def test_teachers_and_rollouts_of_sources(path: Path) -> None:
    traces, reinforce = load_recipe(path).stages[1:3]
    assert isinstance(traces, SftStage)
    assert isinstance(reinforce, ReinforceStage)
    assert reinforce.replay is not None
    same, other, cleared = (source.teacher for source in traces.sources)
    assert same is not None
    assert (same.p_bar_range, same.writes) == ((0.3, 1.0), "reasoning")
    assert other is not None
    assert (other.p_bar_range, other.continuations) == (None, 3), "of another kind: nothing of the stage's"
    assert cleared is not None
    assert cleared.p_bar_range is None
    assert traces.sources[0].rollout == RolloutConfig(prompts=4, samples=2, max_new_tokens=96)
    assert traces.sources[1].rollout is None
    (replayed,) = reinforce.replay.sources
    assert replayed.rollout == RolloutConfig(prompts=4, samples=2, max_new_tokens=80)
    assert replayed.teacher is not None
    assert replayed.teacher.writes == "score"


def test_a_source_that_says_no_kind_is_of_its_stages(path: Path) -> None:
    sources = "[{share: 0.6, teacher: {judgements: 8}}, {share: 0.4, teacher: {kind: exact}}]"
    said = ["stages.traces.teacher={kind: self, rounds: 2}", f"stages.traces.sources={sources}"]
    stage = load_recipe(path, said).stages[1]
    assert isinstance(stage, SftStage)
    assert [source.teacher for source in stage.sources] == [
        TeacherConfig(kind="self", rounds=2, judgements=8),
        TeacherConfig(kind="exact"),
    ]


def test_a_resolved_recipe_is_read_back_to_the_same(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    (tmp_path / "resolved.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    assert (
        load_recipe(tmp_path / "resolved.yaml", ["roles.actor.optimizer.weight_decay=1"]).stages
        == recipe.stages
    )


def test_one_key_on_the_command_line_leaves_the_others_the_roles(path: Path) -> None:
    recipe = load_recipe(path, ["stages.3={kind: ppo}", "stages.ppo.actor_optimizer.lr=4e-5"])
    assert optimizers(recipe)[-2:] == [OptimizerConfig(lr=4e-5, weight_decay=0.0, warmup_steps=7), None]


def test_a_roles_bad_value_is_told_once(path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(path, ["roles.actor.optimizer.beta2=7"])
    assert str(caught.value).count("beta2' must be") == 1


@pytest.mark.parametrize("recipe", ["quickstart.yaml", "quickstart/sft.yaml", "quickstart-sglang.yaml"])
def test_the_quickstarts_sft_has_the_weight_decay_that_its_figures_had(recipe: str) -> None:
    """Its roles have none: before stages' blocks were merged with theirs, that of the schema stood there."""
    sfts = [stage for stage in load_recipe(RECIPES / recipe).stages if isinstance(stage, SftStage)]
    assert [stage.optimizer.weight_decay for stage in sfts if stage.optimizer] == [0.01, 0.01]
