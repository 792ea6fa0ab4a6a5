"""What a dry run sees of the data: every row is read, as when a run begins, and counted. Without torch.

Whether rows have room in the models, and whether a chat template takes them, is seen when the run begins
(stages/room.py). A user's function is not run, and what lies under a name on a hub is not fetched.
"""

from __future__ import annotations

from pathlib import Path

from genac_megatron.recipe.schema import Recipe, SftStage
from genac_megatron.recipe.tasks import (
    BenchmarkTask,
    DatasetTask,
    JsonlTask,
    OwnReward,
    RubricTask,
    TaskConfig,
    single_tasks,
)
from genac_megatron.tasks.conversations import read_conversations


def look_at_data(recipe: Recipe) -> list[str]:
    """A line for each file or folder of rows that the recipe names. Raises InputError by file and line."""
    told = [line for task in single_tasks(recipe.task) for line in _task(task, recipe.seed)]
    for stage in recipe.stages:
        if isinstance(stage, SftStage) and stage.data == "jsonl" and stage.path is not None:
            count = len(read_conversations(Path(stage.path).expanduser()))
            told.append(f"stage {stage.name}: {count} conversations in {stage.path}")
    return told


def _task(config: TaskConfig, seed: int) -> list[str]:
    if isinstance(config, RubricTask):
        from genac_megatron.tasks.rubric import read_rubric_rows

        train, heldout = read_rubric_rows(config, seed)
        return [_counted(config.path, len(train), len(heldout))]
    if isinstance(config, DatasetTask | BenchmarkTask):
        name = config.name if isinstance(config, DatasetTask) else config.path or ""
        if not name or not Path(name).expanduser().exists():
            return [f"task: {config.name} is looked for when the run begins"]
    elif not isinstance(config, JsonlTask):
        return []
    else:
        name = config.path
    from genac_megatron.tasks import make_task

    if isinstance(getattr(config, "verifier", None), OwnReward):  # the rows are the same
        config = config.model_copy(update={"verifier": "exact"})
    task = make_task(config, None, seed)
    try:
        return [_counted(name, task.train_size, task.heldout_size), *(f"task: {note}" for note in task.notes)]
    finally:
        task.close()


def _counted(name: str, train: int, heldout: int) -> str:
    return f"task: {train} training and {heldout} held-out prompts in {name}"
