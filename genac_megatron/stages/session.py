"""A run that trains nothing, for a command that may work beside one that does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from genac_megatron.observe.lock import SILENT_S, FolderLock
from genac_megatron.observe.progress import Progress
from genac_megatron.recipe.schema import Recipe
from genac_megatron.stages.runtime import Run
from genac_megatron.stages.stopping import StopFlag
from genac_megatron.training.agreement import from_first
from genac_megatron.training.layout import World


@contextmanager
def session(
    recipe: Recipe, world: World, stop: StopFlag, name: str, folder: Path, *, trains: bool = False
) -> Iterator[Run]:
    """The run, whose heartbeats, logs and servers' files are in `folder`. Collective.

    trains: it plays training prompts, which are held to the models too.

    Rank 0 holds the folder meanwhile. Raises InputError where the same command is under way.
    """
    asked = recipe.evaluation.model_copy(update={"suites": [], "test": []})
    recipe = recipe.model_copy(update={"evaluation": asked})
    silent_s = min(SILENT_S, recipe.world.timeout_s / 2)
    lock = FolderLock(folder, "the same command", silent_s=silent_s)
    from_first(lock.acquire)
    try:
        with Progress(world.rank == 0, name=recipe.name, stages=[name]) as progress:
            run = Run(recipe, world, None, progress, stop, trains=trains, unmade=[], folder=folder)
            try:
                yield run
            finally:
                run.close()
    finally:
        lock.release()
