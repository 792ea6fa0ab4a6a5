"""Rules of the `environment` block, and what is not there yet for conversations. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from genac_megatron.errors import InputError
from genac_megatron.recipe.algorithms import Dapo, RegressionConfig, WithScalarCritic
from genac_megatron.recipe.data import HELDOUT
from genac_megatron.recipe.environments import EnvironmentConfig
from genac_megatron.recipe.own_code import check_named, parse_named
from genac_megatron.recipe.precision import Where
from genac_megatron.recipe.schema import PolicyStage, PpoStage, Recipe, SftStage, ValueStage
from genac_megatron.recipe.source_rules import has_teacher
from genac_megatron.recipe.stages import TeacherConfig, sources_of
from genac_megatron.recipe.tasks import LockTask, PackageTask, single_tasks

Place = tuple[str | int, ...]
PLAYED = (LockTask, PackageTask)  # tasks that are environments themselves
SANDBOX_SLACK_S = 5.0  # of an answer, for its program's process to begin and to end


def check_environment(recipe: Recipe, where: Where) -> None:
    """What a recipe with an environment must keep, and one without. Raises InputError."""
    config, played = recipe.environment, isinstance(recipe.task, PLAYED)
    if config is None and recipe.judging.states.cutter == "turns":
        raise InputError(
            "judging.states.cutter turns cuts conversations, and there is no environment",
            where=where(("judging", "states", "cutter")),
            way_out="choose lines, fixed or low_prob, or add an environment",
        )
    for index, stage in enumerate(recipe.stages):
        for place, source in sources_of(stage):
            if isinstance(source.task, PLAYED):
                raise InputError(
                    f"the task '{source.task.kind}' is played in turns, and a source's texts have one",
                    where=where(("stages", index, *place, "task")),
                    way_out="make it the recipe's task, with environment: {kind: task}",
                )
    if config is None:
        if any(isinstance(task, PLAYED) for task in single_tasks(recipe.task)):
            raise InputError(
                f"the task '{recipe.task.kind}' is played in turns, and no environment plays it",
                where=where(("task",)),
                way_out="add environment: {kind: task}, with the task by itself and in no mixture",
            )
        return
    if config.kind == "tools" and played:
        raise InputError(
            f"the task '{recipe.task.kind}' is played in turns, which tools do not answer",
            where=where(("environment", "kind")),
            way_out="set environment.kind to task",
        )
    if config.kind == "task" and not played:
        raise InputError(
            f"the task '{recipe.task.kind}' is no environment of its own",
            where=where(("environment", "kind")),
            way_out="choose a task that is played (lock, verifiers, textarena), or environment.kind python",
        )
    if isinstance(recipe.task, LockTask) and config.kind == "task" and config.turns < recipe.task.turns:
        raise InputError(
            f"a lock has {recipe.task.turns} turns, and the environment ends after {config.turns}",
            where=where(("environment", "turns")),
            way_out=f"set environment.turns to {recipe.task.turns}",
        )
    if (config.kind == "python") != (config.python is not None):
        raise InputError(
            "environment.python names what a kind of python answers with, and nothing else",
            where=where(("environment", "python")),
            way_out="give kind: python and python: path/to/file.py:Name, or leave python out",
        )
    _check_tools(config, where)
    if isinstance(recipe.task, PackageTask):
        _check_package(recipe.task, config, where)
    if config.python is not None:
        here = where(("environment", "python"))
        check_named(parse_named(config.python, here), here)
    for place, what, way_out in _missing(recipe):
        raise InputError(f"{what} does not work with an environment yet", where=where(place), way_out=way_out)


def _check_tools(config: EnvironmentConfig, where: Where) -> None:
    if (config.kind == "tools") != bool(config.tools):
        raise InputError(
            "environment.tools names what a kind of tools offers, and nothing else",
            where=where(("environment", "tools")),
            way_out="give kind: tools and tools: [calculator], or leave tools out",
        )
    if "python" in config.tools and config.step_s < config.sandbox_s + SANDBOX_SLACK_S:
        enough = config.sandbox_s + 2 * SANDBOX_SLACK_S
        raise InputError(
            f"a turn's programs may take {config.sandbox_s:g} s (environment.sandbox_s), and an answer "
            f"{config.step_s:g} s: conversations would fail that a slow program is in",
            where=where(("environment", "step_s")),
            way_out=f"set environment.step_s to {enough:g}, or lower sandbox_s",
        )


def _check_package(task: PackageTask, config: EnvironmentConfig, where: Where) -> None:
    low, high = task.rewards
    if low >= high:
        raise InputError(
            f"task.rewards [{low:g}, {high:g}] are the rewards that are worth 0 and 1, the lower one first",
            where=where(("task", "rewards")),
            way_out="give its least and its best reward: [-1, 1]",
        )
    if config.kind != "task":
        raise InputError(
            f"the task '{task.kind}' is an environment, and environment.kind names another",
            where=where(("environment", "kind")),
            way_out="set environment.kind to task",
        )


def _missing(recipe: Recipe) -> Iterator[tuple[Place, str, str]]:
    """(place, what, way out) of what a recipe asks for that conversations do not have yet."""
    if recipe.judging.states.final:
        what = "judging.states.final, whose states may say how the conversation ended,"
        yield ("judging", "states", "final"), what, "take it out"
    for key in ("suites", "test"):
        if getattr(recipe.evaluation, key) and isinstance(recipe.task, PLAYED):
            what = f"evaluation.{key}, whose questions are not played as the task '{recipe.task.kind}' is,"
            yield ("evaluation", key), what, "take it out"
    if recipe.environment is not None and recipe.environment.history == "template":
        yield from _missing_in_turns(recipe)
    if recipe.environment is not None and recipe.environment.kind != "task" and has_teacher(recipe.task):
        yield from _missing_teachers(recipe)
    for index, stage in enumerate(recipe.stages):
        place: Place = ("stages", index)
        if isinstance(stage, PpoStage) and stage.overlong is not None:
            yield (*place, "overlong"), "the overlong penalty", "take it out"
        if isinstance(stage, ValueStage) and stage.distil is not None:
            yield (*place, "distil"), "distil", "take it out"
        for own, source in sources_of(stage):
            if source.task not in (None, recipe.task):
                yield (*place, *own, "task"), "a source of another task", "take the source out"
        if isinstance(stage, PolicyStage) and isinstance(stage.algorithm, Dapo) and stage.algorithm.overlong:
            yield (*place, "algorithm", "overlong"), "the overlong penalty", "take it out"


def _missing_teachers(recipe: Recipe) -> Iterator[tuple[Place, str, str]]:
    """The same of exact teachers: they read a response, or the task's own game, and no other transcript."""
    what = f"an exact teacher of '{recipe.task.kind}', which knows no transcript but its own game's,"
    if recipe.judging.teacher:
        yield ("judging", "teacher"), what, "take it out"
    for index, stage in enumerate(recipe.stages):
        own: Place = ("algorithm",) if isinstance(stage, PolicyStage) else ()
        value = getattr(getattr(stage, "algorithm", stage), "value", None)
        if isinstance(value, RegressionConfig) and value.target == "exact":
            yield ("stages", index, *own, "value", "target"), what, "set it to outcome or monte_carlo"
        data, default = getattr(stage, "data", "traces"), getattr(stage, "teacher", TeacherConfig())
        asked = [(place, one.data or data, one.teacher or default) for place, one in sources_of(stage)]
        if isinstance(stage, SftStage) and not asked:
            asked = [((), data, default)]
        for place, kind, teacher in asked:
            reasons = teacher.kind == "monte_carlo" and teacher.writes != "score"
            if kind == "traces" and (teacher.kind == "exact" or reasons):
                way_out = "set teacher.kind to self or endpoint, or to monte_carlo with writes: score"
                yield ("stages", index, *place, "teacher"), what, way_out


def _missing_in_turns(recipe: Recipe) -> Iterator[tuple[Place, str, str]]:
    """The same of conversations whose turns are sequences of their own."""
    say = "{}, which reads a conversation as one sequence (environment.history: template has one a turn),"
    way_out = "set environment.history: sampled"
    for name, role in recipe.roles.items():
        if role.engine.routing_replay:
            yield ("roles", name, "engine", "routing_replay"), say.format("routing replay"), way_out
    for index, stage in enumerate(recipe.stages):
        place: Place = ("stages", index)
        if isinstance(stage, ValueStage) or isinstance(getattr(stage, "algorithm", None), WithScalarCritic):
            yield place, say.format("a scalar critic"), way_out
        if isinstance(stage, PpoStage) and stage.critic_updates > 1:
            yield (*place, "critic_updates"), say.format("a critic that weighs by the moved actor"), way_out
        if isinstance(stage, SftStage) and stage.role == "actor" and stage.data == "demonstrations":
            yield (*place, "data"), say.format("a demonstration"), way_out


def continues(recipe: Recipe) -> bool:
    """Whether responses are continued from their states, for Monte-Carlo values."""
    if recipe.evaluation.mc_states and "critic" in recipe.roles:
        return True
    for stage in recipe.stages:
        value = getattr(getattr(stage, "algorithm", stage), "value", None)
        if isinstance(value, RegressionConfig) and value.target == "monte_carlo":
            return True
        data, teacher = getattr(stage, "data", "traces"), getattr(stage, "teacher", TeacherConfig())
        asked = [(one.data or data, one.teacher or teacher) for _, one in sources_of(stage)]
        for kind, by in asked or [(data, teacher)]:
            if kind == "traces" and by.kind in ("self", "monte_carlo"):
                return True
    return False


def need_no_environment(recipe: Recipe, command: str) -> None:
    """Raise InputError where a command would take a recipe's conversations for single responses."""
    if recipe.environment is not None:
        raise InputError(
            f"{command} does not work with an environment yet",
            where=f"recipe {recipe.name}, environment",
            way_out="genac run, genac evaluate task, genac evaluate bank and genac traces do",
        )


def check_benchmarks(recipe: Recipe, names: Sequence[str], *, voting: bool) -> None:
    """What `genac evaluate task` may ask of a recipe with an environment. Raises InputError.

    voting: by a critic.
    """
    if recipe.environment is None:
        return
    if voting:
        need_no_environment(recipe, "genac evaluate task --critic")
    others = [name for name in names if name != HELDOUT]
    if others and isinstance(recipe.task, PLAYED):
        raise InputError(
            f"the questions of {', '.join(others)} are not played as the task '{recipe.task.kind}' is",
            where=f"recipe {recipe.name}, environment",
            way_out=f"name {HELDOUT}, which is the task's own prompts",
        )
