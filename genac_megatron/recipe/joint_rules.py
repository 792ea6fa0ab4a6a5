"""Rules of joint training: what a critic's values are trusted for, and a teacher in its place. No torch."""

from __future__ import annotations

from genac_megatron.errors import InputError
from genac_megatron.recipe.algorithms import (
    OF_MONTE_CARLO,
    AdvantageConfig,
    BlendConfig,
    LamGate,
    WithScalarCritic,
)
from genac_megatron.recipe.precision import Where
from genac_megatron.recipe.schema import (
    PolicyStage,
    PpoStage,
    Recipe,
    ReinforceStage,
    SftStage,
    StageConfig,
    ValueStage,
)

Place = tuple[str | int, ...]


def check_final_state(recipe: Recipe, where: Where) -> None:
    """Whole responses are judged where a critic learns from it. Raises InputError where none does."""
    learns = (
        isinstance(stage, ReinforceStage | PpoStage) and _trains_critic(stage) for stage in recipe.stages
    )
    if recipe.judging.states.final and not any(learns):
        raise InputError(
            "judging.states.final has whole responses judged for a critic to learn from, and no stage of "
            "this recipe trains one by their outcomes",
            where=where(("judging", "states", "final")),
            way_out="take it out, or add a reinforce stage, or a ppo stage that trains its critic",
        )


def check_judging_teacher(recipe: Recipe, has_teacher: bool, where: Where) -> None:
    """A teacher in the critic's place: the task has one, and nothing is there to train. Raises InputError."""
    if recipe.judging.teacher is None:
        return
    if not has_teacher:
        raise InputError(
            "judging.teacher puts the exact teacher in the critic's place, and the task "
            f"'{recipe.task.kind}' has none",
            where=where(("judging", "teacher")),
            way_out="take it out, or choose a task with a teacher: state_tracking, chained_arithmetic, or "
            "reasoning_gym's tower_of_hanoi",
        )
    if "critic" in recipe.roles and recipe.roles["critic"].model.head != "lm":
        raise InputError(
            "judging.teacher puts the exact teacher in the critic's place, and the critic is a scalar one",
            where=where(("roles", "critic", "model", "head")),
            way_out="take the role out, or judging.teacher",
        )
    if recipe.judging.budget is not None:
        raise InputError(
            f"judging.budget {recipe.judging.budget} is of a critic's tokens; judging.teacher writes none",
            where=where(("judging", "budget")),
            way_out="take one of them out",
        )
    for index, stage in enumerate(recipe.stages):
        if _trains_critic(stage):
            raise InputError(
                f"the stage '{stage.name}' ({stage.kind}) trains a critic, and judging.teacher puts the "
                "exact teacher, which does not learn, in its place",
                where=where(("stages", index)),
                way_out="set train_critic: false" if isinstance(stage, PpoStage) else "take the stage out",
            )


def check_certain(recipe: Recipe, where: Where) -> None:
    """Responses whose outcome is certain are left out where that means something. Raises InputError."""
    if recipe.judging.certain == "judged":
        return
    said = "judging.certain: left_out leaves responses out of judging whose group ended alike"
    joint = [(index, stage) for index, stage in enumerate(recipe.stages) if isinstance(stage, PpoStage)]
    if not joint:
        raise InputError(
            f"{said}, in joint stages, and this recipe has none",
            where=where(("judging", "certain")),
            way_out="take it out: elsewhere a critic learns from every response",
        )
    if recipe.judging.teacher is not None:
        raise InputError(
            f"{said}, for the critic's tokens; judging.teacher writes none",
            where=where(("judging", "certain")),
            way_out="take one of them out",
        )
    for index, stage in joint:
        _check_left_out(recipe, stage, said, ("stages", index), where)


def _check_left_out(recipe: Recipe, stage: PpoStage, said: str, place: Place, where: Where) -> None:
    samples, blend = stage.rollout.samples, stage.advantage.blend
    if samples < 3:
        raise InputError(
            f"{said}, by its other responses; with rollout.samples {samples} these are "
            f"{'always alike' if samples == 2 else 'none'}, and nothing would ever be judged",
            where=where((*place, "rollout", "samples")),
            way_out="raise it to 3 or more, or take judging.certain out",
        )
    if stage.advantage.readiness is not None:
        raise InputError(
            f"{said}, and readiness goes by the critic's error at every problem that is played: one that is "
            "always solved would never be ready",
            where=where((*place, "advantage", "readiness")),
            way_out="take one of them out",
        )
    if blend is not None and blend.weight is None and blend.of == "heldout":
        raise InputError(
            f"{said}, and blend's weight is measured on held-out responses, of which none is left out",
            where=where((*place, "advantage", "blend", "of")),
            way_out="set blend.of: running, or blend.weight; or take judging.certain out",
        )


def _trains_critic(stage: StageConfig) -> bool:
    if isinstance(stage, SftStage):
        return stage.role == "critic"
    if isinstance(stage, PpoStage):
        return stage.train_critic
    scalar = isinstance(stage, PolicyStage) and isinstance(stage.algorithm, WithScalarCritic)
    return scalar or isinstance(stage, ReinforceStage | ValueStage)


def check_joint(recipe: Recipe, stage: StageConfig, place: Place, where: Where) -> None:
    """Raises InputError at the first rule of a joint stage that is broken."""
    if not isinstance(stage, PpoStage):
        return
    _check_lambda(recipe, stage, (*place, "advantage"), where)
    _check_blend(recipe, stage, (*place, "advantage", "blend"), where)
    if stage.gate.of_monte_carlo and not recipe.evaluation.mc_states:
        raise _needs_evaluations("an entry gate by Monte-Carlo values", (*place, "gate"), where)
    if stage.critic_updates == 1 and stage.importance_limit != PpoStage(kind="ppo").importance_limit:
        raise InputError(
            "importance_limit is of updates of the critic after the actor's, and critic_updates is 1",
            where=where((*place, "importance_limit")),
            way_out="set critic_updates to 2 or more, or take importance_limit out",
        )
    if stage.critic_updates > 1 and not stage.train_critic:
        raise InputError(
            f"the stage '{stage.name}' updates the critic {stage.critic_updates} times a step, and does not "
            "train it (train_critic: false)",
            where=where((*place, "critic_updates")),
            way_out="take critic_updates out",
        )


def _check_lambda(recipe: Recipe, stage: PpoStage, place: Place, where: Where) -> None:
    config, default = stage.advantage, AdvantageConfig()
    if config.lam_schedule is not None and config.lam != default.lam:
        raise InputError(
            f"lam {config.lam:g} and lam_schedule both say what lambda is",
            where=where((*place, "lam")),
            way_out="keep one of them",
        )
    if config.readiness is not None:
        given = ("lam", "lam_schedule", "lam_gate")
        other = next((key for key in given if getattr(config, key) != getattr(default, key)), None)
        if other is not None:
            raise InputError(
                f"readiness says each problem's lambda, and {other} that of all",
                where=where((*place, other)),
                way_out=f"take {other} out (readiness.lam is that of ready problems), or readiness",
            )
    gate = config.gate
    if gate is not None and gate.figure == "explained_variance_prompt":
        _check_within_prompts(recipe, stage, gate, place, where)
    if gate is None or gate.figure not in OF_MONTE_CARLO:
        return
    if gate.of == "batch":
        raise InputError(
            f"a batch has no Monte-Carlo values, which {gate.figure} is of",
            where=where((*place, "lam_gate", "of")),
            way_out="set of: heldout, or figure: explained_variance or explained_variance_prompt",
        )
    if not recipe.evaluation.mc_states:
        raise _needs_evaluations(f"lam_gate's {gate.figure}", (*place, "lam_gate"), where)


def _check_within_prompts(recipe: Recipe, stage: PpoStage, gate: LamGate, place: Place, where: Where) -> None:
    """With one response to a prompt nothing varies within it: the gate would never open."""
    samples, key, other = recipe.evaluation.samples, "evaluation", "batch"
    if gate.of == "batch":
        samples, key, other = stage.rollout.samples, f"stages.{place[1]}.rollout", "heldout"
    if samples == 1:
        raise InputError(
            f"lam_gate's explained_variance_prompt is within a prompt's responses, and {key}.samples is 1: "
            "lambda would be 1 for good",
            where=where((*place, "lam_gate")),
            way_out=f"raise {key}.samples, set of: {other}, or figure: explained_variance",
        )


def _needs_evaluations(what: str, place: Place, where: Where) -> InputError:
    return InputError(
        f"{what} needs evaluation.mc_states, which is 0",
        where=where(place),
        way_out="set evaluation.mc_states, for example to 96: each takes evaluation.mc_continuations "
        "responses at an evaluation",
    )


def _check_blend(recipe: Recipe, stage: PpoStage, place: Place, where: Where) -> None:
    blend = stage.advantage.blend
    if blend is None:
        return
    default = BlendConfig()
    for key in ("of", "momentum"):
        if blend.weight is not None and getattr(blend, key) != getattr(default, key):
            raise InputError(
                f"blend.{key} is of a weight that is measured, and blend.weight is {blend.weight:g}",
                where=where((*place, key)),
                way_out=f"take {key} out, or weight",
            )
    if stage.rollout.samples == 1:
        raise InputError(
            "blend mixes the critic's value with the mean of a prompt's other responses, and rollout.samples "
            "is 1",
            where=where((*place[:2], "rollout", "samples")),
            way_out="raise it to 2 or more, or take blend out",
        )
    if blend.of == "heldout" and blend.weight is None and recipe.evaluation.samples == 1:
        raise InputError(
            "blend measures the value against the mean of a prompt's other held-out responses, and "
            "evaluation.samples is 1",
            where=where(("evaluation", "samples")),
            way_out="raise it to 2 or more, or set blend.of: running",
        )
    if blend.of == "heldout" and blend.weight is None and recipe.evaluation.samples != stage.rollout.samples:
        raise InputError(
            f"blend measures means of {recipe.evaluation.samples} held-out responses to a prompt "
            f"(evaluation.samples), and mixes with means of {stage.rollout.samples}, whose error is another",
            where=where(("evaluation", "samples")),
            way_out=f"set it to {stage.rollout.samples}, or blend.of: running",
        )
