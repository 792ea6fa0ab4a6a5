"""What a run begins with of its task, before models are built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from genac_megatron.critic.prompt import Template, load_template, need_privileged
from genac_megatron.observe.metrics import MetricsLog
from genac_megatron.observe.runinfo import DATA, write_json_atomic
from genac_megatron.recipe.schema import Recipe, RoleConfig
from genac_megatron.records import Prompt
from genac_megatron.tasks import Task, make_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PRIVILEGED_LOOK = 256  # held-out prompts among which each part of a mixture has one


def keep_told(log: MetricsLog | None, task: Task, told: Sequence[str]) -> None:
    """Keep what was told of the data for the report. By the rank that has the log."""
    if log is not None:
        sizes = f"{task.train_size:,} training and {task.heldout_size:,} held-out prompts"
        write_json_atomic(log.folder.path / DATA, {"told": [*told, sizes]})


def speaker_of(recipe: Recipe) -> RoleConfig:
    """The role that reads the task's prompts: the actor, else the first."""
    return recipe.roles.get("actor") or next(iter(recipe.roles.values()))


def begun_task(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The recipe's task. Raises InputError where it is wrong, or lacks what a privileged critic needs."""
    judging = recipe.judging
    tags = speaker_of(recipe).model.reasoning_tags
    task = make_task(recipe.task, tokenizer, recipe.seed, privileged=judging.privileged, reasoning_tags=tags)
    if judging.privileged:
        try:
            _need_privileged(load_template(judging.template, True), task)
        except BaseException:
            task.close()
            raise
    return task


def _need_privileged(template: Template, task: Task) -> None:
    """A held-out prompt stands for all, one of each part of a mixture; others are checked as they come."""
    first: dict[str, Prompt] = {}
    for index in range(min(task.heldout_size, PRIVILEGED_LOOK)):
        prompt = task.prompt("heldout", index)
        first.setdefault(prompt.source, prompt)
    for prompt in first.values():
        need_privileged(template, prompt)
