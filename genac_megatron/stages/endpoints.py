"""Endpoints that a recipe names, asked before ranks start whether somebody is there. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from genac_megatron.recipe.schema import Recipe, SftStage
from genac_megatron.recipe.stages import sources_of
from genac_megatron.recipe.tasks import MixtureTask, RubricTask, TaskConfig

Named = tuple[str, str, str, str]  # who, the key that names it, its address, what to ask it for


def need_endpoints(recipe: Recipe, *, teachers: bool) -> None:
    """Raise InputError where one that will be asked does not answer. teachers: those of stages, too."""
    asked = {one[2:]: one for one in _named(recipe, teachers=teachers)}
    if asked:
        from genac_megatron.serving.there import need_there  # httpx: a third of a second

        for who, key, url, path in asked.values():
            need_there(url, who, key, path)


def _named(recipe: Recipe, *, teachers: bool) -> Iterator[Named]:
    yield from _judges(recipe.task, "task")
    for index, stage in enumerate(recipe.stages):
        for place, source in sources_of(stage):
            at = ".".join(map(str, ("stages", index, *place)))
            if source.task is not None:
                yield from _judges(source.task, f"{at}.task")
            if teachers and source.teacher is not None and source.teacher.kind == "endpoint":
                yield "teacher", f"{at}.teacher.url", source.teacher.url or "", "/models"
        if teachers and isinstance(stage, SftStage) and _asks(stage):
            yield "teacher", f"stages.{index}.teacher.url", stage.teacher.url or "", "/models"
    for name, role in recipe.roles.items():
        if role.served and role.engine.share is None:
            for url in role.engine.urls:
                yield "SGLang server", f"roles.{name}.engine.urls", url, "/health"


def _asks(stage: SftStage) -> bool:
    return stage.data == "traces" and stage.teacher.kind == "endpoint"


def _judges(task: TaskConfig, at: str) -> Iterator[Named]:
    if isinstance(task, MixtureTask):
        for index, part in enumerate(task.parts):
            yield from _judges(part.task, f"{at}.parts.{index}.task")
    elif isinstance(task, RubricTask):
        yield "judge", f"{at}.judge.url", task.judge.url, "/models"
