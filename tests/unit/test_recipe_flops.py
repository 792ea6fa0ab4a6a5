"""A dry run's FLOPs of a joint step beside PPO's."""

from __future__ import annotations

import pytest

from benchmarks.published_models import MODELS
from genac_megatron.models.registry import shape_from_hf
from genac_megatron.models.sizes import parameters
from genac_megatron.recipe import flops
from genac_megatron.recipe.estimate import describe
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.rules import read_shape
from genac_megatron.recipe.schema import PpoStage
from tests.warm import ROOT

PATH = ROOT / "recipes" / "quickstart.yaml"
SMALL = [
    "judging.max_new_tokens=400", "judging.states.max_states=4", "judging.states.min_segment=100",
    "stages.ppo.rollout.max_new_tokens=1600", "stages.ppo.rollout.prompts=2", "stages.ppo.rollout.samples=3",
    "stages.ppo.train_states=2", "stages.ppo.train_share=1.0",
]  # fmt: skip


def parts(*overrides: str, length: float = 1000) -> tuple[flops.Step, flops.Step, int]:
    recipe = load_recipe(PATH, [*SMALL, *overrides])
    shapes = {name: read_shape(role.model) for name, role in recipe.roles.items()}
    stage = recipe.stages[-1]
    assert isinstance(stage, PpoStage)
    both = (step(recipe, stage, shapes, length) for step in (flops.joint_step, flops.ppo_step))
    return (*both, parameters(shapes["critic"]))  # type: ignore[return-value]


def test_a_step_against_a_count_by_hand() -> None:
    """Marks are at 200, 400 and 800 tokens: a response of 1,000 has three states beside the prompt's."""
    own, ppo, size = parts()
    written = 6 * 1000 + 2 * flops.PROBLEM
    states = 2 + 6 * 3
    head = 2 * (flops.TEMPLATE + flops.PROBLEM)
    assert own.acting == ppo.acting == 2 * size * written
    assert own.judging == 2 * size * (6 * 800 + head + states * flops.AROUND + states * 100)
    assert own.actor == ppo.actor == 6 * size * written
    assert own.critic == 6 * size * (6 * 800 + head + 12 * (flops.AROUND + 100))
    assert (ppo.judging, ppo.critic) == (2 * size * written, 6 * size * written)


def test_levers_move_what_they_are_of() -> None:
    own, ppo, _ = parts()
    assert parts("stages.ppo.train_critic=false")[0].critic == 0
    assert parts("stages.ppo.train_share=0.5")[0].critic < 0.6 * own.critic
    assert parts("roles.actor.training.recompute=full")[1].actor == pytest.approx(ppo.actor * 8 / 6)
    assert parts(length=150)[0].judging < own.judging / 3  # no mark is reached: the prompt alone
    assert parts("stages.ppo.epochs=2")[0].actor == 2 * own.actor


def test_of_a_mixture_of_experts_the_chosen_ones_count() -> None:
    shape = shape_from_hf(MODELS["Qwen3-30B-A3B"])
    assert parameters(shape) == pytest.approx(30.5e9, rel=0.01)
    assert flops.used_parameters(shape) == pytest.approx(3.3e9, rel=0.02)  # its name says 3B
    dense = shape_from_hf(MODELS["Qwen3-8B"])
    assert flops.used_parameters(dense) == parameters(dense)


def test_a_dry_run_says_them_of_joint_stages_with_a_critic_that_writes() -> None:
    shown = describe(load_recipe(PATH, SMALL))
    assert shown.count("times PPO's (acting") == len(flops.SHARES)
    assert "FLOPs of a step with responses of 200 tokens" in shown
    assert "judgements of 100 tokens" in shown
    alone = describe(load_recipe(PATH, ["judging.teacher=exact", "stages.ppo.train_critic=false",
                                        "stages=[{kind: ppo, train_critic: false}]"]))  # fmt: skip
    assert "times PPO's" not in alone
