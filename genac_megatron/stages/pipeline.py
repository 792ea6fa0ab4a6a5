"""A run: its recipe's stages one after another, from the beginning or from the newest checkpoint."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from genac_megatron.errors import InputError
from genac_megatron.observe.manifest import read_manifest
from genac_megatron.observe.metrics import MetricsLog
from genac_megatron.observe.progress import Progress
from genac_megatron.observe.runinfo import RunFolder, write_text_atomic
from genac_megatron.recipe.loader import dump_recipe
from genac_megatron.recipe.schema import (
    PolicyStage,
    PpoStage,
    Recipe,
    ReinforceStage,
    SftStage,
    StageConfig,
    ValueStage,
)
from genac_megatron.stages.loop import Loop, check_resumable, restore_engines, restore_state
from genac_megatron.stages.policy import policy
from genac_megatron.stages.ppo import joint_ppo
from genac_megatron.stages.reinforce import reinforce
from genac_megatron.stages.runtime import Run
from genac_megatron.stages.sft import sft
from genac_megatron.stages.stopping import StopFlag
from genac_megatron.stages.value import value
from genac_megatron.training.agreement import agree, from_first
from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint
from genac_megatron.training.layout import World

logger = logging.getLogger(__name__)

Found = tuple[Path, dict[str, Any]]  # a checkpoint and its manifest


def run_recipe(recipe: Recipe, world: World, stop: StopFlag, *, resume: bool) -> None:
    """Run every stage that is left. The same call on every rank of the world."""
    folder = RunFolder(Path(recipe.runs) / recipe.name)
    checkpoints = Checkpoints(
        folder.checkpoints,
        recipe.checkpoint.keep,
        recipe.checkpoint.asynchronous,
        recipe.world.timeout_s,
    )
    # By rank 0 for all: another rank's view of a shared file system may be older.
    begun = from_first(lambda: where_to_begin(recipe, checkpoints, resume))
    first = world.rank == 0
    log = agree(lambda: begin_logs(recipe, folder, begun) if first else None)
    with Progress(first, name=recipe.name, stages=[s.name for s in recipe.stages]) as progress:
        run = Run(recipe, world, log, progress, stop, resuming=resume)
        try:
            _stages(run, checkpoints, begun)
        finally:
            run.close()
    if first:
        from genac_megatron.observe.report import (
            write_report,  # with matplotlib, a second of every rank's start
        )

        write_report(folder.path)


def where_to_begin(recipe: Recipe, checkpoints: Checkpoints, resume: bool) -> Found | None:
    """The newest complete checkpoint and its manifest to resume from, or None to begin at the beginning.

    Raises InputError where there is none, where it is of another recipe, or where a run that begins
    would write over an earlier one's.
    """
    found = checkpoints.survey()
    newest, passed = found.newest, found.told()
    if not resume:
        if newest is not None or found.refused:
            raise InputError(
                "\n  ".join(["the run folder holds checkpoints of an earlier run", *passed]),
                where=str(checkpoints.folder),
                way_out="go on with --resume, give the run another name=..., or remove the folder",
            )
        return None
    if newest is None:
        raise InputError(
            "\n  ".join(["there is no complete checkpoint to resume from", *passed]),
            where=str(checkpoints.folder),
            way_out="remove what is damaged and run without --resume to begin at the beginning",
        )
    manifest = read_manifest(newest)
    check_resumable(recipe, manifest["state"], str(newest))
    for line in passed:
        logger.warning("genac: warning: checkpoint %s; going on from %s", line, newest.name)
    for path in found.unfinished:
        shutil.rmtree(path, ignore_errors=True)  # of an attempt that is over
    return newest, manifest


def begin_logs(recipe: Recipe, folder: RunFolder, begun: Found | None) -> MetricsLog:
    """The run's logs, ending where training goes on."""
    position = None
    if begun is not None:
        stage, steps = begun[1]["state"]["position"]
        position = (stage, steps)
    log = MetricsLog(folder.path, recipe.observe, position, name=recipe.name, recipe=recipe.model_dump())
    write_text_atomic(folder.recipe, dump_recipe(recipe))
    return log


def _stages(run: Run, checkpoints: Checkpoints, begun: Found | None) -> None:
    resumed = None
    if begun is not None:
        resumed, manifest = begun
        load_checkpoint(resumed, run.roles)
        run.together(lambda: restore_state(run, manifest["state"]))
        restore_engines(run)
    for index in range(run.at.stage, len(run.recipe.stages)):
        stage = run.recipe.stages[index]
        loop = Loop(run, stage, checkpoints, resumed)
        _stage(run, stage, loop)
        loop.end(index)
        resumed = None
    checkpoints.wait()


def _stage(run: Run, stage: StageConfig, loop: Loop) -> None:
    match stage:
        case SftStage():
            sft(run, stage, loop)
        case ReinforceStage():
            reinforce(run, stage, loop)
        case PpoStage():
            joint_ppo(run, stage, loop)
        case ValueStage():
            value(run, stage, loop)
        case PolicyStage():
            policy(run, stage, loop)
