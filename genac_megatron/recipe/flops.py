"""What a joint step computes beside PPO's with a scalar critic of the same size, for --dry-run. No torch.

A token costs 2 FLOPs a parameter that it uses when it is read or written by an engine, 6 when it is trained,
8 with full recomputation; attention's own are left out, as in benchmarks/critic_counts.py, which counts real
prompts. Shared beginnings count once, in engines (prefix caches) and in training (training.share_prefixes).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from genac_megatron.critic.states import marks
from genac_megatron.models.families.base import Shape
from genac_megatron.models.sizes import parameters
from genac_megatron.recipe.schema import JudgingConfig, PpoStage, Recipe, RoleConfig

TEMPLATE = 340  # tokens of the critic's standard prompt around problem and response
AROUND = 30  # of these stand behind the partial response, and so are read for each state
PROBLEM = 150  # tokens
SHARES = (1 / 8, 1 / 2, 1.0)  # of rollout.max_new_tokens that responses have
WRITTEN = 1 / 4  # of judging.max_new_tokens that judgements have


class Step(NamedTuple):
    """FLOPs of a step, by what they are for."""

    acting: float  # the actor writes
    judging: float
    actor: float  # trained
    critic: float

    @property
    def total(self) -> float:
        return sum(self)


def used_parameters(shape: Shape) -> int:
    """Parameters that a token uses: of a mixture of experts those of its experts alone."""
    experts = 3 * shape.hidden * (shape.expert_ffn or 0) * shape.layers
    return parameters(shape) - experts * ((shape.experts or 0) - (shape.experts_per_token or 0))


def joint_step(recipe: Recipe, stage: PpoStage, shapes: dict[str, Shape], length: float) -> Step:
    """A step whose responses have `length` tokens; its critic is the recipe's generative one."""
    roles, judging, rollout = recipe.roles, recipe.judging, stage.rollout
    actor, critic = used_parameters(shapes["actor"]), used_parameters(shapes["critic"])
    responses = rollout.prompts * rollout.samples
    written = responses * length + rollout.prompts * PROBLEM
    cuts = [mark for mark in marks(judging.states, rollout.max_new_tokens) if mark < length]
    said = judging.max_new_tokens * WRITTEN
    deepest = cuts[-1] if cuts else 0
    states = rollout.prompts + responses * len(cuts)
    read = responses * deepest + rollout.prompts * (TEMPLATE + PROBLEM) + states * AROUND
    learnt = math.ceil(responses * stage.train_share)
    trained = min(rollout.prompts + learnt * len(cuts), learnt * stage.train_states)
    once = learnt * deepest + rollout.prompts * (TEMPLATE + PROBLEM) + trained * (AROUND + said)
    times = stage.critic_updates if stage.train_critic else 0
    return Step(
        2 * actor * written,
        2 * critic * (read + states * said),
        _passes(roles["actor"]) * actor * written * stage.epochs,
        _passes(roles["critic"]) * critic * once * times,
    )


def ppo_step(recipe: Recipe, stage: PpoStage, shapes: dict[str, Shape], length: float) -> Step:
    """The same responses under PPO, with a scalar critic of the critic's size on every token."""
    actor, critic = used_parameters(shapes["actor"]), used_parameters(shapes["critic"])
    written = stage.rollout.prompts * (stage.rollout.samples * length + PROBLEM)
    train = [_passes(recipe.roles[name]) * stage.epochs for name in ("actor", "critic")]
    return Step(
        2 * actor * written, 2 * critic * written, train[0] * actor * written, train[1] * critic * written
    )


def told(recipe: Recipe, stage: PpoStage, shapes: dict[str, Shape]) -> list[str]:
    """The estimate in lines, one for each length of responses; none without a critic that writes."""
    if "critic" not in shapes or shapes["critic"].value or recipe.judging.teacher is not None:
        return []
    lines = []
    for share in SHARES:
        length = share * stage.rollout.max_new_tokens
        own, ppo = joint_step(recipe, stage, shapes, length), ppo_step(recipe, stage, shapes, length)
        parts = ", ".join(f"{name} {part / own.total:.0%}" for name, part in own._asdict().items())
        lines.append(
            f"FLOPs of a step with responses of {length:,.0f} tokens: {own.total:.2g}, "
            f"{own.total / ppo.total:.2f} times PPO's ({parts})"
        )
    return [*lines, f"(judgements of {_said(recipe.judging)} tokens, beginnings computed once, no attention)"]


def _said(judging: JudgingConfig) -> str:
    return f"{judging.max_new_tokens * WRITTEN:,.0f}"


def _passes(role: RoleConfig) -> int:
    return 8 if role.training.recompute == "full" else 6
