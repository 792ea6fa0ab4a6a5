"""Rules that a stage's algorithm keeps, with the rest of its stage and with the roles. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from genac_megatron.errors import InputError
from genac_megatron.recipe.algorithms import (
    Algorithm,
    Dapo,
    DrGrpo,
    Grpo,
    OverlongConfig,
    Pact,
    RegressionConfig,
    ReinforcePlusPlus,
    Rloo,
    Sao,
    ValueConfig,
    WithScalarCritic,
)
from genac_megatron.recipe.precision import Where
from genac_megatron.recipe.schema import PolicyStage, PpoStage, Recipe, StageConfig, ValueStage


def check_algorithm(
    recipe: Recipe, stage: StageConfig, place: tuple[str | int, ...], where: Where, *, exact: bool
) -> None:
    """Raises InputError at the first rule that is broken. exact: whether the task has an exact teacher."""
    _check_reference(recipe, stage, place, where)
    if isinstance(stage, ValueStage):
        _check_regression(recipe, stage, stage.value, exact, (*place, "value"), where)
        _check_distil(stage, place, where)
    if isinstance(stage, PpoStage):
        _check_overlong(stage.overlong, stage.rollout.max_new_tokens, (*place, "overlong"), where)
    if isinstance(stage, PolicyStage):
        _check_policy(recipe, stage, place, where)
        if isinstance(stage.algorithm, WithScalarCritic):
            value = (*place, "algorithm", "value")
            _check_regression(recipe, stage, stage.algorithm.value, exact, value, where)
            _check_importance(stage.algorithm.value, value, where)
            _check_lambda(stage.algorithm.value, value, where)


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
    """A KL term needs a frozen reference, an adapter's base at the least; nothing else may be frozen."""
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
    adapter = recipe.roles["actor"].training.adapter
    if "reference" not in recipe.roles and adapter is not None and adapter.merge_every is None:
        return  # its base is the reference
    if "reference" not in recipe.roles and adapter is not None:
        raise InputError(
            f"kl_coef of the stage '{stage.name}' would be to the actor's base, which moves every "
            f"{adapter.merge_every} steps",
            where=where(("roles", "actor", "training", "adapter", "merge_every")),
            way_out="add a role 'reference' with training.frozen: true, or take kl_coef or merge_every out",
        )
    check_role(recipe, "reference", f"kl_coef of the stage '{stage.name}'", place, where)
    if not recipe.roles["reference"].training.frozen:
        raise InputError(
            "the reference of a KL term must not be trained or served",
            where=where(("roles", "reference", "training")),
            way_out="set frozen: true",
        )


def _check_regression(
    recipe: Recipe,
    stage: ValueStage | PolicyStage,
    value: RegressionConfig,
    exact: bool,
    place: tuple[str | int, ...],
    where: Where,
) -> None:
    """What a scalar critic is taught, and how."""
    _check_places(value, place, where)
    head = recipe.roles["critic"].model.head
    if head == "logit" and value.clip is not None:
        raise InputError(
            f"a critic of log-odds is trained by cross-entropy; clip {value.clip:g} is of a squared error",
            where=where((*place, "clip")),
            way_out="set clip: null, or roles.critic.model.head: value",
        )
    if value.target == "exact" and not exact:
        raise InputError(
            f"the stage '{stage.name}' is to teach exact values, and the task '{recipe.task.kind}' has no "
            "exact teacher",
            where=where((*place, "target")),
            way_out="set it to outcome or monte_carlo, or train on a task that has one (docs/tasks.md)",
        )
    if value.target != "outcome" and value.lam_critic != 1.0:
        raise InputError(
            f"lam_critic {value.lam_critic:g} is of targets made of outcomes, and these are {value.target}",
            where=where((*place, "lam_critic")),
            way_out="set lam_critic: 1, or target: outcome",
        )
    if value.target == "monte_carlo" and isinstance(stage, PolicyStage) and stage.overlap:
        raise InputError(
            "Monte-Carlo targets need the actor's engines while the next batch is generated with them",
            where=where((*place, "target")),
            way_out="take overlap out, or set target: outcome",
        )
    if value.by_spread and stage.rollout.samples == 1:
        raise InputError(
            "by_spread compares the returns of a prompt, and rollout.samples is 1",
            where=where((*place, "by_spread")),
            way_out="take by_spread out, or raise samples",
        )


def _check_distil(stage: ValueStage, place: tuple[str | int, ...], where: Where) -> None:
    """What says how outcomes of rollouts are learnt says nothing of kept judgements."""
    if stage.distil is None:
        return
    for key, default in (("value", RegressionConfig(clip=stage.value.clip)), ("minibatches", 1)):
        if getattr(stage, key) != default:
            raise InputError(
                f"the stage '{stage.name}' learns from {stage.distil.path}, and {key} is of rollouts",
                where=where((*place, key)),
                way_out=f"take {key} out, or distil",
            )


def _check_importance(value: ValueConfig, place: tuple[str | int, ...], where: Where) -> None:
    if value.importance_limit is not None and value.target != "outcome":
        raise InputError(
            f"importance_limit weights outcomes by the moved policy, and the critic is taught {value.target} "
            "values",
            where=where((*place, "target")),
            way_out="set importance_limit: null, or target: outcome",
        )
    if value.importance_limit is not None and value.lam_critic != 1.0:
        raise InputError(
            "importance_limit weights outcomes by the moved policy, and lam_critic "
            f"{value.lam_critic:g} mixes the critic's own values into them",
            where=where((*place, "lam_critic")),
            way_out="set lam_critic: 1, or importance_limit: null",
        )


def _check_places(value: RegressionConfig, place: tuple[str | int, ...], where: Where) -> None:
    if value.at_cuts and not value.at:
        raise InputError(
            "at_cuts moves the places of `at` to the nearest cuts, and there are none",
            where=where((*place, "at_cuts")),
            way_out="name places, such as at: [0, 0.3, 0.6, 0.9], or take at_cuts out",
        )


def _check_lambda(value: ValueConfig, place: tuple[str | int, ...], where: Where) -> None:
    if value.length_alpha is not None and value.lam_actor != 1.0:
        raise InputError(
            f"lam_actor {value.lam_actor:g} and length_alpha {value.length_alpha:g} both say what the "
            "actor's lambda is",
            where=where((*place, "lam_actor")),
            way_out="set length_alpha: null, or lam_actor: 1",
        )


def _check_critics_model(
    recipe: Recipe, algorithm: Algorithm, place: tuple[str | int, ...], where: Where
) -> None:
    """What SAO and PACT say of the critic's model itself is said in its role: a role is built once a run."""
    if isinstance(algorithm, Pact) and recipe.roles["critic"].model.head != "logit":
        raise InputError(
            "pact trains its critic by cross-entropy, and the role's head gives the value itself",
            where=where(("roles", "critic", "model", "head")),
            way_out="set roles.critic.model.head: logit, or take another algorithm",
        )
    frozen = recipe.roles["critic"].training.frozen_attention if isinstance(algorithm, Sao) else None
    if isinstance(algorithm, Sao) and frozen != algorithm.frozen_attention:
        wanted = str(algorithm.frozen_attention).lower()
        raise InputError(
            f"sao has frozen_attention {wanted}, and the role 'critic' {str(frozen).lower()}",
            where=where(("roles", "critic", "training", "frozen_attention")),
            way_out=f"set roles.critic.training.frozen_attention: {wanted}, or the algorithm's to the other",
        )


def _check_policy(recipe: Recipe, stage: PolicyStage, place: tuple[str | int, ...], where: Where) -> None:
    algorithm, rollout = stage.algorithm, stage.rollout
    grouped = isinstance(algorithm, Grpo | DrGrpo | Dapo | Rloo) or (
        isinstance(algorithm, ReinforcePlusPlus) and algorithm.baseline
    )
    if grouped and rollout.samples == 1:
        baseline = " with baseline" if isinstance(algorithm, ReinforcePlusPlus) else ""
        raise InputError(
            f"{algorithm.kind}{baseline} compares the responses to a prompt, and rollout.samples is 1: every "
            "advantage would be 0",
            where=where((*place, "rollout", "samples")),
            way_out="raise it to 4 or more, or take an algorithm that needs no group: reinforce_pp without "
            "baseline, or one with a scalar critic (ppo, vc_ppo, vapo, sp3o, sao, pact)",
        )
    _check_critics_model(recipe, algorithm, place, where)
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
