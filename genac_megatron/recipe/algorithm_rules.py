"""Rules that a stage's algorithm keeps, with the rest of its stage and with the roles. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from genac_megatron.errors import InputError
from genac_megatron.recipe.algorithms import (
    Dapo,
    DrGrpo,
    Grpo,
    OverlongConfig,
    RegressionConfig,
    ReinforcePlusPlus,
    Rloo,
    ValueConfig,
    WithScalarCritic,
)
from genac_megatron.recipe.precision import Where
from genac_megatron.recipe.schema import PolicyStage, PpoStage, Recipe, StageConfig, ValueStage


def check_algorithm(recipe: Recipe, stage: StageConfig, place: tuple[str | int, ...], where: Where) -> None:
    """Raises InputError at the first rule that is broken."""
    _check_reference(recipe, stage, place, where)
    if isinstance(stage, ValueStage):
        _check_places(stage.value, (*place, "value"), where)
    if isinstance(stage, PpoStage):
        _check_overlong(stage.overlong, stage.rollout.max_new_tokens, (*place, "overlong"), where)
    if isinstance(stage, PolicyStage):
        _check_policy(stage, place, where)
        if isinstance(stage.algorithm, WithScalarCritic):
            _check_places(stage.algorithm.value, (*place, "algorithm", "value"), where)
            _check_lambda(stage.algorithm.value, (*place, "algorithm", "value"), where)


def check_role(recipe: Recipe, role: str, who: str, place: Sequence[str | int], where: Where) -> None:
    """The role is there. `who` needs it."""
    if role not in recipe.roles:
        raise InputError(
            f"{who} needs a role '{role}'",
            where=where(place),
            way_out=f"the roles are: {', '.join(recipe.roles)}",
        )


def _check_overlong(
    overlong: OverlongConfig | None, limit: int, place: tuple[str | int, ...], where: Where
) -> None:
    if overlong is not None and overlong.cache > limit:
        key = ".".join(part for part in (*place[2:], "cache") if isinstance(part, str))
        raise InputError(
            f"an overlong cache of {overlong.cache} tokens is more than rollout.max_new_tokens {limit}",
            where=where((*place, "cache")),
            way_out=f"lower {key}, for example to {max(1, limit // 4)}",
        )


def _check_reference(recipe: Recipe, stage: StageConfig, place: tuple[str | int, ...], where: Where) -> None:
    """A KL term needs a frozen reference, and nothing else may be frozen."""
    for name in ("actor", "critic"):
        if name in recipe.roles and recipe.roles[name].training.frozen:
            raise InputError(
                f"the role '{name}' is frozen, which is for a reference",
                where=where(("roles", name, "training", "frozen")),
                way_out="take it out: a stage trains the roles that it says, and no other",
            )
    actors = stage.actor_loss if isinstance(stage, PpoStage) else None
    if isinstance(stage, PolicyStage):
        actors = stage.algorithm.loss
    if actors is None or not actors.kl_coef:
        return
    check_role(recipe, "reference", f"kl_coef of the stage '{stage.name}'", place, where)
    if not recipe.roles["reference"].training.frozen:
        raise InputError(
            "the reference of a KL term must not be trained or served",
            where=where(("roles", "reference", "training")),
            way_out="set frozen: true",
        )


def _check_places(value: RegressionConfig, place: tuple[str | int, ...], where: Where) -> None:
    if value.at_cuts and not value.at:
        raise InputError(
            "at_cuts moves the places of `at` to the nearest cuts, and there are none",
            where=where((*place, "at_cuts")),
            way_out="name places, such as at: [0.3, 0.6, 0.9], or take at_cuts out",
        )


def _check_lambda(value: ValueConfig, place: tuple[str | int, ...], where: Where) -> None:
    if value.length_alpha is not None and value.lam_actor != 1.0:
        raise InputError(
            f"lam_actor {value.lam_actor:g} and length_alpha {value.length_alpha:g} both say what the "
            "actor's lambda is",
            where=where((*place, "lam_actor")),
            way_out="set length_alpha: null, or lam_actor: 1",
        )


def _check_policy(stage: PolicyStage, place: tuple[str | int, ...], where: Where) -> None:
    algorithm, rollout = stage.algorithm, stage.rollout
    grouped = isinstance(algorithm, Grpo | DrGrpo | Dapo | Rloo) or (
        isinstance(algorithm, ReinforcePlusPlus) and algorithm.baseline
    )
    if grouped and rollout.samples == 1:
        raise InputError(
            f"{algorithm.kind} compares the responses to a prompt, and rollout.samples is 1",
            where=where((*place, "rollout", "samples")),
            way_out="raise it to 4 or more",
        )
    if isinstance(algorithm, Dapo) and stage.overlap:
        raise InputError(
            "dapo samples until its groups are mixed, so a batch cannot be begun a step ahead",
            where=where((*place, "overlap")),
            way_out="take overlap out",
        )
    if isinstance(algorithm, Dapo):
        _check_overlong(algorithm.overlong, rollout.max_new_tokens, (*place, "algorithm", "overlong"), where)
    if not isinstance(algorithm, WithScalarCritic) and stage.critic_optimizer is not None:
        raise InputError(
            f"{algorithm.kind} has no critic that a critic_optimizer could train",
            where=where((*place, "critic_optimizer")),
            way_out="take critic_optimizer out",
        )
