"""Whether every row of the data has room in the models, looked at before anything is built or generated.

A prompt needs room for the longest response too; a critic's prompt holds a response and needs room for a
judgement behind it. Rows are looked at by all ranks, each its share, and by a dry run (stages/look.py).
"""

from __future__ import annotations

import heapq
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from genac_megatron.critic.icc import IccState
from genac_megatron.critic.prompt import build_prompt_ids
from genac_megatron.errors import InputError, on_all_ranks
from genac_megatron.recipe.algorithms import Dapo
from genac_megatron.recipe.schema import Recipe, ReinforceStage, SftStage, StageConfig
from genac_megatron.recipe.source_rules import replayed
from genac_megatron.recipe.stages import sources_of
from genac_megatron.recipe.tasks import RowsBlock, TaskConfig, single_tasks
from genac_megatron.records import Prompt
from genac_megatron.stages.sft_chats import chat_samples, used_conversations
from genac_megatron.tasks.base import FixedTask, Split, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genac_megatron.stages.runtime import Run

T = TypeVar("T")
SHOWN = 3  # rows that a message names
SPARE = 2.0  # states made per trace wanted: short responses and balancing take some
ROUNDS = 4  # in which a source's states are drawn until there are enough
ALL_STEPS = 1_000_000  # critics are told the step: its longest way of being written
LOOK_S = 20.0  # seconds that a rank looks at what a generator makes
LONGEST = 16  # problems of a generator, the longest by their text, whose tokens are counted
DROP = "leave them out (task.overlong: drop)"
WAY_OUT = (
    "lower rollout.max_new_tokens or judging.max_new_tokens, or use a model with more positions "
    "(max_positions)"
)


class _Placed(Protocol):
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...


class _Noted(Protocol):
    def note(self, text: str) -> None: ...


class Looker(Protocol):
    """What these checks use of a run (stages/runtime.py: Run), which a dry run has too."""

    recipe: Recipe

    @property
    def tokenizers(self) -> Mapping[str, PreTrainedTokenizerBase]: ...
    @property
    def world(self) -> _Placed: ...
    @property
    def progress(self) -> _Noted: ...
    def together(self, act: Callable[[], T]) -> T: ...
    def gather(self, mine: Sequence[T]) -> list[T]: ...
    def share(self, items: Sequence[T]) -> list[T]: ...


@dataclass(frozen=True)
class Room:
    """What prompts of one split must leave room for, in the models that read them."""

    recipe: Recipe
    positions: Mapping[str, int]  # of each role's model
    tokenizers: Mapping[str, PreTrainedTokenizerBase]
    played: int  # tokens of the longest response
    judged: int  # of the longest that the critic reads
    whole: bool = False  # it reads whole responses too

    def lacks(self, prompt: Prompt) -> str:
        """What has no room of this prompt; "" where everything has."""
        needs = {"actor": (len(prompt.ids), self.played)} if self.played else {}
        if self.judged and "critic" in self.positions:
            needs["critic"] = self._critic(prompt)
        for role, (read, new) in needs.items():
            most = self.positions.get(role)
            if most is not None and read + new > most:
                return f"the {role} reads {read} tokens and may write {new}, in {most} positions"
        return ""

    def _critic(self, prompt: Prompt) -> tuple[int, int]:
        """(tokens that the critic reads at most, tokens that it may write)."""
        if self.recipe.roles["critic"].model.head != "lm":
            return len(prompt.ids) + self.judged, 0
        judging = self.recipe.judging
        ids = build_prompt_ids(
            self.tokenizers["critic"],
            judging,
            IccState(1.0, step=ALL_STEPS),
            prompt,
            "",
            self.judged,
            self.judged,
        )
        # The last state may lie a token before the end. Another tokenizer may cut the response otherwise.
        response = max(self.judged - 1, 0) if judging.states.max_states > 1 else 0
        if self.whole:
            response = self.judged
        return len(ids) + response, judging.max_new_tokens


def room_of(
    recipe: Recipe,
    positions: Mapping[str, int],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    split: Split,
) -> Room:
    """What prompts of a split of the recipe's task must fit into."""
    whole = split == "train" and recipe.judging.states.final  # evaluations ask about states alone
    return Room(recipe, positions, tokenizers, *longest(recipe, split), whole=whole)


def longest(recipe: Recipe, split: Split) -> tuple[int, int]:
    """(tokens of the longest response to prompts of a split, of the longest that the critic reads)."""
    played = [s.rollout.max_new_tokens for s in recipe.stages if _plays(s, split)]
    judged = [s.rollout.max_new_tokens for s in recipe.stages if _judges(s, split)]
    if split == "train":
        for _, source in (one for stage in recipe.stages for one in sources_of(stage)):
            if source.rollout is not None and source.task in (None, recipe.task):
                played.append(source.rollout.max_new_tokens)
                judged.append(source.rollout.max_new_tokens)
    return max(played, default=0), max(judged, default=0)


def drawn(recipe: Recipe) -> int:
    """Training prompts that the run's stages draw at most, from the first of the task's order on."""
    made, played = [0], 0
    for stage in recipe.stages:
        for sft in _sft_of(stage):
            made.append(math.ceil(SPARE * sft.made * _draws(sft)) if sft.data != "jsonl" else 0)
        if not isinstance(stage, SftStage):
            played += stage.steps * stage.rollout.prompts * _rounds(stage)
    return max(played, *made)


def _sft_of(stage: StageConfig) -> list[SftStage]:
    """The stage itself, or its replay, where samples are made for it."""
    if isinstance(stage, ReinforceStage) and stage.replay is not None:
        return [replayed(stage)]
    return [stage] if isinstance(stage, SftStage) else []


def _draws(stage: SftStage) -> int:
    """How often an SFT stage draws states at most."""
    teachers = [stage.teacher, *(one.teacher for one in stage.sources if one.teacher is not None)]
    asked = [teacher.rounds for teacher in teachers if teacher.kind == "self"]
    return max([1, *asked, *([ROUNDS] if stage.sources else [])])


def _rounds(stage: StageConfig) -> int:
    """How often a step of the stage draws its prompts at most."""
    algorithm = getattr(stage, "algorithm", None)
    return algorithm.rounds if isinstance(algorithm, Dapo) else 1


def _plays(stage: StageConfig, split: Split) -> bool:
    if isinstance(stage, SftStage):
        return stage.data == "traces" or (split == "heldout" and stage.role in ("actor", "critic"))
    return True


def _judges(stage: StageConfig, split: Split) -> bool:
    if isinstance(stage, SftStage):
        return stage.data == "traces" or (split == "heldout" and stage.role == "critic")
    return True


def fit_task(run: Run, positions: Mapping[str, int], splits: Sequence[Split]) -> None:
    """Hold every row of a task with fixed rows to what it must fit into, by `task.overlong`. Collective.

    Raises InputError that names rows, and where a row's messages are refused by the chat template.
    """
    first = room_of(run.recipe, positions, run.tokenizers, "heldout")
    # Whatever the task: a chat template that refuses every prompt is told before anything is built.
    run.together(lambda: first.lacks(run.task.prompt("heldout", 0)) if run.task.heldout_size else "")
    for part, config in zip(run.task.parts, single_tasks(run.recipe.task), strict=True):
        for note in part.fixed.notes if part.fixed is not None else ():
            run.progress.note(f"task: {note}")
        for split in splits:
            room = room_of(run.recipe, positions, run.tokenizers, split)
            fit_part(run, part, config, room, split)
    run.task.resized()


def fit_part(run: Run, part: Task, config: TaskConfig, room: Room, split: Split, where: str = "task") -> None:
    """Hold a split of one task to what it must fit into. Collective. As `fit_task`."""
    fixed = part.fixed
    if fixed is not None and isinstance(config, RowsBlock):
        fit_rows(run, fixed, config, room, split, where)
    elif fixed is None:
        # A state that has no room in the critic takes the value before it; a prompt ends the run.
        _fit_drawn(run, part, replace(room, judged=0), split, where)


def _fit_drawn(run: Run, task: Task, room: Room, split: Split, where: str) -> None:
    """Hold what a generator makes to what it must fit into, in the order in which it is drawn: all of it, or
    as much of a run's one task as the stages draw.
    """
    size = task.train_size if split == "train" else task.heldout_size
    if split == "train" and task is run.task:
        size = min(size, drawn(run.recipe))
    places = range(run.world.rank, size, run.world.size)
    mine: Iterable[int] = places
    if split == "train":
        mine = (task.train_index(run.recipe.seed, place) for place in places)
    found = run.gather(run.together(partial(_lacking_drawn, task, room, split, mine)))
    if found:
        what = f"{split} prompts of the task have no room: {listed(sorted(found, key=_place))}"
        way_out = f"make the task's problems smaller; or {WAY_OUT}"
        raise on_all_ranks(InputError(what, where=where, way_out=way_out))


def _lacking_drawn(task: Task, room: Room, split: Split, indices: Iterable[int]) -> list[str]:
    """What the longest problems of a generator lack, of those that it makes in LOOK_S."""
    begun, kept = time.monotonic(), list[tuple[int, int]]()
    for index in indices:
        entry = len(task._problem(split, index).text), index
        if len(kept) < LONGEST:
            heapq.heappush(kept, entry)
        else:
            heapq.heappushpop(kept, entry)
        if time.monotonic() - begun > LOOK_S:
            break
    prompts = [task.prompt(split, index) for _, index in kept]
    return [f"{prompt.id}: {what}" for prompt in prompts if (what := room.lacks(prompt))]


def fit_rows(
    run: Looker, task: FixedTask, config: RowsBlock, room: Room, split: Split, where: str = "task"
) -> None:
    """Hold a split's rows to what they must fit into, by `config.overlong`. Collective. As `fit_task`."""
    size = task.train_size if split == "train" else task.heldout_size
    found = dict(sorted(run.gather(run.together(partial(_lacking, run, task, room, split, size)))))
    if not found:
        return
    shown = listed(sorted(found.values(), key=_place))
    what = f"{len(found)} of {size} {split} prompts have no room: {shown}"
    if config.overlong == "error" or len(found) == size:
        way_out = WAY_OUT if len(found) == size else f"{DROP}, or {WAY_OUT}"
        raise on_all_ranks(InputError(what, where=where, way_out=way_out))
    task.leave_out(split, found)
    run.progress.note(f"{where}: {what}; they are left out (task.overlong: drop)")


def _place(line: str) -> list[str | int]:
    """Sorts lines as people read them: file:9 before file:10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", line)]


def _lacking(run: Looker, task: FixedTask, room: Room, split: Split, size: int) -> list[tuple[int, str]]:
    """(index, what it lacks) of this rank's share of a split's rows."""
    found = []
    for index in range(run.world.rank, size, run.world.size):
        prompt = task.prompt(split, index)
        if what := room.lacks(prompt):
            found.append((index, f"{prompt.where or prompt.id}: {what}"))
    return found


def fit_chats(run: Looker, positions: Mapping[str, int], stages: Sequence[StageConfig]) -> list[str]:
    """Read the files of SFT stages, and hold their conversations to their model. Collective.

    Returns a line for each that has no room and may be left out. Raises InputError that names the file and
    line of what the chat template refuses, and, where the stage's `overlong` is error, of what is too long.
    """
    long = []
    for stage in stages:
        if isinstance(stage, SftStage) and stage.data == "jsonl":
            found = run.gather(run.together(partial(_long_chats, run, stage, positions)))
            check_chats(stage, sorted(found, key=_place))
            long += sorted(found, key=_place)
    return long


def _long_chats(run: Looker, stage: SftStage, positions: Mapping[str, int]) -> list[str]:
    tokenizer, most = run.tokenizers[stage.role], positions[stage.role]
    found = []
    for chat in run.share(used_conversations(stage)[0]):
        length = max((len(sample.tokens) for sample in chat_samples(tokenizer, chat, stage)), default=0)
        if length > most:
            found.append(f"{chat.where}: {length} tokens, in {most} positions")
    return found


def check_chats(stage: SftStage, long: Sequence[str]) -> None:
    """Raise InputError for conversations that are too long, where the stage's rule says so."""
    if long and stage.overlong == "error":
        error = InputError(
            f"{len(long)} conversations have no room in {stage.role}'s model: {listed(long)}",
            where=f"stage {stage.name}",
            way_out="leave them out (the stage's overlong: drop), shorten them, or use a model with more "
            "positions (max_positions)",
        )
        raise on_all_ranks(error)


def listed(lines: Sequence[str]) -> str:
    """The first lines, and how many more there are."""
    more = len(lines) - SHOWN
    return "".join(f"\n  {line}" for line in lines[:SHOWN]) + (f"\n  and {more} more" if more > 0 else "")
