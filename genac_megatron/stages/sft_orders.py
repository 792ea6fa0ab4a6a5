"""What an SFT stage's samples are ordered of: one source, which is the stage itself, or several by share.

A source may be of a task of its own. Its prompts are that task's training prompts, but for texts that the
recipe's task holds out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from genac_megatron.critic.traces import unscored
from genac_megatron.recipe.schema import (
    Recipe,
    ReinforceStage,
    RolloutConfig,
    SftSource,
    SftStage,
    StageConfig,
    TeacherConfig,
)
from genac_megatron.recipe.source_rules import replayed
from genac_megatron.recipe.stages import ActorConfig, named_sources
from genac_megatron.recipe.tasks import TaskConfig, single_tasks
from genac_megatron.records import Sample
from genac_megatron.stages.rollouts import Asked
from genac_megatron.stages.room import Room, fit_part
from genac_megatron.stages.sft_pool import MAKING
from genac_megatron.tasks import Task, make_task
from genac_megatron.tasks.base import read_alike

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genac_megatron.stages.runtime import Run

WHOLE = (0.0, 1.0)  # the phase of a source that has none


@dataclass(frozen=True)
class Order:
    """Samples to be made: how many, of which task, by whom."""

    stage: str
    role: str
    name: str  # the source's; "": the stage has none
    task: Task
    kind: str  # of the task
    tag: str  # sets its prompts' ids apart from those of the recipe's task
    data: Literal["demonstrations", "traces"]
    size: int
    first: int  # training prompts of the task that sources before it may have
    teacher: TeacherConfig
    rollout: RolloutConfig
    length_buckets: int
    scored: bool
    seed: tuple[object, ...]
    actors: tuple[ActorConfig, ...] = ()  # whose states; (): the run's own actor's
    played_in: StageConfig | None = None  # the stage whose actors they are

    @property
    def label(self) -> str:
        """Its name in what people are told."""
        return f"{self.stage}, source {self.name}" if self.name else self.stage

    @property
    def where(self) -> str:
        """Its place, for messages."""
        return f"stage {self.label}"

    @property
    def file(self) -> str:
        """Its samples' name among the run's files while they are made; of each actor's one of its own."""
        told = "/".join(map(str, self.seed[1:]))
        return f"{MAKING}{self.stage}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"

    def marked(self, samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        """Its samples as the stage keeps them: named, and without the score's loss where it is not scored."""
        made = list(samples) if self.scored else [unscored(tokenizer, sample) for sample in samples]
        source = f"{self.tag}/" if self.tag else ""
        return [replace(one, part=self.name, source=f"{source}{one.source}", otherwise="") for one in made]


def orders(run: Run, stage: SftStage) -> Iterator[Order]:
    """The stage's orders, one by one: a source's samples are made before the next one's task is looked at."""
    plain = Order(
        stage=stage.name,
        role=stage.role,
        name="",
        task=run.task,
        kind=run.recipe.task.kind,
        tag="",
        data="demonstrations" if stage.data == "demonstrations" else "traces",
        size=stage.made,
        first=0,
        teacher=stage.teacher,
        rollout=stage.rollout,
        length_buckets=stage.length_buckets,
        scored=True,
        seed=(run.recipe.seed, stage.name),
        actors=tuple(stage.actors),
        played_in=stage,
    )
    if not stage.sources:
        yield plain
        return
    drawn: dict[str, int] = {}
    for (name, source), size in zip(named_sources(stage.sources), sizes(stage), strict=True):
        config = source.task or run.recipe.task
        task, key = task_of(run, config), config.model_dump_json()
        own = task is not run.task
        yield replace(
            plain,
            name=name,
            task=task,
            kind=config.kind,
            tag=f"task{place_of(run.recipe, config)}" if own else "",
            data=source.data or plain.data,
            size=size,
            first=drawn.get(key, 0),
            teacher=source.teacher or stage.teacher,
            rollout=source.rollout or stage.rollout,
            length_buckets=source.length_buckets or stage.length_buckets,
            scored=source.scored,
            seed=(*plain.seed, name),
        )
        # At least one prompt a sample: the next source of the task begins behind all that this one may draw.
        drawn[key] = drawn.get(key, 0) + 2 * size


def sizes(stage: SftStage) -> list[int]:
    """How many of the stage's samples each source gives, in order; they sum to all."""
    edges, total = [0], 0.0
    for source in stage.sources:
        total += source.share
        edges.append(round(total * stage.made))
    return [after - before for before, after in pairwise(edges)]


def order_prompts(run: Run, order: Order, places: range) -> tuple[list[int], Asked]:
    """(places, training prompts of an order's task there) for some places among those that it draws; texts
    that the recipe's task holds out are passed over, so they may be a few fewer.
    """
    held = frozenset[str]() if order.task is run.task else held_out_texts(run.task)
    found = []
    for place in places:
        index = order.task.train_index(run.recipe.seed, order.first + place)
        if not held or order.task._problem("train", index).key not in held:
            found.append((place, index))
    return [place for place, _ in found], Asked(order.task, [index for _, index in found])


def held_out_texts(task: Task) -> frozenset[str]:
    """The texts that a task holds out."""
    return frozenset(task._problem("heldout", index).key for index in range(task.heldout_size))


# --- tasks of their own --------------------------------------------------------------------------


def own_sources(
    recipe: Recipe, stages: Sequence[StageConfig] | None = None
) -> list[tuple[SftStage, SftSource, TaskConfig]]:
    """Of some stages, or all, the sources of another task than the recipe's."""
    found = []
    for stage in recipe.stages if stages is None else stages:
        if isinstance(stage, ReinforceStage) and stage.replay is not None:
            stage = replayed(stage)
        if isinstance(stage, SftStage):
            found += [
                (stage, source, source.task)
                for source in stage.sources
                if source.task is not None and source.task != recipe.task
            ]
    return found


def place_of(recipe: Recipe, config: TaskConfig) -> int:
    """Which of the tasks that the recipe's sources have it is, from 1, whatever a run has made of them."""
    known = dict.fromkeys(own.model_dump_json() for _, _, own in own_sources(recipe))
    return 1 + list(known).index(config.model_dump_json())


def task_of(run: Run, config: TaskConfig) -> Task:
    """The task of a source, made once; the recipe's own is the run's. Collective."""
    if config == run.recipe.task:
        return run.task
    key = config.model_dump_json()
    if key not in run.more_tasks:
        privileged, seed = run.recipe.judging.privileged, run.recipe.seed
        tokenizer = run.tokenizers["actor" if "actor" in run.tokenizers else next(iter(run.tokenizers))]
        tags = run.task.reasoning_tags
        run.more_tasks[key] = run.together(
            lambda: make_task(config, tokenizer, seed, privileged=privileged, reasoning_tags=tags)
        )
    read_alike(run.more_tasks[key], run.task)
    return run.more_tasks[key]


def fit_sources(run: Run, positions: Mapping[str, int], unmade: Sequence[StageConfig] | None = None) -> None:
    """Make the tasks of the sources of stages whose samples are not made yet (None: all), and hold their
    training prompts to what must fit, before time is spent. Collective. Raises InputError as `fit_task` does.

    Whether a row is left out goes by all stages that have the task: a resumed run draws the same prompts.
    """
    wanted = {config.model_dump_json() for _, _, config in own_sources(run.recipe, unmade)}
    for stage, source, config in own_sources(run.recipe):
        if config.model_dump_json() not in wanted:
            continue
        task = task_of(run, config)
        if (source.data or stage.data) != "traces":
            continue
        _tell_p_bar(run, stage, source, task)
        tokens = (source.rollout or stage.rollout).max_new_tokens
        room = Room(run.recipe, positions, run.tokenizers, tokens, tokens)
        where = f"stage {stage.name}, sources"
        for part, single in zip(task.parts, single_tasks(config), strict=True):
            fit_part(run, part, single, room, "train", where)
        task.resized()


def _tell_p_bar(run: Run, stage: SftStage, source: SftSource, task: Task) -> None:
    """Say what p_bar is taught to mean where it is not the success rate at the recipe's task."""
    if not source.scored or source.task is None or (source.teacher or stage.teacher).kind != "exact":
        return
    known = {type(part.teacher) for part in run.task.parts}
    if any(type(part.teacher) not in known for part in task.parts):
        run.progress.note(
            f"[{stage.name}] a source is of {source.task.kind}: its scores take the success rate that the "
            f"critic is told, which is the actor's at {run.recipe.task.kind}, for the one at its own task"
        )
