"""Endpoints that a recipe names, asked before ranks start whether somebody is there. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from genac_megatron.errors import InputError
from genac_megatron.recipe.schema import Recipe, SftStage
from genac_megatron.recipe.stages import TeacherConfig, sources_of
from genac_megatron.recipe.tasks import MixtureTask, RubricTask, TaskConfig


class Named(NamedTuple):
    """An endpoint, and what of a recipe names it."""

    url: str
    path: str  # what to ask it for
    key: str | None  # the environment variable that has its key
    who: str
    setting: str  # the key of its address
    block: str  # where its api_key_env stands


def need_endpoints(recipe: Recipe, *, teachers: bool) -> None:
    """Raise InputError where one that will be asked does not answer, or the variable of its key is not set:
    all that is found at once. teachers: those of stages, too.
    """
    asked = {one[:3]: one for one in _named(recipe, teachers=teachers)}
    faults: dict[str, InputError] = {}
    for look in (look for one in asked.values() for look in _looks(one)):
        try:
            look()
        except InputError as error:
            faults.setdefault(str(error), error)
    if faults:
        first, *others = faults.values()
        also = [f"{one.where}: {one.what} ({one.way_out})" for one in others]
        raise InputError("\n  ".join([first.what, *also]), where=first.where, way_out=first.way_out)


def unset_keys(recipe: Recipe) -> list[str]:
    """A line for each variable of a key that is not set here, for a dry run, which asks nobody.

    Raises InputError where an address is none.
    """
    named = list(_named(recipe, teachers=True))
    if not named:
        return []
    from genac_megatron.serving.chat import check_address

    for one in named:
        check_address(one.url, one.setting)
    unset = dict.fromkeys(
        (one.who, one.key) for one in named if one.key and not os.environ.get(one.key, "").strip()
    )
    return [f"{who}: {key} is not set here; the run needs it in its environment" for who, key in unset]


def _looks(one: Named) -> Iterator[Callable[[], object]]:
    from genac_megatron.serving.chat import read_key  # httpx: a third of a second
    from genac_megatron.serving.there import need_there

    if one.key is not None:
        yield partial(read_key, one.key, f"{one.block}.api_key_env")
    yield partial(need_there, one.url, one.who, one.setting, one.path)


def _named(recipe: Recipe, *, teachers: bool) -> Iterator[Named]:
    yield from _judges(recipe.task, "task")
    for index, stage in enumerate(recipe.stages):
        for place, source in sources_of(stage):
            at = ".".join(map(str, ("stages", index, *place)))
            if source.task is not None:
                yield from _judges(source.task, f"{at}.task")
            if teachers and source.teacher is not None and source.teacher.kind == "endpoint":
                yield _teacher(source.teacher, f"{at}.teacher")
        if teachers and isinstance(stage, SftStage) and _asks(stage):
            yield _teacher(stage.teacher, f"stages.{index}.teacher")
    for name, role in recipe.roles.items():
        if role.served and role.engine.share is None:
            at = f"roles.{name}.engine"
            for url in role.engine.urls:
                yield Named(url, "/health", role.engine.api_key_env, "SGLang server", f"{at}.urls", at)


def _asks(stage: SftStage) -> bool:
    return stage.data == "traces" and stage.teacher.kind == "endpoint"


def _teacher(config: TeacherConfig, at: str) -> Named:
    return Named(config.url or "", "/models", config.api_key_env, "teacher", f"{at}.url", at)


def _judges(task: TaskConfig, at: str) -> Iterator[Named]:
    if isinstance(task, MixtureTask):
        for index, part in enumerate(task.parts):
            yield from _judges(part.task, f"{at}.parts.{index}.task")
    elif isinstance(task, RubricTask):
        block = f"{at}.judge"
        yield Named(task.judge.url, "/models", task.judge.api_key_env, "judge", f"{block}.url", block)
