"""What a cut-off response earns the actor, and critics are to predict of it; DAPO's penalty in joint PPO."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import torch

from genac_megatron.algorithms.advantages import segment_gae
from genac_megatron.algorithms.baselines.dapo import overlong_penalty
from genac_megatron.errors import InputError
from genac_megatron.evaluation.build import for_critics
from genac_megatron.evaluation.session import as_sampled, trial_config
from genac_megatron.recipe.algorithms import CriticLossConfig
from genac_megatron.recipe.rules import check
from genac_megatron.recipe.schema import AdvantageConfig, LossConfig, Recipe, RolloutConfig
from genac_megatron.recipe.tasks import StateTrackingTask
from genac_megatron.records import Completion, Judgement, Rollout, State
from genac_megatron.stages.batch import Batch, actor_rewards, actor_samples, critic_samples
from genac_megatron.stages.figures import judge_figures, rollout_figures
from genac_megatron.stages.rollouts import Generator, Group
from genac_megatron.tasks import make_task
from genac_megatron.tasks.tokenizer import load_tokenizer

TINY = load_tokenizer("builtin:tiny")
TASK = make_task(StateTrackingTask(kind="state_tracking", objects=3, heldout_size=8), TINY, 0)
PROMPT = TASK.prompt("train", 0)
RIGHT = TASK.teacher.demonstrate(PROMPT, random.Random(0)) if TASK.teacher else ""


def verified(finish: str, text: str = RIGHT, **config: Any) -> Rollout:
    """A response after `Generator.verify`, which asks no engine."""
    rollout = Rollout(PROMPT, 0, Completion((1, 2), (0.0, 0.0), finish, ((3, 2),)), text)  # type: ignore[arg-type]
    generator = Generator(None, TINY, TASK, RolloutConfig(**config), (), ())  # type: ignore[arg-type]
    asyncio.run(generator.verify(rollout))
    return rollout


@pytest.mark.parametrize(
    ("actor", "critic", "outcome", "target"),
    [
        ("verify", "same", 1.0, 1.0),
        ("zero", "same", 0.0, 0.0),
        ("zero", "verify", 0.0, 1.0),
        ("verify", "zero", 1.0, 0.0),
        ("zero", "zero", 0.0, 0.0),
    ],
)
def test_a_cut_off_response_by_role(actor: str, critic: str, outcome: float, target: float) -> None:
    rules = {"truncated_outcome": actor, "truncated_critic": critic}
    cut_off = verified("length", **rules)
    assert (cut_off.outcome, cut_off.target) == (outcome, target)
    whole = verified("stop", **rules)
    assert (whole.outcome, whole.target) == (1.0, 1.0)
    wrong = verified("length", "no", **rules)
    assert (wrong.outcome, wrong.target) == (0.0, 0.0)
    bank = for_critics(RolloutConfig(**rules))  # type: ignore[arg-type]
    again = verified(
        "length", truncated_outcome=bank.truncated_outcome, truncated_critic=bank.truncated_critic
    )
    assert again.outcome == again.target == target, "a bank has the critic's outcomes"


def judged(rollouts: list[Rollout]) -> Batch:
    group = Group(PROMPT, rollouts)
    for rollout in rollouts:
        state = State(rollout, 0, 0, len(rollout.completion.ids))
        words = Completion((5, 6), (0.0, 0.0), "stop")
        group.judgements.append([Judgement(state, (4,), words, "", 0.5, used=0.5)])
    return Batch([group])


def test_the_critic_learns_its_own_outcome_and_the_actor_its_own() -> None:
    rollouts = [verified("length", truncated_critic="zero"), verified("stop", truncated_critic="zero")]
    batch = judged(rollouts)
    assert batch.outcomes == [1.0, 1.0]
    assert batch.targets == [0.0, 1.0]
    figures = rollout_figures(batch, {"actor": 3})
    assert (figures["rollout/outcome_mean"], figures["rollout/target_mean"]) == (1.0, 0.5)
    assert judge_figures(batch)["judge/brier_constant"] == 0.25
    plain = AdvantageConfig(whiten=False)
    advantages = [s.fields["advantages"][0] for s in actor_samples(batch, plain, 1.0, LossConfig(), 9)]
    assert advantages == [0.5, 0.5]
    critic_samples(batch, 1, "none", CriticLossConfig())
    for outcome, judgements in zip((0.0, 1.0), batch.judgements, strict=True):
        judgements[0].used = judgements[0].value = outcome
    critic_samples(batch, 1, "none", CriticLossConfig())
    assert [js[0].weight for js in batch.judgements] == [1.0, 1.0], (
        "the best reward is for the critic's outcome"
    )


def test_without_a_rule_of_its_own_nothing_is_new() -> None:
    batch = judged([verified("length"), verified("stop")])
    assert "rollout/target_mean" not in rollout_figures(batch, {"actor": 3})
    assert all(rollout.critic_outcome is None for rollout in batch.rollouts)
    assert actor_rewards(batch, 9, None).tolist() == batch.outcomes


def test_the_overlong_penalty_is_the_actors_alone() -> None:
    """DAPO's, for rewards of -1 and 1: half of it for outcomes of 0 and 1."""
    rollouts = []
    for length in (4, 7, 9, 10):
        rollout = Rollout(
            PROMPT, 0, Completion((1,) * length, (0.0,) * length, "stop", ((3, length),)), "", 1.0
        )
        rollouts.append(rollout)
    batch = judged(rollouts)
    rewards = actor_rewards(batch, 10, 4)
    assert rewards.tolist() == [1.0, 0.875, 0.625, 0.5]
    penalty = overlong_penalty(torch.tensor([[4, 7, 9, 10]]), 10, 4)[0]
    assert torch.allclose(2 * rewards - 1, 1 + penalty)
    samples = actor_samples(batch, AdvantageConfig(whiten=False), 1.0, LossConfig(), 10, 4)
    wanted = segment_gae([torch.tensor([0.5])] * 4, rewards, 1.0, 1.0)
    assert [s.fields["advantages"][0] for s in samples] == [float(advantage[0]) for advantage in wanted]
    assert batch.targets == [1.0] * 4


def recipe(stage: dict[str, Any]) -> Recipe:
    shape = {"layers": 2, "hidden": 32, "ffn": 64, "heads": 2, "kv_heads": 2}
    role = {"model": {"family": "qwen3", "tokenizer": "builtin:tiny", "shape": shape}}
    return Recipe.model_validate(
        {
            "name": "x",
            "task": {"kind": "state_tracking"},
            "roles": {"actor": role, "critic": role},
            "stages": [stage],
        }
    )


def test_a_benchmark_verifies_what_was_cut_off_whatever_the_recipe_trains_by() -> None:
    strict = recipe({"kind": "ppo", "rollout": {"truncated_outcome": "zero"}})
    outcomes = {}
    for name in ("aime24", "heldout"):
        config = trial_config(strict, name, None, 0.5)
        assert config.temperature == 0.5
        rule = config.truncated_outcome
        outcomes[name] = verified("length", truncated_outcome=rule).outcome
        assert as_sampled(strict, config)["truncated_outcome"] == rule, "its plan says it"
    assert outcomes == {"aime24": 1.0, "heldout": 0.0}  # its own prompts: as its evaluations do
    usual = recipe({"kind": "ppo"})
    plan = as_sampled(usual, trial_config(usual, "aime24", 9, None))
    assert plan == {"max_new_tokens": 9, "temperature": 1.0}, "as in folders of earlier versions"


def test_a_cache_longer_than_a_response_is_refused() -> None:
    long = recipe({"kind": "ppo", "overlong": {"cache": 65}, "rollout": {"max_new_tokens": 64}})
    with pytest.raises(
        InputError, match=r"overlong cache of 65 tokens .*\n.*lower overlong.cache, for example to 16"
    ):
        check(long)
