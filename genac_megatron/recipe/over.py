"""Blocks of a stage that stand over an outer one: keys that they leave out are the outer one's. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel

from genac_megatron.recipe.stages import ReinforceStage, SftSource, SftStage, StageConfig

if TYPE_CHECKING:
    from genac_megatron.recipe.schema import Recipe, RoleConfig

B = TypeVar("B", bound=BaseModel)


def over(inner: B, outer: B) -> B:
    """`inner` with `outer`'s values where it says nothing; as it is where it says another `kind`, whose keys
    mean something else. Merged again it stays the same.
    """
    if "kind" in inner.model_fields_set and getattr(inner, "kind", None) != getattr(outer, "kind", None):
        return inner
    written = {key: getattr(inner, key) for key in inner.model_fields_set}
    return outer.model_copy(update=written)


def merged(recipe: Recipe) -> Recipe:
    """A stage's optimizers over their roles', its sources' teachers and rollouts over its own."""
    stages = [_merged(stage, recipe.roles) for stage in recipe.stages]
    return recipe.model_copy(update={"stages": stages})


def _merged(stage: StageConfig, roles: Mapping[str, RoleConfig]) -> StageConfig:
    trained = {
        "optimizer": stage.role if isinstance(stage, SftStage) else "critic",
        "actor_optimizer": "actor",
        "critic_optimizer": "critic",
    }
    made: dict[str, object] = {
        key: over(inner, roles[role].optimizer)
        for key, role in trained.items()
        if role in roles and (inner := getattr(stage, key, None)) is not None
    }
    if isinstance(stage, SftStage):
        made["sources"] = _sources(stage.sources, stage)
    if isinstance(stage, ReinforceStage) and stage.replay is not None:
        sources = _sources(stage.replay.sources, stage)
        made["replay"] = stage.replay.model_copy(update={"sources": sources})
    return stage.model_copy(update=made)


def _sources(sources: Sequence[SftSource], stage: SftStage | ReinforceStage) -> list[SftSource]:
    found = []
    for source in sources:
        made: dict[str, object] = {}
        if source.rollout is not None:
            made["rollout"] = over(source.rollout, stage.rollout)
        if source.teacher is not None and isinstance(stage, SftStage):
            made["teacher"] = over(source.teacher, stage.teacher)
        found.append(source.model_copy(update=made))
    return found
