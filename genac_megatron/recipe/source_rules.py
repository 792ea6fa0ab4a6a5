"""Rules for what samples of SFT, and of a replay, are made of: teachers, and several sources. No torch."""

from __future__ import annotations

from collections import Counter

from genac_megatron.errors import InputError
from genac_megatron.recipe.precision import Where
from genac_megatron.recipe.schema import Recipe, ReinforceStage, SftSource, SftStage, TeacherConfig
from genac_megatron.recipe.stages import COPIED, named_sources, sources_of
from genac_megatron.recipe.task_rules import check_task
from genac_megatron.recipe.tasks import (
    BenchmarkTask,
    ChainedArithmeticTask,
    LockTask,
    MixtureTask,
    ReasoningGymTask,
    StateTrackingTask,
    TaskConfig,
    single_tasks,
)

Place = tuple[str | int, ...]
WHOLE = (0.0, 1.0)  # the phase of a source that has none


def source_tasks(recipe: Recipe) -> list[TaskConfig]:
    """The tasks that sources have of their own, the parts of mixtures one by one."""
    sources = [source for stage in recipe.stages for _, source in sources_of(stage)]
    return [task for one in sources if one.task is not None for task in single_tasks(one.task)]


def has_teacher(task: TaskConfig) -> bool:
    """Whether the task has an exact teacher: those made here, and one of reasoning-gym's (tasks/hanoi.py)."""
    if isinstance(task, MixtureTask):
        return all(has_teacher(part.task) for part in task.parts)
    if isinstance(task, ReasoningGymTask):
        return task.name == "tower_of_hanoi"
    return isinstance(task, StateTrackingTask | ChainedArithmeticTask | LockTask)


def check_teacher(teacher: TeacherConfig, task: TaskConfig, who: str, place: Place, where: Where) -> None:
    """A teacher can teach the task, and has what it needs and no more. Raises InputError."""
    if teacher.kind == "exact" and not has_teacher(task):
        raise InputError(
            f"{who} asks for the exact teacher, and the task '{task.kind}' has none",
            where=where(place),
            way_out="set teacher.kind to self, monte_carlo or endpoint",
        )
    if teacher.kind == "endpoint" and not (teacher.url and teacher.model):
        raise InputError(
            f"{who} asks for an endpoint without its url and model",
            where=where(place),
            way_out="add teacher.url and teacher.model",
        )
    if (teacher.kind == "file") != (teacher.path is not None):
        what = "the traces of a file, and names none" if teacher.path is None else "no file, and names one"
        raise InputError(
            f"{who} asks for {what}",
            where=where((*place, "path")),
            way_out="set teacher.kind: file and teacher.path, as `genac traces` has written it",
        )
    if teacher.kind in COPIED:
        _check_free(teacher, who, place, where)
    if teacher.kind == "monte_carlo" and teacher.writes == "reasoning":
        raise InputError(
            f"{who} has scores by Monte Carlo, and writes the reasoning alone, which has no score",
            where=where((*place, "writes")),
            way_out="set writes: trace or score, or teacher.kind: exact",
        )
    if teacher.kind == "monte_carlo" and teacher.p_bar_range is not None:
        raise InputError(
            f"{who} has scores by Monte Carlo, which are about the actor as it is, and shows others "
            "(p_bar_range)",
            where=where((*place, "p_bar_range")),
            way_out="take p_bar_range out, or set teacher.kind: exact",
        )


def _check_free(teacher: TeacherConfig, who: str, place: Place, where: Where) -> None:
    """A teacher whose words are its own has no keys that say what is written."""
    says = {"self": "the critic's own judgements", "file": "a file's traces"}.get(
        teacher.kind, "an endpoint's answers"
    )
    if teacher.writes != "trace":
        other = "monte_carlo or exact" if teacher.writes == "score" else "exact"
        raise InputError(
            f"{who} learns {says} as they are, and asks for a part of them (writes: {teacher.writes})",
            where=where((*place, "writes")),
            way_out=f"take writes out, or set teacher.kind: {other}, whose traces have parts",
        )
    if teacher.p_bar_range is not None:
        raise InputError(
            f"{who} learns {says}, which are about the actor as it is, and shows others (p_bar_range)",
            where=where((*place, "p_bar_range")),
            way_out="take p_bar_range out, or set teacher.kind: exact",
        )


def check_sources(recipe: Recipe, stage: SftStage, place: Place, where: Where) -> None:
    """An SFT stage's sources, and whether it draws what it says how to draw. Raises InputError."""
    check_actors(recipe, stage, place, where)
    who = f"the stage '{stage.name}' (sft)"
    drawing = [source for source in stage.sources if (source.data or stage.data) == "traces"]
    if stage.length_buckets > 1 and not (drawing if stage.sources else stage.data == "traces"):
        raise InputError(
            f"{who} makes no traces, and length_buckets is about the states that these are drawn from",
            where=where((*place, "length_buckets")),
            way_out="take length_buckets out, or set data: traces",
        )
    if not stage.sources:
        return
    if stage.data == "jsonl":
        raise InputError(
            f"{who} reads jsonl, and has sources, which are made",
            where=where((*place, "sources")),
            way_out="take sources out, or set data: traces or demonstrations",
        )
    _check_all(recipe, stage, stage.sources, stage.made, who, (*place, "sources"), where)
    phased = [name for name, source in named_sources(stage.sources) if source.phase != WHOLE]
    if phased and stage.epochs != 1:
        raise InputError(
            f"{who} has phases (source '{phased[0]}') and {stage.epochs} epochs: every epoch would begin "
            "again with the first phase",
            where=where((*place, "epochs")),
            way_out="set epochs: 1, or take the phases out",
        )


def check_actors(recipe: Recipe, stage: SftStage | ReinforceStage, place: Place, where: Where) -> None:
    """A stage's several actors can be told apart, and are played. Raises InputError."""
    actors, own = stage.actors, recipe.judging.actor_name
    if not actors:
        return
    if isinstance(stage, SftStage) and (stage.role != "critic" or stage.data != "traces"):
        raise InputError(
            f"the stage '{stage.name}' has actors, and only traces for the critic are of their states",
            where=where((*place, "actors")),
            way_out="take actors out",
        )
    for name, times in Counter(actor.name for actor in actors).items():
        if times > 1:
            raise InputError(
                f"{times} actors of the stage '{stage.name}' are called '{name}', as the critic is told",
                where=where((*place, "actors")),
                way_out="give each a name of its own",
            )
    for index, actor in enumerate(actors):
        if (actor.checkpoint is None) != (actor.name == own):
            which = "names no checkpoint: it is the run's own" if actor.checkpoint is None else "is another's"
            raise InputError(
                f"the actor '{actor.name}' of the stage '{stage.name}' {which}, and the run's own is called "
                f"'{own}'",
                where=where((*place, "actors", index)),
                way_out=f"call the run's own '{own}' (judging.actor_name), and others otherwise",
            )


def check_replay(recipe: Recipe, stage: ReinforceStage, place: Place, where: Where) -> None:
    """A REINFORCE stage's actors, its replay, and what its gate goes back to. Raises InputError."""
    check_actors(recipe, stage, place, where)
    _check_fallback(recipe, stage, (*place, "gate"), where)
    replay = stage.replay
    if replay is None:
        return
    who, here = f"the replay of the stage '{stage.name}'", (*place, "replay", "sources")
    made = replayed(stage)
    if any(other.name == made.name for other in recipe.stages):
        raise InputError(
            f"a stage is called '{made.name}', as the samples of {who} are",
            where=where((*place, "replay")),
            way_out="give that stage another name",
        )
    _check_all(recipe, made, replay.sources, replay.size, who, here, where)
    for index, source in enumerate(replay.sources):
        if source.phase != WHOLE:
            raise InputError(
                f"{who} draws from all its samples in every step, and a source has a phase",
                where=where((*here, index, "phase")),
                way_out="take phase out",
            )


def replayed(stage: ReinforceStage) -> SftStage:
    """The SFT stage whose samples a REINFORCE stage's replay draws from."""
    assert stage.replay is not None
    return SftStage(
        kind="sft",
        name=f"{stage.name}-replay",
        role="critic",
        data="traces",
        size=stage.replay.size,
        length_buckets=stage.replay.length_buckets,
        rollout=stage.rollout,
        sources=stage.replay.sources,
        epochs=1,
    )


def _check_all(
    recipe: Recipe, stage: SftStage, sources: list[SftSource], size: int, who: str, place: Place, where: Where
) -> None:
    for name, times in Counter(name for name, _ in named_sources(sources)).items():
        if times > 1:
            raise InputError(
                f"{who} has {times} sources that are called '{name}'",
                where=where(place),
                way_out="give each a name of its own; one without is called by its place",
            )
    total = sum(source.share for source in sources)
    if abs(total - 1.0) > 1e-6:
        raise InputError(
            f"{who} has sources whose shares sum to {total:g}, not to 1",
            where=where(place),
            way_out="give each the part of all samples that it is to have",
        )
    for index, (name, source) in enumerate(named_sources(sources)):
        _check_source(recipe, stage, source, f"{who}, source '{name}',", (*place, index), where)
        if source.share * size < 1:
            raise InputError(
                f"{who} has {size} samples: the share {source.share:g} of source '{name}' is less than one",
                where=where((*place, index, "share")),
                way_out="raise size, or the share",
            )


def _check_source(
    recipe: Recipe, stage: SftStage, source: SftSource, who: str, place: Place, where: Where
) -> None:
    task, data, teacher = (
        source.task or recipe.task,
        source.data or stage.data,
        source.teacher or stage.teacher,
    )
    whose = "the" if source.task is None else "its own"
    if isinstance(task, BenchmarkTask):
        raise InputError(
            f"{who} is of the benchmark {task.name}, all of which is held out",
            where=where((*place, "task")),
            way_out="name a task that has training prompts",
        )
    if source.task is not None:
        check_task(source.task, (*place, "task"), where)
    if source.phase[0] >= source.phase[1]:
        raise InputError(
            f"{who} has a phase from {source.phase[0]:g} to {source.phase[1]:g}",
            where=where((*place, "phase")),
            way_out="give the beginning, then an end after it, both from 0 to 1",
        )
    if data == "traces":
        if stage.data != "traces":
            raise InputError(
                f"{who} is traces of the actor's states, and the stage is {stage.data}, before which no "
                "engine has the actor",
                where=where((*place, "data")),
                way_out="set the stage's data: traces, and data: demonstrations where a source is of those",
            )
        check_teacher(teacher, task, who, (*place, "teacher"), where)
        if not source.scored and teacher.writes == "reasoning":
            raise InputError(
                f"{who} is not scored, and its teacher writes the reasoning alone, which has no score",
                where=where((*place, "scored")),
                way_out="set writes: trace, so that where an answer stands is learnt, or take scored out",
            )
        return
    if not has_teacher(task):
        raise InputError(
            f"{who} is demonstrations, and {whose} task '{task.kind}' has no teacher that writes any",
            where=where((*place, "data")),
            way_out="name a task that has one, or data: traces",
        )
    given = {key: getattr(source, key) is not None for key in ("teacher", "rollout", "length_buckets")}
    for key, dead in {"scored": not source.scored, **given}.items():
        if dead:
            raise InputError(
                f"{who} is demonstrations, and {key} is about traces",
                where=where((*place, key)),
                way_out=f"take {key} out, or set data: traces",
            )


def _check_fallback(recipe: Recipe, stage: ReinforceStage, place: Place, where: Where) -> None:
    to = stage.gate.fallback
    if to is None:
        return
    before = recipe.stages[: recipe.stages.index(stage)]
    known = [one.name for one in before if isinstance(one, SftStage) and one.role == "critic"]
    if stage.gate.action != "fallback":
        raise InputError(
            f"the gate of the stage '{stage.name}' names weights to go back to, and its action is "
            f"{stage.gate.action}",
            where=where((*place, "fallback")),
            way_out="set action: fallback, or take fallback out",
        )
    if to not in known:
        raise InputError(
            f"the gate of the stage '{stage.name}' goes back to '{to}', which is no SFT stage of the critic "
            "before it",
            where=where((*place, "fallback")),
            way_out=f"there are: {', '.join(known) or 'none'}; without fallback it goes back to the weights "
            "that the stage began with",
        )
