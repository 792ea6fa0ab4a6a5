"""Sizes that must hold what other blocks ask for. No torch."""

from __future__ import annotations

from genac_megatron.errors import InputError
from genac_megatron.recipe.precision import Where
from genac_megatron.recipe.schema import EvaluationConfig, PolicyStage, PpoStage, Recipe, ReinforceStage
from genac_megatron.recipe.tasks import ChainedArithmeticTask, LockTask, ReasoningGymTask, StateTrackingTask

MADE = (StateTrackingTask, ChainedArithmeticTask, LockTask, ReasoningGymTask)


def check_sizes(recipe: Recipe, where: Where) -> None:
    """Raise InputError where a micro-batch or what is held out is too small."""
    _microbatches(recipe, where)
    _heldout(recipe, where)


def _microbatches(recipe: Recipe, where: Where) -> None:
    """A sample that is longer than a micro-batch has one to itself; one of twice its size is a mistake."""
    rollouts = [s.rollout.max_new_tokens for s in recipe.stages if isinstance(s, PpoStage | PolicyStage)]
    judged = any(isinstance(stage, PpoStage | ReinforceStage) for stage in recipe.stages)
    asked = (
        ("actor", max(rollouts, default=0), "stages.N.rollout.max_new_tokens"),
        ("critic", recipe.judging.max_new_tokens if judged else 0, "judging.max_new_tokens"),
    )
    for name, longest, key in asked:
        if name not in recipe.roles:
            continue
        room = recipe.roles[name].training.tokens_per_microbatch
        if room < longest / 2:
            raise InputError(
                f"a micro-batch of {room} tokens is no size for {longest} new ones a sample ({key})",
                where=where(("roles", name, "training", "tokens_per_microbatch")),
                way_out="raise it to some responses with their prompts, as memory allows (8192)",
            )


def _heldout(recipe: Recipe, where: Where) -> None:
    """Of a made task it is known how much is held out; of rows, once they are read (stages/runtime.py)."""
    size = getattr(recipe.task, "heldout_size", None)
    asked, made = recipe.evaluation.prompts, isinstance(recipe.task, MADE)
    if isinstance(size, int) and asked > max(size, EvaluationConfig().prompts) and made:
        raise InputError(
            f"evaluation.prompts asks for {asked} held-out prompts, and {size} are held out",
            where=where(("evaluation", "prompts")),
            way_out=f"raise task.heldout_size, or take {size}",
        )
