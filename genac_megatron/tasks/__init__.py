"""Tasks: prompts, verifiers, teachers. `make_task` is the way in."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from genac_megatron.tasks.base import Problem, Task, Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genac_megatron.recipe.tasks import BenchmarkTask, LockTask, PackageTask, PartTask, TaskConfig

__all__ = ["Problem", "Task", "Teacher", "make_task"]


def make_task(
    config: TaskConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    *,
    privileged: bool = False,
    reasoning_tags: tuple[str, str] | None = None,
) -> Task:
    """The task that a recipe's `task` block describes; `seed` fixes its problems and its split.

    `privileged`: its prompts carry what a privileged critic is shown. Without a tokenizer they have no ids.
    `reasoning_tags`: what opens and closes the actor's reasoning, where no known family writes so.

    Raises InputError where its data is missing or wrong, where it has no verifier, or where a reward of the
    user's own fails on its first samples.
    """
    # Here, so that processes that score or grade (workers.py) start without the schema.
    from genac_megatron.recipe.tasks import MixtureTask, OwnReward, PythonTask

    if isinstance(config, MixtureTask):
        from genac_megatron.tasks.mixture import make_mixture

        make = partial(
            make_task, tokenizer=tokenizer, seed=seed, privileged=privileged, reasoning_tags=reasoning_tags
        )
        mixture = make_mixture(config, make)
        mixture.reasoning_tags = reasoning_tags
        return mixture
    own = getattr(config, "verifier", None)
    if not isinstance(own, OwnReward):
        task = _make_task(config, tokenizer, seed, reasoning_tags)
        task.success, task.reveals = config.success or task.success, privileged
        task.reasoning_tags = reasoning_tags
        return task
    from genac_megatron.tasks.own_reward import OwnRewarded

    if not isinstance(config, PythonTask):  # whose references may be other than text
        # The task's own verifier is never asked: the one that needs nothing stands in.
        config = config.model_copy(update={"verifier": "exact"})
    inner = _make_task(config, tokenizer, seed, reasoning_tags)
    inner.success, inner.reveals = config.success or inner.success, privileged
    task = OwnRewarded(inner, own)
    task.reasoning_tags = reasoning_tags
    return task


def _make_task(
    config: PartTask | BenchmarkTask | LockTask | PackageTask,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    reasoning_tags: tuple[str, str] | None,
) -> Task:
    from genac_megatron.recipe.tasks import (
        BenchmarkTask,
        ChainedArithmeticTask,
        DatasetTask,
        JsonlTask,
        LockTask,
        PackageTask,
        PythonTask,
        RubricTask,
        StateTrackingTask,
    )

    # Imported here: each brings a library of its own that the other tasks do not need.
    if isinstance(config, StateTrackingTask):
        from genac_megatron.tasks.state_tracking import StateTracking

        return StateTracking(config, tokenizer, seed)
    if isinstance(config, ChainedArithmeticTask):
        from genac_megatron.tasks.chained_arithmetic import ChainedArithmetic

        return ChainedArithmetic(config, tokenizer, seed)
    if isinstance(config, LockTask):
        from genac_megatron.tasks.lock import LockTasks

        return LockTasks(config, tokenizer, seed)
    if isinstance(config, JsonlTask):
        from genac_megatron.tasks.jsonl import make_jsonl_task

        return make_jsonl_task(config, tokenizer, seed)
    if isinstance(config, DatasetTask):
        from genac_megatron.tasks.hf_datasets import make_dataset_task

        return make_dataset_task(config, tokenizer, seed)
    if isinstance(config, PythonTask):
        from genac_megatron.tasks.own_prompts import make_python_task

        return make_python_task(config, tokenizer, seed)
    if isinstance(config, BenchmarkTask):
        from genac_megatron.tasks.benchmarks import make_benchmark

        return make_benchmark(config.name, config.path, tokenizer, reasoning_tags)
    if isinstance(config, PackageTask):
        from genac_megatron.tasks.theirs.task import make_package_task

        return make_package_task(config, tokenizer, seed)
    if isinstance(config, RubricTask):
        from genac_megatron.tasks.rubric import make_rubric_task

        return make_rubric_task(config, tokenizer, seed)
    from genac_megatron.tasks.reasoning_gym import ReasoningGym

    return ReasoningGym(config, tokenizer, seed)
