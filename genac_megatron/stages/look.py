"""What a dry run sees of the data: every row is read, as when a run begins, and counted. Without torch.

Where a role's tokenizer and its model's config.json are there, and transformers, rows are held to the model's
positions too, as stages/room.py does when the run begins. A user's function is not run, and what lies under a
name on a hub is not fetched.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from genac_megatron.models.registry import shape_of
from genac_megatron.recipe.judged import SuiteConfig
from genac_megatron.recipe.schema import Recipe, RoleConfig, SftStage
from genac_megatron.recipe.source_rules import source_tasks
from genac_megatron.recipe.tasks import (
    BenchmarkTask,
    DatasetTask,
    JsonlTask,
    OwnReward,
    PackageTask,
    RowsBlock,
    RubricTask,
    TaskConfig,
    single_tasks,
)
from genac_megatron.stages.room import fit_chats, fit_rows, listed, room_of
from genac_megatron.stages.sft_chats import used_conversations
from genac_megatron.tasks import make_task
from genac_megatron.tasks.base import FixedTask, Split
from genac_megatron.tasks.benchmarks import find_benchmark
from genac_megatron.tasks.suite import make_suite
from genac_megatron.tasks.tokenizer import role_tokenizer, tokenizer_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
TOKENIZER_FILES = ("tokenizer*", "vocab*")
SPLITS: tuple[Split, ...] = ("train", "heldout")


def look_at_data(recipe: Recipe) -> list[str]:
    """A line for each file or folder of rows that the recipe names, and for what was not looked at.

    Raises InputError by file and line.
    """
    look = _Look(recipe)
    for task in single_tasks(recipe.task):
        _task(task, look)
    for task in source_tasks(recipe):
        _task(task, look, fit=False)
    for suite in (*recipe.evaluation.suites, *recipe.evaluation.test):
        _suite(suite, look)
    for stage in recipe.stages:
        if isinstance(stage, SftStage) and stage.data == "jsonl" and stage.path is not None:
            count = used_conversations(stage)[1]
            look.note(f"stage {stage.name}: {count} conversations in {stage.path}")
            if stage.role in look.positions:
                _fit_chats(stage, look)
    return [*look.told, *look.unseen]


@dataclass
class _Look:
    """One process that looks at all rows, in the place of a run's ranks."""

    recipe: Recipe
    told: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)  # what was not looked at, where somebody asked

    rank, size = 0, 1

    @property
    def world(self) -> _Look:
        return self

    @property
    def progress(self) -> _Look:
        return self

    def note(self, text: str) -> None:
        self.told.append(text)

    def together(self, act: Callable[[], T]) -> T:
        return act()

    def gather(self, mine: Sequence[T]) -> list[T]:
        return list(mine)

    def share(self, items: Sequence[T]) -> list[T]:
        return list(items)

    @cached_property
    def tokenizers(self) -> Mapping[str, PreTrainedTokenizerBase]:
        """Of the roles whose folders are here; the others are named in `unseen`."""
        found = {}
        for name, role in self.recipe.roles.items():
            if missing := _missing(role):
                self.unseen.append(f"{name}: room for rows is looked at when the run begins: {missing}")
            else:
                found[name] = role_tokenizer(name, role.model)
        return found

    @cached_property
    def positions(self) -> Mapping[str, int]:
        return {
            name: shape_of(self.recipe.roles[name].model, len(tokenizer)).max_positions
            for name, tokenizer in self.tokenizers.items()
        }

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """That by which prompts are made."""
        speaker = "actor" if "actor" in self.recipe.roles else next(iter(self.recipe.roles), "")
        return self.tokenizers.get(speaker)


def _missing(role: RoleConfig) -> str:
    """What is not here of what counting its tokens takes."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed here"
    folder = tokenizer_folder(role.model.tokenizer or str(role.model.hf))
    return "" if any(map(any, map(folder.glob, TOKENIZER_FILES))) else f"there is no tokenizer in {folder}"


def _task(config: TaskConfig, look: _Look, *, fit: bool = True) -> None:
    """fit: the rows are held to the models too; those of an SFT stage's source are when the run begins."""
    if isinstance(config, DatasetTask | BenchmarkTask):
        name = config.source if isinstance(config, DatasetTask) else config.path or ""
        if not name or not Path(name).expanduser().exists():
            look.note(f"task: {config.name} is looked for when the run begins")
            return
    elif isinstance(config, PackageTask):
        look.note(f"task: {config.id} of {config.kind} is loaded when the run begins")
        return
    elif isinstance(config, JsonlTask | RubricTask):
        name = config.path
    else:
        return
    if isinstance(getattr(config, "verifier", None), OwnReward):  # the rows are the same
        config = config.model_copy(update={"verifier": "exact"})
    if isinstance(config, RubricTask):  # no judge is asked
        judge = config.judge.model_copy(update={"api_key_env": None})
        config = config.model_copy(update={"judge": judge})
    if isinstance(config, DatasetTask | JsonlTask):
        config = _with_local_benchmarks(config, look)
    privileged = look.recipe.judging.privileged
    task = make_task(config, look.tokenizer, look.recipe.seed, privileged=privileged)
    try:
        look.note(f"task: {task.train_size} training and {task.heldout_size} held-out prompts in {name}")
        look.told += [f"task: {note}" for note in task.notes]
        if fit and task.fixed is not None and isinstance(config, RowsBlock) and look.tokenizer is not None:
            _fit(task.fixed, config, look)
    finally:
        task.close()


def _suite(config: SuiteConfig, look: _Look) -> None:
    """A suite whose questions are here, or made here, is read and counted."""
    source = config.path
    if config.task is not None:
        source = config.task.source if isinstance(config.task, DatasetTask) else config.task.path
    made = config.task is None and find_benchmark(config.name).suite
    if not made and (source is None or not Path(source).expanduser().exists()):
        look.note(f"suite {config.name}: {source or 'its data set'} is looked for when the run begins")
        return
    if config.task is not None and isinstance(config.task.verifier, OwnReward):  # the rows are the same
        rows = config.task.model_copy(update={"verifier": "exact"})
        config = config.model_copy(update={"task": rows})
    suite = make_suite(config, None, None)
    look.note(f"suite {suite.name}: {len(suite.prompts):,} questions x {suite.samples} samples")
    suite.task.close()


def _with_local_benchmarks(config: DatasetTask | JsonlTask, look: _Look) -> DatasetTask | JsonlTask:
    """The task, to be held to the benchmarks that lie here; others are named."""
    clean = config.decontaminate
    if clean is None:
        return config
    here = [source for source in clean.against if source.path is not None]
    if missing := [source.name for source in clean.against if source.path is None]:
        look.note(f"task: questions of {', '.join(missing)} are looked for in it when the run begins")
    left = clean.model_copy(update={"against": here}) if here else None
    return config.model_copy(update={"decontaminate": left})


def _fit(task: FixedTask, config: RowsBlock, look: _Look) -> None:
    """Hold the rows to the models that are here, and say how it went."""
    before = len(look.told)
    for split in SPLITS:
        room = room_of(look.recipe, look.positions, look.tokenizers, split)
        fit_rows(look, task, config, room, split)
    if len(look.told) == before:
        read = " and ".join(name for name in ("actor", "critic") if name in look.positions)
        look.note(f"task: all of them have room in the model of {read}, with the longest response")


def _fit_chats(stage: SftStage, look: _Look) -> None:
    """Hold a stage's conversations to its model, and say how many are left out."""
    long = fit_chats(look, look.positions, [stage])
    if long:
        count = len(used_conversations(stage)[0])
        look.note(
            f"stage {stage.name}: {len(long)} of {count} conversations have no room in {stage.role}'s model "
            f"and are left out: {listed(long)}"
        )
